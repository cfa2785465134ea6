"""Trains EAGLE draft models that SGLang serves as they are."""

__version__ = "0.1.0"
