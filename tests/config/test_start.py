"""The start of every recipe: --help and --cfg job print at once, without torch and transformers."""

import runpy
import subprocess
import sys

import pytest

from nemo_speculative.config.groups import CONF

RECIPES = sorted((CONF.parent / "recipes").glob("*.py"))
PROGRAM = """
import resource, runpy, sys
sys.argv = [sys.argv[1], *sys.argv[2].split()]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(used.ru_utime + used.ru_stime, [m for m in ("torch", "transformers") if m in sys.modules], file=sys.stderr)
"""
CPU_SECONDS = 2.0


@pytest.mark.parametrize("flags", ["--help", "--cfg job"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_help_and_configuration_import_neither_torch_nor_transformers(recipe, flags, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(recipe), flags]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=120)
    seconds, modules = result.stderr.split(" ", 1)
    assert modules.strip() == "[]"
    assert float(seconds) < CPU_SECONDS
    assert ("Groups " if flags == "--help" else "_target_" if "merge" not in recipe.stem else "output") in result.stdout
    assert not list(tmp_path.iterdir())


def test_help_lists_commands_groups_and_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipes/train_eagle1.py", "--help"])
    runpy.run_path(str(CONF.parent / "recipes" / "train_eagle1.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert text.startswith("Train an EAGLE-1 draft") and "python recipes/train_eagle1.py" in text
    assert "eagle1*, eagle2, eagle3" in text and "tiny*" in text and "hf*, hf_fsdp2" in text
    assert "--cfg job" in text and "hydra/" not in text
