"""Acceptance length and speed of a draft on held-out questions, beside plain decoding and n-gram drafting."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.config.schema import EvaluationConfig
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.data.chat_template import prompt_ids
from nemo_speculative.data.conversation import Conversation, TokenRow
from nemo_speculative.decoding.drafters import Drafter, EagleDrafter, NgramDrafter, NoDrafter
from nemo_speculative.decoding.engine import Generation, generate
from nemo_speculative.decoding.tree_builder import StaticTree, TreeBuilder, tree_builder_for
from nemo_speculative.decoding.verify import Sampling, Verifier, verifier_for
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.progress import Progress


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
        """Share of the verifications that accepted a draft token at depth i + 1; τ = 1 + their sum."""
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
    settings: SpeculativeSettings
    sampled: bool = False
    """Whether the answers were sampled, at a temperature above 0."""
    conditions: str = ""
    """How it was measured, for the reader."""

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
    def num_steps(self) -> int:
        """Depth of the deepest draft tokens."""
        return self.settings.num_steps

    @property
    def lossless(self) -> bool | None:
        """Whether every answer is, token by token, the one that the target gives without a draft.

        None for sampled answers, which differ by chance.
        """
        return None if self.sampled else self.identical == len(self.plain.generations)

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
            "speculative": asdict(self.settings),
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
    target: HFTarget,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    settings: SpeculativeSettings,
    config: EvaluationConfig,
) -> Evaluation:
    """Answers every prompt three times, one way after the other, so that a noisy machine hits all alike.

    Raises:
        UserError: ``settings`` make no tree, or none that is lossless with the sampling that ``config`` asks for.
    """
    settings, tree_builder = _tree_settings(settings, config)
    ways: dict[str, Drafter] = {
        "plain": NoDrafter(),
        "ngram": NgramDrafter(settings.num_steps, config.ngram),
        "draft": EagleDrafter(draft, target, tree_builder),
    }
    measured, verifier = {name: Measured() for name in ways}, _verifier(config, target)
    batches, progress = _batches(prompts, config.batch_size), Progress("measuring", len(prompts))
    with cpu_threads(config.num_threads):
        for drafter in ways.values():  # warm-up: the first call allocates
            generate(target, drafter, batches[0], max_new_tokens=min(16, config.answer_tokens), verifier=verifier)
        for batch in batches:
            for name, drafter in ways.items():
                started = time.perf_counter()
                answers = generate(target, drafter, batch, max_new_tokens=config.answer_tokens, verifier=verifier)
                measured[name].seconds += time.perf_counter() - started
                measured[name].generations += answers
            progress.advance(lambda: f"tau {measured['draft'].tau:.2f}", len(batch))
    progress.close()
    grown = "EAGLE-1's static tree" if config.static_tree else str(settings)
    conditions = f"{_how(config)}, {grown}, {_at_once(config.batch_size)}"
    return Evaluation(**measured, settings=settings, sampled=config.temperature > 0, conditions=conditions)


def _how(config: EvaluationConfig) -> str:
    if config.temperature == 0:
        return "greedy"
    rule = "rejection sampling" if config.rejection_sampling else "the target's samples"
    return f"temperature {config.temperature:g} ({rule})"


def _tree_settings(settings: SpeculativeSettings, config: EvaluationConfig) -> tuple[SpeculativeSettings, TreeBuilder]:
    """The settings that describe what is measured, and the way to grow it."""
    if not config.static_tree:
        return settings, tree_builder_for(settings)
    tree = StaticTree()
    return SpeculativeSettings(max(map(len, tree.paths)), tree.max_children, len(tree.paths) + 1), tree


def _at_once(batch_size: int) -> str:
    return "one sequence at a time" if batch_size == 1 else f"{batch_size} sequences at a time"


def measure_tau(
    target: HFTarget,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    settings: SpeculativeSettings,
    config: EvaluationConfig,
) -> float:
    """τ of the draft alone: the figure by which a run chooses its best checkpoint."""
    drafter, verifier = EagleDrafter(draft, target, _tree_settings(settings, config)[1]), _verifier(config, target)
    measured = Measured()
    with cpu_threads(config.num_threads):
        for batch in _batches(prompts, config.batch_size):
            measured.generations += generate(
                target, drafter, batch, max_new_tokens=config.answer_tokens, verifier=verifier
            )
    return measured.tau


def _verifier(config: EvaluationConfig, target: HFTarget) -> Verifier:
    sampling = Sampling(config.temperature, config.top_p, config.top_k)
    return verifier_for(sampling, config.rejection_sampling, torch.Generator(target.device).manual_seed(config.seed))


def _batches(prompts: Sequence[Sequence[int]], size: int) -> list[Sequence[Sequence[int]]]:
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


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
