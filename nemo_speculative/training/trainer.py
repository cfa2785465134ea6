"""The training loop, composed of torchtitan's parts.

Everything that decides a number is the same on any number of ranks and after any restart: a global batch is a fixed set
of rows, losses are divided by counts over all of it, and the only state besides the tensors is the number of rows read.
"""

import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.ttt import LossSum, TTTObjective
from nemo_speculative.config.schema import TrainJob
from nemo_speculative.data.batch import Batch, PackedLoader
from nemo_speculative.distributed import parallelism, titan
from nemo_speculative.distributed.health import Progress, StragglerDetector
from nemo_speculative.targets.base import Target, TargetOutput
from nemo_speculative.training.checkpointer import Checkpointer, ResumeState
from nemo_speculative.training.metrics import MetricsLogger
from nemo_speculative.training.optimizer import WeightAverage, build_optimizers, build_schedules
from nemo_speculative.training.prefetch import BatchPrefetcher, GlobalBatch, TargetPrefetcher
from nemo_speculative.utils.devices import StepTimer
from nemo_speculative.utils.errors import UserError

EXIT_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 0}
"""Exit status after a signal and a save; 0 for the scheduler that takes its machine back and restarts the run later."""


class TTTModule(nn.Module):
    """Draft and loss as the unit that FSDP wraps: parameters are gathered once per micro-batch, not per TTT step."""

    def __init__(
        self, draft: Draft, objective: TTTObjective, timed: Callable[[], AbstractContextManager[None]] = nullcontext
    ):
        super().__init__()
        self.draft, self.objective, self.timed = draft, objective, timed

    def forward(self, schedule: Any, supervision: TargetOutput, counts: torch.Tensor) -> LossSum:
        with self.timed():
            return self.objective.loss(self.draft, schedule, supervision, counts)


@dataclass(frozen=True)
class StepResult:
    """An optimizer step on this rank; its tensors are still being computed on a GPU."""

    batch: GlobalBatch
    values: torch.Tensor
    """[2]: this rank's loss, and the norm of the gradient over all ranks before clipping."""
    learning_rate: float
    sums: dict[str, torch.Tensor]
    """Sums of metrics over this rank's micro-batches."""
    stop_signal: signal.Signals | None
    """The signal that any rank had received before the step."""
    save_due: bool
    """Whether trainer.save_minutes had passed on rank 0's clock."""
    save_written: bool
    """Whether the pending checkpoint was on disk on every rank, or had failed."""


class DraftTrainer:
    """Trains a draft against a frozen target."""

    def __init__(
        self, job: TrainJob, *, target: Target, draft: Draft, objective: TTTObjective, loader: PackedLoader,
        validation: list[Batch], total_steps: int, parallel_dims: titan.ParallelDims, device: torch.device,
        checkpointer: Checkpointer, metrics: MetricsLogger,
    ):  # fmt: skip
        self.job, self.config = job, job.trainer
        self.objective, self.loader, self.parallel_dims = objective, loader, parallel_dims
        self.validation = [objective.schedule(batch, device, training=False) for batch in validation]
        self.checkpointer, self.metrics = checkpointer, metrics
        self.step, self.total_steps = 0, total_steps
        if job.trainer.compile:
            target.compile()
            for layer in draft.decoder_layers:
                layer.finish = torch.compile(layer.finish)  # type: ignore[method-assign]
        self.timer, self.stragglers = StepTimer(device), StragglerDetector(metrics.print)
        dtype = getattr(torch, job.trainer.dtype.value)
        module = TTTModule(draft.to(device), objective, self.timer.local)
        self.module = parallelism.shard_draft(module, parallel_dims, dtype, job.parallelism.offload)
        self.optimizers = build_optimizers(job.optimizer, self.module)
        self.lr_schedulers = build_schedules(job.optimizer, self.optimizers, total_steps)
        self.average = WeightAverage(self.module, job.optimizer.ema_decay)
        self.state = ResumeState(self.module, self.optimizers, self.lr_schedulers, self.average, device)
        self._stop, self._signals = threading.Event(), set[int]()
        self._last_save = time.monotonic()
        self.batches = BatchPrefetcher(loader, objective, device)
        self.targets = TargetPrefetcher(target, device, self.timer, self._stop)
        self._unchecked: list[tuple[int, tuple[str, ...], torch.Tensor]] = []
        """Step, ids of its conversations, and ``StepResult.values``, of steps not yet checked."""

    def resume(self) -> None:
        """Resumes from the newest checkpoint of the run directory, if there is one."""
        if metadata := self.checkpointer.load_latest(self.state):
            self.step = metadata.step
            self.loader.load_state_dict(metadata.data)
            ended = self.step >= self.total_steps
            done = f": all {self.total_steps} steps are done, trainer.max_steps or epochs adds some" if ended else ""
            self.metrics.print(f"resumed from step {self.step}{done}")

    def train(self) -> None:
        """Runs to the last step.  A signal saves a checkpoint and ends the program.

        Raises:
            UserError: a loss is not finite, or no target server answers, possibly after a signal; nothing is saved.
            SystemExit: after a signal, with status 130 for SIGINT and 0 for SIGTERM.
        """
        seconds = max(self.config.timeout_seconds, self.job.backend.longest_wait)
        parallelism.limit_collective_waits(self.parallel_dims, seconds)
        handlers = {number: signal.signal(number, self._on_signal) for number in EXIT_STATUS}
        profiler_config = titan.Profiler.Config(enable_profiling=self.config.profile, save_traces_folder="profile")
        try:
            with profiler_config.build(global_step=self.step, base_folder=self.job.output_dir) as profiler:
                while self.step < self.total_steps:
                    self._finish_step(self.train_step())
                    profiler.step()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def train_step(self) -> StepResult:
        """Runs one optimizer step over a global batch."""
        with self.timer.section("data"):
            batch = self.batches.next()
            counts, stop_signal, save_due, save_written = self._sync_ranks(batch.counts)
        parallelism.start_unshard(self.module)
        sums: dict[str, torch.Tensor] = {}
        losses: list[torch.Tensor] = []
        for schedule, supervision in self.targets.iterate(batch.schedules, lambda: self.batches.peek().schedules):
            with self.timer.section("draft"):
                parallelism.set_gradient_sync(self.module, last=len(losses) + 1 == len(batch.schedules))
                out = self.module(schedule, supervision, counts)
                out.loss.backward()
            losses.append(out.loss.detach())
            sums = _add(sums, out.sums)
        with self.timer.section("draft"):
            norm = titan.clip_grad_norm_(self.module.parameters(), self.job.optimizer.clip_norm)
            learning_rate = float(self.lr_schedulers.schedulers[0].get_last_lr()[0])
            self.optimizers.step()
            self.lr_schedulers.step()
            self.optimizers.zero_grad()
        self.step += 1
        self.average.update(self.step)
        loss, norm = torch.stack(losses).sum(), getattr(norm, "full_tensor", lambda: norm)()
        values = torch.stack([loss, norm.to(loss.device)])
        return StepResult(batch, values, learning_rate, sums, stop_signal, save_due, save_written)

    def _sync_ranks(self, counts: torch.Tensor) -> tuple[torch.Tensor, signal.Signals | None, bool, bool]:
        """The supervised slots of the global batch per TTT step, float64 [T], and the last fields of StepResult.

        One small reduction on the CPU; ``counts`` are this rank's.
        """
        signals, minutes, pending = list(EXIT_STATUS), self.config.save_minutes, self.checkpointer.pending
        save_due = minutes is not None and dist.get_rank() == 0 and time.monotonic() - self._last_save > 60 * minutes
        save_written = pending is not None and pending.written.done()
        flags = [*(number in self._signals for number in signals), save_due, save_written]
        packed = torch.cat([counts, torch.tensor(flags, dtype=torch.float64)])
        dist.all_reduce(packed)
        *stopping, due, written = packed[len(counts) :].tolist()
        stop_signal = next((number for number, ranks in zip(signals, stopping, strict=True) if ranks), None)
        return packed[: len(counts)], stop_signal, due > 0, written == dist.get_world_size()

    def _finish_step(self, result: StepResult) -> None:
        """Checks, validates, logs and saves after a step, where they are due; raises SystemExit after a signal."""
        self._unchecked.append((self.step, result.batch.ids, result.values))
        self.metrics.count_tokens(result.batch.num_tokens)
        if result.save_written:
            with self.timer.excluded():
                self._finish_save()
        last = self.step == self.total_steps
        ending = last or result.stop_signal is not None
        save = ending or result.save_due or self.step % self.config.save_interval == 0
        validate = last or self.step % self.config.val_interval == 0
        if save or validate or self.step == 1 or self.step % self.config.log_interval == 0:
            self._check_losses()
            metrics = self._train_metrics(result) | (self.validate() if validate else {})
            self.metrics.print_step(self.step, metrics)
            if save:
                self._finish_save()
                # The checkpoint's own metrics belong to this step's line, and are measured when it is written.
                self.metrics.hold()
            self.metrics.write(self.step, metrics)
            if save:
                self._last_save = time.monotonic()
                self.checkpointer.begin(self.step, self.state, result.batch.loader_state)
                if ending or not self.config.async_save:
                    self._finish_save()
            # Time for validation, measurement and saving is not part of the following steps.
            self.timer.reset()
        if result.stop_signal:
            self.metrics.print(f"interrupted: saved step {self.step}; resume with resume=auto")
            raise SystemExit(EXIT_STATUS[result.stop_signal])

    def _on_signal(self, number: int, _frame: Any) -> None:
        self._signals.add(number)
        self._stop.set()

    def _check_losses(self) -> None:
        """Raises UserError if a loss or gradient of any rank since the last check is not finite.

        One check of several steps, so that a step needs no synchronization.  Gradients can overflow where the loss
        does not.
        """
        finite = torch.stack([values for *_, values in self._unchecked]).isfinite()
        bad = (~finite.all(1)).nonzero().flatten().tolist()
        step, ids, _ = self._unchecked[bad[0] if bad else 0]
        bad_loss = bool(bad) and not finite[bad[0], 0]
        self._unchecked.clear()
        ranks = torch.tensor([float(bool(bad)), float(bad_loss)])
        dist.all_reduce(ranks)
        any_bad, any_bad_loss = ranks.tolist()
        if not any_bad:
            return
        self._finish_save()  # of an earlier step, whose losses were finite
        if not bad or (any_bad_loss and not bad_loss):
            raise UserError("the loss or its gradient is not finite on another rank; its message names the batch")
        shown = ", ".join(ids[:8]) + (", …" if len(ids) > 8 else "")
        raise UserError(
            f"step {step}: the loss or its gradient is not finite on the batch of {shown}; training stopped, "
            f"the last good checkpoint is {self.checkpointer.last_good()}; lower optimizer.lr or look at these "
            "conversations"
        )

    def _train_metrics(self, result: StepResult) -> dict[str, float]:
        sums, times = _reduce(result.sums), self.timer.reset()
        metrics = {f"train/{k}": v for k, v in self.objective.metrics(sums).items()}
        metrics |= {"train/lr": result.learning_rate, "train/grad_norm": float(result.values[1])}
        metrics |= self.metrics.performance(times, parallelism.data_rank(self.parallel_dims)[1])
        if self.job.parallelism.context == 1:  # else ranks that share rows wait for each other in all they compute
            metrics |= self.stragglers.compare(self.step, times.local)
        slots = self.config.global_batch_size * self.loader.packed_length
        return metrics | {
            "data/epoch": result.batch.epoch,
            "data/rows": result.batch.loader_state["rows_consumed"],
            "data/supervised_share": float(sums["count"][0]) / slots,
        }

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The objective's metrics on held-out rows: ``val/loss``, ``val/acc_i``, ``val/tau``."""
        if not self.validation:
            return {}
        sums: dict[str, torch.Tensor] = {}
        with self.average.applied():
            for schedule in self.validation:
                out = self.module(schedule, self.targets.compute_now(schedule.batch), schedule.counts)
                sums = _add(sums, out.sums)
            if isinstance(self.module, FSDPModule):
                self.module.reshard()  # no backward pass will
        return {f"val/{k}": v for k, v in self.objective.metrics(_reduce(sums)).items()}

    def _finish_save(self) -> None:
        """Publishes the pending checkpoint, if any; waits until it is written."""
        if pending := self.checkpointer.pending:
            measure = self.step == self.total_steps or not self._stop.is_set()
            self.checkpointer.finish(measure=measure, before_publishing=self.metrics.release)
            self.metrics.print(self.checkpointer.describe(pending.step))

    def progress(self) -> Progress:
        """This rank's progress, for the heartbeat."""
        return Progress(self.timer.sections, self.step, self.timer.current)

    def close(self) -> None:
        self.targets.close()
        self.batches.close()
        self.checkpointer.close()
        self.state.close()
        self.metrics.close()


def _add(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value + a[name] if a else value for name, value in b.items()}


def _reduce(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums over all ranks, on the CPU, in one reduction."""
    packed = torch.stack([value.cpu() for value in sums.values()])
    dist.all_reduce(packed)
    return dict(zip(sums, packed, strict=True))
