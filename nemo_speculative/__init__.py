"""Trains EAGLE draft models that SGLang serves as they are."""

from nemo_speculative.utils.torchvision_stub import make_importable

__version__ = "0.1.0"

# Before anything imports transformers, which imports torchvision where it is installed.
make_importable()
