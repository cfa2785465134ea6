"""The points of a benchmark, their metrics, and the file that their results are appended to."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_speculative import __version__
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.decoding.tau import acceptance_length, acceptance_per_position
from nemo_speculative.serving.client import Answer
from nemo_speculative.utils.append_log import AppendLog, read_lines
from nemo_speculative.utils.errors import UserError

FILE = "cells.jsonl"


@dataclass(frozen=True)
class BenchPoint:
    """A point of a benchmark (a "cell" on disk): everything that its metrics depend on, and nothing else."""

    suite: str
    suite_digest: str
    max_new_tokens: int
    concurrency: int
    temperature: float
    server: dict[str, Any]
    """Target, versions and flags of the server; equal for a draft and its baseline."""
    draft: dict[str, Any] | None
    """The draft and its settings; None: the baseline."""

    @property
    def key(self) -> str:
        """Digest of all fields; equal for equal points in every run."""
        return digest(asdict(self))

    @property
    def comparison_key(self) -> str:
        """Digest of all fields but the draft; equal for the points that are compared with each other."""
        return digest({**asdict(self), "draft": None})

    @property
    def speculative(self) -> SpeculativeSettings | None:
        """The draft's settings; None: the baseline."""
        return SpeculativeSettings(**self.draft["speculative"]) if self.draft else None

    @property
    def weights(self) -> str | None:
        """Digest of the draft's weights; None: the baseline."""
        return self.draft["weights"] if self.draft else None

    @property
    def setting(self) -> str:
        """The draft's settings as shown in tables."""
        return setting_name(self.speculative)

    def __str__(self) -> str:
        return f"{self.setting}, {self.suite}, {self.concurrency} at once, temperature {self.temperature:g}"


def setting_name(settings: SpeculativeSettings | None) -> str:
    """Steps-topk-draft tokens, or ``baseline``."""
    return f"{settings.num_steps}-{settings.topk}-{settings.num_draft_tokens}" if settings else "baseline"


@dataclass(frozen=True)
class BenchMetrics:
    """The metrics of one point."""

    answers: int
    """Answers, one per turn."""
    refused: int
    """Turns that the server refused, as too long for its context; no other metric includes them."""
    stopped: float
    """Share of the answers that ended with a stop token."""
    completion_tokens: int
    verifications: int
    tau: float | None
    """Σ completion tokens / Σ verifications: each token weighs the same.  The prefill's token of each answer counts, as
    in SGLang's ``spec_accept_length``.  None: nothing was verified."""
    histogram: list[int]
    """Number of verifications that accepted 0, 1, 2, … draft tokens."""
    acceptance_per_position: list[float]
    """Share of the verifications that accepted a draft token at depth i + 1."""
    seconds: float
    """Seconds from the first request to the last token."""
    output_tokens_per_second: float
    time_to_first_token: dict[str, float]
    """Seconds by percentile, like the next two."""
    inter_token_latency: dict[str, float]
    latency: dict[str, float]
    accuracy: float | None
    """Share of the conversations whose last answer is right; None: the suite has no scorer."""

    @classmethod
    def of(cls, answers: Sequence[Answer], seconds: float, refused: int, accuracy: float | None) -> "BenchMetrics":
        tokens = sum(answer.completion_tokens for answer in answers)
        verifications = sum(answer.verifications for answer in answers)
        histogram = [sum(counts) for counts in zip_longest(*(a.histogram for a in answers), fillvalue=0)]
        return cls(
            answers=len(answers),
            refused=refused,
            stopped=sum(answer.stopped for answer in answers) / len(answers),
            completion_tokens=tokens,
            verifications=verifications,
            tau=acceptance_length(tokens, verifications),
            histogram=histogram,
            acceptance_per_position=acceptance_per_position(histogram),
            seconds=seconds,
            output_tokens_per_second=tokens / seconds,
            time_to_first_token=percentiles([answer.time_to_first_token for answer in answers]),
            inter_token_latency=percentiles([gap for answer in answers for gap in answer.inter_token_latencies]),
            latency=percentiles([answer.latency for answer in answers]),
            accuracy=accuracy,
        )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Nearest-rank percentiles: the smallest value that p percent of ``values`` do not exceed; empty for no values."""
    return {f"p{p}": float(np.percentile(values, p, method="inverted_cdf")) for p in (50, 95, 99) if values}


@dataclass(frozen=True)
class BenchResult:
    """The metrics of a point, or the reason why it failed."""

    point: BenchPoint
    metrics: BenchMetrics | None
    error: str | None = None


class ResultsLog:
    """The results in a directory, one JSON object per line; the last line of a point counts.

    A torn last line is ignored, so its point is measured again.
    """

    def __init__(self, directory: Path):
        self._file = directory / FILE
        directory.mkdir(parents=True, exist_ok=True)
        self._results = {result.point.key: result for result in self._read()}

    def __iter__(self) -> Iterator[BenchResult]:
        return iter(self._results.values())

    def get(self, point: BenchPoint) -> BenchResult | None:
        return self._results.get(point.key)

    def has(self, point: BenchPoint) -> bool:
        """Whether the point has metrics; a point that failed is measured again."""
        result = self.get(point)
        return result is not None and result.metrics is not None

    def append(self, result: BenchResult) -> None:
        """Adds ``result``, which is on disk when this returns."""
        line = {
            "key": result.point.key,
            "cell": asdict(result.point),
            "figures": asdict(result.metrics) if result.metrics else None,
            "error": result.error,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"host": platform.node(), "cores": os.cpu_count(), "accelerator": accelerator()},
            "version": __version__,
        }
        # First, so that an interruption right after the line is written does not leave it out of the table.
        self._results[result.point.key] = result
        with closing(AppendLog(self._file, sync_seconds=0)) as log:
            log.append(line)

    def _read(self) -> Iterator[BenchResult]:
        for line in read_lines(self._file):
            try:
                values = json.loads(line.data)
                metrics = BenchMetrics(**values["figures"]) if values["figures"] else None
                yield BenchResult(BenchPoint(**values["cell"]), metrics, values["error"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self._file}:{line.number}: not a line of this benchmark ({error}); delete it to measure that "
                    "point again, or give another directory with results=DIR"
                ) from None


def accelerator() -> str:
    """The accelerator's name, or cpu."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def digest(values: dict[str, Any]) -> str:
    """Digest of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
