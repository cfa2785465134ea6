"""A torchvision that cannot be imported, made importable.

SGLang needs torchvision to be there, and transformers imports it where it is.  Beside a CPU-only torch the wheel of the
package index cannot load its compiled operators, and then fails to describe them ("operator torchvision::nms does not
exist").  Nothing here calls one of them, so their descriptions are left out.
"""

import sys
import types
from importlib.metadata import PackageNotFoundError, version

DESCRIPTIONS = "torchvision._meta_registrations"
CPU_ONLY = "+cpu"


def make_importable() -> None:
    """Leaves out the descriptions of torchvision's operators where importing them would fail.

    By the versions alone: every program of this package passes here, and most need neither.
    """
    try:
        torch, torchvision = version("torch"), version("torchvision")
    except PackageNotFoundError:
        return
    if torch.endswith(CPU_ONLY) and not torchvision.endswith(CPU_ONLY):
        sys.modules.setdefault(DESCRIPTIONS, types.ModuleType(DESCRIPTIONS))
