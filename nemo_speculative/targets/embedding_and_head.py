"""The parts of a frozen target that a draft itself uses: tokenizer, embedding, final norm and head."""

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

from nemo_speculative.config.schema import aux_layers_for
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.targets.fingerprint import target_fingerprint
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.progress import quiet_transformers

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that need no scale from another tensor."""


class EmbeddingAndHead:
    """Base class of targets: a transformers model in ``path`` whose decoder layers are not loaded.

    Subclasses get the hidden states from elsewhere, or load the layers as well
    (:class:`nemo_speculative.targets.hf.TransformersTarget`).

    Args:
        aux_layers: layers whose outputs are captured; None: EAGLE-3's choice.
        dtype, device: those of the loaded weights.
        trust_remote_code: whether the repository's own code may run.
        options: further options of transformers' ``from_pretrained``.

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
        **options: Any,
    ):
        self.path, self.device, self.trust_remote_code = Path(path), torch.device(device), trust_remote_code
        self.config = text_config(self.path, trust_remote_code)
        self.aux_layers = aux_layers_for(self.config.num_hidden_layers, aux_layers)
        self.tokenizer = load_tokenizer(self.path, trust_remote_code)
        self.model = self._load(dtype=dtype, trust_remote_code=trust_remote_code, **options)
        self.stop_ids = stop_ids(self.model.generation_config.eos_token_id, self.tokenizer)
        self._head = self.model.get_output_embeddings()
        self._embedding = self.model.get_input_embeddings()

    def _load(self, **options: Any) -> Any:
        return load_model(self.path, self.device, num_layers=0, **options)

    @cached_property
    def fingerprint(self) -> str:
        """Hash that identifies the target's weights, from samples of them."""
        return target_fingerprint(self.path)

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] → [..., h]"""
        return self._embedding(input_ids.to(self._embedding.weight.device)).to(self.device)

    def logits(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        """[..., h] → [..., V], scaled and capped as the model itself does."""
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
        """The norm in front of the head, if the decoder has one under its usual name."""
        return getattr(self.model.get_decoder(), "norm", None)

    @property
    def dtype(self) -> torch.dtype:
        return self._head.weight.dtype

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, h]"""
        return self._head.weight

    @torch.no_grad()
    def last_layers(self, count: int) -> Sequence[nn.Module]:
        """The last ``count`` decoder layers, or all if there are fewer, read from the files onto the CPU.

        Raises:
            UserError: the files store a layer's weights under other names, or quantized.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=self.trust_remote_code)
        layers = decoder_layers(model.get_decoder(), self.config.num_hidden_layers)
        first = max(len(layers) - count, 0)
        return [_load_layer(layer, self.path, first + n) for n, layer in enumerate(layers[first:])]

    def expect(self, *documents: Sequence[TokenRow]) -> None:
        """Nothing to check: any document can be computed."""

    def close(self) -> None:
        """Nothing to release."""

    def compile(self) -> None:
        """Nothing to compile."""


def load_model(path: Path, device: torch.device | None, num_layers: int | None = None, **options: Any) -> Any:
    """The model in ``path``, frozen and in eval mode.

    Args:
        device: None leaves the placement to ``options``.
        num_layers: number of decoder layers to load; None: all.

    Raises:
        UserError: transformers cannot load it, or its files lack weights.
    """
    quiet_transformers()
    logs: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if num_layers is not None:
        options["config"] = _truncate(load_config(path, options.get("trust_remote_code", False)), num_layers)
        logs = _errors_only()  # transformers would report every layer that is left out
    loaded: Any
    try:
        with logs:
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
def _errors_only() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _truncate(config: Any, num_layers: int) -> Any:
    """The configuration of the same model with only its first layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = num_layers
    if not num_layers:
        # It describes the layers; a quantizer would also expect quantized embeddings, which the files lack.
        for part in (config, text):
            vars(part).pop("quantization_config", None)
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = kinds[:num_layers]
    return config


def _load_layer(layer: nn.Module, path: Path, number: int) -> nn.Module:
    """``layer``, which has no storage, on the CPU with the weights of layer ``number`` in ``path``."""
    layer = layer.to_empty(device="cpu")
    parameters = dict(layer.named_parameters())
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            for name in names:
                _, prefix, parameter = name.rpartition(f"layers.{number}.")
                if prefix and parameter in parameters:
                    weights[parameter] = tensors.get_tensor(name)
    for name, parameter in parameters.items():
        weight = weights.get(name)
        if weight is None or weight.shape != parameter.shape or weight.dtype not in PLAIN_DTYPES:
            raise UserError(
                f"{path}: its files have no layers.{number}.{name} of shape {tuple(parameter.shape)} as it is, which "
                "draft.init_from_target.layer copies; set it to false, or use backend=hf"
            )
        parameter.copy_(weight)
    return layer


def load_config(path: Path, trust_remote_code: bool = False) -> Any:
    """The configuration of the model in ``path``.

    Raises:
        UserError: there is none, or transformers does not know its type.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a usable model configuration: {_first_line(error)}") from error


def text_config(path: Path, trust_remote_code: bool = False) -> Any:
    """The text part of :func:`load_config`."""
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
    """The list of the ``num_layers`` decoder layers in ``decoder``.

    Raises:
        UserError: there is no such list.
    """
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise UserError(f"{type(decoder).__name__}: no list of {num_layers} decoder layers found in it")


def stop_ids(generation_eos: int | list[int] | None, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer: those of the generation configuration, and the tokenizer's end-of-text id."""
    eos = generation_eos if isinstance(generation_eos, list) else [generation_eos]
    return frozenset(i for i in [*eos, tokenizer.eos_token_id] if i is not None)
