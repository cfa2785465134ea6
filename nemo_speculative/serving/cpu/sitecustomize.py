"""Replaces torchvision's operator descriptions, see :mod:`nemo_speculative.utils.torchvision_stub`.

It serves the processes that SGLang starts, which import nothing of this package.
"""

import sys
import types

NAME = "torchvision._meta_registrations"
sys.modules[NAME] = types.ModuleType(NAME)
