"""Trains EAGLE draft models that SGLang serves as they are."""

from nemo_speculative.utils import torchvision_stub

__version__ = "0.1.0"

# Before anything imports transformers, which imports torchvision where it is installed.
torchvision_stub.install()
