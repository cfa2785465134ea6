"""A torchvision that cannot be imported, made importable.

SGLang needs torchvision to be there.  Beside a CPU-only torch the wheel of the package index cannot load its compiled
operators, and then fails to describe them ("operator torchvision::nms does not exist").  Nothing here calls one of
them, so their descriptions are left out.
"""

import sys
import types
from importlib.util import find_spec

DESCRIPTIONS = "torchvision._meta_registrations"


def make_importable() -> None:
    """Leaves out the descriptions of torchvision's operators where importing them fails; otherwise changes nothing."""
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        sys.modules[DESCRIPTIONS] = types.ModuleType(DESCRIPTIONS)
