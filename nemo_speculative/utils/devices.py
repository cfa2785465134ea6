"""Which device a program runs on."""

import os

import torch

from nemo_speculative.utils.errors import UserError


def choose_device(wanted: str, key: str) -> torch.device:
    """The device of this rank; ``key`` is the configuration's name for ``wanted`` (auto, cpu or cuda).

    Raises:
        UserError: CUDA was asked for and there is none.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"{key} is {wanted!r}: expected auto, cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{key}=cuda: torch {torch.__version__} finds no CUDA device; use {key}=cpu, or a machine with a GPU and a "
            "CUDA build of torch"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``x`` on ``device``; what comes from the host by way of pinned memory, so that nothing waits for it."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
