"""Speed of the built-in decoder with a trained draft, compared with plain decoding and transformers' ``generate``.

    python -m benchmarks.decoding RUN [--questions 20] [--threads 1]

All methods answer a question before the next question starts, so that noise of the machine affects all of them equally;
the reference is ``generate`` with a static cache.  RUN is a run of this project.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig

from nemo_speculative.checkpoint.draft_checkpoint import read_servable
from nemo_speculative.decoding.drafters import Drafter, EagleDrafter, NgramDrafter, NoDrafter
from nemo_speculative.decoding.engine import generate
from nemo_speculative.decoding.tree_builder import DynamicTree, StaticTree, tree_builder_for
from nemo_speculative.targets.hf import HFTarget

NEW_TOKENS = 128
REFERENCE = "generate, static cache"
Way = Callable[[list[int]], list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    questions = [json.loads(line)["input_ids"] for line in (options.run / "questions.jsonl").open()]
    ways = make_ways(options.run)
    for way in ways.values():
        way(questions[0])
    rounds = [{name: timed(way, q) for name, way in ways.items()} for q in questions[: options.questions]]
    print(
        f"{len(rounds)} questions, at most {NEW_TOKENS} tokens each, one at a time, float32, "
        f"torch {torch.__version__}, {options.threads} thread(s), {platform.machine()}"
    )
    reference = speed([r[REFERENCE] for r in rounds])
    print(f"{'':28}{'tokens/s':>10}{'ratio':>8}{'median of the questions (min to max)':>40}")
    for name in ways:
        ratios = [speed([r[name]]) / speed([r[REFERENCE]]) for r in rounds]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        total = speed([r[name] for r in rounds])
        print(f"{name:28}{total:10.0f}{total / reference:8.2f}{spread:>40}")


def make_ways(run: Path) -> dict[str, Way]:
    """Methods to answer a question greedily, by name."""
    servable = read_servable(run)
    target = HFTarget(Path(servable.provenance.target), aux_layers=servable.aux_layers)
    draft, settings = servable.build(), servable.provenance.speculative
    trees = {
        str(settings): tree_builder_for(settings),
        "dynamic tree 5-4-16": DynamicTree(5, 4, 16),
        "EAGLE-1's static tree": StaticTree(),
    }
    drafters: dict[str, Drafter] = {name: EagleDrafter(draft, target, tree) for name, tree in trees.items()}
    ours = {**drafters, "n-gram": NgramDrafter(settings.num_steps), "plain": NoDrafter()}
    return {
        REFERENCE: lambda question: reference(target, question, "static"),
        "generate, growing cache": lambda question: reference(target, question, None),
        **{name: _decoding(target, drafter) for name, drafter in ours.items()},
    }


def _decoding(target: HFTarget, drafter: Drafter) -> Way:
    return lambda question: generate(target, drafter, [question], max_new_tokens=NEW_TOKENS)[0].tokens


@torch.inference_mode()
def reference(target: HFTarget, question: list[int], cache: str | None) -> list[int]:
    """Greedy decoding by transformers."""
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=sorted(target.stop_ids), pad_token_id=0,
        cache_implementation=cache,
    )  # fmt: skip
    ids = torch.tensor([question])
    out = target.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return out[0, len(question) :].tolist()


def timed(way: Way, question: list[int]) -> tuple[int, float]:
    """Answers a question; returns the number of tokens and the seconds."""
    started = time.perf_counter()
    answer = way(question)
    return len(answer), time.perf_counter() - started


def speed(answers: list[tuple[int, float]]) -> float:
    """Tokens per second."""
    return sum(tokens for tokens, _ in answers) / sum(seconds for _, seconds in answers)


if __name__ == "__main__":
    main()
