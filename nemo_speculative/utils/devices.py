"""The device of this process, and copies to it."""

import os

import torch

from nemo_speculative.utils.errors import UserError


def choose_device(name: str, key: str) -> torch.device:
    """The device of this rank for ``name``: auto, cpu or cuda; ``key`` is its configuration key.

    Raises:
        UserError: another name, or cuda where there is no CUDA device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"{key} is {name!r}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{key}=cuda: torch {torch.__version__} finds no CUDA device; use {key}=cpu, or a machine with a GPU and a "
            "CUDA build of torch"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``x`` on ``device``; a copy from the CPU to CUDA goes through pinned memory, so that nothing waits for it."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
