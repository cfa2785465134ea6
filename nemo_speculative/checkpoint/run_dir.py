"""The run directory: checkpoints that appear complete or not at all, links to the latest and the best, rotation.

``checkpoints/step_<N>/`` holds ``model/`` (servable), ``state/`` (resume) and ``acceptance.json``.  It is written as
``.step_<N>.partial`` and renamed, so a step directory that exists is complete; the leftovers of a crash
start with a dot and are removed at the next start.
"""

import json
import os
import re
import shutil
from pathlib import Path

from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_write_text

STEP = re.compile(r"step_(\d+)")
RUN_FILES = re.compile(
    r"config\.yaml|metrics(\.previous-\d+)?\.(jsonl(\.\d+\.partial)?|partial)|checkpoints|tensorboard|wandb|profile|questions\.jsonl|"
    r"summary\.json"
)
"""Names that a run writes into its directory."""


class RunDirectory:
    """The directory of one run.  Only the first rank changes it; the others read."""

    def __init__(self, root: str | Path):
        self.root = Path(os.path.abspath(root))
        self.checkpoints = self.root / "checkpoints"

    def check_usable(self) -> None:
        """Refuses a directory with files of others, which a run would mix with or rename.

        Raises:
            UserError: the root is the working directory or above it, cannot be written, or holds other files.
        """
        cwd = Path.cwd().resolve()
        if self.root.resolve() in (cwd, *cwd.parents):
            raise UserError(f"output_dir: {self.root} is the working directory or above it; choose one inside it")
        existing = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            reason = "is not writable" if existing.is_dir() else "is a file"
            raise UserError(
                f"output_dir: {self.root} cannot be written, {existing} {reason}; choose another output_dir"
            )
        entries = self.root.iterdir() if self.root.exists() else ()
        other = sorted(entry.name for entry in entries if not RUN_FILES.fullmatch(entry.name))
        if other:
            raise UserError(
                f"output_dir: {self.root} holds other files ({', '.join(other[:3])}); choose another output_dir"
            )

    def set_aside(self) -> Path | None:
        """Renames the directory of an earlier run, so that a fresh start loses nothing; returns its new path."""
        if not self.steps() and not (self.root / "metrics.jsonl").exists():
            return None
        number = 1
        while (new := self.root.with_name(f"{self.root.name}.previous-{number}")).exists():
            number += 1
        return self.root.rename(new)

    def set_metrics_aside(self) -> Path | None:
        """Renames the metrics of a run that left no checkpoint; returns their new path."""
        metrics, number = self.root / "metrics.jsonl", 1
        if not metrics.exists():
            return None
        while (new := self.root / f"metrics.previous-{number}.jsonl").exists():
            number += 1
        return metrics.rename(new)

    def prepare(self) -> None:
        """Creates the directory, removes the leftovers of a crash and corrects the links."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in self.checkpoints.glob(".*"):
            _remove(leftover)
        self._update_links()

    def steps(self) -> list[int]:
        """The steps of the checkpoints, ascending."""
        if not self.checkpoints.is_dir():
            return []
        matches = (STEP.fullmatch(entry.name) for entry in self.checkpoints.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def newest(self) -> Path | None:
        """The checkpoint of the last step; None where there is none."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def path(self, step: int) -> Path:
        """The directory of a finished checkpoint."""
        return self.checkpoints / f"step_{step}"

    def begin(self, step: int) -> Path:
        """Creates the directory in which a checkpoint is written before :meth:`publish`."""
        partial = self.partial(step)
        _remove(partial)
        (partial / "state").mkdir(parents=True)
        return partial

    def partial(self, step: int) -> Path:
        """The directory of a checkpoint that is being written."""
        return self.checkpoints / f".step_{step}.partial"

    def abandon(self, step: int) -> None:
        """Removes an unfinished checkpoint."""
        _remove(self.partial(step))

    def publish(self, step: int, tau: float | None, keep: int) -> None:
        """Renames a finished checkpoint, updates the links and removes all but the last ``keep`` and the best."""
        partial = self.partial(step)
        (partial / "acceptance.json").write_text(json.dumps({"tau": tau}) + "\n")
        for entry in (*partial.iterdir(), partial):
            fsync(entry)
        if self.path(step).exists():
            _remove(self.path(step))
        partial.rename(self.path(step))
        fsync(self.checkpoints)
        self._update_links()
        for old in self.steps()[:-keep]:
            if old != self.best():
                _remove(self.path(old))

    def tau(self, step: int) -> float | None:
        """The acceptance length of a checkpoint; None where it was not measured."""
        file = self.path(step) / "acceptance.json"
        return json.loads(file.read_text())["tau"] if file.exists() else None

    def best(self) -> int | None:
        """The step with the largest acceptance length (the earliest of equal ones), else the latest step."""
        steps = self.steps()
        measured = [(tau, -step) for step in steps if (tau := self.tau(step)) is not None]
        return -max(measured)[1] if measured else (steps[-1] if steps else None)

    def _update_links(self) -> None:
        steps = self.steps()
        for name, step in (("latest", steps[-1] if steps else None), ("best", self.best())):
            if step is not None:
                link = self.checkpoints / f".{name}"
                link.unlink(missing_ok=True)
                link.symlink_to(f"step_{step}")
                link.replace(self.checkpoints / name)

    def keep_metrics_until(self, step: int) -> None:
        """Removes the lines of ``metrics.jsonl`` after ``step``, which will be written again."""
        file = self.root / "metrics.jsonl"
        if file.exists():
            lines = [line for line in file.read_text().splitlines() if _step_of(line) <= step]
            atomic_write_text(file, "".join(line + "\n" for line in lines))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line that a crash cut off
        return float("inf")


def _remove(path: Path) -> None:
    """Removes a file or a directory; a directory is renamed first, so that a crash leaves no partial checkpoint."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        renamed = path.with_name(f".{path.name}.removed".replace("..", "."))
        if renamed != path:
            shutil.rmtree(renamed, ignore_errors=True)
            path.rename(renamed)
        shutil.rmtree(renamed)


def fsync(path: Path) -> None:
    """Writes a file or directory through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
