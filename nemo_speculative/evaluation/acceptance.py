"""Acceptance length and speed of a draft on held-out questions, beside plain decoding and n-gram drafting."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nemo_speculative.config.schema import EvaluationConfig
from nemo_speculative.data.chat import prompt_ids
from nemo_speculative.data.conversations import Conversation, TokenRow
from nemo_speculative.decoding.drafters import Drafter, Eagle3Drafter, NgramDrafter, NoDrafter
from nemo_speculative.decoding.generate import Generation, generate_greedy
from nemo_speculative.drafts.eagle3 import Eagle3Draft
from nemo_speculative.progress import Progress
from nemo_speculative.targets.hf import HFTarget


@dataclass
class Measured:
    """What one way of drafting did on all questions."""

    generations: list[Generation] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tau(self) -> float:
        """Acceptance length: tokens emitted per verification, bonus token included."""
        return _tau(self.generations)

    @property
    def tau_finished(self) -> float | None:
        """The same over answers that ended with a stop token (an endless loop is easy to draft); None without any."""
        finished = [g for g in self.generations if g.finished and g.emitted]
        return _tau(finished) if finished else None

    @property
    def tokens_per_second(self) -> float:
        return sum(len(g.tokens) for g in self.generations) / max(self.seconds, 1e-9)

    def acceptance_per_position(self, num_steps: int) -> list[float]:
        """Share of the verifications that accepted draft token i and all before it; τ = 1 + their sum."""
        emitted = [n for g in self.generations for n in g.emitted]
        return [sum(n > i + 1 for n in emitted) / max(len(emitted), 1) for i in range(num_steps)]


def _tau(generations: Sequence[Generation]) -> float:
    verifications = sum(len(g.emitted) for g in generations)
    return sum(sum(g.emitted) for g in generations) / max(verifications, 1)


@dataclass(frozen=True)
class Evaluation:
    """A draft beside its baselines on the same questions."""

    draft: Measured
    plain: Measured
    ngram: Measured
    num_steps: int

    FIGURES = (
        "tau",
        "acceptance_per_position",
        "ngram_tau",
        "tokens_per_second",
        "baseline_tokens_per_second",
        "lossless",
    )
    """The names in ``summary.json`` that other programs may rely on."""

    @property
    def lossless(self) -> bool:
        """Whether every answer is, token by token, the one that the target gives without a draft."""
        return self.identical == len(self.plain.generations)

    @property
    def identical(self) -> int:
        """Questions answered identically with and without the draft."""
        return sum(d.tokens == p.tokens for d, p in zip(self.draft.generations, self.plain.generations, strict=True))

    def summary(self) -> dict[str, object]:
        """The figures of ``summary.json``."""
        return {
            "tau": self.draft.tau,
            "tau_finished": self.draft.tau_finished,
            "acceptance_per_position": self.draft.acceptance_per_position(self.num_steps),
            "ngram_tau": self.ngram.tau,
            "ngram_tau_finished": self.ngram.tau_finished,
            "tokens_per_second": self.draft.tokens_per_second,
            "baseline_tokens_per_second": self.plain.tokens_per_second,
            "ngram_tokens_per_second": self.ngram.tokens_per_second,
            "lossless": self.lossless,
            "num_draft_tokens_per_chain": self.num_steps,
            "questions": len(self.draft.generations),
            "finished_answers": sum(g.finished for g in self.plain.generations),
        }


@contextlib.contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Runs on ``number`` CPU threads; None leaves the setting alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def evaluate_draft(
    target: HFTarget, draft: Eagle3Draft, prompts: Sequence[Sequence[int]], num_steps: int, config: EvaluationConfig
) -> Evaluation:
    """Answers every prompt three times, one way after the other, so that a noisy machine hits all alike."""
    with cpu_threads(config.num_threads):
        return _evaluate(target, draft, prompts, num_steps, config)


def _evaluate(target, draft, prompts, num_steps: int, config: EvaluationConfig) -> Evaluation:
    max_new_tokens = config.max_new_tokens
    ways: dict[str, Drafter] = {
        "plain": NoDrafter(),
        "ngram": NgramDrafter(num_steps, config.ngram),
        "draft": Eagle3Drafter(draft, target, num_steps),
    }
    measured = {name: Measured() for name in ways}
    stop_ids, progress = target.stop_ids, Progress("measuring", len(prompts))
    for drafter in ways.values():  # warm-up: the first call allocates
        generate_greedy(target, drafter, prompts[0], min(16, max_new_tokens), stop_ids)
    for prompt in prompts:
        for name, drafter in ways.items():
            started = time.perf_counter()
            measured[name].generations.append(generate_greedy(target, drafter, prompt, max_new_tokens, stop_ids))
            measured[name].seconds += time.perf_counter() - started
        progress.advance(lambda: f"tau {measured['draft'].tau:.2f}")
    progress.close()
    return Evaluation(**measured, num_steps=num_steps)


def measure_tau(
    target: HFTarget, draft: Eagle3Draft, prompts: Sequence[Sequence[int]], num_steps: int, config: EvaluationConfig
) -> float:
    """τ of the draft alone: the figure by which a run chooses its best checkpoint."""
    drafter, stop_ids = Eagle3Drafter(draft, target, num_steps), target.stop_ids
    with cpu_threads(config.num_threads):
        return Measured([generate_greedy(target, drafter, p, config.max_new_tokens, stop_ids) for p in prompts]).tau


def prompt_of(row: Conversation | TokenRow, tokenizer: Any) -> list[int]:
    """The ids after which the first answer begins: of a conversation, or up to the first supervised token."""
    if isinstance(row, TokenRow):
        return row.input_ids[: row.loss_mask.index(True)] if True in row.loss_mask else list(row.input_ids)
    roles = [m["role"] for m in row.messages]
    asked = row.messages[: roles.index("assistant")] if "assistant" in roles else row.messages
    return prompt_ids(tokenizer, asked, row.origin) if asked else []


def question_prompts(rows: Sequence[TokenRow], limit: int, max_prompt: int) -> list[list[int]]:
    """The prompts of the first ``limit`` rows that have one of at most ``max_prompt`` tokens."""
    prompts = (row.input_ids[: row.loss_mask.index(True)] for row in rows)
    return [p for p in prompts if 0 < len(p) <= max_prompt][:limit]
