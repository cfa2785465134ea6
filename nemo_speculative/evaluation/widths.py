"""How many tokens to verify at once: more are accepted, and each verification costs more (EAGLE-2's total_tokens)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.config.schema import EvaluationConfig
from nemo_speculative.config.speculative import SpeculativeSettings, largest_tree
from nemo_speculative.decoding.drafters import EagleDrafter
from nemo_speculative.decoding.engine import generate
from nemo_speculative.decoding.tree_builder import DynamicTree
from nemo_speculative.evaluation.acceptance import Measured, cpu_threads
from nemo_speculative.targets.hf import HFTarget

WIDTHS = (8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Width:
    """A tree of so many tokens, and what it cost."""

    settings: SpeculativeSettings
    measured: Measured

    @property
    def seconds_per_token(self) -> float:
        """Target, draft and verification together, over the tokens they emitted."""
        return 1 / self.measured.tokens_per_second


def measure_widths(
    target: HFTarget, draft: Draft, prompts: Sequence[Sequence[int]], num_steps: int, topk: int,
    config: EvaluationConfig,
) -> list[Width]:  # fmt: skip
    """Every width on the same questions, one after the other on each, so that a noisy machine hits all alike."""
    most = largest_tree(num_steps, topk)
    sizes = sorted({min(width, most) for width in WIDTHS if width > topk})
    widths = [Width(SpeculativeSettings(num_steps, topk, size), Measured()) for size in sizes]
    drafters = [EagleDrafter(draft, target, DynamicTree(num_steps, topk, size)) for size in sizes]
    with cpu_threads(config.num_threads):
        for drafter in drafters:  # warm-up: the first call allocates
            generate(target, drafter, prompts[:1], max_new_tokens=min(16, config.answer_tokens))
        for prompt in prompts:
            for width, drafter in zip(widths, drafters, strict=True):
                started = time.perf_counter()
                answers = generate(target, drafter, [prompt], max_new_tokens=config.answer_tokens)
                width.measured.seconds += time.perf_counter() - started
                width.measured.generations += answers
    return widths


def cheapest(widths: Sequence[Width]) -> Width:
    """The width of the fewest seconds per token."""
    return min(widths, key=lambda width: width.seconds_per_token)


def describe_widths(widths: Sequence[Width]) -> str:
    """A line for each, and which is the cheapest."""
    questions, best = len(widths[0].measured.generations), cheapest(widths)
    lines = [f"tokens verified at once, measured on {questions} questions", "  width   tau  ms/token"]
    for width in widths:
        figures = f"{width.measured.tau:6.2f}{1000 * width.seconds_per_token:10.2f}"
        lines.append(f"  {width.settings.num_draft_tokens:5}{figures}{'  <-' if width is best else ''}")
    return "\n".join(lines)
