"""A target's configuration and tokenizer, without its weights."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from nemo_speculative.config.schema import ModelConfig, TinyModelConfig
from nemo_speculative.targets.demo import directory_of, llama_config, make_tokenizer
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.utils.errors import UserError, describe_error


@dataclass(frozen=True)
class TargetDescription:
    """A target without its weights."""

    config: Any
    """The text part of its transformers configuration."""
    tokenizer: Any
    stop_ids: frozenset[int]
    """Token ids that end an answer."""


def target_config(model: ModelConfig) -> Any:
    """The text part of the target's configuration, also of a demo target that does not exist yet."""
    if isinstance(model, TinyModelConfig):
        return llama_config(model)
    return text_config(resolve_target(model, weights=False), model.trust_remote_code)


def describe_target(model: ModelConfig) -> TargetDescription:
    """The target without its weights, also a demo target that does not exist yet; raises UserError without one."""
    config = target_config(model)
    directory = directory_of(model) if isinstance(model, TinyModelConfig) else resolve_target(model, weights=False)
    if isinstance(model, TinyModelConfig) and not directory.exists():
        tokenizer = make_tokenizer(model)
    else:
        tokenizer = load_tokenizer(directory, model.trust_remote_code)
    return TargetDescription(config, tokenizer, stop_ids_of(directory, config, tokenizer))


def load_config(path: Path, trust_remote_code: bool = False) -> Any:
    """The configuration of the model in ``path``; raises UserError if transformers can read none."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a usable model configuration: {describe_error(error)}") from error


def text_config(path: Path, trust_remote_code: bool = False) -> Any:
    """The text part of :func:`load_config`."""
    return load_config(path, trust_remote_code).get_text_config()


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in ``path``; raises UserError if transformers can read none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: the tokenizer cannot be loaded: {describe_error(error)}") from error


def stop_ids_of(directory: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer of the target in ``directory``: its generation configuration's and the tokenizer's."""
    eos = config.eos_token_id
    if (directory / "generation_config.json").is_file():  # without one transformers would ask the hub
        with contextlib.suppress(OSError):  # it is damaged
            eos = GenerationConfig.from_pretrained(directory).eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)
