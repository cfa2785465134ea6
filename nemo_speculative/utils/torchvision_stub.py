"""Makes a torchvision importable that does not match a CPU-only torch.

SGLang requires torchvision, and transformers imports it where it is installed.  With a CPU-only torch, the wheel of the
package index cannot load its compiled operators, and its import fails while registering them ("operator
torchvision::nms does not exist").  This package calls none of these operators, so the registration is skipped.
"""

import sys
from importlib.machinery import ModuleSpec


class _EmptyModuleFinder:
    """Import hook that gives torchvision an empty module in place of its operator registration, if that would fail.

    A hook rather than an entry in ``sys.modules``: programs that never import torchvision, such as ``--help``, must not
    spend time on reading package versions.
    """

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        if name == "torchvision._meta_registrations" and registration_fails():
            return ModuleSpec(name, loader=None, is_package=True)  # an empty namespace package
        return None


def registration_fails() -> bool:
    """Whether torch is CPU-only and torchvision is not, by their versions."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch").endswith("+cpu") and not version("torchvision").endswith("+cpu")
    except PackageNotFoundError:
        return False


def install() -> None:
    """Installs the import hook."""
    sys.meta_path.insert(0, _EmptyModuleFinder())  # type: ignore[arg-type]
