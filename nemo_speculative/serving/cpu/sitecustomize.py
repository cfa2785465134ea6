"""Leaves out torchvision's operator descriptions, see :mod:`nemo_speculative.serving.torchvision`.

Unconditional, unlike there: to find out whether they fail would import torch in every Python that starts.
"""

import sys
import types

NAME = "torchvision._meta_registrations"
sys.modules[NAME] = types.ModuleType(NAME)
