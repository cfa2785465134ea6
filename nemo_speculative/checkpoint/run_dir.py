"""The run directory: checkpoints that appear complete or not at all, links to the latest and the best, rotation.

``checkpoints/step_<N>/`` holds ``model/`` (servable), ``state/`` (resume) and ``acceptance.json``.  It is renamed from
``.step_<N>.partial``, so a step directory that exists is complete; the next start removes a crash's leftovers.
"""

import itertools
import json
import os
import re
import shutil
from pathlib import Path

from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_write_text, fsync

STEP = re.compile(r"step_(\d+)")
RUN_FILES = re.compile(
    r"config\.yaml|metrics(\.previous-\d+)?\.(jsonl(\.\d+\.partial)?|partial)|checkpoints|tensorboard|wandb|profile|"
    r"questions\.jsonl|summary\.json"
)
"""Names that a run writes into its directory."""


class RunDirectory:
    """The directory of one run.  Only the first rank changes it; the others read."""

    def __init__(self, root: str | Path):
        self.root = Path(os.path.abspath(root))
        self.checkpoints = self.root / "checkpoints"
        self._metrics = self.root / "metrics.jsonl"

    def check_usable(self) -> None:
        """Raises UserError if the root cannot be written or holds files of others, which a run would mix with."""
        cwd = Path.cwd().resolve()
        existing = next(path for path in (self.root, *self.root.parents) if path.exists())
        other = sorted(entry.name for entry in self.root.glob("*") if not RUN_FILES.fullmatch(entry.name))
        if self.root.resolve() in (cwd, *cwd.parents):
            problem = "is the working directory or above it"
        elif not existing.is_dir():
            problem = f"cannot be written, {existing} is a file"
        elif not os.access(existing, os.W_OK | os.X_OK):
            problem = f"cannot be written, {existing} is not writable"
        elif other:
            problem = f"holds other files ({', '.join(other[:3])})"
        else:
            return
        raise UserError(f"output_dir: {self.root} {problem}; choose another output_dir")

    def set_aside(self) -> Path | None:
        """Renames the directory of an earlier run, so that a fresh start loses nothing; returns its new path."""
        return _rename_to_previous(self.root) if self.steps() or self._metrics.exists() else None

    def set_metrics_aside(self) -> Path | None:
        """Renames the metrics of a run that left no checkpoint; returns their new path."""
        return _rename_to_previous(self._metrics, ".jsonl") if self._metrics.exists() else None

    def prepare(self) -> None:
        """Creates the directory, removes the leftovers of a crash and corrects the links."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in self.checkpoints.glob(".*"):
            _remove(leftover)
        self._update_links()

    def steps(self) -> list[int]:
        """The steps of the checkpoints, ascending."""
        matches = (STEP.fullmatch(entry.name) for entry in self.checkpoints.glob("step_*") if entry.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def newest(self) -> Path | None:
        """The checkpoint of the last step; None where there is none."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def path(self, step: int) -> Path:
        """The directory of a finished checkpoint."""
        return self.checkpoints / f"step_{step}"

    def partial(self, step: int) -> Path:
        """The directory of a checkpoint that is being written."""
        return self.checkpoints / f".step_{step}.partial"

    def begin(self, step: int) -> Path:
        """Creates the directory in which a checkpoint is written before :meth:`publish`."""
        self.abandon(step)
        (self.partial(step) / "state").mkdir(parents=True)
        return self.partial(step)

    def abandon(self, step: int) -> None:
        """Removes an unfinished checkpoint."""
        _remove(self.partial(step))

    def publish(self, step: int, tau: float | None, keep: int) -> None:
        """Renames a finished checkpoint, updates the links and removes all but the last ``keep`` and the best."""
        partial = self.partial(step)
        (partial / "acceptance.json").write_text(json.dumps({"tau": tau}) + "\n")
        for entry in (*partial.iterdir(), partial):
            fsync(entry)
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
        return -max(measured)[1] if measured else max(steps, default=None)

    def _update_links(self) -> None:
        for name, step in (("latest", max(self.steps(), default=None)), ("best", self.best())):
            if step is not None:
                link = self.checkpoints / f".{name}"
                link.unlink(missing_ok=True)
                link.symlink_to(f"step_{step}")
                link.replace(self.checkpoints / name)

    def keep_metrics_until(self, step: int) -> None:
        """Removes the lines of ``metrics.jsonl`` after ``step``, which will be written again."""
        if self._metrics.exists():
            lines = [line for line in self._metrics.read_text().splitlines() if _step_of(line) <= step]
            atomic_write_text(self._metrics, "".join(line + "\n" for line in lines))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line that a crash cut off
        return float("inf")


def _rename_to_previous(path: Path, suffix: str = "") -> Path:
    """Renames ``path`` to ``<name>.previous-<N><suffix>`` with the first free number, and returns that."""
    stem = path.name.removesuffix(suffix)
    numbered = (path.with_name(f"{stem}.previous-{number}{suffix}") for number in itertools.count(1))
    return path.rename(next(new for new in numbered if not new.exists()))


def _remove(path: Path) -> None:
    """Removes a file or a directory; a directory is renamed first, so that a crash leaves no partial checkpoint."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        renamed = path.with_name(f".{path.name.removeprefix('.')}.removed")
        shutil.rmtree(renamed, ignore_errors=True)
        path.rename(renamed)
        shutil.rmtree(renamed)
