"""Serving a draft with SGLang: the command, the process, and what it takes on a CPU."""

from nemo_speculative.serving.torchvision import make_importable

# Before anything here imports transformers, which imports torchvision where it is installed.
make_importable()
