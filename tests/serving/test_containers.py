"""The container recipes: linted, and their one script step by step, with a stand-in for python."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_speculative.serve_sglang import main
from nemo_speculative.serving.versions import NEWEST

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "containers"
RECIPES = sorted(CONTAINERS.glob("Containerfile.*"))
SCRIPT = CONTAINERS / "install.sh"
FAKE_PYTHON = """#!/bin/sh
printf '%s\\n' "$*" >> "$CALLS"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python";;
  *$FAILS*) exit 9;;
esac
"""


def linter(name: str) -> str:
    """Path of a program of this Python environment; skips the test where it is not installed."""
    program = Path(sys.executable).with_name(name)
    if not program.is_file():
        pytest.skip(f"{name} is not installed here; see requirements.txt")
    return str(program)


def instructions(recipe: Path) -> list[tuple[str, str]]:
    """Name and arguments of each."""
    lines = [line for line in recipe.read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


@pytest.fixture
def install(tmp_path):
    """Runs the script with a python that only writes down what it is asked for."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def run(*arguments: str, fails: str = "nothing") -> tuple[subprocess.CompletedProcess, list[str]]:
        environment = {**os.environ, "PYTHON3": str(python), "CALLS": str(calls), "FAILS": fails}
        done = subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, cwd=tmp_path)
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_both_are_here():
    assert [recipe.name for recipe in RECIPES] == ["Containerfile.cpu", "Containerfile.cuda"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_linter_finds_nothing(recipe):
    done = subprocess.run([linter("hadolint"), recipe], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_shell_linter_finds_nothing():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    done = subprocess.run([linter("shellcheck"), SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_runs_the_script_on_what_it_copied(recipe):
    steps = instructions(recipe)
    copied = [source for name, rest in steps if name == "COPY" for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    # The script, what it reads, and what pyproject.toml names.
    needed = {"containers/install.sh", "containers/random_draft.py", "nemo_speculative", "conf", "recipes",
              "pyproject.toml", "setup.py", "requirements-sglang.txt", "README.md", "LICENSE"}  # fmt: skip
    assert set(copied) == needed
    kind = recipe.suffix.removeprefix(".")
    assert any(name == "RUN" and rest.startswith(f"containers/install.sh {kind} /opt/sglang") for name, rest in steps)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_starts_the_program_without_root_rights(recipe, capsys):
    steps = dict(instructions(recipe))
    python, dash_m, module, *arguments = json.loads(steps["ENTRYPOINT"])
    assert (python, dash_m) == ("/opt/sglang/bin/python", "-m") and importlib.util.find_spec(module)
    assert int(steps["USER"]) > 0
    with pytest.raises(SystemExit):
        main([*arguments, *json.loads(steps["CMD"])])
    # The address is chosen by the user, not by the recipe.
    assert "--host" not in arguments and "127.0.0.1" in capsys.readouterr().out


def test_the_pins_are_those_of_the_newest_version():
    assert f"\nsglang={NEWEST}\n" in SCRIPT.read_text()


@pytest.mark.parametrize(
    ("kind", "packages"),
    [
        ("cpu", [f"--requirement {ROOT}/requirements-sglang.txt",
                 f"--no-deps torchvision==0.28.0 sglang=={NEWEST}"]),
        ("cuda", [f"setuptools==84.2.1 sglang=={NEWEST}"]),
    ],
)  # fmt: skip
def test_the_steps(install, tmp_path, kind, packages):
    done, calls = install(kind, "my environment")
    assert (done.returncode, done.stderr) == (0, "")
    pip = "-m pip install --quiet --disable-pip-version-check"
    assert calls[0] == "-m venv my environment"
    assert calls[1:-2] == [
        f"{pip} {options}" for options in [*packages, f"--no-deps --no-build-isolation --editable {ROOT}"]
    ]
    assert calls[-2].startswith(f"{CONTAINERS}/random_draft.py ")
    draft = calls[-2].split()[-1]
    assert calls[-1] == f"-m nemo_speculative.serve_sglang --draft {draft} --device {kind} --dry-run"
    assert not Path(draft).parent.exists()


def test_a_step_that_fails_is_the_last(install):
    done, calls = install("cpu", "environment", fails="sglang==")
    assert done.returncode == 9
    assert "sglang==" in calls[-1]


@pytest.mark.parametrize("arguments", [(), ("cpu",), ("rocm", "environment"), ("cpu", "environment", "more")])
def test_a_wrong_command_line_is_one_line(install, arguments):
    done, calls = install(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n"), calls) == (2, "", 1, [])
    assert "cpu|cuda DIRECTORY" in done.stderr


def test_the_random_draft_is_one_that_is_served(tmp_path, capsys):
    subprocess.run([sys.executable, CONTAINERS / "random_draft.py", tmp_path / "draft"], check=True, cwd=ROOT)
    assert main(["--draft", str(tmp_path / "draft"), "--print-only"]) == 0
    assert "--speculative-algorithm EAGLE3" in capsys.readouterr().out
