"""Speculative decoding: draft, verify, emit; the caches keep what was accepted."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from nemo_speculative.decoding.cached_target import CachedTarget
from nemo_speculative.decoding.drafters import Drafter
from nemo_speculative.decoding.verify import Greedy, Verifier
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.errors import UserError


class Emission(NamedTuple):
    """What a prefill or a verification added to one answer."""

    sequence: int
    """Which prompt's."""
    tokens: list[int]
    finished: bool
    """Whether the last of them is a stop token."""


@dataclass
class Generation:
    """An answer and how it came about."""

    tokens: list[int] = field(default_factory=list)
    """The answer, its stop token included where it reached one."""
    emitted: list[int] = field(default_factory=list)
    """Tokens that each verification emitted; the first token of the answer came from the prefill."""
    finished: bool = False
    """Whether it ended with a stop token rather than at the length limit."""

    def add(self, emission: Emission) -> None:
        """Appends what came next."""
        if self.tokens:
            self.emitted.append(len(emission.tokens))
        self.tokens += emission.tokens
        self.finished = emission.finished


class _Row:
    """A prompt and the answer behind it, to which ``room`` tokens can still be added."""

    def __init__(self, number: int, prompt: Sequence[int], room: int):
        self.number, self.tokens, self.room, self.finished = number, list(prompt), room, False

    @property
    def done(self) -> bool:
        return self.finished or not self.room

    def emit(self, new: Sequence[int], stop_ids: Collection[int]) -> Emission:
        """Adds ``new`` up to a stop token, included, or the end of the room."""
        stop = next((i for i, token in enumerate(new) if token in stop_ids), len(new))
        kept = list(new[: min(stop + 1, self.room)])
        self.finished = stop < len(kept)
        self.room -= len(kept)
        self.tokens += kept
        return Emission(self.number, kept, self.finished)


def generate(target: HFTarget, drafter: Drafter, prompts: Sequence[Sequence[int]], **options: Any) -> list[Generation]:
    """The answers of :func:`stream`, which takes the same ``options``, each as a whole and how it came about."""
    answers = [Generation() for _ in prompts]
    for emission in stream(target, drafter, prompts, **options):
        answers[emission.sequence].add(emission)
    return answers


def stream(
    target: HFTarget,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] | None = None,
    verifier: Verifier | None = None,
) -> Iterator[Emission]:
    """The target's answers to ``prompts``, all decoded at once, a few tokens of one sequence at a time.

    Args:
        max_new_tokens: of an answer; one also ends where the target's context does.
        stop_ids: what ends an answer; None: the target's own.
        rule: which draft tokens stay; None: greedy.  Whatever the drafter, greedy answers are those that the target
            gives alone, and sampled ones have the target's distribution.

    Raises:
        UserError: no room for a single token, an empty prompt, or a drafter that cannot draft for ``verifier``.
    """
    rows = _rows(target, prompts, max_new_tokens)
    return _decode(target, drafter, rows, target.stop_ids if stop_ids is None else stop_ids, verifier or Greedy())


def _rows(target: HFTarget, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[_Row]:
    context = target.config.max_position_embeddings
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens: expected 1 to {context - 1}, so that the target's context "
                f"of {context} holds it and a token of the answer"
            )
    return [_Row(i, prompt, min(max_new_tokens, context - len(prompt))) for i, prompt in enumerate(prompts)]


@torch.inference_mode()
def _decode(
    target: HFTarget, drafter: Drafter, rows: list[_Row], stop_ids: Collection[int], verifier: Verifier
) -> Iterator[Emission]:
    if not rows:
        return
    model, drafting = CachedTarget(target, len(rows)), drafter.start(len(rows), verifier)
    states = model.prefill([row.tokens for row in rows])
    new = verifier.sample(target.logits(states.last())).tolist()
    while True:
        for row, tokens in zip(rows, new, strict=True):
            yield row.emit(tokens, stop_ids)
        going = [i for i, row in enumerate(rows) if not row.done]
        if not going:
            return
        if len(going) < len(rows):
            rows, states = [rows[i] for i in going], states.select(going)
            model.select(going)
            drafting.select(going)
        trees = drafting.propose([row.tokens for row in rows], states)
        trees = trees.cut([model.context - len(row.tokens) for row in rows])
        states = model.read(trees)
        results = verifier.verify(trees, target.logits(states.last_hidden_state))
        paths = [result.path for result in results]
        model.keep(paths)
        states, new = states.at(paths), [result.tokens for result in results]
