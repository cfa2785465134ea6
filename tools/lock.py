"""Writes the locks after a change of requirements.txt: ``make lock``.

requirements.lock has the releases of requirements.txt except torch, each with the sha256 sums of all its files, for
every Python and platform.  It is installed together with requirements-cuda.lock (torch from the package index and its
dependencies) or requirements-cpu.lock (a build of torch without CUDA, from another source).  ``python -m tools.lock
WHEEL…`` adds files of such a build; those in the lock stay until the release changes.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from packaging.utils import canonicalize_name, parse_wheel_filename

from tools.requirements import AuditError, Pin, built_elsewhere, parse_pins, read_pins, run_module

ROOT = Path(__file__).parents[1]
REQUIREMENTS, LOCK = "requirements.txt", "requirements.lock"
CUDA_LOCK, CPU_LOCK = "requirements-cuda.lock", "requirements-cpu.lock"
BUILT = "torch"
"""The package whose builds have different dependencies."""
PLATFORM, PYTHON = "x86_64-manylinux_2_28", "3.11"
"""Platform and Python whose dependencies are resolved; the hashes cover all files."""
CACHE = Path(sys.prefix) / "cache"
"""Cache inside the environment, so that no files remain in the user's home."""
HEAD = """\
# {what}, each release with the sha256 sums of its files.
# Made by `make lock` from requirements.txt; checked by `make audit`.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.lock", description="Writes the locks from requirements.txt.")
    parser.add_argument("wheels", nargs="*", type=Path, help="builds of torch without CUDA to add to the lock")
    wheels = parser.parse_args(arguments).wheels
    try:
        write(ROOT, published(ROOT / REQUIREMENTS), wheels)
    except AuditError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def published(requirements: Path, constraint: Path | None = None) -> dict[str, Pin]:
    """Pins of ``requirements`` and all their dependencies with the package index's hashes, without downloading them.

    Args:
        constraint: pins of the dependencies; None: the newest.

    Raises:
        AuditError: the index cannot be asked, or lacks a release.
    """
    command = ["pip", "compile", "--quiet", "--generate-hashes", "--no-header", "--no-annotate"]
    command += ["--cache-dir", str(CACHE)]
    command += ["--constraint", str(constraint)] if constraint else []
    done = run_module("uv", *command, "--python-platform", PLATFORM, "--python-version", PYTHON, str(requirements))
    if done.returncode:
        message = " ".join(done.stderr.split())[:300] or f"exit status {done.returncode}"
        raise AuditError(f"the package index could not be asked for {requirements.name}: {message}")
    return parse_pins(done.stdout, "the package index")


def write(root: Path, index: Mapping[str, Pin], wheels: Iterable[Path]) -> None:
    """Writes the locks of ``root`` from the index's pins and from ``wheels`` of another build."""
    pins = read_pins(root / REQUIREMENTS)
    built = pins[BUILT]
    builds = _kept(root / CPU_LOCK, built) | dict(_of_wheel(wheel, built) for wheel in wheels)
    (root / LOCK).write_text(
        HEAD.format(what="The releases of requirements.txt except torch")
        + _entries(index[name] for name in sorted(pins.keys() - {BUILT}))
    )
    (root / CUDA_LOCK).write_text(
        HEAD.format(what="torch with CUDA, and its dependencies that requirements.lock lacks")
        + _entries(index[name] for name in sorted(index.keys() - pins.keys() | {BUILT}))
    )
    (root / CPU_LOCK).write_text(
        HEAD.format(what="torch without CUDA, to install with requirements.lock")
        + "".join(f"# {wheel} sha256:{sha256}\n" for sha256, wheel in sorted(builds.items()))
        + _entries([Pin(built.name, built.version, frozenset(builds))])
    )


def _kept(lock: Path, built: Pin) -> dict[str, str]:
    if not lock.exists():
        return {}
    return {sha256: wheel for sha256, wheel in built_elsewhere(lock).items() if _is_of(wheel, built)}


def _of_wheel(wheel: Path, built: Pin) -> tuple[str, str]:
    if not _is_of(wheel.name, built):
        raise AuditError(f"{wheel}: not a wheel of {built} as {REQUIREMENTS} has it")
    return hashlib.sha256(wheel.read_bytes()).hexdigest(), wheel.name


def _is_of(wheel: str, built: Pin) -> bool:
    name, version, *_ = parse_wheel_filename(wheel)
    return canonicalize_name(name) == built.name and version.public == built.version


def _entries(pins: Iterable[Pin]) -> str:
    return "".join(" \\\n    --hash=sha256:".join([str(pin), *sorted(pin.hashes)]) + "\n" for pin in pins)


if __name__ == "__main__":
    sys.exit(main())
