"""Optimizer, learning-rate schedule and weight average, on torchtitan's containers."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hydra.utils import get_method
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from nemo_speculative.config.schema import MuonConfig, OptimizerConfig
from nemo_speculative.distributed import titan

NOT_HIDDEN = ("embed_tokens.weight", "lm_head.weight")
"""Matrices with a row per token, which Muon does not train: it is for hidden layers."""
EMA_WARMUP = 10
"""At step n the decay of the weight average is at most (1 + n) / (10 + n)."""


def build_optimizers(config: OptimizerConfig, model: nn.Module) -> titan.OptimizersContainer:
    """The optimizer of ``config`` over every trainable parameter; its state is float32, like the parameters."""
    return get_method(config._target_)(config, model)


def adamw(config: OptimizerConfig, model: nn.Module) -> titan.OptimizersContainer:
    """AdamW, in one fused kernel."""
    return _optimizers(model, _adamw_group(config))


def muon(config: MuonConfig, model: nn.Module) -> titan.OptimizersContainer:
    """torch's Muon for the matrices of the hidden layers; AdamW for norms, biases, embedding and head.

    Updates of the matrices are scaled to the RMS of AdamW's (2502.16982, section 2.2), so that one learning rate suits
    both.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [name for name, p in parameters.items() if p.ndim == 2 and not name.endswith(NOT_HIDDEN)]
    kwargs = {
        "lr": config.muon_lr or config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay,
        "adjust_lr_fn": "match_rms_adamw", "fused": False,
    }  # fmt: skip
    exactly = f"^(?:{'|'.join(map(re.escape, matrices))})$"
    hidden = titan.ParamGroupConfig(pattern=exactly, optimizer_name="Muon", optimizer_kwargs=kwargs)
    rest = [_adamw_group(config)] if len(matrices) < len(parameters) else []
    return _optimizers(model, *([hidden] if matrices else []), *rest)


def _adamw_group(config: OptimizerConfig) -> titan.ParamGroupConfig:
    kwargs = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "weight_decay": config.weight_decay}
    return titan.ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=kwargs)


def _optimizers(model: nn.Module, *groups: titan.ParamGroupConfig) -> titan.OptimizersContainer:
    config = titan.OptimizersContainer.Config(param_groups=list(groups), implementation="fused")
    return Optimizers(config, model_parts=[model])


class Optimizers(titan.OptimizersContainer):
    """torchtitan's container, extended by torch's Muon: torchtitan's own needs CUDA."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        return gathered_muon if name == "Muon" else titan.OptimizersContainer._resolve_optimizer_factory(name)


def gathered_muon(params: Any, **kwargs: Any) -> torch.optim.Muon:
    """torch's Muon over full matrices, gathered from FSDP2's shards for the step only.

    Muon orthogonalizes a matrix as a whole.  On shards DTensor would communicate in each of the fifteen products of a
    step, and round partial sums to bfloat16, so that the result would depend on the number of ranks.
    """
    optimizer = torch.optim.Muon(params, **kwargs)
    optimizer.register_step_pre_hook(lambda stepped, *_: _redistribute(stepped, gather=True))
    optimizer.register_step_post_hook(lambda stepped, *_: _redistribute(stepped, gather=False))
    return optimizer


def _redistribute(optimizer: torch.optim.Optimizer, gather: bool) -> None:
    """Gathers the gradients and momenta of sharded parameters on every rank, or shards them again."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if isinstance(p, DTensor) and p.grad is not None:
            placements = [Replicate()] * p.device_mesh.ndim if gather else p.placements
            gradient: Any = p.grad
            p.grad = gradient.redistribute(placements=placements)
            if state := optimizer.state.get(p):
                state["momentum_buffer"] = state["momentum_buffer"].redistribute(placements=placements)


def build_schedules(
    config: OptimizerConfig, optimizers: titan.OptimizersContainer, total_steps: int
) -> titan.LRSchedulersContainer:
    """Warm-up, stable, decay over ``total_steps``; every learning rate is scaled by the same factor."""
    warmup = max(1, round(config.warmup_ratio * total_steps))
    return titan.LRSchedulersContainer.Config(
        warmup_steps=warmup,
        total_steps=total_steps,
        decay_ratio=config.decay_share(warmup / total_steps),
        decay_type=config.decay_type.value,
        min_lr_factor=config.min_lr_factor,
    ).build(optimizers=optimizers, training_steps=total_steps)


class WeightAverage:
    """Exponential moving average of a model's trainable weights: float32, sharded as they are.

    a ← d · a + (1 - d) · w after every optimizer step, with d = min(decay, (1 + n) / (10 + n)) at step n, so that the
    average soon forgets the initial weights (the rule of TensorFlow's ``ExponentialMovingAverage``).  With
    ``decay=None`` it is empty and does nothing.

    A ``Stateful`` of torch's distributed checkpoint, so that a resumed run continues the average exactly.
    """

    def __init__(self, model: nn.Module, decay: float | None):
        self.model, self.decay = model, decay or 0.0
        self._weights = {n: p for n, p in model.named_parameters() if p.requires_grad and decay is not None}
        self._averages = {n: p.detach().to(torch.float32, copy=True) for n, p in self._weights.items()}

    @property
    def names(self) -> list[str]:
        """Names of the averaged parameters."""
        return list(self._averages)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the weights after optimizer step ``step``; the first one is step 1."""
        decay = min(self.decay, (1 + step) / (EMA_WARMUP + step))
        for name, average in self._averages.items():
            average.lerp_(self._weights[name].float(), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Replaces the model's weights by their average within the block, and restores them bit for bit."""
        own = {name: p.detach().clone() for name, p in self._weights.items()}
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self._weights[name].copy_(value)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # weights that a forward pass without a backward has gathered are out of date

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores the averages; raises KeyError where one is missing."""
        for name, average in self._averages.items():
            average.copy_(state[name])
