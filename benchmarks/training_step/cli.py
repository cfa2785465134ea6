"""The command line and its checks."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from benchmarks.training_step.case import LENGTHS, SIZES, Case
from benchmarks.training_step.controller import ROOT
from benchmarks.training_step.registry import Chosen, parse_chosen, usual
from nemo_speculative.utils.errors import UsageError

STEPS = {"eagle3": 7, "eagle1": 1}
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
REFERENCE, WITHOUT_PEERS = "automodel", "textbook"
AGAINST_AUTOMODEL = "--implementations ours,ours:geometric,target,automodel,automodel:medium"
SHAREGPT = "--lengths sharegpt --warmup 1 --rounds 2"
TABLES = {
    "short": [
        "--size S",
        "--size M",
        f"--size M --supervised 1 {AGAINST_AUTOMODEL}",
        f"--size M --supervised 0.25 {AGAINST_AUTOMODEL}",
        f"--size M --steps 4 {AGAINST_AUTOMODEL}",
        "--size M --dtype bfloat16 --implementations ours,ours:geometric,target,automodel",
        "--size M --draft eagle1",
        f"--size M {SHAREGPT}",
    ],
    "full": [
        *(
            f"--size {size} --supervised {share} --steps {steps} --dtype {dtype}"
            for size in SIZES
            for share in (0.25, 0.5, 1)
            for steps in (4, 7)
            for dtype in ("float32", "bfloat16")
        ),
        *(f"--size {size} --draft eagle1 --supervised {share}" for size in SIZES for share in (0.25, 0.5, 1)),
        *(f"--size {size} {SHAREGPT}" for size in SIZES),
    ],
}


@dataclass(frozen=True)
class Comparison:
    """A case with the implementations to compare, checked."""

    case: Case
    chosen: list[Chosen]
    references: list[str]
    rounds: int
    warmup: int
    peers_python: Path


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are one line, without the usage that argparse prints first."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m benchmarks.training_step", description=description, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--table", choices=TABLES, help="many comparisons; the other options apply to all of them")
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--draft", choices=STEPS, default="eagle3")
    parser.add_argument("--steps", type=int, help="steps of the unroll (default: 7; EAGLE-1: 1)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--lengths", choices=LENGTHS, default="full", help="full: every conversation fills a row")
    parser.add_argument("--supervised", type=float, help="share of a row, above 0, at most 1 (default: 0.5)")
    parser.add_argument("--implementations", help="e.g. ours,textbook,automodel:medium (default: all available)")
    parser.add_argument("--reference", help="implementations to divide the others' speeds by (default: automodel)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--warmup", type=int, default=2, help="earlier rounds that do not count (default: 2)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: all cores)")
    parser.add_argument("--peers-python", type=Path, help="Python of the peers' environment (default: .venv-peers)")
    return parser


def parse(argv: Sequence[str], description: str | None = None) -> list[Comparison]:
    """Returns the comparisons selected by ``argv``.

    Raises:
        UsageError: one of them is not possible.
    """
    parser = build_parser(description)
    options = parser.parse_args(argv)
    rows = TABLES[options.table] if options.table else [""]
    return [_comparison(parser.parse_args([*argv, *row.split()])) for row in rows]


def _comparison(options: argparse.Namespace) -> Comparison:
    for name in ("steps", "rounds", "warmup", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"--{name} is {value}: expected at least 1")
    case = _case(options)
    peers_python = options.peers_python or PEERS_PYTHON
    if options.peers_python and not peers_python.is_file():
        raise UsageError(f"--peers-python: {peers_python} does not exist; give the Python of the peers' environment")
    chosen = _chosen(options.implementations, case, peers_python)
    references = _references(options.reference, [c.text for c in chosen])
    return Comparison(case, chosen, references, options.rounds, options.warmup, peers_python)


def _case(options: argparse.Namespace) -> Case:
    supervised = 0.5 if options.supervised is None else options.supervised
    if not 0 < supervised <= 1:
        raise UsageError(f"--supervised is {supervised}: expected a share above 0 and at most 1, e.g. 0.5")
    if options.supervised is not None and options.lengths != "full":
        raise UsageError(f"--supervised: the answers of --lengths {options.lengths} determine it; leave it out")
    num_steps = options.steps or STEPS[options.draft]
    if options.draft == "eagle1" and num_steps != 1:
        raise UsageError(f"--steps is {num_steps}: EAGLE-1 is compared with one step; leave it out")
    return Case(
        size=SIZES[options.size],
        draft=options.draft,
        num_steps=num_steps,
        dtype=options.dtype,
        lengths=options.lengths,
        supervised=supervised,
        threads=options.threads,
    )


def _chosen(text: str | None, case: Case, peers_python: Path) -> list[Chosen]:
    if text is None:
        return usual(case, peers=peers_python.is_file())
    chosen = [parse_chosen(part) for part in text.split(",")]
    if misfit := next((reason for c in chosen if (reason := c.misfit(case))), None):
        raise UsageError(f"--implementations: {misfit}")
    if len({c.text for c in chosen}) < len(chosen):
        raise UsageError(f"--implementations: {text} names one twice")
    if not peers_python.is_file() and (peer := next((c for c in chosen if c.known.peer), None)):
        raise UsageError(
            f"--implementations: {peer.text} needs the peers' environment, and {peers_python} does not exist; "
            "`make bench` creates it, or give another Python with --peers-python"
        )
    return chosen


def _references(text: str | None, names: list[str]) -> list[str]:
    """The references in ``text``; by default all variants of AutoModel, else the textbook, else the first name."""
    if text is None:
        peers = [name for name in names if name.split(":")[0] == REFERENCE]
        return peers or [WITHOUT_PEERS if WITHOUT_PEERS in names else names[0]]
    if missing := [part for part in text.split(",") if part not in names]:
        raise UsageError(f"--reference: {missing[0]!r} is not compared; expected one or more of {', '.join(names)}")
    return text.split(",")
