"""Checkpoints of a run: a resume state in torch's distributed checkpoint format (DCP), and a servable model next to it.

Training pauses only while the tensors are copied to host memory.  Threads write them from there, on every rank its own
part; rank 0's thread then reads the weights back and writes ``model/``.  A later step finds that everything is on disk,
and only then publishes the checkpoint under its name.  One saved on N ranks resumes on M: DCP reshards, and the
position in the data is a count of rows.
"""

import contextlib
import json
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from nemo_speculative.checkpoint.draft_checkpoint import Servable, read_servable
from nemo_speculative.checkpoint.run_dir import RunDirectory
from nemo_speculative.config.renames import translate
from nemo_speculative.distributed import titan
from nemo_speculative.distributed.parallelism import FIRST_RANK_TIMEOUT, on_first_rank
from nemo_speculative.training.optimizer import WeightAverage
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_write_text

# Rank 0 reads its own weights back alone, which DCP takes for a mistake.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

METADATA = "position.json"
REUSABLE_STAGER = "2.13"
"""The first torch whose stager works for more than one save, and then reuses its memory."""
FREE_TO_CHANGE = (
    "resume", "plan", "output_dir", "logger", "parallelism", "exporter.dtype", "exporter.topk",
    "exporter.num_draft_tokens", "evaluation.num_questions", "evaluation.num_threads", "evaluation.ngram",
    "trainer.max_steps", "trainer.epochs", "trainer.micro_batch_size", "trainer.device", "trainer.ttt_chunk_slots",
    "trainer.compile", "trainer.log_interval", "trainer.save_interval", "trainer.save_minutes", "trainer.async_save",
    "trainer.keep_checkpoints", "trainer.timeout_seconds", "trainer.val_interval", "trainer.val_rows",
    "trainer.profile", "data.cache_dir", "data.generation_batch_size", "data.workers", "model.cache_dir",
    "model.path", "data.path", "data.held_out_path", "backend",
)  # fmt: skip
"""Keys that a resumed run may change; for model.path and data.path the contents are compared instead."""


class DamagedError(Exception):
    """A checkpoint cannot be read back; the message says why."""


@dataclass(frozen=True)
class ResumeMetadata:
    """A run's position and what it was started with: ``state/position.json``."""

    step: int
    data: dict[str, int]
    """State of the loader."""
    config: dict[str, Any]
    target_fingerprint: str
    data_fingerprint: str
    files: dict[str, list[int]] = field(default_factory=dict)
    """Size in bytes and CRC-32 of each tensor file in ``state/``."""

    @classmethod
    def read(cls, checkpoint: Path) -> "ResumeMetadata":
        """Raises DamagedError if the file is missing or truncated."""
        try:
            metadata = cls(**json.loads((checkpoint / "state" / METADATA).read_text()))
            return replace(metadata, config=translate(metadata.config))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DamagedError(f"state/{METADATA}: {root_cause(error)}") from None

    def write(self, checkpoint: Path) -> None:
        atomic_write_text(checkpoint / "state" / METADATA, json.dumps(vars(self)) + "\n")

    def check_files(self, checkpoint: Path) -> None:
        """Raises DamagedError if a tensor file has changed since it was written: DCP would not notice every change."""
        for name, (size, checksum) in self.files.items():
            file = checkpoint / "state" / name
            if not file.is_file():
                raise DamagedError(f"state/{name} is missing")
            if (actual := file.stat().st_size) != size:
                raise DamagedError(f"state/{name} has {actual} bytes, {size} were written")
            if crc32(file) != checksum:
                raise DamagedError(f"state/{name} holds other bytes than were written")

    def check_same_run(self, start: "ResumeMetadata", checkpoint: Path) -> None:
        """Raises UserError where ``start``, that of a new run, does not continue this one."""
        self.check_same_config(start.config, checkpoint)
        if self.target_fingerprint != start.target_fingerprint:
            raise UserError(f"{checkpoint}: trained for another target than model.path; resume with the same target")
        if self.data_fingerprint != start.data_fingerprint:
            raise UserError(f"{checkpoint}: trained on other data than data.path holds; resume with the same data")

    def check_same_config(self, config: dict[str, Any], checkpoint: Path) -> None:
        """Raises UserError where a run of ``config`` would give other results than this one."""
        new = OmegaConf.create(config)
        changed = [
            f"{key} is {OmegaConf.select(new, key)!r}, the run was started with {value!r}"
            for key, value in _leaves(self.config)
            if not key.startswith(FREE_TO_CHANGE) and OmegaConf.select(new, key) != value
        ]
        if changed:
            raise UserError(
                f"{checkpoint}: cannot resume from it: {'; '.join(changed)}; set the same values, or another output_dir"
            )


def _leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class ResumeState:
    """The tensors of a run: writes them to a checkpoint's ``state/`` and loads them.

    Args:
        device: of the tensors; from CUDA they are copied to pinned memory, which torch 2.13 reuses from save to save.
    """

    def __init__(
        self, model: nn.Module, optimizers: titan.OptimizersContainer, schedules: titan.LRSchedulersContainer,
        average: WeightAverage, device: torch.device,
    ):  # fmt: skip
        self.model, self.average = titan.ModelWrapper(model), average
        self._stateful = {"optimizer": optimizers, "lr_scheduler": schedules, "ema": average}
        self._exported = {name: (x.shape, x.dtype) for name, x in self.model.state_dict().items()}
        # A group of its own: a thread uses it next to the training's collectives, and a slow disk is no lost rank.
        self._group = dist.new_group(backend="gloo", timeout=FIRST_RANK_TIMEOUT)
        pin = device.type == "cuda"
        self._staging = StagingOptions(pin, False, False, pin)
        self._stager = DefaultStager(self._staging)

    def save(self, checkpoint: Path) -> "Future[Any]":
        """Copies the tensors to host memory and starts to write them; done when those of all ranks are on disk."""
        if torch.__version__ < REUSABLE_STAGER:
            self._stager = DefaultStager(self._staging)
        written = dcp.async_save(
            self.model.state_dict() | self._stateful, checkpoint_id=str(checkpoint / "state"),
            process_group=self._group, async_stager=self._stager,
        )  # fmt: skip
        assert isinstance(written, Future)  # staging is synchronous
        return written

    def weights(self, checkpoint: Path) -> dict[str, torch.Tensor]:
        """The full float32 weights, or their average, of a checkpoint, which this rank alone reads from disk."""
        weights = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self._exported.items()}
        averaged = {name: weights[name] for name in self.average.names}
        requested: dict[str, Any] = {name: x for name, x in weights.items() if name not in averaged}
        if averaged:
            requested["ema"] = averaged
        dcp.load(requested, checkpoint_id=str(checkpoint / "state"), no_dist=True)
        return weights

    def load(self, checkpoint: Path) -> None:
        """Raises DamagedError if the checkpoint is truncated or belongs to another draft shape."""
        states = self.model.state_dict() | self._stateful
        try:
            # Read the metadata first: for a damaged file DCP prints a traceback of its own.
            dcp.FileSystemReader(str(checkpoint / "state")).read_metadata()
            dcp.load(states, checkpoint_id=str(checkpoint / "state"))
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            raise DamagedError(f"or of another draft shape: {root_cause(error)}") from error
        self.model.load_state_dict(states)

    def close(self) -> None:
        """Frees the host memory."""
        self._stager.close()


@dataclass(frozen=True)
class PendingSave:
    """A checkpoint that is being written."""

    step: int
    written: "Future[Any]"
    """Done when this rank's part is on disk or has failed; on rank 0, when all of the checkpoint is."""
    paused: float
    """Seconds for which it has paused training."""


@dataclass
class Checkpointer:
    """Writes ``model/`` and ``state/`` of a step, measures the stored draft, and publishes the checkpoint."""

    run: RunDirectory
    keep: int
    export: Callable[[Path, dict[str, torch.Tensor], int], None]
    """Writes the full weights of the draft after a step as a servable directory."""
    start: ResumeMetadata
    """Metadata of a fresh start, with which a resumed run must agree."""
    measure: Callable[[Servable], float] | None
    """Measures τ of a draft on the selection questions; None where there are none."""
    pending: PendingSave | None = None
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="model"))

    @property
    def is_first_rank(self) -> bool:
        return dist.get_rank() == 0

    def begin(self, step: int, state: ResumeState, data: dict[str, int]) -> None:
        """Copies ``state`` and starts to write a checkpoint, none other pending; raises UserError if it cannot."""
        assert self.pending is None
        started = time.perf_counter()
        with self._write_errors(step):
            on_first_rank(lambda: self.run.begin(step))
            written = state.save(self.run.partial(step))
        if self.is_first_rank:
            written = self._thread.submit(self._complete, step, written, state, data)
        self.pending = PendingSave(step, written, time.perf_counter() - started)

    def _complete(self, step: int, tensors: "Future[Any]", state: ResumeState, data: dict[str, int]) -> None:
        """Rank 0's part, once the tensors of all ranks are on disk."""
        tensors.result()
        partial = self.run.partial(step)
        weights = {name.removeprefix("draft."): x for name, x in state.weights(partial).items()}
        self.export(partial / "model", weights, step)
        files = {f.name: [f.stat().st_size, crc32(f)] for f in sorted((partial / "state").iterdir())}
        replace(self.start, step=step, data=data, files=files).write(partial)

    def finish(self, *, measure: bool, before_publishing: Callable[[dict[str, float]], None]) -> None:
        """Waits for the pending checkpoint, on all ranks at once, and publishes it.

        Args:
            measure: whether rank 0 decodes with the draft to measure its acceptance length.
            before_publishing: called with ``perf/save_pause_seconds`` and, if measured, ``val/tau_decoded``.

        Raises:
            UserError: it could not be written; earlier checkpoints are unchanged.
        """
        assert self.pending is not None
        save, self.pending = self.pending, None

        def publish() -> None:
            waiting = time.perf_counter()
            save.written.result()
            metrics = {"perf/save_pause_seconds": save.paused + time.perf_counter() - waiting}
            tau = None
            if measure and self.measure:
                tau = metrics["val/tau_decoded"] = self.measure(read_servable(self.run.partial(save.step)))
            before_publishing(metrics)
            self.run.publish(save.step, tau, self.keep)

        with self._write_errors(save.step):
            on_first_rank(publish)
        # A late thread of this rank would collide with the next save; rank 0 has already reported any failure.
        if not self.is_first_rank:
            save.written.exception()

    @contextlib.contextmanager
    def _write_errors(self, step: int) -> Iterator[None]:
        """Removes the checkpoint of ``step`` if it cannot be written, and raises one line about it."""
        try:
            yield
        except (OSError, CheckpointException) as error:
            if self.is_first_rank:
                self.run.abandon(step)
            raise UserError(
                f"{self.run.path(step)}: could not be written ({root_cause(error)}); the last good checkpoint is "
                f"{self.last_good()}; free some space and resume with resume=auto"
            ) from error

    def load_latest(self, state: ResumeState) -> ResumeMetadata | None:
        """Loads the newest checkpoint into ``state``, if any; raises UserError if it is damaged or of another run."""
        if (checkpoint := self.run.newest()) is None:
            return None
        with _damage_errors(self.run):
            metadata = ResumeMetadata.read(checkpoint)
            metadata.check_same_run(self.start, checkpoint)
            state.load(checkpoint)
        if self.is_first_rank:
            self.run.keep_metrics_until(metadata.step)
        return metadata

    def describe(self, step: int) -> str:
        """One line on a published checkpoint: its acceptance length, if measured, and the best one so far."""
        tau = self.run.tau(step)
        measured = "" if tau is None else f", tau {tau:.2f} decoded"
        return f"saved {self.run.path(step).name}{measured}; best: step_{self.run.best()}"

    def last_good(self) -> str:
        return str(self.run.newest() or "none")

    def close(self) -> None:
        """Does not wait: a pending checkpoint has no name yet, and the next start removes it."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def check_newest(run: RunDirectory, config: dict[str, Any]) -> None:
    """Raises UserError if the newest checkpoint is damaged, or is of a run with another configuration."""
    if checkpoint := run.newest():
        with _damage_errors(run):
            metadata = ResumeMetadata.read(checkpoint)
            metadata.check_same_config(config, checkpoint)
            metadata.check_files(checkpoint)


@contextlib.contextmanager
def _damage_errors(run: RunDirectory) -> Iterator[None]:
    """Turns a DamagedError into one line that names the checkpoint before the damaged one."""
    try:
        yield
    except DamagedError as error:
        *before, newest = run.steps()
        other = f"the one before it is step_{before[-1]}" if before else "there is none before it"
        resumes = "resumes from there" if before else "starts at step 0"
        raise UserError(
            f"{run.path(newest)}: is damaged ({error}); {other}: remove this directory, and resume=auto {resumes}"
        ) from error


def crc32(file: Path) -> int:
    """CRC-32 of a file's contents."""
    checksum = 0
    with file.open("rb") as content:
        while chunk := content.read(1 << 24):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def root_cause(error: BaseException) -> str:
    """One line on the failure of the first rank that failed, which DCP wraps."""
    if isinstance(error, CheckpointException) and error.failures:
        failure = next(iter(error.failures.values()))
        error = failure[0] if isinstance(failure, tuple) else failure
    if "inline_container" in str(error):  # torch's writer reports only the line of its own source code
        return "a file could not be written to its end; most likely the disk is full"
    return (str(error).strip().splitlines() or [repr(error)])[-1][:200]
