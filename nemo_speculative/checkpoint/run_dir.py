"""The run directory: checkpoints that appear whole or not at all, links to the latest and the best, rotation.

``checkpoints/step_<N>/`` holds ``model/`` (servable), ``state/`` (resume) and ``acceptance.json``.  It is written as
``.step_<N>.partial`` and renamed, so a step directory that exists is complete; what a crash leaves behind starts with
a dot and is removed by the next start.
"""

import json
import os
import re
import shutil
from pathlib import Path

from nemo_speculative.utils.errors import UserError

STEP = re.compile(r"step_(\d+)")
OWN = re.compile(
    r"config\.yaml|metrics(\.previous-\d+)?\.(jsonl|partial)|checkpoints|tensorboard|wandb|profile|questions\.jsonl|"
    r"summary\.json"
)
"""What a run writes into its directory."""


class RunDirectory:
    """One rank, the first, changes it; the others only read."""

    def __init__(self, root: str | Path):
        self.root = Path(os.path.abspath(root))
        self.checkpoints = self.root / "checkpoints"

    def check_usable(self) -> None:
        """Refuses a place where a run would mix with, or rename, what is not its own.

        Raises:
            UserError: the root is where the program runs or above it, cannot be written, or holds other files.
        """
        here = Path.cwd().resolve()
        if self.root.resolve() in (here, *here.parents):
            raise UserError(f"output_dir: {self.root} is the working directory or above it; choose one inside it")
        there = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            why = "is not writable" if there.is_dir() else "is a file"
            raise UserError(f"output_dir: {self.root} cannot be written, {there} {why}; choose another output_dir")
        entries = self.root.iterdir() if self.root.exists() else ()
        other = sorted(entry.name for entry in entries if not OWN.fullmatch(entry.name))
        if other:
            raise UserError(
                f"output_dir: {self.root} holds what is not a run's ({', '.join(other[:3])}); choose another output_dir"
            )

    def set_aside(self) -> Path | None:
        """Renames an earlier run in the same place, so that a fresh start loses nothing; returns its new name."""
        if not self.steps() and not (self.root / "metrics.jsonl").exists():
            return None
        number = 1
        while (aside := self.root.with_name(f"{self.root.name}.previous-{number}")).exists():
            number += 1
        self.root.rename(aside)
        return aside

    def set_metrics_aside(self) -> Path | None:
        """Renames metrics of a run that left no checkpoint; returns their new name."""
        metrics, number = self.root / "metrics.jsonl", 1
        if not metrics.exists():
            return None
        while (aside := self.root / f"metrics.previous-{number}.jsonl").exists():
            number += 1
        return metrics.rename(aside)

    def prepare(self) -> None:
        """Makes the directory, removes what a crash left behind and puts the links right."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in self.checkpoints.glob(".*"):
            _remove(leftover)
        self._link_all()

    def steps(self) -> list[int]:
        """The steps of the checkpoints, ascending."""
        if not self.checkpoints.is_dir():
            return []
        found = (STEP.fullmatch(entry.name) for entry in self.checkpoints.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def newest(self) -> Path | None:
        """The checkpoint of the last step, if there is one."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def path(self, step: int) -> Path:
        return self.checkpoints / f"step_{step}"

    def begin(self, step: int) -> Path:
        """An empty directory in which a checkpoint is written before :meth:`publish`."""
        partial = self.partial(step)
        _remove(partial)
        (partial / "state").mkdir(parents=True)
        return partial

    def partial(self, step: int) -> Path:
        return self.checkpoints / f".step_{step}.partial"

    def abandon(self, step: int) -> None:
        """Removes a checkpoint that could not be finished."""
        _remove(self.partial(step))

    def publish(self, step: int, tau: float | None, keep: int) -> None:
        """Names a finished checkpoint, moves the links and removes the oldest beyond ``keep``, but never the best."""
        partial = self.partial(step)
        (partial / "acceptance.json").write_text(json.dumps({"tau": tau}) + "\n")
        for entry in (*partial.iterdir(), partial):
            _sync(entry)
        if self.path(step).exists():
            _remove(self.path(step))
        partial.rename(self.path(step))
        _sync(self.checkpoints)
        self._link_all()
        for old in self.steps()[:-keep]:
            if old != self.best():
                _remove(self.path(old))

    def tau(self, step: int) -> float | None:
        """The acceptance length measured at a checkpoint, if it was."""
        file = self.path(step) / "acceptance.json"
        return json.loads(file.read_text())["tau"] if file.exists() else None

    def best(self) -> int | None:
        """The step with the largest acceptance length (the earliest of equals), else the latest step."""
        steps = self.steps()
        measured = [(tau, -step) for step in steps if (tau := self.tau(step)) is not None]
        return -max(measured)[1] if measured else (steps[-1] if steps else None)

    def _link_all(self) -> None:
        steps = self.steps()
        for name, step in (("latest", steps[-1] if steps else None), ("best", self.best())):
            if step is not None:
                fresh = self.checkpoints / f".{name}"
                fresh.unlink(missing_ok=True)
                fresh.symlink_to(f"step_{step}")
                os.replace(fresh, self.checkpoints / name)

    def keep_metrics_until(self, step: int) -> None:
        """Drops the lines of ``metrics.jsonl`` after ``step``: they will be written again."""
        file = self.root / "metrics.jsonl"
        if file.exists():
            kept = [line for line in file.read_text().splitlines() if _step_of(line) <= step]
            fresh = file.with_suffix(".partial")
            fresh.write_text("".join(line + "\n" for line in kept))
            os.replace(fresh, file)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the line that a crash cut off
        return float("inf")


def _remove(path: Path) -> None:
    """Removes a file or a directory; the name goes first, so that a crash leaves no half of a checkpoint."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        doomed = path.with_name(f".{path.name}.removed".replace("..", "."))
        if doomed != path:
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
        shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
