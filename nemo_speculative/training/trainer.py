"""The training loop, composed of torchtitan's parts.

Everything that decides a number is the same on any number of ranks and after any restart: a global batch is a fixed set
of rows, losses are divided by counts over all of it, and the only state beside the tensors is how many rows were read.
"""

import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.objective import LossSum, Objective
from nemo_speculative.config.schema import TrainJob
from nemo_speculative.data.batch import Batch
from nemo_speculative.data.loader import PackedLoader
from nemo_speculative.distributed import titan
from nemo_speculative.distributed.health import Progress, StragglerDetector
from nemo_speculative.distributed.parallelism import (
    data_rank,
    limit_collective_waits,
    set_gradient_sync,
    shard_draft,
    start_unshard,
)
from nemo_speculative.targets.base import Target, TargetOutput
from nemo_speculative.training.checkpointer import Checkpointer
from nemo_speculative.training.ema import WeightAverage
from nemo_speculative.training.optimizer import build_optimizers, build_schedules
from nemo_speculative.training.prefetch import BatchPrefetcher, GlobalBatch, TargetPrefetcher
from nemo_speculative.training.reporting import Reporter
from nemo_speculative.training.resume_state import ResumeState
from nemo_speculative.training.step_timer import StepTimer
from nemo_speculative.utils.errors import UserError

EXIT_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 0}
"""Of a run that was asked to stop and has saved: a scheduler that takes its machine back starts it anew."""


class TTTModule(nn.Module):
    """What FSDP wraps: one forward is one loss, so that the parameters are gathered once per micro-batch."""

    def __init__(
        self, draft: Draft, objective: Objective, timed: Callable[[], AbstractContextManager[None]] = nullcontext
    ):
        super().__init__()
        self.draft, self.objective, self.timed = draft, objective, timed

    def forward(self, schedule: Any, supervision: TargetOutput, counts: torch.Tensor) -> LossSum:
        with self.timed():
            return self.objective.loss(self.draft, schedule, supervision, counts)


@dataclass
class Taken:
    """A step whose loss has not been looked at yet."""

    step: int
    figures: torch.Tensor
    """[2]: its loss on this rank, and the norm of its gradient, which is that of all ranks."""
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Told:
    """What all ranks have told each other before a step."""

    counts: torch.Tensor
    """float64 [T]: the supervised slots of the global batch."""
    asked: signal.Signals | None
    """With what any of them was asked to stop."""
    due: bool
    """The first one's clock asks for a checkpoint."""
    written: bool
    """All of the checkpoint under way is on the disk, or could not be written."""


class DraftTrainer:
    """Trains a draft against a frozen target; ``saver`` writes its checkpoints, ``reporter`` its metrics."""

    def __init__(
        self, job: TrainJob, *, target: Target, draft: Draft, objective: Objective, stream: PackedLoader,
        validation: list[Batch], total_steps: int, parallel_dims: titan.ParallelDims, device: torch.device,
        saver: Checkpointer, reporter: Reporter,
    ):  # fmt: skip
        self.job, self.config, self.device = job, job.trainer, device
        self.target, self.objective, self.stream = target, objective, stream
        self.validation = [objective.schedule(batch, device, training=False) for batch in validation]
        self.parallel_dims, self.saver, self.reporter = parallel_dims, saver, reporter
        self.step, self.total_steps = 0, total_steps
        if job.trainer.compile:
            target.compile()
            for layer in draft.stack:
                layer.finish = torch.compile(layer.finish)  # type: ignore[method-assign]
        dtype = getattr(torch, job.trainer.dtype.value)
        self.clock, self.pace, self.learning_rate = StepTimer(device), StragglerDetector(reporter.say), 0.0
        trainee = TTTModule(draft.to(device), objective, self.clock.local)
        self.trainee = shard_draft(trainee, parallel_dims, dtype, job.parallelism.offload)
        self.optimizers = build_optimizers(job.optimizer, self.trainee)
        self.lr_schedulers = build_schedules(job.optimizer, self.optimizers, total_steps)
        self.average = WeightAverage(self.trainee, job.optimizer.ema_decay)
        self.state = ResumeState(self.trainee, self.optimizers, self.lr_schedulers, self.average, device)
        self._stop, self._asked = threading.Event(), set[int]()
        self.feed, self.ahead = (
            BatchPrefetcher(stream, objective, device),
            TargetPrefetcher(target, device, self.clock, self._stop),
        )
        self.position: GlobalBatch
        self._unchecked: list[Taken] = []

    def resume(self) -> None:
        """Goes on from the newest checkpoint of the run directory, if there is one."""
        position = self.saver.load_latest(self.state)
        if position:
            self.step = position.step
            self.stream.load_state_dict(position.data)
            ended = self.step >= self.total_steps
            done = f": all {self.total_steps} steps are done, trainer.max_steps or epochs adds some" if ended else ""
            self.reporter.say(f"resumed from step {self.step}{done}")

    def train(self) -> None:
        """Runs to the last step.  An interrupt saves a checkpoint and ends the program.

        Raises:
            UserError: a loss is not finite, or no target server answers, be it after an interrupt; nothing is saved.
            SystemExit: asked to stop, with status 130 by SIGINT, 0 by SIGTERM.
        """
        limit_collective_waits(self.parallel_dims, max(self.config.timeout_seconds, self.job.backend.longest_wait))
        handlers = {number: signal.signal(number, self._ask_to_stop) for number in EXIT_STATUS}
        try:
            with self._profiler() as profiler:
                while self.step < self.total_steps:
                    self._advance()
                    profiler.step()
        finally:
            for signal_number, handler in handlers.items():
                signal.signal(signal_number, handler)

    def _ask_to_stop(self, number: int, _frame: Any) -> None:
        self._asked.add(number)
        self._stop.set()

    def progress(self) -> Progress:
        """Where this rank stands, for the others."""
        return Progress(self.clock.sections, self.step, self.clock.current)

    def _profiler(self) -> titan.Profiler:
        config = titan.Profiler.Config(enable_profiling=self.config.profile, save_traces_folder="profile")
        return config.build(global_step=self.step, base_folder=self.job.output_dir)

    def _advance(self) -> None:
        sums, grad_norm, tokens, told = self.train_step()
        self.reporter.count_tokens(tokens)
        if told.written:
            with self.clock.excluded():
                self._finish_save()
        last = self.step == self.total_steps
        ending = last or told.asked is not None
        save = ending or told.due or self.step % self.config.save_interval == 0
        validate = last or self.step % self.config.val_interval == 0
        if save or validate or self.step == 1 or self.step % self.config.log_interval == 0:
            self._check_losses()
            metrics = self._train_metrics(sums, grad_norm) | (self.validate() if validate else {})
            self._report_and_save(metrics, save, wait=ending or not self.config.async_save)
            # What validation, measurement and saving took is no part of the steps that follow.
            self.clock.reset()
        if told.asked:
            self.reporter.say(f"interrupted: saved step {self.step}; go on with resume=auto")
            raise SystemExit(EXIT_STATUS[told.asked])

    def train_step(self) -> tuple[dict[str, torch.Tensor], torch.Tensor, int, Told]:
        """One optimizer step over a global batch.

        Returns:
            This rank's sums of metrics, the gradient's norm before clipping, this rank's tokens, and what all ranks
            have told each other.
        """
        with self.clock.section("data"):
            taken = self.feed.take()
            self.position = taken
            told = self._over_all_ranks(taken.counts)
        start_unshard(self.trainee)
        sums: dict[str, torch.Tensor] = {}
        losses: list[torch.Tensor] = []
        for schedule, supervision in self.ahead.over(taken.schedules, lambda: self.feed.peek().schedules):
            with self.clock.section("draft"):
                set_gradient_sync(self.trainee, last=len(losses) + 1 == len(taken.schedules))
                out = self.trainee(schedule, supervision, told.counts)
                out.loss.backward()
            losses.append(out.loss.detach())
            sums = {name: value + sums[name] if sums else value for name, value in out.sums.items()}
        with self.clock.section("draft"):
            grad_norm = titan.clip_grad_norm_(self.trainee.parameters(), self.job.optimizer.clip_norm)
            self.learning_rate = float(self.lr_schedulers.schedulers[0].get_last_lr()[0])
            self.optimizers.step()
            self.lr_schedulers.step()
            self.optimizers.zero_grad()
        self.step += 1
        self.average.update(self.step)
        norm = getattr(grad_norm, "full_tensor", lambda: grad_norm)()
        # Both: a gradient can overflow where the loss does not.
        figures = torch.stack([torch.stack(losses).sum(), norm.to(losses[0].device)])
        self._unchecked.append(Taken(self.step, figures, taken.ids))
        return sums, grad_norm, taken.num_tokens, told

    def _over_all_ranks(self, counts: torch.Tensor) -> Told:
        """One small reduction on the CPU: ``counts`` [T] are this rank's."""
        asked = list(EXIT_STATUS)
        signs = [*(number in self._asked for number in asked), self.saver.due, self.saver.written]
        packed = torch.cat([counts, torch.tensor(signs, dtype=torch.float64)])
        dist.all_reduce(packed)
        *stopping, due, written = packed[len(counts) :].tolist()
        number = next((number for number, ranks in zip(asked, stopping, strict=True) if ranks), None)
        return Told(packed[: len(counts)], number, due > 0, written == dist.get_world_size())

    def _check_losses(self) -> None:
        """Looks at all losses since the last time at once, so that a step needs no synchronisation."""
        finite = torch.stack([taken.figures for taken in self._unchecked]).isfinite().tolist()
        bad, loss_is_finite = None, True
        for taken, (loss_is_finite, norm_is_finite) in zip(self._unchecked, finite, strict=True):
            if not (loss_is_finite and norm_is_finite):
                bad = taken
                break
        self._unchecked.clear()
        ranks = torch.tensor([float(bad is not None), float(not loss_is_finite)])
        dist.all_reduce(ranks)
        anywhere, of_a_loss = ranks.tolist()
        if not anywhere:
            return
        self._finish_save()  # of an earlier step, whose losses were finite
        if bad is None or (of_a_loss and loss_is_finite):
            raise UserError("the loss or its gradient is not finite on another rank; its message names the batch")
        named = ", ".join(bad.ids[:8]) + (", …" if len(bad.ids) > 8 else "")
        raise UserError(
            f"step {bad.step}: the loss or its gradient is not finite on the batch of {named}; training stopped, "
            f"the last good checkpoint is {self.saver.last_good()}; lower optimizer.lr or look at these conversations"
        )

    def _train_metrics(self, sums: dict[str, torch.Tensor], grad_norm: torch.Tensor) -> dict[str, float]:
        learned = self.objective.metrics(reduce_sums(sums))
        metrics = {f"train/{name}": value for name, value in learned.items()}
        metrics["train/lr"] = self.learning_rate
        metrics["train/grad_norm"] = float(getattr(grad_norm, "full_tensor", lambda: grad_norm)())
        lap = self.clock.reset()
        supervised = float(reduce_sums({"count": sums["count"]})["count"][0])
        rows = self.config.global_batch_size * self.stream.row_tokens
        return (
            metrics
            | self.reporter.performance(lap.wall, lap.shares, data_rank(self.parallel_dims)[1])
            # Ranks that share rows wait for each other in all that they compute.
            | (self.pace.compare(self.step, lap.local) if self.job.parallelism.context == 1 else {})
            | {
                "data/epoch": self.position.epoch,
                "data/rows": self.position.state["rows_consumed"],
                "data/supervised_share": supervised / rows,
            }
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The objective on held-out rows: ``val/loss``, ``val/acc_i``, ``val/tau``."""
        if not self.validation:
            return {}
        sums: dict[str, torch.Tensor] = {}
        with self.average.applied():
            for schedule in self.validation:
                out = self.trainee(schedule, self.ahead.at_once(schedule.batch), schedule.counts)
                sums = {name: value + sums[name] if sums else value for name, value in out.sums.items()}
            if isinstance(self.trainee, FSDPModule):
                self.trainee.reshard()  # no backward pass will
        return {f"val/{name}": value for name, value in self.objective.metrics(reduce_sums(sums)).items()}

    def _report_and_save(self, metrics: dict[str, float], save: bool, wait: bool) -> None:
        self.reporter.line(self.step, metrics)
        if not save:
            return self.reporter.write(self.step, metrics)
        self._finish_save()
        # What is measured of a checkpoint belongs to the line of its step, which is there before the checkpoint is.
        self.reporter.hold()
        self.reporter.write(self.step, metrics)
        self.saver.begin(self.step, self.state, self.position.state)
        if wait:
            self._finish_save()
        return None

    def _finish_save(self) -> None:
        """The checkpoint under way, if any, gets its name; waited for if it must be."""
        under_way = self.saver.under_way
        if under_way:
            measure = self.step == self.total_steps or not self._stop.is_set()
            self.saver.finish(measure=measure, before_publishing=self.reporter.release)
            self.reporter.say(self.saver.report(under_way.step))

    def close(self) -> None:
        self.ahead.close()
        self.feed.close()
        self.saver.close()
        self.state.close()
        self.reporter.close()


def reduce_sums(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adds the sums of all ranks, on the CPU, in one reduction."""
    packed = torch.stack([value.cpu() for value in sums.values()])
    dist.all_reduce(packed)
    return dict(zip(sums, packed, strict=True))
