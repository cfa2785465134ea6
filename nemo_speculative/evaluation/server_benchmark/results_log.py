"""The cells of a benchmark, and the file that they are appended to one by one."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nemo_speculative import __version__
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.evaluation.server_benchmark.metrics import Figures
from nemo_speculative.utils.errors import UserError

FILE = "cells.jsonl"


@dataclass(frozen=True)
class Cell:
    """What is measured: all that its figures depend on, and nothing else."""

    suite: str
    suite_digest: str
    max_new_tokens: int
    concurrency: int
    temperature: float
    server: dict[str, Any]
    """What serves: target, versions, flags; equal for a draft and the baseline beside it."""
    draft: dict[str, Any] | None
    """The draft and its settings; None: the baseline."""

    @property
    def key(self) -> str:
        """Equal for equal cells, in this run and the next."""
        return _digest(asdict(self))

    @property
    def rivals(self) -> str:
        """Equal for the cells that are to be compared: everything but the draft."""
        return _digest({**asdict(self), "draft": None})

    @property
    def speculative(self) -> SpeculativeSettings | None:
        """None: the baseline."""
        return SpeculativeSettings(**self.draft["speculative"]) if self.draft else None

    @property
    def weights(self) -> str | None:
        """Of the draft."""
        return self.draft["weights"] if self.draft else None

    @property
    def setting(self) -> str:
        """As a table shows it."""
        return setting_name(self.speculative)


def setting_name(values: SpeculativeSettings | None) -> str:
    """steps-topk-draft tokens, or ``baseline``."""
    return f"{values.num_steps}-{values.topk}-{values.num_draft_tokens}" if values else "baseline"


@dataclass(frozen=True)
class Measured:
    """A cell and what came of it."""

    cell: Cell
    figures: Figures | None
    error: str | None = None
    """Why there are no figures."""


class ResultsLog:
    """The cells of a results directory, one JSON object a line; the last line of a cell counts.

    Each is on disk when :meth:`append` returns.  A last line that was cut off is measured again.

    Raises:
        UserError: the file is not one of cells.
    """

    def __init__(self, directory: Path):
        self._file = directory / FILE
        directory.mkdir(parents=True, exist_ok=True)
        self._measured: dict[str, Measured] = {}
        for measured in self._read():
            self._measured[measured.cell.key] = measured

    def __iter__(self) -> Iterator[Measured]:
        return iter(self._measured.values())

    def has(self, cell: Cell) -> bool:
        """Whether the cell has figures; one that failed is measured again."""
        found = self._measured.get(cell.key)
        return found is not None and found.figures is not None

    def get(self, cell: Cell) -> Measured | None:
        return self._measured.get(cell.key)

    def append(self, measured: Measured) -> None:
        """Writes it through to the disk."""
        line = {
            "key": measured.cell.key,
            "cell": asdict(measured.cell),
            "figures": asdict(measured.figures) if measured.figures else None,
            "error": measured.error,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "version": __version__,
        }
        # First: an interruption right after the line is written must not leave the table without it.
        self._measured[measured.cell.key] = measured
        with self._file.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> Iterator[Measured]:
        if not self._file.is_file():
            return
        lines = self._file.read_bytes().split(b"\n")
        whole, torn = lines[:-1], lines[-1]
        if torn:  # what a kill or a full disk left: taken off, so that the next line does not continue it
            os.truncate(self._file, self._file.stat().st_size - len(torn))
        for number, line in enumerate(whole, start=1):
            try:
                values = json.loads(line)
                figures = Figures(**values["figures"]) if values["figures"] else None
                yield Measured(Cell(**values["cell"]), figures, values["error"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self._file}:{number}: not a line of this benchmark ({error}); delete it to measure that cell "
                    "again, or give another directory with results=DIR"
                ) from None


@cache
def machine() -> dict[str, Any]:
    """Where the benchmark runs."""
    return {"host": platform.node(), "cores": os.cpu_count(), "accelerator": accelerator()}


def accelerator() -> str:
    """The accelerator's name, or cpu."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
