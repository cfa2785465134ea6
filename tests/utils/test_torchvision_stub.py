"""A torchvision whose operators a CPU-only torch cannot register."""

import importlib
import importlib.metadata
import subprocess
import sys

import pytest

from nemo_speculative.utils import torchvision_stub

MISMATCH = {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}


@pytest.fixture
def versions(monkeypatch):
    """Installed versions, which a test may change."""
    installed = dict(MISMATCH)

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return installed


@pytest.mark.parametrize(
    ("installed", "fails"),
    [
        (MISMATCH, True),
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}, False),
        ({"torch": "2.13.0+cu130", "torchvision": "0.28.0"}, False),
        ({"torch": "2.13.0+cpu"}, False),
    ],
)
def test_registration_fails_only_for_another_build_of_torchvision(versions, installed, fails):
    versions.clear()
    versions.update(installed)
    assert torchvision_stub.registration_fails() == fails


def test_the_failing_registration_is_replaced_by_an_empty_module(versions, tmp_path, monkeypatch):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from torchvision import _meta_registrations\n")
    (package / "_meta_registrations.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert any(isinstance(finder, torchvision_stub._EmptyModuleFinder) for finder in sys.meta_path)
    importlib.import_module("torchvision")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    versions["torchvision"] = "0.28.0+cpu"
    with pytest.raises(RuntimeError, match="nms"):
        importlib.import_module("torchvision")


def test_importing_the_package_reads_no_versions():
    modules = "('torch', 'transformers', 'importlib.metadata')"
    code = f"import sys, nemo_speculative; print([m for m in {modules} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
