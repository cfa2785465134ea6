"""Writing ``config.json`` and ``model.safetensors``."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def write_model(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Makes ``directory`` with the two files.

    Raises:
        OSError: the disk is full or not writable.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # wraps what the file system said
        raise OSError(str(error)) from error
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
