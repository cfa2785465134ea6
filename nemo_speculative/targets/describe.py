"""A target's configuration and tokenizer, before any of its weights are there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from nemo_speculative.config.schema import ModelConfig, TinyModelConfig
from nemo_speculative.targets.demo import directory_of, llama_config, make_tokenizer
from nemo_speculative.targets.embedding_and_head import load_tokenizer, stop_ids, text_config
from nemo_speculative.targets.resolve import resolve_target


@dataclass(frozen=True)
class Description:
    """What a target is, but for its weights."""

    config: Any
    """The part of it that is about text."""
    tokenizer: Any
    stop_ids: frozenset[int]
    """What ends an answer."""


def target_config(model: ModelConfig) -> Any:
    """The (text) configuration of the target; of the embedded one even before it is made.

    Raises:
        UserError: it cannot be had.
    """
    if isinstance(model, TinyModelConfig):
        return llama_config(model)
    return text_config(resolve_target(model, weights=False), model.trust_remote_code)


def describe_target(model: ModelConfig) -> Description:
    """The target without its weights; the embedded one even before it is made.

    Raises:
        UserError: it cannot be had.
    """
    config = target_config(model)
    if isinstance(model, TinyModelConfig) and not directory_of(model).exists():
        tokenizer = make_tokenizer(model)
        return Description(config, tokenizer, stop_ids(config.eos_token_id, tokenizer))
    directory = directory_of(model) if isinstance(model, TinyModelConfig) else resolve_target(model, weights=False)
    tokenizer = load_tokenizer(directory, model.trust_remote_code)
    return Description(config, tokenizer, stop_ids_of(directory, config, tokenizer))


def stop_ids_of(directory: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """What ends an answer of the target in ``directory``, as the loaded model has it."""
    try:
        eos = GenerationConfig.from_pretrained(directory).eos_token_id
    except OSError:  # it ships none
        eos = config.eos_token_id
    return stop_ids(eos, tokenizer)
