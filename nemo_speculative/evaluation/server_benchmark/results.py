"""The points of a benchmark, their metrics, the file that their results are appended to, and the report of them."""

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby, zip_longest
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_speculative import __version__
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.decoding.tau import acceptance_length, acceptance_per_position
from nemo_speculative.serving.client import Answer
from nemo_speculative.utils import svg
from nemo_speculative.utils.append_log import AppendLog, read_lines
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.tables import markdown_table

FILE = "cells.jsonl"
COLUMNS = ("setting", "suite", "temperature", "at once", "tokens/s", "speed-up", "tau", "accepted by depth",
           "first token ms", "inter-token ms p50/p95/p99", "latency ms", "accuracy")  # fmt: skip
WIDTH, HEIGHT, LEFT, TOP = 108, 44, 132, 64
"""Pixels of a field, and of the space left of and above the fields of a panel."""


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


def best(results: Iterable[BenchResult], concurrency: int, temperature: float) -> BenchResult | None:
    """The draft's result with the most tokens/s at that concurrency and temperature."""
    drafts = [r for r in results if r.metrics and r.point.draft]
    candidates = [r for r in drafts if (r.point.concurrency, r.point.temperature) == (concurrency, temperature)]
    return max(candidates, key=_speed, default=None)


def _speed(result: BenchResult) -> float:
    return result.metrics.output_tokens_per_second if result.metrics else 0.0


def _with_speed_ups(results: Iterable[BenchResult]) -> list[tuple[BenchResult, float | None]]:
    """The results with metrics, sorted, with their speed-up over the baseline at the same point; None without one."""

    def order(result: BenchResult) -> tuple[str, float, int, str, float]:
        point = result.point
        return point.suite, point.temperature, point.concurrency, point.comparison_key, -_speed(result)

    measured = sorted((result for result in results if result.metrics), key=order)
    baselines = {r.point.comparison_key: _speed(r) for r in measured if r.point.draft is None}
    speeds = [(result, baselines.get(result.point.comparison_key)) for result in measured]
    return [(result, _speed(result) / baseline if baseline else None) for result, baseline in speeds]


def table(results: Iterable[BenchResult]) -> str:
    """Markdown table of the results with metrics, sorted by suite, temperature and concurrency, then fastest first.

    Times are in milliseconds, and medians unless a percentile is named.
    """
    return markdown_table(COLUMNS, [_row(result, speed_up) for result, speed_up in _with_speed_ups(results)])


def _row(result: BenchResult, speed_up: float | None) -> tuple[str, ...]:
    point, metrics = result.point, result.metrics
    assert metrics is not None
    return (
        point.setting,
        point.suite,
        f"{point.temperature:g}",
        str(point.concurrency),
        f"{metrics.output_tokens_per_second:.1f}",
        "-" if speed_up is None else f"{speed_up:.2f}x",
        "-" if metrics.tau is None else f"{metrics.tau:.2f}",
        " ".join(f"{share:.2f}" for share in metrics.acceptance_per_position) or "-",
        _milliseconds(metrics.time_to_first_token, "p50"),
        _milliseconds(metrics.inter_token_latency, "p50", "p95", "p99"),
        _milliseconds(metrics.latency, "p50"),
        "-" if metrics.accuracy is None else f"{metrics.accuracy:.2f}",
    )


def _milliseconds(percentiles: dict[str, float], *names: str) -> str:
    return "/".join(f"{1000 * percentiles[name]:.1f}" for name in names) if percentiles else "-"


def heat_map(results: Iterable[BenchResult]) -> str:
    """An SVG document with a panel for each suite and temperature: rows are settings, columns are concurrencies.

    A field shows the speed-up over the baseline and tokens/s; without a baseline it is white.
    """
    parts, top, width = [], 0, 0
    for _, panel in groupby(_with_speed_ups(results), key=lambda r: (r[0].point.suite, r[0].point.temperature)):
        text, right, top = _panel(list(panel), top)
        parts.append(text)
        width = max(width, right)
    size = f'width="{width}" height="{top}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {top}">'
    return "\n".join([head, f"<style>{svg.STYLE}</style>", f'<rect {size} fill="#fff"/>', *parts, "</svg>", ""])


def _panel(panel: Sequence[tuple[BenchResult, float | None]], top: int) -> tuple[str, int, int]:
    """One panel's text, and its right and bottom edges."""
    points = [result.point for result, _ in panel]
    columns = sorted({point.concurrency for point in points})
    # The baseline first, then by steps, top-k and tokens.
    numbers = {point.setting: list(point.draft["speculative"].values()) if point.draft else [] for point in points}
    settings = sorted(numbers, key=lambda setting: numbers[setting])
    title = f"{points[0].suite}, temperature {points[0].temperature:g}: speed-up and tokens/s"
    parts = [svg.text(12, top + 22, title, "title"), svg.text(12, top + TOP - 8, "steps-topk-tokens", "small")]
    for i, concurrency in enumerate(columns):
        parts.append(svg.text(LEFT + WIDTH * (i + 0.5), top + TOP - 8, f"{concurrency} at once", "middle"))
    for j, setting in enumerate(settings):
        parts.append(svg.text(12, top + TOP + HEIGHT * (j + 0.6), setting))
    for result, speed_up in panel:
        x = LEFT + WIDTH * columns.index(result.point.concurrency)
        y = top + TOP + HEIGHT * settings.index(result.point.setting)
        fill, shown = ("#fff", "-") if speed_up is None else (_color(speed_up), f"{speed_up:.2f}x")
        parts += [
            f'<rect x="{x}" y="{y}" width="{WIDTH - 2}" height="{HEIGHT - 2}" fill="{fill}" stroke="#ddd"/>',
            svg.text(x + WIDTH / 2, y + HEIGHT * 0.45, shown, "middle"),
            svg.text(x + WIDTH / 2, y + HEIGHT * 0.82, f"{_speed(result):.1f}", "small middle"),
        ]
    right = max(LEFT + WIDTH * len(columns), 8 * len(title)) + 16  # a letter has at most 8 pixels
    return "\n".join(parts), right, top + TOP + HEIGHT * len(settings) + 16


def _color(speed_up: float) -> str:
    """Gray for 1; the full color for a speed-up or slow-down of 3 and more."""
    share = min(abs(log2(speed_up)) / log2(3), 1.0)
    end = svg.GOOD if speed_up > 1 else svg.BAD
    # At most three quarters of the way, so that dark letters stay readable.
    mixed = (round(a + (b - a) * share * 0.75) for a, b in zip((247, 247, 244), end, strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)
