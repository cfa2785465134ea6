"""The target through transformers: any ``AutoModelForCausalLM``."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from nemo_speculative.data.batch import Batch
from nemo_speculative.distributed.context_parallel import FULL_BATCH
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.document_attention import BY_DOCUMENT, packed_documents
from nemo_speculative.targets.embedding_and_head import EmbeddingAndHead, decoder_layers, load_model
from nemo_speculative.utils.errors import UserError


class TransformersTarget(EmbeddingAndHead):
    """A frozen Hugging Face model in eval mode; see :class:`nemo_speculative.targets.base.Target`.

    Args:
        attn_implementation: transformers' name of its attention.
        ends: those of :class:`.embedding_and_head.EmbeddingAndHead`, and further options of transformers.

    Raises:
        UserError: the directory holds no usable model or tokenizer, or the head does more to the last hidden state
            than this class reproduces.
    """

    def __init__(self, path: Path, *, attn_implementation: str = "sdpa", **ends: Any):
        super().__init__(path, attn_implementation=attn_implementation, **ends)
        # Greedy means the argmax: a repetition penalty that the model ships would otherwise be taken over.
        self.model.generation_config = GenerationConfig()
        self._decoder = self.model.get_decoder()
        self._captured: dict[int, torch.Tensor] = {}
        self.layers = decoder_layers(self._decoder, self.config.num_hidden_layers)
        for layer in self.aux_layers:
            self.layers[layer].register_forward_hook(self._capture(layer))
        self._check_head()
        self._by_document = self._can_attend_by_document()
        self._check_packing()

    def _capture(self, layer: int):
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._captured[layer] = output[0] if isinstance(output, tuple) else output

        return hook

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
        inputs = input_ids.to(self._embedding.weight.device)
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

    def compute_hidden_states(self, batch: Batch) -> TargetOutput:
        """
        Raises:
            UserError: ranks share the batch, and the model does not attend document by document.
        """
        if self._by_document:
            return self._supervise_by_document(batch)
        if batch.shard is not FULL_BATCH:
            raise UserError(
                f"parallelism.context: {type(self.model).__name__} with {self._decoder.config._attn_implementation} "
                "attention reads whole rows; use backend.attn_implementation=sdpa, or parallelism.context=1"
            )
        return TargetOutput(*self.forward(batch.input_ids, batch.positions))

    def _supervise_by_document(self, batch: Batch) -> TargetOutput:
        shard = batch.shard.for_prefetch()
        with self._attention(BY_DOCUMENT), packed_documents(batch.document_lengths(), shard):
            return TargetOutput(*self.forward(shard.local(batch.input_ids), shard.local(batch.positions)))

    def last_layers(self, count: int) -> Sequence[nn.Module]:
        return list(self.layers)[-count:]

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
        if not self._separates_documents(self.compute_hidden_states):
            raise UserError(
                f"{self.path}: {type(self.model).__name__} with {self.model.config._attn_implementation} attention "
                "lets packed documents see each other; try backend.attn_implementation=eager"
            )

    @torch.no_grad()
    def _separates_documents(self, compute_hidden_states: Callable[[Batch], TargetOutput]) -> bool:
        """Whether the second of two packed documents gets the hidden states that it has alone."""
        place = torch.arange(8, device=self.device)[None]
        ids = place % self.config.vocab_size
        batch = Batch(ids, torch.zeros_like(ids, dtype=torch.bool), positions=place % 4, documents=place // 4)
        packed = compute_hidden_states(batch).last_hidden_state[:, 4:].float()
        alone = self.forward(ids[:, 4:])[1].float()
        return torch.allclose(packed, alone, rtol=1e-2, atol=1e-2 * float(alone.abs().max()), equal_nan=True)


class HFTarget(TransformersTarget):
    """One that this process holds whole: the only target that continues texts, answers questions and measures drafts.

    Args:
        device_map, max_memory: see :class:`nemo_speculative.config.schema.PlacementConfig`.
        options: those of :class:`TransformersTarget`.
    """

    def __init__(
        self, path: Path, *, device_map: str | None = None, max_memory: dict[str, str] | None = None, **options: Any
    ):
        placed = _spread(device_map, max_memory) if device_map else {}
        super().__init__(path, **placed, **options)

    def _load(self, **options: Any) -> Any:
        return load_model(self.path, None if "device_map" in options else self.device, **options)


def _spread(device_map: str, max_memory: dict[str, str] | None) -> dict[str, Any]:
    """transformers' options for a model on several devices.

    Raises:
        UserError: the package that does it is missing.
    """
    if find_spec("accelerate") is None:
        raise UserError(f"model.device_map={device_map} needs the accelerate package: pip install accelerate")
    limits = {int(key) if key.isdigit() else key: value for key, value in (max_memory or {}).items()}
    return {"device_map": device_map, "max_memory": limits or None}
