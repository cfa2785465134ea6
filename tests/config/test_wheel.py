"""The wheel holds conf/ and the recipes, and its command runs them as the scripts do."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nemo_speculative.config.groups import CONF

ROOT = CONF.parent
BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "nemo_speculative", "conf", "recipes")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The directory of the unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        source, copy = ROOT / name, folder / "source" / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__")) if source.is_dir() else shutil.copy(
            source, copy
        )
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(folder / "source")], check=True, timeout=200)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder / "site")
    return folder / "site"


def run(*command: str, site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment, timeout=100
    )


def test_the_wheel_holds_the_configuration_the_recipes_and_the_command(installed):
    for folder in ("conf", "recipes"):
        files = {file.relative_to(ROOT) for kind in ("*.yaml", "*.py") for file in (ROOT / folder).rglob(kind)}
        installed_files = {
            file.relative_to(installed / "nemo_speculative") for file in installed.rglob(f"{folder}/**/*.*")
        }
        assert files <= installed_files
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "nemo-speculative = nemo_speculative.__main__:main" in entry_points.read_text()
    assert (installed / "nemo_speculative" / "inspect_data" / "report.html").is_file()
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"nemo_speculative"}


@pytest.mark.parametrize("name", ["train_eagle3", "train-eagle3"])
def test_a_subcommand_is_the_recipe(name, installed, tmp_path):
    arguments = ("--cfg", "job", "model=local", "model.path=DIR")
    command = run("-m", "nemo_speculative", name, *arguments, site=installed, cwd=tmp_path)
    script = run(str(ROOT / "recipes" / "train_eagle3.py"), *arguments, site=ROOT, cwd=tmp_path)
    assert command.returncode == script.returncode == 0, command.stderr + script.stderr
    assert command.stdout == script.stdout and "ttt_steps" in command.stdout
    assert not list(tmp_path.iterdir())


def test_the_command_lists_its_subcommands_and_refuses_others(installed, tmp_path):
    listed = run("-m", "nemo_speculative", "--help", site=installed, cwd=tmp_path)
    assert listed.returncode == 0
    for recipe in (ROOT / "recipes").glob("*.py"):
        assert f"  {recipe.stem.replace('_', '-')} " in listed.stdout
    refused = run("-m", "nemo_speculative", "train", site=installed, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.endswith("error: train: no such subcommand\n")
