"""Speculative decoding of one sequence: draft, verify, emit; the caches keep what was accepted."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from nemo_speculative.decoding.drafters import Drafter
from nemo_speculative.decoding.verification import verify_greedy
from nemo_speculative.targets.hf import HFTarget


@dataclass
class Generation:
    """An answer and how it came about."""

    tokens: list[int] = field(default_factory=list)
    """The answer, its stop token included where it reached one."""
    emitted: list[int] = field(default_factory=list)
    """Tokens that each verification emitted; the first token of the answer came from the prefill."""
    finished: bool = False
    """Whether it ended with a stop token rather than at the length limit."""


@torch.inference_mode()
def generate_greedy(
    target: HFTarget, drafter: Drafter, prompt: Sequence[int], max_new_tokens: int, stop_ids: Collection[int]
) -> Generation:
    """The target's greedy answer to ``prompt``: the same tokens with every drafter, in fewer target forwards."""
    out, cache, tokens = Generation(), DynamicCache(config=target.config), list(prompt)
    limit = min(max_new_tokens, target.config.max_position_embeddings - len(prompt))
    drafter.start()
    aux, hidden = target.forward(torch.tensor([tokens], device=target.device), cache=cache)
    new = target.logits(hidden[:, -1]).argmax(-1).tolist()
    while _emit(new, out, tokens, limit, stop_ids):
        room = target.config.max_position_embeddings - len(tokens)
        draft_tokens = drafter.propose(tokens, aux)[:room]
        block = torch.tensor([[tokens[-1], *draft_tokens]], device=target.device)
        aux, hidden = target.forward(block, cache=cache)
        new = verify_greedy(draft_tokens, target.logits(hidden)[0].argmax(-1).tolist())
        rejected = len(draft_tokens) + 1 - len(new)
        if rejected:
            cache.crop(-rejected)
        aux = aux[:, : len(new)]
        out.emitted.append(len(new))
    return out


def _emit(new: list[int], out: Generation, tokens: list[int], limit: int, stop_ids: Collection[int]) -> bool:
    """Adds ``new`` up to a stop token or the limit; returns whether decoding goes on."""
    stop = next((i for i, token in enumerate(new) if token in stop_ids), None)
    kept = new[: limit - len(out.tokens)] if stop is None else new[: stop + 1][: limit - len(out.tokens)]
    out.finished = stop is not None and len(kept) == stop + 1
    out.tokens += kept
    tokens += kept
    if out.emitted:
        out.emitted[-1] = len(kept)
    return not out.finished and len(out.tokens) < limit
