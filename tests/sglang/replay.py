"""SGLang's own draft class, run step by step as in its worker; everything but the attention kernel is SGLang's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.speculative.eagle_info import EagleDraftExtendInput, EagleDraftInput
from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from nemo_speculative.checkpoint.draft_checkpoint import read_servable
from tests.sglang.family import LENGTH, STEPS, Ends, Given


class PlainAttention:
    """Causal attention with its own cache, in place of SGLang's kernels."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any, batch: ForwardBatch, save: bool = True
    ) -> torch.Tensor:
        """The new positions of one sequence: [n, H * d] and twice [n, H_kv, d] → [n, H * d]."""
        old_keys, old_values = self._seen.get(layer.layer_id, (k[:0], v[:0]))
        keys, values = self._seen[layer.layer_id] = torch.cat((old_keys, k)), torch.cat((old_values, v))
        q = q.view(len(k), -1, layer.head_dim)
        groups = q.shape[1] // keys.shape[1]
        scores = torch.einsum("nhd,mhd->hnm", q, keys.repeat_interleave(groups, dim=1)) * layer.scaling
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(keys) - len(k) + 1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return torch.einsum("hnm,mhd->nhd", weights, values.repeat_interleave(groups, dim=1)).flatten(1)


class Runner:
    """A loaded draft with one sequence in its cache."""

    def __init__(self, model: Any, algorithm: str, ends: Ends):
        self.model, self.attention = model, PlainAttention()
        self.ids = _share(model, algorithm, ends)

    def extend(self, tokens: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's features of the first n positions and the tokens after them: logits [n, V_d], states [n, h]."""
        info = EagleDraftExtendInput(hidden_states=features)
        return self._forward(tokens, torch.arange(len(tokens)), info, ForwardMode.DRAFT_EXTEND_V2)

    def decode(self, token: torch.Tensor, position: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft step on the state that the step before returned: int64 [1], [1, h] → [1, V_d], [1, h]."""
        info = EagleDraftInput(hidden_states=state)
        return self._forward(token, torch.tensor([position]), info, ForwardMode.DECODE)

    def _forward(self, tokens, positions, info, mode: ForwardMode) -> tuple[torch.Tensor, torch.Tensor]:
        length = int(positions[-1]) + 1
        batch = ForwardBatch(
            forward_mode=mode, batch_size=1, input_ids=tokens, req_pool_indices=torch.zeros(1, dtype=torch.long),
            seq_lens=torch.tensor([length]), out_cache_loc=positions, seq_lens_sum=length, positions=positions,
            spec_info=info, capture_hidden_mode=CaptureHiddenMode.FULL,
        )  # fmt: skip
        with forward_context(ForwardContext(attn_backend=self.attention)):  # type: ignore[arg-type]
            output = self.model(tokens, positions, batch)
        return output.next_token_logits, output.hidden_states


def _share(model: Any, algorithm: str, ends: Ends) -> torch.Tensor:
    """Sets the target's tensors as SGLang's worker does, and returns the worker's ids of the draft vocabulary."""
    embedding, head = (torch.nn.Parameter(weight, requires_grad=False) for weight in (ends.embedding, ends.head))
    worker = SimpleNamespace(
        speculative_algorithm=SpeculativeAlgorithm.from_string(algorithm),
        draft_runner=SimpleNamespace(model=model),
        target_worker=SimpleNamespace(model_runner=SimpleNamespace(model=None)),
        hot_token_id=None,
        _resolve_shared_embed_and_head=lambda: (embedding, head),
    )
    EagleDraftWorker.init_lm_head(worker)  # type: ignore[arg-type]
    return torch.arange(len(head)) if worker.hot_token_id is None else worker.hot_token_id


@torch.no_grad()
def replay(model: Any, directory: Path) -> None:
    """Writes ``returned.safetensors`` next to the checkpoint in ``directory``, whose weights ``model`` has.

    ``logits`` [LENGTH + STEPS, V_d] and ``states`` [LENGTH + STEPS, h]: of the LENGTH given positions, then of STEPS
    steps that each read the state of the one before and the token that it liked best, ``drafted`` int64 [STEPS].
    """
    given = Given.load(directory.parent / "given.safetensors")
    runner = Runner(model, read_servable(directory).algorithm, given.ends)
    logits, states = runner.extend(given.tokens, given.features)
    all_logits, all_states, drafted = [logits], [states], []
    for step in range(STEPS):
        drafted.append(runner.ids[logits[-1:].argmax(-1)])
        logits, states = runner.decode(drafted[-1], LENGTH + step, states[-1:])
        all_logits.append(logits)
        all_states.append(states)
    outputs = {"logits": torch.cat(all_logits), "states": torch.cat(all_states), "drafted": torch.cat(drafted)}
    save_file(
        {name: tensor.contiguous() for name, tensor in outputs.items()}, directory.parent / "returned.safetensors"
    )
