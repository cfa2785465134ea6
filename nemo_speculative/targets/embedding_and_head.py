"""The ends of a frozen target: configuration, tokenizer, embedding, final norm and head.

All that a draft needs of its target beside the supervision.  They are a transformers model whose decoder layers were
never loaded, where something else computes those (:class:`EmbeddingAndHead`), or those of a whole one
(:class:`nemo_speculative.targets.hf.HFTarget`).
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from nemo_speculative.config.vocab_and_aux_layers import aux_layers_for
from nemo_speculative.data.conversation import TokenRow
from nemo_speculative.targets.fingerprint import target_fingerprint
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.progress import quiet_transformers

UNSCALED = (torch.float32, torch.bfloat16, torch.float16)
"""Types of weights that say all of themselves: none is scaled by another tensor."""


class EmbeddingAndHead:
    """The ends of the model in ``path``; :meth:`logits` is its head as the model itself applies it.

    Args:
        aux_layers: whose outputs are wanted; None: EAGLE-3's choice.
        dtype, device: of what is loaded.
        trust_remote_code: whether the repository's own code may run.
        loading: transformers' further options.

    Raises:
        UserError: the directory holds no usable model or tokenizer, or ``aux_layers`` cannot be captured in it.
    """

    requests_ahead = 0
    collective = False

    def __init__(
        self,
        path: Path,
        *,
        aux_layers: list[int] | None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        **loading: Any,
    ):
        self.path, self.device, self.trust_remote_code = Path(path), torch.device(device), trust_remote_code
        self.config = text_config(self.path, trust_remote_code)
        self.aux_layers = aux_layers_for(self.config.num_hidden_layers, aux_layers)
        self.tokenizer = load_tokenizer(self.path, trust_remote_code)
        self.model = self._load(dtype=dtype, trust_remote_code=trust_remote_code, **loading)
        self.stop_ids = stop_ids(self.model.generation_config.eos_token_id, self.tokenizer)
        """The ids that end an answer: the generation configuration's, and the tokenizer's own."""
        self._head = self.model.get_output_embeddings()
        self._embedding = self.model.get_input_embeddings()

    def _load(self, **options: Any) -> Any:
        return load_model(self.path, self.device, num_layers=0, **options)

    @cached_property
    def fingerprint(self) -> str:
        """Tells one target's weights from another's, without reading all of them."""
        return target_fingerprint(self.path)

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._embedding(input_ids.to(self._embedding.weight.device)).to(self.device)

    def logits(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        logits = self._head(last_hidden_state.to(self._head.weight.device)).to(self.device)
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        if scale := getattr(self.config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if divisor := getattr(self.config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        return logits

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm in front of the head, where the decoder has one under its usual name."""
        return getattr(self.model.get_decoder(), "norm", None)

    @property
    def dtype(self) -> torch.dtype:
        return self._head.weight.dtype

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, h]: the rows of the frozen head."""
        return self._head.weight

    def last_layers(self, count: int) -> Sequence[nn.Module]:
        """The last decoder layers, as many as there are up to ``count``; read from the files for it, onto the CPU.

        Raises:
            UserError: the files name their weights otherwise than the model does.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=self.trust_remote_code)
        layers = decoder_layers(model.get_decoder(), self.config.num_hidden_layers)
        first = max(len(layers) - count, 0)
        return [_filled(layer, self.path, first + n) for n, layer in enumerate(layers[first:])]

    def expect(self, *documents: Sequence[TokenRow]) -> None:
        """Whatever it is asked for will be computed."""

    def close(self) -> None:
        """Nothing is held."""

    def compile(self) -> None:
        """Nothing of the supervision is computed here."""


def load_model(path: Path, device: torch.device | None, num_layers: int | None = None, **options: Any) -> Any:
    """The model, frozen, in eval mode.

    Args:
        device: None leaves the placement to ``options``.
        num_layers: how many of its decoder layers are loaded; None: all.

    Raises:
        UserError: transformers cannot load it, or its files lack weights.
    """
    quiet_transformers()
    report: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if num_layers is not None:
        options["config"] = _cut(load_config(path, options.get("trust_remote_code", False)), num_layers)
        report = _no_report_of_what_is_left_out()
    loaded: Any
    try:
        with report:
            loaded = AutoModelForCausalLM.from_pretrained(
                path, use_safetensors=True, output_loading_info=True, **options
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: the target cannot be loaded: {_first_line(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{path}: its files lack {missing[0]} and {len(missing) - 1} more of {type(model).__name__}")
    return (model.to(device) if device else model).eval().requires_grad_(False)


@contextlib.contextmanager
def _no_report_of_what_is_left_out() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _cut(config: Any, num_layers: int) -> Any:
    """``config`` of the same model with its first layers only."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = num_layers
    if not num_layers:
        for described in (config, text):  # of the layers; what quantises the ends as well, lacks their weights
            vars(described).pop("quantization_config", None)
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = kinds[:num_layers]
    return config


@torch.no_grad()
def _filled(layer: nn.Module, path: Path, number: int) -> nn.Module:
    """``layer``, which has no storage, with the weights that the files in ``path`` have for it."""
    layer = layer.to_empty(device="cpu")
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            for name in names:
                _, here, own = name.rpartition(f"layers.{number}.")
                if here and own in dict(layer.named_parameters()):
                    found[own] = tensors.get_tensor(name)
    for name, parameter in layer.named_parameters():
        if name not in found or found[name].shape != parameter.shape or found[name].dtype not in UNSCALED:
            raise UserError(
                f"{path}: its files have no layers.{number}.{name} of shape {tuple(parameter.shape)} as it is, which "
                "draft.init_from_target.layer copies; set it to false, or take backend=hf"
            )
        parameter.copy_(found[name])
    return layer


def load_config(path: Path, trust_remote_code: bool = False) -> Any:
    """The configuration of the model in ``path``, without its weights.

    Raises:
        UserError: there is none, or transformers does not know its type.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a usable model configuration: {_first_line(error)}") from error


def text_config(path: Path, trust_remote_code: bool = False) -> Any:
    """The part of :func:`load_config` that is about text."""
    return load_config(path, trust_remote_code).get_text_config()


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in ``path``.

    Raises:
        UserError: there is none that transformers can read.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: the tokenizer cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def decoder_layers(decoder: nn.Module, num_layers: int) -> nn.ModuleList:
    """Those of ``decoder``, which has so many.

    Raises:
        UserError: there is no such list of them.
    """
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise UserError(f"{type(decoder).__name__}: no list of {num_layers} decoder layers found in it")


def stop_ids(generation_eos: int | list[int] | None, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer."""
    eos = generation_eos if isinstance(generation_eos, list) else [generation_eos]
    return frozenset(i for i in [*eos, tokenizer.eos_token_id] if i is not None)
