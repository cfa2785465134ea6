"""Every torchtitan import of the project (0.3.0), and what it needs on a released torch and without a GPU.

torchtitan is composed: mesh, FSDP2 helpers, optimizer and schedule containers, clipping, checkpoint
wrapper, loggers and profiler come from it; the step function is this project's.
"""

import sys
from types import SimpleNamespace

import torch
import torch.distributed.fsdp as torch_fsdp

if not hasattr(torch_fsdp, "DataParallelMeshDims"):  # torch 2.11: only annotates an argument that we leave None
    setattr(torch_fsdp, "DataParallelMeshDims", type("DataParallelMeshDims", (), {}))  # noqa: B010

from torchtitan.components.checkpointer.base import ModelWrapper
from torchtitan.components.metrics import BaseLogger, TensorBoardLogger
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer
from torchtitan.config import CommConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division
from torchtitan.distributed.utils import clip_grad_norm_, init_distributed
from torchtitan.tools.profiler import Profiler

__all__ = [
    "BaseLogger", "CommConfig", "LRSchedulersContainer", "ModelWrapper", "OptimizersContainer", "ParallelDims",
    "ParamGroupConfig", "Profiler", "TensorBoardLogger", "bind_device", "clip_grad_norm_",
    "disable_fsdp_gradient_division", "init_distributed",
]  # fmt: skip


def bind_device(device_type: str) -> None:
    """Sets the device that torchtitan uses: it guesses at import ("cuda" where there is none), and copies by value."""
    names = ("current_device", "device_count", "synchronize", "set_device")
    cpu = SimpleNamespace(**{name: getattr(torch.cpu, name) for name in names})
    chosen = {"device_type": device_type, "device_module": torch.cuda if device_type == "cuda" else cpu}
    for name, loaded in list(sys.modules.items()):
        if name.startswith("torchtitan"):
            vars(loaded).update({key: value for key, value in chosen.items() if key in vars(loaded)})
