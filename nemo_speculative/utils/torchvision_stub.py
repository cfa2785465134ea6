"""Makes a torchvision importable that does not fit the installed torch.

SGLang requires torchvision, and transformers imports it where it is installed.  Next to a CPU-only torch, the wheel of
the package index cannot load its compiled operators and then fails to register their meta functions ("operator
torchvision::nms does not exist").  Nothing here calls one of them, so the registrations are skipped.
"""

import sys
import types
from importlib.metadata import PackageNotFoundError, version

META_REGISTRATIONS = "torchvision._meta_registrations"
CPU_ONLY = "+cpu"


def make_importable() -> None:
    """Skips torchvision's meta registrations where importing them would fail.

    Decides by the installed versions alone: every program of this package calls this, and most import neither.
    """
    try:
        torch, torchvision = version("torch"), version("torchvision")
    except PackageNotFoundError:
        return
    if torch.endswith(CPU_ONLY) and not torchvision.endswith(CPU_ONLY):
        sys.modules.setdefault(META_REGISTRATIONS, types.ModuleType(META_REGISTRATIONS))
