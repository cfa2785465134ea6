#!/usr/bin/env bash
# Creates an environment that serves checkpoints with SGLang: install.sh cpu|cuda DIRECTORY
#
# The Containerfiles and `make test-sglang` run it.  Finally SGLang's own parser reads the command of a random draft.
set -euo pipefail

sglang=0.5.23
torchvision=0.28.0
setuptools=84.2.1

usage() {
  echo "error: usage: $0 cpu|cuda DIRECTORY, which is created; PYTHON3 names another python3" >&2
  exit 2
}

pip_install() {
  "$python" -m pip install --quiet --disable-pip-version-check "$@"
}

# Without its dependencies: dozens of them are GPU packages, see requirements-sglang.txt.
install_cpu() {
  pip_install --requirement "$root/requirements-sglang.txt"
  pip_install --no-deps "torchvision==$torchvision" "sglang==$sglang"
}

# SGLang pins its own torch, transformers and kernels.
install_cuda() {
  pip_install "setuptools==$setuptools" "sglang==$sglang"
}

check() {
  local scratch
  scratch=$(mktemp -d)
  "$python" "$root/containers/random_draft.py" "$scratch/draft"
  "$python" -m nemo_speculative.serve_sglang --draft "$scratch/draft" --device "$device" --dry-run
  rm -r "$scratch"
}

[[ $# -eq 2 && $1 =~ ^(cpu|cuda)$ ]] || usage
device=$1
python=$2/bin/python
root=$(cd "$(dirname "$0")/.." && pwd)

"${PYTHON3:-python3}" -m venv "$2"
"install_$device"
pip_install --no-deps --no-build-isolation --editable "$root"
check
