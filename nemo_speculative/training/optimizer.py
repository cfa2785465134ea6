"""The optimizer and its schedule, from torchtitan's containers."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hydra.utils import get_method
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from nemo_speculative.config.schema import MuonConfig, OptimizerConfig
from nemo_speculative.distributed import titan

NOT_HIDDEN = ("embed_tokens.weight", "lm_head.weight")
"""Matrices with a row per token: Muon is for hidden layers."""


def build_optimizers(config: OptimizerConfig, model: nn.Module) -> titan.OptimizersContainer:
    """What ``config`` names, over every trainable parameter; its state is float32, as the parameters are."""
    return get_method(config._target_)(config, model)


def adamw(config: OptimizerConfig, model: nn.Module) -> titan.OptimizersContainer:
    """AdamW, in one fused kernel."""
    return _container([_adamw_group(config)], model)


def muon(config: MuonConfig, model: nn.Module) -> titan.OptimizersContainer:
    """torch's Muon for the matrices of the hidden layers; AdamW for norms, biases, embedding and head.

    Updates of the matrices are scaled to the RMS that AdamW's have (2502.16982, section 2.2), so that one learning rate
    suits both.
    """
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [name for name, p in parameters if p.ndim == 2 and not name.endswith(NOT_HIDDEN)]
    groups = [_muon_group(config, matrices)] if matrices else []
    if len(matrices) < len(parameters):
        groups.append(_adamw_group(config))
    return _container(groups, model)


def _adamw_group(config: OptimizerConfig) -> titan.ParamGroupConfig:
    kwargs = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "weight_decay": config.weight_decay}
    return titan.ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=kwargs)


def _muon_group(config: MuonConfig, names: Sequence[str]) -> titan.ParamGroupConfig:
    kwargs = {
        "lr": config.muon_lr or config.lr,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
        "adjust_lr_fn": "match_rms_adamw",
        "fused": False,
    }
    exactly = f"^(?:{'|'.join(map(re.escape, names))})$"
    return titan.ParamGroupConfig(pattern=exactly, optimizer_name="Muon", optimizer_kwargs=kwargs)


def _container(groups: list[titan.ParamGroupConfig], model: nn.Module) -> titan.OptimizersContainer:
    config = titan.OptimizersContainer.Config(param_groups=groups, implementation="fused")
    return Optimizers(config, model_parts=[model])


class Optimizers(titan.OptimizersContainer):
    """torchtitan's container, which knows AdamW, and torch's Muon besides: torchtitan's own needs CUDA."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        return gathered_muon if name == "Muon" else titan.OptimizersContainer._resolve_optimizer_factory(name)


def gathered_muon(params: Any, **kwargs: Any) -> torch.optim.Muon:
    """torch's Muon, whose steps see whole matrices where FSDP2 keeps shards of them.

    It orthogonalises a matrix as a whole.  On shards DTensor would communicate in each of the fifteen products of
    a step, and round partial sums to bfloat16: another result on every number of ranks.  Gathered before the step each
    rank computes the same one; between steps a rank holds its shards alone.
    """
    optimizer = torch.optim.Muon(params, **kwargs)
    optimizer.register_step_pre_hook(_gather)
    optimizer.register_step_post_hook(_scatter)
    return optimizer


def _gather(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for p in _sharded(optimizer):
        _place(optimizer, p, [Replicate()] * p.device_mesh.ndim)


def _scatter(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for p in _sharded(optimizer):
        _place(optimizer, p, p.placements)


def _sharded(optimizer: torch.optim.Optimizer) -> list[DTensor]:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [p for p in parameters if isinstance(p, DTensor) and p.grad is not None]


def _place(optimizer: torch.optim.Optimizer, p: DTensor, placements: Sequence[Placement]) -> None:
    gradient: Any = p.grad
    p.grad = gradient.redistribute(placements=placements)
    if state := optimizer.state.get(p):
        state["momentum_buffer"] = state["momentum_buffer"].redistribute(placements=placements)


def build_schedules(
    config: OptimizerConfig, optimizers: titan.OptimizersContainer, total_steps: int
) -> titan.LRSchedulersContainer:
    """Warm-up, stable, decay over ``total_steps``; the same shape for every learning rate."""
    warmup = max(1, round(config.warmup_ratio * total_steps))
    return titan.LRSchedulersContainer.Config(
        warmup_steps=warmup,
        total_steps=total_steps,
        decay_ratio=config.decay_share(warmup / total_steps),
        decay_type=config.decay_type.value,
        min_lr_factor=config.min_lr_factor,
    ).build(optimizers=optimizers, training_steps=total_steps)
