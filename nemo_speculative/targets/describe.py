"""A target's configuration, before any of its weights are there."""

from typing import Any

from nemo_speculative.config.schema import ModelConfig, TinyModelConfig
from nemo_speculative.targets.ends import text_config
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.targets.tiny import llama_config


def target_config(model: ModelConfig) -> Any:
    """The (text) configuration of the target; of the embedded one even before it is made.

    Raises:
        UserError: it cannot be had.
    """
    if isinstance(model, TinyModelConfig):
        return llama_config(model)
    return text_config(resolve_target(model, weights=False), model.trust_remote_code)
