"""The target through transformers: any ``AutoModelForCausalLM``."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nemo_speculative.data.batch import Batch
from nemo_speculative.errors import UserError
from nemo_speculative.progress import quiet_transformers
from nemo_speculative.shapes import aux_layers_for
from nemo_speculative.targets.base import Supervision
from nemo_speculative.targets.packed_attention import BY_DOCUMENT, packed_documents

FINGERPRINT_SAMPLES, FINGERPRINT_BYTES = 512, 1 << 13


class HFTarget:
    """A frozen Hugging Face model in eval mode; see :class:`nemo_speculative.targets.base.Target`.

    Raises:
        UserError: the directory holds no usable model or tokenizer, or the head does more to the last hidden state
            than this class reproduces.
    """

    def __init__(
        self,
        path: Path,
        *,
        aux_layers: list[int] | None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attn_implementation: str = "sdpa",
        trust_remote_code: bool = False,
        device_map: str | None = None,
        max_memory: dict[str, str] | None = None,
    ):
        self.path, self.device = Path(path), torch.device(device)
        self.config = text_config(path, trust_remote_code)
        self.aux_layers = aux_layers_for(self.config.num_hidden_layers, aux_layers)
        self.tokenizer = load_tokenizer(path, trust_remote_code)
        self.model: Any = _load_model(
            path,
            None if device_map else self.device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            **(_spread(device_map, max_memory) if device_map else {}),
        )
        self.stop_ids = stop_ids(self.model.generation_config.eos_token_id, self.tokenizer)
        """The ids that end an answer: the generation configuration's, and the tokenizer's own."""
        # Greedy means the argmax: a repetition penalty that the model ships would otherwise be taken over.
        self.model.generation_config = GenerationConfig()
        self._decoder = self.model.get_decoder()
        self._head = self.model.get_output_embeddings()
        self._embedding = self.model.get_input_embeddings()
        self._entry, self._exit = self._embedding.weight.device, self._head.weight.device
        self._captured: dict[int, torch.Tensor] = {}
        layers = _decoder_layers(self._decoder, self.config.num_hidden_layers)
        self.layers = layers
        for layer in self.aux_layers:
            layers[layer].register_forward_hook(self._capture(layer))
        self._check_head()
        self._by_document = self._can_attend_by_document()
        self._check_packing()

    def _capture(self, layer: int):
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._captured[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    @property
    def fingerprint(self) -> str:
        """Tells one target's weights from another's, without reading all of them."""
        return target_fingerprint(self.path)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: Any = None,
        visible: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The decoder without the head.

        Args:
            input_ids: int64 [B, L].
            positions: int64 [B or 1, L]; without a cache attention starts anew where they do, by a dense mask.
            cache: a transformers cache, extended in place.
            visible: bool [B or 1, L, m], which of the m cached positions, the new ones last, each position sees; None:
                all before it.

        Returns:
            aux [B, L, A * h] and last hidden state [B, L, h], on ``device``.

        Raises:
            UserError: the model has layers for which no mask can be given.
        """
        inputs = input_ids.to(self._entry)
        with contextlib.nullcontext() if visible is None else self._masked_attention():
            out = self._decoder(
                input_ids=inputs,
                attention_mask=None if visible is None else self._masks(visible.to(inputs.device)),
                position_ids=None if positions is None else positions.to(inputs.device),
                past_key_values=cache,
                use_cache=cache is not None,
            )
        hidden = out.last_hidden_state.to(self.device)
        aux = [self._captured.pop(layer).to(self.device) for layer in self.aux_layers]
        return torch.cat(aux, dim=-1) if aux else hidden[..., :0], hidden

    def _masks(self, visible: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """``visible`` as the decoder takes it: one mask, or where its layers are of several kinds one for each."""
        formed = {kind: self._mask(form(visible)) for kind, form in self._mask_forms.items()}
        return formed if len(formed) > 1 else formed.popitem()[1]

    @cached_property
    def _mask_forms(self) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """What each kind of layer sees of what is visible."""
        forms = {"full_attention": lambda visible: visible, "sliding_attention": self._within_window}
        only = "sliding_attention" if getattr(self.config, "sliding_window", None) else "full_attention"
        kinds = sorted(set(getattr(self.config, "layer_types", None) or [only]))
        unknown = [kind for kind in kinds if kind not in forms]
        if unknown:
            raise UserError(
                f"{self.path}: {type(self.model).__name__} has layers of the kind {unknown[0]}, which cannot verify "
                f"several tokens at once: only {' and '.join(forms)} can"
            )
        return {kind: forms[kind] for kind in kinds}

    def _within_window(self, visible: torch.Tensor) -> torch.Tensor:
        """Of what a position sees, the last so many: in a tree the same as so many before it on its path."""
        window = self.config.sliding_window
        if window >= visible.shape[-1]:
            return visible
        return visible & (visible.flip(-1).cumsum(-1).flip(-1) <= window)

    def _mask(self, visible: torch.Tensor) -> torch.Tensor:
        mask = visible[:, None]
        if self._decoder.config._attn_implementation == "sdpa":
            return mask
        lowest = torch.finfo(self.model.dtype).min
        return torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, lowest)

    def _masked_attention(self) -> contextlib.AbstractContextManager[None]:
        """Flash attention takes no mask per position; eager attention, which every model has, does."""
        takes_masks = self._decoder.config._attn_implementation in ("sdpa", "eager")
        return contextlib.nullcontext() if takes_masks else self._attention("eager")

    @contextlib.contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        config = self._decoder.config
        chosen = config._attn_implementation
        config._attn_implementation = name
        try:
            yield
        finally:
            config._attn_implementation = chosen

    def compile(self) -> None:
        """torch.compile what every layer does to each token by itself: its shapes do not depend on the documents."""
        for layer in self.layers:
            if isinstance(mlp := getattr(layer, "mlp", None), nn.Module):
                mlp.compile()

    def supervise(self, batch: Batch) -> Supervision:
        if self._by_document:
            return self._supervise_by_document(batch)
        return Supervision(*self.forward(batch.input_ids, batch.positions))

    def _supervise_by_document(self, batch: Batch) -> Supervision:
        with self._attention(BY_DOCUMENT), packed_documents(batch.document_lengths()):
            return Supervision(*self.forward(batch.input_ids, batch.positions))

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._embedding(input_ids.to(self._entry)).to(self.device)

    def logits(self, last_hidden: torch.Tensor) -> torch.Tensor:
        logits = self._head(last_hidden.to(self._exit)).to(self.device)
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
        return getattr(self._decoder, "norm", None)

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, h]: the rows of the frozen head."""
        return self._head.weight

    @torch.no_grad()
    def _check_head(self) -> None:
        probe = torch.arange(8, device=self.device)[None] % self.config.vocab_size
        expected = self.model(input_ids=probe, use_cache=False).logits.float()
        found = self.logits(self.forward(probe)[1]).float()
        if not torch.allclose(expected, found, rtol=1e-2, atol=1e-2 * float(expected.abs().max()), equal_nan=True):
            raise UserError(
                f"{self.path}: the logits of {type(self.model).__name__} are not its head applied to the last hidden "
                "state; this architecture is not supported by backend=hf"
            )

    def _can_attend_by_document(self) -> bool:
        """Whether packed rows need no dense mask; a model whose own code wants a tensor for one does without."""
        if self._decoder.config._attn_implementation != "sdpa":
            return False
        try:
            return self._separates_documents(self._supervise_by_document)
        except (NotImplementedError, AttributeError, TypeError):
            return False

    def _check_packing(self) -> None:
        """A model that does not tell documents apart would leak silently."""
        if not self._separates_documents(self.supervise):
            raise UserError(
                f"{self.path}: {type(self.model).__name__} with {self.model.config._attn_implementation} attention "
                "lets packed documents see each other; try backend.attn_implementation=eager"
            )

    @torch.no_grad()
    def _separates_documents(self, supervise: Callable[[Batch], Supervision]) -> bool:
        """Whether the second of two packed documents gets the hidden states that it has alone."""
        place = torch.arange(8, device=self.device)[None]
        ids = place % self.config.vocab_size
        batch = Batch(ids, torch.zeros_like(ids, dtype=torch.bool), positions=place % 4, documents=place // 4)
        packed = supervise(batch).last_hidden[:, 4:].float()
        alone = self.forward(ids[:, 4:])[1].float()
        return torch.allclose(packed, alone, rtol=1e-2, atol=1e-2 * float(alone.abs().max()), equal_nan=True)


def _load_model(path: Path, device: torch.device | None, **options: Any) -> Any:
    """On ``device``; None leaves the placement to ``options``."""
    quiet_transformers()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: the target cannot be loaded: {_first_line(error)}") from error
    return (model.to(device) if device else model).eval().requires_grad_(False)


def _spread(device_map: str, max_memory: dict[str, str] | None) -> dict[str, Any]:
    """transformers' options for a model on several devices.

    Raises:
        UserError: the package that does it is missing.
    """
    if find_spec("accelerate") is None:
        raise UserError(f"model.device_map={device_map} needs the accelerate package: pip install accelerate")
    limits = {int(key) if key.isdigit() else key: value for key, value in (max_memory or {}).items()}
    return {"device_map": device_map, "max_memory": limits or None}


def text_config(path: Path, trust_remote_code: bool = False) -> Any:
    """The (text) configuration of the model in ``path``, without its weights.

    Raises:
        UserError: there is none, or transformers does not know its type.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a usable model configuration: {_first_line(error)}") from error


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


def _decoder_layers(decoder: nn.Module, num_layers: int) -> nn.ModuleList:
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise UserError(f"{type(decoder).__name__}: no list of {num_layers} decoder layers found in it")


def stop_ids(generation_eos: int | list[int] | None, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer."""
    eos = generation_eos if isinstance(generation_eos, list) else [generation_eos]
    return frozenset(i for i in [*eos, tokenizer.eos_token_id] if i is not None)


def target_fingerprint(path: Path) -> str:
    """A hash over the configuration and the names, sizes and evenly spaced samples of the weight files in ``path``."""
    digest = hashlib.sha256()
    config = json.loads((path / "config.json").read_text())
    config.pop("transformers_version", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as weights:
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            for start in range(0, size, max(size // FINGERPRINT_SAMPLES, FINGERPRINT_BYTES)):
                weights.seek(start)
                digest.update(weights.read(FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]
