"""``backend=hf``: the target through transformers, any ``AutoModelForCausalLM``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from nemo_speculative.data.batch import Batch
from nemo_speculative.distributed.context_parallel import FULL_BATCH
from nemo_speculative.targets.base import Target, TargetOutput, decoder_layers, load_model, nearly_equal
from nemo_speculative.targets.document_attention import BY_DOCUMENT, packed_documents
from nemo_speculative.utils.errors import UserError


class TransformersTarget(Target):
    """A frozen Hugging Face model in eval mode, whole or divided over ranks (:mod:`.sharded`).

    Args:
        attn_implementation: transformers' name of the attention.

    Raises:
        UserError: the directory holds no usable model or tokenizer, the head does more to the last hidden state than
            this class reproduces, or packed documents would see each other.
    """

    def __init__(self, path: Path, *, attn_implementation: str = "sdpa", **options: Any):
        super().__init__(path, attn_implementation=attn_implementation, **options)
        # Greedy decoding means the argmax: a repetition penalty that the model ships would otherwise apply.
        self.model.generation_config = GenerationConfig()
        self._decoder = self.model.get_decoder()
        self.layers = decoder_layers(self._decoder, self.config.num_hidden_layers)
        self._captured: dict[int, torch.Tensor] = {}
        for layer in self.aux_layers:
            self.layers[layer].register_forward_hook(partial(self._capture, layer))
        self._check_head()
        self._by_document = self._can_attend_by_document()
        if not self._separates_documents(self.compute_hidden_states):
            raise UserError(
                f"{self.path}: {type(self.model).__name__} with {attn_implementation} attention "
                "lets packed documents see each other; try backend.attn_implementation=eager"
            )

    def compute_hidden_states(self, batch: Batch) -> TargetOutput:
        """Raises UserError if context-parallel ranks share the batch, and the model does not attend by document."""
        if self._by_document:
            return self._compute_by_document(batch)
        if batch.shard is not FULL_BATCH:
            raise UserError(
                f"parallelism.context: {type(self.model).__name__} with {self._decoder.config._attn_implementation} "
                "attention reads whole rows; use backend.attn_implementation=sdpa, or parallelism.context=1"
            )
        return TargetOutput(*self.forward(batch.input_ids, batch.positions))

    def _compute_by_document(self, batch: Batch) -> TargetOutput:
        shard = batch.shard.for_prefetch()
        with self._use_attention(BY_DOCUMENT), packed_documents(batch.document_lengths(), shard):
            return TargetOutput(*self.forward(shard.local(batch.input_ids), shard.local(batch.positions)))

    @torch.no_grad()
    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor | None = None, cache: Any = None,
        visible: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Runs the decoder without the head; raises UserError if no mask can be made of ``visible`` for its layers.

        Args:
            input_ids: int64 [B, L].
            positions: int64 [B or 1, L]; without a cache each 0 starts a new document, separated by a dense mask.
            cache: a transformers cache, extended in place.
            visible: bool [B or 1, L, m]: which of the m cached positions, including the new ones at the end, each new
                position attends to; None: all earlier ones.

        Returns:
            aux [B, L, A * h] and last hidden state [B, L, h], on ``device``.
        """
        inputs = input_ids.to(self._embedding.weight.device)
        with ExitStack() as stack:
            # Flash attention takes no mask per position; eager attention, which every model has, does.
            if visible is not None and self._decoder.config._attn_implementation not in ("sdpa", "eager"):
                stack.enter_context(self._use_attention("eager"))
            out = self._decoder(
                input_ids=inputs,
                attention_mask=None if visible is None else self._attention_masks(visible.to(inputs.device)),
                position_ids=None if positions is None else positions.to(inputs.device),
                past_key_values=cache,
                use_cache=cache is not None,
            )
        hidden = out.last_hidden_state.to(self.device)
        aux = [self._captured.pop(layer).to(self.device) for layer in self.aux_layers]
        return torch.cat(aux, dim=-1) if aux else hidden[..., :0], hidden

    def _capture(self, layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
        self._captured[layer] = output[0] if isinstance(output, tuple) else output

    def _attention_masks(self, visible: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """``visible`` in the form the decoder takes: one mask, or one for each kind of layer."""
        window: Any = getattr(self.config, "sliding_window", None)
        default = "sliding_attention" if window else "full_attention"
        masks = {}
        for kind in sorted(set(getattr(self.config, "layer_types", None) or [default])):
            if kind not in ("full_attention", "sliding_attention"):
                raise UserError(
                    f"{self.path}: {type(self.model).__name__} has layers of the kind {kind}, which cannot verify "
                    "several tokens at once: only full_attention and sliding_attention can"
                )
            mask = visible[:, None]
            if kind == "sliding_attention" and window < visible.shape[-1]:
                # The last `window` visible positions: in a tree those are the nearest ancestors on the path.
                mask = mask & (mask.flip(-1).cumsum(-1).flip(-1) <= window)
            if self._decoder.config._attn_implementation != "sdpa":
                dtype = self.model.dtype
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            masks[kind] = mask
        return masks if len(masks) > 1 else masks.popitem()[1]

    @contextmanager
    def _use_attention(self, name: str) -> Iterator[None]:
        config = self._decoder.config
        before, config._attn_implementation = config._attn_implementation, name
        try:
            yield
        finally:
            config._attn_implementation = before

    def compile(self) -> None:
        """Compiles the MLP of every layer: its shapes do not depend on the documents."""
        for layer in self.layers:
            if isinstance(mlp := getattr(layer, "mlp", None), nn.Module):
                mlp.compile()

    def last_layers(self, count: int) -> Sequence[nn.Module]:
        return list(self.layers)[-count:]

    @torch.no_grad()
    def _check_head(self) -> None:
        probe = torch.arange(8, device=self.device)[None] % self.config.vocab_size
        logits = self.model(input_ids=probe, use_cache=False).logits
        self.require_own_logits(logits, self.forward(probe)[1], "hf")

    def _can_attend_by_document(self) -> bool:
        """Whether packed rows need no dense mask; not so for models whose own code requires a mask tensor."""
        if self._decoder.config._attn_implementation != "sdpa":
            return False
        try:
            return self._separates_documents(self._compute_by_document)
        except (NotImplementedError, AttributeError, TypeError):
            return False

    def _separates_documents(self, compute_hidden_states: Callable[[Batch], TargetOutput]) -> bool:
        """Whether the second of two packed documents gets the hidden states that it has alone."""
        at = torch.arange(8, device=self.device)[None]
        ids = at % self.config.vocab_size
        batch = Batch(ids, torch.zeros_like(ids, dtype=torch.bool), positions=at % 4, documents=at // 4)
        packed = compute_hidden_states(batch).last_hidden_state[:, 4:]
        return nearly_equal(packed, self.forward(ids[:, 4:])[1])


class HFTarget(TransformersTarget):
    """A model that this process holds whole: the only target that generates text and measures drafts in training.

    ``device_map`` and ``max_memory``: see PlacementConfig.  Raises UserError if the accelerate package is missing.
    """

    def __init__(
        self, path: Path, *, device_map: str | None = None, max_memory: dict[str, str] | None = None, **options: Any
    ):
        if device_map:
            if find_spec("accelerate") is None:
                raise UserError(f"model.device_map={device_map} needs the accelerate package: pip install accelerate")
            limits = {int(key) if key.isdigit() else key: value for key, value in (max_memory or {}).items()}
            options |= {"device_map": device_map, "max_memory": limits or None}
        super().__init__(path, **options)

    def _load(self, **options: Any) -> Any:
        return load_model(self.path, None if "device_map" in options else self.device, **options)
