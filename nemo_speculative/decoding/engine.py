"""Batched speculative decoding: draft, verify, emit; the caches keep what was accepted."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from nemo_speculative.algorithms.common.drafting import last_of
from nemo_speculative.decoding.cached_target import CachedTarget
from nemo_speculative.decoding.drafters import Drafter
from nemo_speculative.decoding.verify import Greedy, Verifier
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.errors import UserError


@dataclass
class Generation:
    """An answer, and the number of tokens that each verification added to it."""

    tokens: list[int] = field(default_factory=list)
    """The answer, including the stop token if it reached one."""
    emitted: list[int] = field(default_factory=list)
    """Tokens emitted by each verification; the answer's first token came from the prefill."""
    finished: bool = False
    """Whether it ended with a stop token rather than at the length limit."""


class Row:
    """A sequence of a :class:`Batch`: a prompt and its answer, at most ``max_new_tokens`` long."""

    def __init__(self, prompt: Sequence[int], max_new_tokens: int):
        self.tokens, self.num_prompt_tokens = list(prompt), len(prompt)
        self.remaining, self.stopped = max_new_tokens, False
        self.emitted: list[int] = []
        """Tokens emitted by the prefill and by each verification."""

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def done(self) -> bool:
        """Whether the answer reached a stop token or its length limit."""
        return self.stopped or not self.remaining

    def extend(self, new: Sequence[int], stop_ids: Collection[int]) -> None:
        """Appends ``new`` up to and including a stop token, or up to the length limit; nothing if it is done."""
        if self.done:
            return
        stop = next((i for i, token in enumerate(new) if token in stop_ids), len(new))
        tokens = new[: min(stop + 1, self.remaining)]
        self.stopped = stop < len(tokens)
        self.remaining -= len(tokens)
        self.tokens += tokens
        self.emitted.append(len(tokens))


RowT = TypeVar("RowT", bound=Row)


class Batch(Generic[RowT]):
    """Sequences that are decoded together.

    Finished rows stay in the batch, and are still computed, until :meth:`release`: the caller decides when
    copying the caches is worth it.  Rows can join at any time if the drafter is stateless.

    Args:
        verifier_of: The verifier for the given rows; it may depend on them, e.g. on a seed of each.
    """

    def __init__(
        self, target: HFTarget, drafter: Drafter, verifier_of: Callable[[Sequence[RowT]], Verifier],
        stop_ids: Collection[int],
    ):  # fmt: skip
        self.target, self.drafter, self.verifier_of, self.stop_ids = target, drafter, verifier_of, stop_ids
        self.clear()

    def clear(self) -> None:
        """Drops every row."""
        self.rows: list[RowT] = []
        self._model: Any = None
        self._drafting: Any = None
        self._states: Any = None
        """Target states at the positions verified last; None for a stateless drafter, which does not read them."""

    @torch.inference_mode()
    def admit(self, rows: Sequence[RowT]) -> None:
        """Prefills ``rows``, samples the first token of each answer, and adds them to the batch."""
        verifier, model = self.verifier_of(rows), CachedTarget(self.target, len(rows))
        drafting = self.drafter.start(len(rows), verifier)
        states = model.prefill([row.tokens for row in rows])
        first = verifier.sample(self.target.logits(last_of(states.last_hidden_state, states.counts)))
        for row, tokens in zip(rows, first.tolist(), strict=True):
            row.extend(tokens, self.stop_ids)
        self.release()
        if self.rows:
            assert not self.drafter.stateful, "rows join a running batch only if the drafter is stateless"
            self._model.kv.join(model.kv)
        else:
            self._model, self._drafting = model, drafting
            self._states = states if self.drafter.stateful else None
        self.rows += rows

    @torch.inference_mode()
    def step(self) -> None:
        """Drafts and verifies once: every unfinished row gets at least one token."""
        trees = self._drafting.propose([row.tokens for row in self.rows], self._states)
        trees = trees.cut([self._model.context - len(row.tokens) for row in self.rows])
        states = self._model.read(trees)
        results = self.verifier_of(self.rows).verify(trees, self.target.logits(states.last_hidden_state))
        paths = [result.path for result in results]
        self._model.kv.keep(paths)
        self._states = states.at(paths) if self.drafter.stateful else None
        for row, result in zip(self.rows, results, strict=True):
            row.extend(result.tokens, self.stop_ids)

    @torch.inference_mode()
    def release(self) -> None:
        """Removes the finished rows."""
        active = [i for i, row in enumerate(self.rows) if not row.done]
        if not active:
            self.clear()
        elif len(active) < len(self.rows):
            self.rows = [self.rows[i] for i in active]
            self._states = self._states.select(active) if self.drafter.stateful else None
            self._model.kv.select(active)
            self._drafting.select(active)


def generate(
    target: HFTarget, drafter: Drafter, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
    stop_ids: Collection[int] | None = None, verifier: Verifier | None = None,
) -> list[Generation]:  # fmt: skip
    """The target's answers to ``prompts``, all decoded together.

    With any drafter, greedy answers are those that the target gives without one, and sampled answers have the target's
    distribution.

    Args:
        max_new_tokens: Limit of each answer; an answer also ends where the target's context does.
        stop_ids: Tokens that end an answer; None: the target's own.
        verifier: Decides which draft tokens are accepted; None: greedy.

    Raises:
        UserError: a prompt is empty or leaves no room for a token, or the drafter does not support the verifier.
    """
    context = target.config.max_position_embeddings
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens: expected 1 to {context - 1}, so that the target's context "
                f"of {context} holds it and a token of the answer"
            )
    rows = [Row(prompt, min(max_new_tokens, context - len(prompt))) for prompt in prompts]
    chosen = verifier or Greedy()
    batch = Batch[Row](target, drafter, lambda _: chosen, target.stop_ids if stop_ids is None else stop_ids)
    if rows:
        batch.admit(rows)
    while any(not row.done for row in rows):
        batch.release()
        batch.step()
    return [Generation(row.answer, row.emitted[1:], row.stopped) for row in rows]
