"""The known checkpoint formats: how each is recognized, which target it names, and how its draft is read."""

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_speculative.algorithms.eagle3.contract import Eagle3Contract
from nemo_speculative.checkpoint.adapters.networks import read_eagle, read_eagle3
from nemo_speculative.checkpoint.adapters.source import Source, read_pickled
from nemo_speculative.checkpoint.draft_checkpoint import Servable, read_servable
from nemo_speculative.checkpoint.metadata import OWN_KEY, provenance_of
from nemo_speculative.utils.errors import UserError, describe_error

SGLANG_EAGLE3 = "LlamaForCausalLMEagle3"
SPECULATORS_TYPE = "speculators_model_type"
DEEPER_NORM = re.compile(r"layers\.[1-9]\d*\.hidden_norm\.weight")


class Format(ABC):
    """The checkpoint format of one project."""

    name: ClassVar[str]

    @abstractmethod
    def recognizes(self, source: Source) -> bool:
        """Whether ``source`` is in this format."""

    def target(self, source: Source) -> str | None:
        """The target that the checkpoint names: a directory or a hub name."""
        return None

    @abstractmethod
    def read(self, source: Source) -> Servable:
        """Reads the draft; raises UserError if it is damaged, of another target, or a network that cannot be served."""


class Own(Format):
    """The format of :func:`nemo_speculative.checkpoint.draft_checkpoint.write_servable`."""

    name = OWN_KEY

    def recognizes(self, source: Source) -> bool:
        return OWN_KEY in source.config

    def target(self, source: Source) -> str | None:
        return provenance_of(source.config, source.directory).target

    def read(self, source: Source) -> Servable:
        servable, target = read_servable(source.directory), source.target
        shape = servable.shape
        sizes = (shape.vocab_size, getattr(shape, "target_hidden_size", shape.hidden_size))
        if sizes != (target.vocab_size, target.hidden_size):
            raise UserError(
                f"{source.where}: made for a target with {sizes[0]} ids and {sizes[1]} features, found one with "
                f"{target.vocab_size} and {target.hidden_size}; give the target that it was trained for"
            )
        if source.aux_layers is not None and list(source.aux_layers) != servable.aux_layers:
            raise UserError(f"aux_layers is {list(source.aux_layers)}; {source.where} says {servable.aux_layers}")
        return servable


class Speculators(Format):
    """speculators' EAGLE-3 checkpoints, which vLLM serves.

    A layer id names the INPUT of a layer: it is one above SGLang's and this project's, which name the output.  A draft
    whose residual is the normalized feature (norm_before_residual) is another network, which SGLang lacks.
    """

    name = "speculators (vLLM)"

    def recognizes(self, source: Source) -> bool:
        return SPECULATORS_TYPE in source.config

    def target(self, source: Source) -> str | None:
        value: Any = source.config.get("speculators_config")
        for key in ("verifier", "name_or_path"):
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, str) else None

    def read(self, source: Source) -> Servable:
        config, layer = source.config, source.config.get("transformer_layer_config")
        layer = layer if isinstance(layer, dict) else {}
        for key, value, expected in (
            (SPECULATORS_TYPE, config[SPECULATORS_TYPE], "eagle3"),
            ("norm_before_residual", config.get("norm_before_residual", False), False),
            ("transformer_layer_config.model_type", layer.get("model_type", "llama"), "llama"),
        ):
            source.require(value == expected, key, value, f"{expected!r}; SGLang and this project lack such a network")
        inputs = config.get("eagle_aux_hidden_state_layer_ids")
        valid = isinstance(inputs, list) and all(type(number) is int for number in inputs)
        source.require(valid or inputs is None, "eagle_aux_hidden_state_layer_ids", inputs, "a list of layers")
        outer = ("target_hidden_size", "draft_vocab_size", *Eagle3Contract.SWITCHES)
        return read_eagle3(
            source,
            self.name,
            layer | {key: config.get(key) for key in outer},
            speculators_name,
            None if inputs is None else [number - 1 for number in inputs],
            unused=("verifier_lm_head.weight", "verifier_norm.weight"),  # the target's, for training only
        )


def speculators_name(name: str) -> str:
    """speculators' name of a tensor of an EAGLE-3 draft; after the first, its layers are plain Llama layers."""
    if DEEPER_NORM.fullmatch(name):
        return name.replace("hidden_norm", "input_layernorm")
    return name.replace("midlayer.", "layers.0.")


class AutoModel(Format):
    """NeMo AutoModel's ``epoch_<E>_step_<S>/``, with the draft in ``model/consolidated`` or ``model``.

    Its first version wrote a bare ``draft_model.pt`` and the vocabulary to a separate file.  The configuration is a
    copy of the target's with a few fields changed: num_hidden_layers is still the target's, and the aux layers are
    recorded only in the copy of the training configuration.
    """

    name = "NeMo AutoModel"

    def recognizes(self, source: Source) -> bool:
        known = source.architecture in ("LlamaEagle3DraftModel", "LlamaEagleDraftModel")
        return known or any(name.startswith("model.fc.") for name in source.tensors)

    def target(self, source: Source) -> str | None:
        target = _from_recipe(source, "target_model_name_or_path") or source.config.get("_name_or_path")
        return target if isinstance(target, str) and target else None

    def read(self, source: Source) -> Servable:
        if source.architecture == "LlamaEagleDraftModel":
            return read_eagle(source, self.name)
        file = _outer_file(source, "eagle_meta.pt", "eagle3_meta.pt")
        metadata = read_pickled(file) if file else {}
        if not isinstance(metadata, dict):
            raise UserError(f"{file}: holds {type(metadata).__name__}, expected selected_token_ids by name")
        ids, step = metadata.get("selected_token_ids"), metadata.get("global_step", 0)
        if "d2t" not in source.tensors and isinstance(ids, torch.Tensor):
            source.tensors["d2t"] = ids.long() - torch.arange(ids.numel())
            source.notes.append("the draft vocabulary is that of its metadata, selected_token_ids")
        step = step if type(step) is int and step > 0 else 0
        return _read_plain_eagle3(source, self.name, "model.", recipe=True, step=step)


def _outer_file(source: Source, *names: str) -> Path | None:
    """The first file of one of ``names`` in the training checkpoint that contains ``source``."""
    directories = (source.directory, *source.directory.resolve().parents[:2])
    return next((file for name in names for d in directories if (file := d / name).is_file()), None)


def _from_recipe(source: Source, key: str) -> Any:
    """The value of ``key`` in the copy of the training configuration; raises UserError if that is not YAML."""
    file = _outer_file(source, "config.yaml")
    try:
        value = OmegaConf.select(OmegaConf.load(file), f"recipe_args.{key}") if file else None
        return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not plain YAML ({describe_error(error, 100)})") from None


class SpecForge(Format):
    """SpecForge's exports of EAGLE-3 for SGLang and for transformers, mostly with aux layers in ``eagle_config``."""

    name = "SpecForge"

    def recognizes(self, source: Source) -> bool:
        # Keys that SafeAILab's files never have: SpecForge's own, and those of newer versions of transformers.
        keys = {"eagle_config", "rope_parameters", "dtype", *Eagle3Contract.SWITCHES}
        return source.architecture == SGLANG_EAGLE3 and not keys.isdisjoint(source.config)

    def read(self, source: Source) -> Servable:
        if "norm_output" in source.config:
            source.notes.append(
                f"norm_output is {source.config['norm_output']}, read as SGLang reads it; before its pull request 879 "
                "(September 2026) SpecForge trained with another meaning of it, and τ suffers if this draft is older"
            )
        return _read_plain_eagle3(source, self.name)


class SafeAILab(Format):
    """SafeAILab/EAGLE's published drafts, yuhuili/EAGLE-* and yuhuili/EAGLE3-*, mostly as ``pytorch_model.bin``."""

    name = "EAGLE (SafeAILab)"

    def recognizes(self, source: Source) -> bool:
        known = source.architecture in ("LlamaForCausalLM", "LlamaForCausalLMEagle", SGLANG_EAGLE3)
        # A complete model's tensors have another prefix.
        return known and any(name.startswith(("fc.", "midlayer.", "layers.")) for name in source.tensors)

    def read(self, source: Source) -> Servable:
        marked = any(name.startswith(("midlayer.", "lm_head.", "d2t")) for name in source.tensors)
        if marked or source.architecture == SGLANG_EAGLE3:
            return _read_plain_eagle3(source, self.name)
        return read_eagle(source, self.name)


def _read_plain_eagle3(source: Source, name: str, prefix: str = "", recipe: bool = False, step: int = 0) -> Servable:
    """EAGLE-3 under SGLang's names, with ``prefix`` before all but the head and the vocabulary maps.

    With ``recipe``, the copy of the training configuration has the aux layers if config.json does not.
    """
    config = source.config
    eagle = config["eagle_config"] if isinstance(config.get("eagle_config"), dict) else {}
    if eagle.get("use_aux_hidden_state") is False:
        raise UserError(
            f"{source.where}: eagle_config has use_aux_hidden_state=false; expected a draft that reads aux states"
        )
    # A single layer is called midlayer or layers.0; SGLang loads both.
    numbered = any(tensor.startswith(f"{prefix}layers.0.") for tensor in source.tensors)

    def rename(tensor: str) -> str:
        if tensor in ("lm_head.weight", "d2t", "t2d"):
            return tensor
        return prefix + (tensor.replace("midlayer.", "layers.0.") if numbered else tensor)

    stated = eagle.get("eagle_aux_hidden_state_layer_ids")
    if recipe and stated is None and source.aux_layers is None:
        stated = _from_recipe(source, "aux_layer_ids")
    return read_eagle3(source, name, eagle | config, rename, stated, step=step)


FORMATS: tuple[Format, ...] = (Own(), Speculators(), AutoModel(), SpecForge(), SafeAILab())
"""The known formats in the order in which they are tried: those with unmistakable marks first."""


def format_of(source: Source) -> Format:
    """The format of ``source``; raises UserError if none recognizes it."""
    for candidate in FORMATS:
        if candidate.recognizes(source):
            return candidate
    names = ", ".join(sorted(source.tensors)[:3]) or "no tensors"
    raise UserError(
        f"{source.directory}: no known draft: architectures is {source.config.get('architectures')!r}, with {names}; "
        f"expected one of {', '.join(candidate.name for candidate in FORMATS)}"
    )
