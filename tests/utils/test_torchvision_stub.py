"""A torchvision whose operators a CPU-only torch cannot describe."""

import sys

import pytest

from nemo_speculative.utils import torchvision_stub


@pytest.mark.parametrize(
    ("versions", "left_out"),
    [
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0"}, True),
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}, False),
        ({"torch": "2.13.0+cu130", "torchvision": "0.28.0"}, False),
        ({"torch": "2.13.0+cpu"}, False),
    ],
)
def test_descriptions_are_left_out_where_they_would_fail(monkeypatch, versions, left_out):
    def version(name):
        if name not in versions:
            raise torchvision_stub.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(torchvision_stub, "version", version)
    # setitem first, so that whatever was there comes back in the end.
    monkeypatch.setitem(sys.modules, torchvision_stub.META_REGISTRATIONS, object())
    del sys.modules[torchvision_stub.META_REGISTRATIONS]
    torchvision_stub.make_importable()
    assert (torchvision_stub.META_REGISTRATIONS in sys.modules) == left_out
