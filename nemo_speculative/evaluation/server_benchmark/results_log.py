"""The points of a benchmark and the file that their results are appended to."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nemo_speculative import __version__
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.evaluation.server_benchmark.measure import BenchMetrics
from nemo_speculative.utils.append_log import AppendLog, read_lines
from nemo_speculative.utils.errors import UserError

FILE = "cells.jsonl"


@dataclass(frozen=True)
class BenchPoint:
    """One point of a benchmark (a "cell" on disk): everything that its metrics depend on, and nothing else."""

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
        return _digest(asdict(self))

    @property
    def comparison_key(self) -> str:
        """Digest of all fields but the draft; equal for the points that are compared with each other."""
        return _digest({**asdict(self), "draft": None})

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
class BenchResult:
    """The metrics of a point, or the reason why it failed."""

    point: BenchPoint
    metrics: BenchMetrics | None
    error: str | None = None


class ResultsLog:
    """The results in a directory, one JSON object per line; the last line of a point counts.

    Each result is on disk when :meth:`append` returns.  A torn last line is ignored, so its point is measured again.

    Raises:
        UserError: a line is not the result of a benchmark.
    """

    def __init__(self, directory: Path):
        self._file = directory / FILE
        directory.mkdir(parents=True, exist_ok=True)
        self._results = {result.point.key: result for result in self._read()}

    def __iter__(self) -> Iterator[BenchResult]:
        return iter(self._results.values())

    def has(self, point: BenchPoint) -> bool:
        """Whether the point has metrics; a point that failed is measured again."""
        result = self._results.get(point.key)
        return result is not None and result.metrics is not None

    def get(self, point: BenchPoint) -> BenchResult | None:
        return self._results.get(point.key)

    def append(self, result: BenchResult) -> None:
        """Adds ``result`` and writes it through to the disk."""
        line = {
            "key": result.point.key,
            "cell": asdict(result.point),
            "figures": asdict(result.metrics) if result.metrics else None,
            "error": result.error,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
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


@cache
def machine() -> dict[str, Any]:
    """The machine that runs the benchmark."""
    return {"host": platform.node(), "cores": os.cpu_count(), "accelerator": accelerator()}


def accelerator() -> str:
    """The accelerator's name, or cpu."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
