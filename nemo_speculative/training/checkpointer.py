"""Checkpoints of a run: what is written, in which order, by whom, and what happens when the disk is full.

Training stands still only while the tensors are copied to the host's memory.  Threads write them from there, on every
rank its own; the first rank's then reads the weights back and writes ``model/``.  A later step finds that all of it is
on the disk, and only then gives the checkpoint its name.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from nemo_speculative.algorithms.common.draft import Draft, DraftShape
from nemo_speculative.checkpoint.draft_checkpoint import Servable, read_servable, write_servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.checkpoint.run_dir import RunDirectory
from nemo_speculative.distributed.collectives import on_first_rank
from nemo_speculative.training.resume_state import Damaged, Position, ResumeState, checksums, root_cause
from nemo_speculative.utils.errors import UserError


@dataclass(frozen=True)
class PendingSave:
    """A checkpoint that is being written."""

    step: int
    written: "Future[Any]"
    """Done when this rank's part is on the disk, or could not be written; the first rank's, when all of it is."""
    paused: float
    """Seconds for which training has stood still for it."""


@dataclass
class Checkpointer:
    """Writes ``model/`` and ``state/`` of a step, measures the draft as it lies on disk, then names the checkpoint."""

    run: RunDirectory
    keep: int
    draft: type[Draft]
    shape: DraftShape
    provenance: Provenance
    export_dtype: torch.dtype
    special_ids: dict[str, Any]
    start: Position
    """The position of a fresh start: what a resumed run must agree with."""
    measure: Callable[[Servable], float] | None
    """τ of a draft on the selection questions; None where there are none."""
    minutes: float | None
    """Between two checkpoints, by the first rank's clock."""
    under_way: PendingSave | None = None
    _begun: float = field(default_factory=time.monotonic)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="model"))

    @property
    def first(self) -> bool:
        return dist.get_rank() == 0

    @property
    def written(self) -> bool:
        """Whether a checkpoint is under way of which this rank has nothing more to write."""
        return self.under_way is not None and self.under_way.written.done()

    @property
    def due(self) -> bool:
        """Whether the first rank's clock asks for a checkpoint."""
        return self.first and self.minutes is not None and time.monotonic() - self._begun > 60 * self.minutes

    def begin(self, step: int, state: ResumeState, data: dict[str, int]) -> None:
        """Copies ``state`` and begins to write the checkpoint of ``step``; the one before it must be finished.

        Raises:
            UserError: it could not be begun; the checkpoints before it are as they were.
        """
        assert self.under_way is None
        self._begun, started = time.monotonic(), time.perf_counter()
        with self._named_failure(step):
            on_first_rank(lambda: self.run.begin(step))
            written = state.save(self.run.partial(step))
        if self.first:
            written = self._thread.submit(self._complete, step, written, state, data)
        self.under_way = PendingSave(step, written, time.perf_counter() - started)

    def _complete(self, step: int, tensors: "Future[Any]", state: ResumeState, data: dict[str, int]) -> None:
        """What the first rank adds when the tensors of all ranks are on the disk."""
        tensors.result()
        partial = self.run.partial(step)
        self._write_model(step, state)
        replace(self.start, step=step, data=data, files=checksums(partial / "state")).write(partial)

    def _write_model(self, step: int, state: ResumeState) -> None:
        partial = self.run.partial(step)
        tensors = {name.removeprefix("draft."): value for name, value in state.weights(partial).items()}
        provenance = replace(self.provenance, step=step)
        write_servable(
            partial / "model", self.draft, tensors, self.shape, provenance, self.export_dtype, self.special_ids
        )

    def finish(self, *, measure: bool, before_publishing: Callable[[dict[str, float]], None]) -> None:
        """Waits for the checkpoint under way, on all ranks at once, and gives it its name.

        Args:
            measure: whether the first rank measures what it accepts when it decodes.
            before_publishing: is given ``perf/save_pause_seconds`` and, where measured, ``val/tau_decoded``.

        Raises:
            UserError: it could not be written; the checkpoints before it are as they were.
        """
        assert self.under_way is not None
        ended, self.under_way = self.under_way, None

        def publish() -> None:
            waiting = time.perf_counter()
            ended.written.result()
            figures = {"perf/save_pause_seconds": ended.paused + time.perf_counter() - waiting}
            tau = None
            if measure and self.measure:
                tau = figures["val/tau_decoded"] = self.measure(read_servable(self.run.partial(ended.step)))
            before_publishing(figures)
            self.run.publish(ended.step, tau, self.keep)

        with self._named_failure(ended.step):
            on_first_rank(publish)
        # A thread of this rank that is late would meet those of the next save; what failed, the first rank has told.
        if not self.first:
            ended.written.exception()

    @contextlib.contextmanager
    def _named_failure(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, CheckpointException) as error:
            if self.first:
                self.run.abandon(step)
            raise UserError(
                f"{self.run.path(step)}: could not be written ({root_cause(error)}); the last good checkpoint is "
                f"{self.last_good()}; make room and go on with resume=auto"
            ) from error

    def load_latest(self, state: ResumeState) -> Position | None:
        """Loads the newest checkpoint into ``state``; None where there is none.

        Raises:
            UserError: it is damaged, or was made by a run with another configuration, target or data.
        """
        checkpoint = self.run.newest()
        if checkpoint is None:
            return None
        with _named_damage(self.run):
            position = Position.read(checkpoint)
            position.check_same_run(self.start, checkpoint)
            state.load(checkpoint)
        if self.first:
            self.run.keep_metrics_until(position.step)
        return position

    def report(self, step: int) -> str:
        """What was saved, what it accepts when it decodes, and which is the best so far."""
        tau = self.run.tau(step)
        measured = "" if tau is None else f", tau {tau:.2f} decoded"
        return f"saved {self.run.path(step).name}{measured}; best: step_{self.run.best()}"

    def last_good(self) -> str:
        steps = self.run.steps()
        return str(self.run.path(steps[-1])) if steps else "none"

    def close(self) -> None:
        """Waits for nothing: what is under way has no name, and the next start removes it."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def check_newest(run: RunDirectory, config: dict[str, Any]) -> None:
    """Before anything is loaded: the newest checkpoint, if any, is whole, and a run of ``config`` can go on from it.

    Raises:
        UserError: it is not, or cannot.
    """
    checkpoint = run.newest()
    if checkpoint is None:
        return
    with _named_damage(run):
        position = Position.read(checkpoint)
        position.check_same_config(config, checkpoint)
        position.check_whole(checkpoint)


@contextlib.contextmanager
def _named_damage(run: RunDirectory) -> Iterator[None]:
    try:
        yield
    except Damaged as error:
        *before, newest = run.steps()
        other = f"the one before it is step_{before[-1]}" if before else "there is none before it"
        goes_on = "goes on from there" if before else "starts at step 0"
        raise UserError(
            f"{run.path(newest)}: is damaged ({error}); {other}: remove this directory, and resume=auto {goes_on}"
        ) from error
