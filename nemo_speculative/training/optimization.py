"""The optimizer and its schedule, from torchtitan's containers."""

from torch import nn

from nemo_speculative.config.schema import OptimizerConfig
from nemo_speculative.training import titan


def build_optimizers(config: OptimizerConfig, model: nn.Module) -> titan.OptimizersContainer:
    """AdamW over every trainable parameter; its state is float32, as the parameters are."""
    kwargs = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "weight_decay": config.weight_decay}
    groups = [titan.ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=kwargs)]
    return titan.OptimizersContainer.Config(param_groups=groups, implementation="fused").build(model_parts=[model])


def build_schedules(
    config: OptimizerConfig, optimizers: titan.OptimizersContainer, total_steps: int
) -> titan.LRSchedulersContainer:
    """Warm-up, stable, decay over ``total_steps``."""
    warmup = max(1, round(config.warmup_ratio * total_steps))
    return titan.LRSchedulersContainer.Config(
        warmup_steps=warmup,
        total_steps=total_steps,
        decay_ratio=config.decay_ratio * (1 - warmup / total_steps) if total_steps > warmup else 0.0,
        decay_type=config.decay_type.value,
        min_lr_factor=config.min_lr_factor,
    ).build(optimizers=optimizers, training_steps=total_steps)
