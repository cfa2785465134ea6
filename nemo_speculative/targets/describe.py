"""A target's configuration and tokenizer without its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from nemo_speculative.config.schema import ModelConfig, TinyModelConfig
from nemo_speculative.targets.demo import directory_of, llama_config, make_tokenizer
from nemo_speculative.targets.embedding_and_head import load_tokenizer, stop_ids, text_config
from nemo_speculative.targets.resolve import resolve_target


@dataclass(frozen=True)
class TargetDescription:
    """A target without its weights."""

    config: Any
    """The text part of its transformers configuration."""
    tokenizer: Any
    stop_ids: frozenset[int]
    """Token ids that end an answer."""


def target_config(model: ModelConfig) -> Any:
    """The text part of the target's configuration; the demo target need not exist yet.

    Raises:
        UserError: it is not available.
    """
    if isinstance(model, TinyModelConfig):
        return llama_config(model)
    return text_config(resolve_target(model, weights=False), model.trust_remote_code)


def describe_target(model: ModelConfig) -> TargetDescription:
    """The target without its weights; the demo target need not exist yet.

    Raises:
        UserError: it is not available.
    """
    config = target_config(model)
    if isinstance(model, TinyModelConfig) and not directory_of(model).exists():
        tokenizer = make_tokenizer(model)
        return TargetDescription(config, tokenizer, stop_ids(config.eos_token_id, tokenizer))
    directory = directory_of(model) if isinstance(model, TinyModelConfig) else resolve_target(model, weights=False)
    tokenizer = load_tokenizer(directory, model.trust_remote_code)
    return TargetDescription(config, tokenizer, stop_ids_of(directory, config, tokenizer))


def stop_ids_of(directory: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer of the target in ``directory``, the same as the loaded model's."""
    try:
        eos = GenerationConfig.from_pretrained(directory).eos_token_id
    except OSError:  # it has no generation_config.json
        eos = config.eos_token_id
    return stop_ids(eos, tokenizer)
