"""Acceptance length and speed of a draft on held-out questions, compared with plain decoding and n-gram drafting."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.checkpoint.convert import as_servable
from nemo_speculative.checkpoint.draft_checkpoint import Servable
from nemo_speculative.config.schema import EvaluateJob, EvaluationConfig, ModelConfig
from nemo_speculative.config.speculative import SpeculativeSettings, largest_tree
from nemo_speculative.data.chat_template import prompt_ids
from nemo_speculative.data.conversations import Conversation, ConversationFile, TokenRow
from nemo_speculative.decoding.drafters import Drafter, EagleDrafter, NgramDrafter, NoDrafter
from nemo_speculative.decoding.engine import Generation, generate
from nemo_speculative.decoding.tau import acceptance_length, acceptance_per_position
from nemo_speculative.decoding.tree_builder import DynamicTree, StaticTree, TreeBuilder, tree_builder_for
from nemo_speculative.decoding.verify import Sampling, Verifier, verifier_for
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.utils.devices import choose_device
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.progress import Progress

QUESTIONS = "questions.jsonl"
"""A run directory's file of held-out questions."""
TREE_SIZES = (8, 12, 16, 24, 32, 48, 64)
"""Candidates for the number of tokens that are verified at once."""

Prompts = Sequence[Sequence[int]]
K = TypeVar("K")


@dataclass
class Measured:
    """The answers of one drafter to all questions, and the seconds they took."""

    generations: list[Generation] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tau(self) -> float:
        """Acceptance length: tokens emitted per verification, bonus token included."""
        return _tau(self.generations) or 0.0

    @property
    def tau_finished(self) -> float | None:
        """τ of the answers that ended with a stop token (an endless loop is easy to draft); None without any."""
        return _tau([g for g in self.generations if g.finished])

    @property
    def tokens_per_second(self) -> float:
        return sum(len(g.tokens) for g in self.generations) / max(self.seconds, 1e-9)

    def acceptance_per_position(self, num_steps: int) -> list[float]:
        """Share of the verifications that accepted a draft token at depth i + 1; τ = 1 + their sum."""
        histogram = [0] * (num_steps + 1)
        for emitted in (n for g in self.generations for n in g.emitted):
            histogram[min(emitted - 1, num_steps)] += 1
        return acceptance_per_position(histogram) or [0.0] * num_steps


def _tau(generations: Sequence[Generation]) -> float | None:
    return acceptance_length(sum(sum(g.emitted) for g in generations), sum(len(g.emitted) for g in generations))


@dataclass(frozen=True)
class Evaluation:
    """A draft and its baselines on the same questions."""

    draft: Measured
    plain: Measured
    ngram: Measured
    settings: SpeculativeSettings
    """The settings of the draft's trees."""
    config: EvaluationConfig = field(default_factory=EvaluationConfig)

    FIGURES = ("tau", "acceptance_per_position", "ngram_tau", "tokens_per_second", "baseline_tokens_per_second",
               "lossless")  # fmt: skip
    """The keys of ``summary.json`` that other programs may rely on."""

    @property
    def lossless(self) -> bool | None:
        """Whether the answers equal those without a draft, token by token; None for samples, which differ by chance."""
        return None if self.config.temperature > 0 else self.num_identical == len(self.plain.generations)

    @property
    def num_identical(self) -> int:
        """Number of questions with identical answers with and without the draft."""
        return sum(d.tokens == p.tokens for d, p in zip(self.draft.generations, self.plain.generations, strict=True))

    def summary(self) -> dict[str, object]:
        """The values of ``summary.json``."""
        return {
            "tau": self.draft.tau,
            "tau_finished": self.draft.tau_finished,
            "acceptance_per_position": self.draft.acceptance_per_position(self.settings.num_steps),
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


def evaluate_checkpoint(job: EvaluateJob) -> Evaluation:
    """Evaluates ``job.checkpoint``, this project's or another's, with the target, dtype and settings that it records.

    Raises UserError if there is no checkpoint or no question, or the target is not the one that it was trained for.
    """
    if job.draft_class:
        get_class(job.draft_class)  # importing it registers its architecture
    default = SpeculativeSettings(5, 1, 6)  # for a checkpoint of another project that records no settings
    servable = as_servable(Path(job.checkpoint), job.target, default, trust_remote_code=job.trust_remote_code)
    target = _target_of(servable, job)
    prompts = _prompts(job, servable, target)
    draft = servable.build(target.device, getattr(torch, servable.provenance.target_dtype))
    settings = servable.provenance.speculative.with_changes(job.num_steps, job.topk, job.num_draft_tokens)
    file = _run_file(servable.directory, "config.yaml")
    run: Any = OmegaConf.to_container(OmegaConf.load(file)) if file else None
    section = run.get("evaluation") if isinstance(run, dict) else None
    config = job.evaluation.like(section if isinstance(section, dict) else {})
    return evaluate_draft(target, draft, prompts, settings, config)


def _run_file(model: Path, name: str) -> Path | None:
    """The file ``name`` of the run directory that contains the checkpoint ``model``."""
    return next((parent / name for parent in model.resolve().parents if (parent / name).is_file()), None)


def _target_of(servable: Servable, job: EvaluateJob) -> HFTarget:
    provenance = servable.provenance
    directory = resolve_target(ModelConfig(path=job.target or provenance.target), key="target")
    target: HFTarget = instantiate(
        job.backend,
        path=directory,
        aux_layers=servable.aux_layers,
        dtype=getattr(torch, provenance.target_dtype),
        device=choose_device(job.device, "device"),
        trust_remote_code=job.trust_remote_code,
        device_map=job.model.device_map,
        max_memory=job.model.max_memory,
    )
    if target.fingerprint != provenance.target_fingerprint:
        raise UserError(
            f"{servable.directory}: trained for another target than {directory} (fingerprint "
            f"{provenance.target_fingerprint}, found {target.fingerprint}); give its own with target=DIR"
        )
    return target


def _prompts(job: EvaluateJob, servable: Servable, target: HFTarget) -> list[list[int]]:
    file = Path(job.questions) if job.questions else _run_file(servable.directory, QUESTIONS)
    if file is None:
        raise UserError(
            f"questions is not set, and {servable.directory} is in no run directory that holds {QUESTIONS}: give "
            "questions=FILE"
        )
    longest = target.config.max_position_embeddings - 2
    rows = ConversationFile(file, "questions")
    prompts = question_prompts(rows, job.evaluation.num_questions, longest, target.tokenizer)
    if not prompts:
        raise UserError(f"questions: {file} holds none of at most {longest} tokens, which the target's context allows")
    if len(prompts) < job.evaluation.num_questions:
        print(
            f"questions: {file} holds {len(prompts)} of at most {longest} tokens, all of them are measured; "
            f"evaluation.num_questions is {job.evaluation.num_questions}",
            flush=True,
        )
    return prompts


def prompt_of(row: Conversation | TokenRow, tokenizer: Any) -> list[int]:
    """The token ids before the first answer: of a conversation, or up to the first supervised token."""
    if isinstance(row, TokenRow):
        return row.input_ids[: row.loss_mask.index(True)] if True in row.loss_mask else list(row.input_ids)
    roles = [m["role"] for m in row.messages]
    question = row.messages[: roles.index("assistant")] if "assistant" in roles else row.messages
    return prompt_ids(tokenizer, question, row.origin) if question else []


def question_prompts(
    rows: Iterable[Conversation | TokenRow], limit: int, max_prompt: int, tokenizer: Any = None
) -> list[list[int]]:
    """The prompts of the first ``limit`` rows whose prompt has 1 to ``max_prompt`` tokens."""
    prompts = (prompt_of(row, tokenizer) for row in rows)
    return [p for p in prompts if 0 < len(p) <= max_prompt][:limit]


def evaluate_draft(
    target: HFTarget, draft: Draft, prompts: Prompts, settings: SpeculativeSettings, config: EvaluationConfig
) -> Evaluation:
    """Answers every prompt with the draft, with n-grams and without drafting.

    Raises UserError if ``settings`` make no tree, or one that is not lossless with the sampling of ``config``.
    """
    settings, tree_builder = _tree_of(settings, config)
    drafters: dict[str, Drafter] = {
        "plain": NoDrafter(),
        "ngram": NgramDrafter(settings.num_steps, config.ngram),
        "draft": EagleDrafter(draft, target, tree_builder),
    }
    measured = _measure(target, drafters, prompts, config, config.batch_size, _verifier(config, target), "draft")
    return Evaluation(**measured, settings=settings, config=config)


def measure_tau(
    target: HFTarget, draft: Draft, prompts: Prompts, settings: SpeculativeSettings, config: EvaluationConfig
) -> float:
    """τ of the draft alone, by which a run chooses its best checkpoint."""
    drafter, verifier = EagleDrafter(draft, target, _tree_of(settings, config)[1]), _verifier(config, target)
    generations: list[Generation] = []
    with cpu_threads(config.num_threads):
        for batch in _batches(prompts, config.batch_size):
            generations += generate(target, drafter, batch, max_new_tokens=config.answer_tokens, verifier=verifier)
    return Measured(generations).tau


def measure_widths(
    target: HFTarget, draft: Draft, prompts: Prompts, num_steps: int, topk: int, config: EvaluationConfig
) -> dict[SpeculativeSettings, Measured]:
    """Measures dynamic trees of several sizes (EAGLE-2's ``total_tokens``), greedily, one question at a time.

    A larger tree has more of its tokens accepted, but each verification costs more.
    """
    largest = largest_tree(num_steps, topk)
    sizes = sorted({min(size, largest) for size in TREE_SIZES if size > topk})
    drafters = {
        SpeculativeSettings(num_steps, topk, size): EagleDrafter(draft, target, DynamicTree(num_steps, topk, size))
        for size in sizes
    }
    return _measure(target, drafters, prompts, config, 1, None, SpeculativeSettings(num_steps, topk, sizes[-1]))


def cheapest(widths: Mapping[SpeculativeSettings, Measured]) -> SpeculativeSettings:
    """The settings with the fewest seconds per token."""
    return max(widths, key=lambda settings: widths[settings].tokens_per_second)


def _measure(
    target: HFTarget, drafters: Mapping[K, Drafter], prompts: Prompts, config: EvaluationConfig, batch_size: int,
    verifier: Verifier | None, shown: K,
) -> dict[K, Measured]:  # fmt: skip
    """The answers of every drafter to all prompts; they take turns, so that machine noise affects all equally.

    The progress line has the acceptance length of the drafter ``shown``.
    """
    measured, batches = {name: Measured() for name in drafters}, _batches(prompts, batch_size)
    progress = Progress("measuring", len(prompts))
    with cpu_threads(config.num_threads):
        for drafter in drafters.values():  # the first call allocates memory
            generate(target, drafter, batches[0], max_new_tokens=min(16, config.answer_tokens), verifier=verifier)
        for batch in batches:
            for name, drafter in drafters.items():
                started = time.perf_counter()
                answers = generate(target, drafter, batch, max_new_tokens=config.answer_tokens, verifier=verifier)
                measured[name].seconds += time.perf_counter() - started
                measured[name].generations += answers
            progress.advance(lambda: f"tau {measured[shown].tau:.2f}", len(batch))
    progress.close()
    return measured


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Runs on ``number`` CPU threads; None leaves the setting alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tree_of(settings: SpeculativeSettings, config: EvaluationConfig) -> tuple[SpeculativeSettings, TreeBuilder]:
    """The tree builder of an evaluation, and the settings that describe its trees."""
    if not config.static_tree:
        return settings, tree_builder_for(settings)
    tree = StaticTree()
    return SpeculativeSettings(max(map(len, tree.paths)), tree.max_children, len(tree.paths) + 1), tree


def _verifier(config: EvaluationConfig, target: HFTarget) -> Verifier:
    sampling = Sampling(config.temperature, config.top_p, config.top_k)
    return verifier_for(sampling, config.rejection_sampling, torch.Generator(target.device).manual_seed(config.seed))


def _batches(prompts: Prompts, size: int) -> list[Prompts]:
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def describe(evaluation: Evaluation) -> str:
    """A table of the draft, n-gram drafting and plain decoding on the same questions."""
    config, plain, total = evaluation.config, evaluation.plain, len(evaluation.plain.generations)
    method = "rejection sampling" if config.rejection_sampling else "the target's samples"
    sampling = f"temperature {config.temperature:g} ({method})" if config.temperature else "greedy"
    tree = "EAGLE-1's static tree" if config.static_tree else str(evaluation.settings)
    size = "one sequence" if config.batch_size == 1 else f"{config.batch_size} sequences"
    lines = [
        f"measured on {total} held-out questions, {sampling}, {tree}, {size} at a time",
        f"  {'':14}{'tau':>6}{'tau, finished':>15}{'tokens/s':>10}{'speed-up':>10}   accepted at draft position",
    ]
    for name, measured in (("draft", evaluation.draft), ("n-gram", evaluation.ngram), ("plain decoding", plain)):
        accepted = measured.acceptance_per_position(evaluation.settings.num_steps) if measured is not plain else []
        finished = "-" if measured.tau_finished is None else f"{measured.tau_finished:.2f}"
        speed_up = measured.tokens_per_second / plain.tokens_per_second
        lines.append(
            f"  {name:14}{measured.tau:6.2f}{finished:>15}{measured.tokens_per_second:10.0f}{speed_up:9.2f}x   "
            + " ".join(f"{share:.2f}" for share in accepted)
        )
    if evaluation.lossless is not None:
        different = "NOT equal (near ties in this dtype: docs/troubleshooting)"
        result = "equal token by token" if evaluation.lossless else different
        lines.append(f"  answers with and without the draft: {evaluation.num_identical} of {total} {result}")
    return "\n".join(lines)


def describe_widths(widths: Mapping[SpeculativeSettings, Measured]) -> str:
    """A line for each tree size; the cheapest is marked."""
    questions, best = len(next(iter(widths.values())).generations), cheapest(widths)
    lines = [f"tokens verified at once, measured on {questions} questions", "  width   tau  ms/token"]
    for settings, measured in widths.items():
        figures = f"{measured.tau:6.2f}{1000 / measured.tokens_per_second:10.2f}"
        lines.append(f"  {settings.num_draft_tokens:5}{figures}{'  <-' if settings == best else ''}")
    return "\n".join(lines)
