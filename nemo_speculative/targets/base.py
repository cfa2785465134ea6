"""The frozen target of a training: its interface, its output, and the parts of it that a draft itself uses."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from nemo_speculative.config.schema import aux_layers_for
from nemo_speculative.data.batch import Batch
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.distributed.context_parallel import ContextShard
from nemo_speculative.targets.describe import load_config, load_tokenizer, stop_ids_of
from nemo_speculative.targets.fingerprint import target_fingerprint
from nemo_speculative.utils.errors import UserError, describe_error
from nemo_speculative.utils.progress import quiet_transformers

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that need no scale from another tensor."""


@dataclass(frozen=True)
class TargetOutput:
    """The target's hidden states for a batch of B rows of L tokens; for a context shard of m tokens B is 1, L is m."""

    aux_hidden_states: torch.Tensor
    """[B, L, A * h]: outputs of the A aux layers, lowest layer first."""
    last_hidden_state: torch.Tensor
    """[B, L, h]: output of the final norm, so that ``logits(last_hidden_state)`` predicts the next token."""

    def shard(self, shard: ContextShard) -> "TargetOutput":
        """The tokens of ``shard``, of the output for a whole batch."""
        return TargetOutput(shard.local(self.aux_hidden_states), shard.local(self.last_hidden_state))


class Target:
    """A frozen target model, as ``backend=`` chooses it: base class of all targets.

    It loads configuration, tokenizer, embedding, final norm and head of the transformers model in ``path``, and no
    decoder layers; subclasses load these too (see :mod:`.hf`), or get the hidden states from elsewhere.

    To add a target, write a file here with a subclass that implements :meth:`compute_hidden_states`.  It takes packed
    rows and must keep their documents apart: the states of a document are those that it has alone.  It returns the
    tokens of ``batch.shard`` only, on ``device``, in ``dtype``.  Set ``requests_ahead`` and ``collective`` if they
    apply.  Further constructor arguments are the fields of a dataclass in config/schema/target.py, whose ``_target_``
    names the class, plus a YAML in conf/backend/.  hf.py is the example to read; a test of a new target compares it
    with :class:`.hf.HFTarget`.  Logits are never part of the output: losses compute those that they need from the head.

    Args:
        aux_layers: layers whose outputs are captured; None: EAGLE-3's choice.
        dtype, device: those of the loaded weights.
        trust_remote_code: whether the repository's own code may run.
        options: further options of transformers' ``from_pretrained``.

    Raises:
        UserError: the directory holds no usable model or tokenizer, or ``aux_layers`` cannot be captured in it.
    """

    requests_ahead = 0
    """Number of batches that may be requested ahead, in threads; 0 if this process's own device computes them."""
    collective = False
    """Whether all ranks take part in each call, so that they must call equally often, in one order with their other
    collectives."""

    def __init__(
        self, path: Path, *, aux_layers: list[int] | None, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu", trust_remote_code: bool = False, **options: Any,
    ):  # fmt: skip
        self.path, self.device, self.trust_remote_code = Path(path), torch.device(device), trust_remote_code
        self.config = load_config(self.path, trust_remote_code).get_text_config()
        self.aux_layers = aux_layers_for(self.config.num_hidden_layers, aux_layers)
        self.tokenizer = load_tokenizer(self.path, trust_remote_code)
        self.model = self._load(dtype=dtype, trust_remote_code=trust_remote_code, **options)
        self.stop_ids = stop_ids_of(self.path, self.config, self.tokenizer)
        self._head = self.model.get_output_embeddings()
        self._embedding = self.model.get_input_embeddings()

    def _load(self, **options: Any) -> Any:
        return load_model(self.path, self.device, has_layers=False, **options)

    def compute_hidden_states(self, batch: Batch) -> TargetOutput:
        """The hidden states of this rank's tokens, ``batch.shard``."""
        raise NotImplementedError

    def expect(self, *documents: Sequence[TokenRow]) -> None:
        """Called once, before training, with all documents of the run; raises UserError if one is not available."""

    def close(self) -> None:
        """Called at the end of the run, also after an error."""

    def compile(self) -> None:
        """Compiles the parts of :meth:`compute_hidden_states` that can be compiled."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash that identifies the target's weights, from samples of them."""
        return target_fingerprint(self.path)

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] → [..., h], through the frozen embedding."""
        return self._embedding(input_ids.to(self._embedding.weight.device)).to(self.device)

    def logits(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        """[..., h] → [..., V], through the frozen head, scaled and capped as the model itself does."""
        logits = self._head(last_hidden_state.to(self._head.weight.device)).to(self.device)
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        if scale := getattr(self.config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if divisor := getattr(self.config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        return logits

    def require_own_logits(self, logits: torch.Tensor, last_hidden_state: torch.Tensor, backend: str) -> None:
        """Raises UserError if ``logits`` [..., V] are not the head applied to ``last_hidden_state`` [..., h]."""
        if not nearly_equal(self.logits(last_hidden_state), logits):
            raise UserError(
                f"{self.path}: the logits of {type(self.model).__name__} are not its head applied to the last hidden "
                f"state; this architecture is not supported by backend={backend}"
            )

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm in front of the head, if the decoder has one under its usual name."""
        return getattr(self.model.get_decoder(), "norm", None)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states and of the head."""
        return self._head.weight.dtype

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, h]: weight of the frozen head."""
        return self._head.weight

    @torch.no_grad()
    def last_layers(self, count: int) -> Sequence[nn.Module]:
        """The last ``count`` decoder layers, or all if there are fewer, read from the files onto the CPU.
        Raises UserError if they store its weights under other names, or quantized.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=self.trust_remote_code)
        layers = list(enumerate(decoder_layers(model.get_decoder(), self.config.num_hidden_layers)))
        return [_load_layer(layer, self.path, number) for number, layer in layers[-count:]]


def nearly_equal(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the numbers of two computations differ by rounding alone."""
    actual, expected = actual.float(), expected.float()
    return torch.allclose(actual, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()), equal_nan=True)


def load_model(path: Path, device: torch.device | None, has_layers: bool = True, **options: Any) -> Any:
    """The model in ``path``, frozen and in eval mode; ``device`` None leaves the placement to ``options``.

    Raises:
        UserError: transformers cannot load it, or its files lack weights.
    """
    quiet_transformers()
    with ExitStack() as stack:
        if not has_layers:
            options["config"] = _without_layers(load_config(path, options.get("trust_remote_code", False)))
            # transformers would report every layer that is left out.
            stack.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, use_safetensors=True, output_loading_info=True, **options
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{path}: the target cannot be loaded: {describe_error(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{path}: its files lack {missing[0]} and {len(missing) - 1} more of {type(model).__name__}")
    return (model.to(device) if device else model).eval().requires_grad_(False)


def _without_layers(config: Any) -> Any:
    text = config.get_text_config()
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None):
        text.layer_types = []
    for part in (config, text):
        # It describes the layers; a quantizer would also expect quantized embeddings, which the files lack.
        vars(part).pop("quantization_config", None)
    return config


def decoder_layers(decoder: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of the ``num_layers`` decoder layers in ``decoder``; raises UserError if there is none."""
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise UserError(f"{type(decoder).__name__}: no list of {num_layers} decoder layers found in it")


def _load_layer(layer: nn.Module, path: Path, number: int) -> nn.Module:
    """``layer``, which has no storage, on the CPU with the weights of layer ``number`` in ``path``."""
    layer = layer.to_empty(device="cpu")
    parameters = dict(layer.named_parameters())
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            for name in names:
                if (parameter := name.rpartition(f"layers.{number}.")[2]) in parameters:
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
