"""Runs recipes/train_eagle3.py with a fault injected at a step: ``driver.py FAULT STEP OVERRIDES…``.

Faults patch the package from outside.  ``FAULT:RANK`` injects the fault on one rank only.
"""

import os
import runpy
import signal
import sys
import time
from functools import partial
from pathlib import Path

from torch.distributed.checkpoint import FileSystemWriter

from nemo_speculative.algorithms.common import ttt
from nemo_speculative.checkpoint.run_dir import RunDirectory
from nemo_speculative.distributed import health
from nemo_speculative.distributed.health import Heartbeat
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.training import run as training
from nemo_speculative.training.checkpointer import Checkpointer, ResumeState
from nemo_speculative.training.prefetch import BatchPrefetcher
from nemo_speculative.training.trainer import DraftTrainer
from nemo_speculative.utils.append_log import AppendLog

ROOT = Path(__file__).parents[2]


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_answer(count):
    """Kills the process before any step, after ``count`` answers, the last one partial."""
    append, lines = AppendLog.append_line, []

    def append_line(self, line):
        lines.append(line)
        append(self, line) if len(lines) < count else die(self._out.write(line[:-9]))

    AppendLog.append_line = append_line


def kill_in_step(step):
    """Kills the rank after the loss of a step, before its optimizer step."""
    advance = DraftTrainer.train_step

    def train_step(self):
        if self.step + 1 == step:
            self.optimizers.step = die
        return advance(self)

    DraftTrainer.train_step = train_step


def kill_in_write(step):
    """Kills the rank within a save: the tensors are copied, and the thread that writes them has just started."""
    write = FileSystemWriter.write_data
    FileSystemWriter.write_data = lambda self, plan, planner: (
        die if f"step_{step}.partial" in str(self.path) else write
    )(self, plan, planner)


def kill_in_validation(step):
    validate = DraftTrainer.validate
    DraftTrainer.validate = lambda self: (die if self.step == step else validate)(self)


def kill_in_measurement(step):
    """Kills rank 0 while it decodes, or another rank that waits for it."""
    finish = Checkpointer.finish

    def finish_or_die(self, **how):
        if self.pending.step == step:
            self.measure = die
        return die() if self.pending.step == step and not self.is_first_rank else finish(self, **how)

    Checkpointer.finish = finish_or_die


def terminate_in_step(step):
    """Sends SIGTERM, like a scheduler that preempts the machine."""
    interrupt_in_step(step, signal.SIGTERM)


def slow_target(_step):
    """Makes the target of this rank slower in every step."""
    HFTarget.compute_hidden_states = slowed_down(HFTarget.compute_hidden_states)


def slow_draft(_step):
    """Makes the unroll and the loss of this rank slower in every step."""
    ttt.unroll = slowed_down(ttt.unroll)
    ttt.TTTObjective.rows_loss = slowed_down(ttt.TTTObjective.rows_loss)


def slowed_down(call):
    """``call`` made four times as slow, on any machine."""

    def slow(*args):
        started = time.perf_counter()
        result = call(*args)
        time.sleep(3 * (time.perf_counter() - started))
        return result

    return slow


def sleep_in_step(step):
    """The target of this rank answers late; rank 0 reports it after a second."""
    advance, compute_hidden_states = DraftTrainer.train_step, HFTarget.compute_hidden_states
    HFTarget.at = 0
    DraftTrainer.train_step = lambda self: (setattr(HFTarget, "at", self.step + 1), advance(self))[1]
    HFTarget.compute_hidden_states = lambda self, batch: (
        time.sleep(10 * (self.at == step)),
        compute_hidden_states(self, batch),
    )[1]


def break_data_at(step):
    """The thread that packs the batches finds that rows are gone."""
    make = BatchPrefetcher._make

    def broken(self):
        if self.loader.rows_consumed == (step - 1) * self.loader.global_batch_size:
            raise KeyError("rows.arrow")
        return make(self)

    BatchPrefetcher._make = broken


def kill_in_save(step):
    """Kills the process within a save: the resume state is on disk, the model is not yet."""
    read = ResumeState.weights
    ResumeState.weights = lambda self, checkpoint: (die if checkpoint.name == f".step_{step}.partial" else read)(
        self, checkpoint
    )


def kill_after_rename(step):
    """Kills the process within a save: the checkpoint has its name, the links still point to the previous one."""
    update = RunDirectory._update_links

    def update_links(self):
        (die if self.steps()[-1:] == [step] else update)(self)

    RunDirectory._update_links = update_links


def interrupt_in_step(step, number=signal.SIGINT):
    """Raises SIGINT in the middle of a step."""
    advance = DraftTrainer.train_step

    def train_step(self):
        if self.step + 1 == step:
            os.kill(os.getpid(), number)
        return advance(self)

    DraftTrainer.train_step = train_step


def fill_disk_at(step):
    """Limits files to 20 kB from the save of ``step`` on; the system's error is like that of a full disk."""
    import resource

    begin = RunDirectory.begin

    def limited(self, at):
        if at == step:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return begin(self, at)

    RunDirectory.begin = limited


def poison_from(step):
    """The target's features are NaN from ``step`` on."""
    import torch

    from nemo_speculative.targets.base import TargetOutput

    advance, compute_hidden_states = DraftTrainer.train_step, HFTarget.compute_hidden_states
    HFTarget.at = 0  # it also computes before the first step: a probe of document masks
    DraftTrainer.train_step = lambda self: (setattr(HFTarget, "at", self.step + 1), advance(self))[1]

    def poisoned(self, batch):
        output = compute_hidden_states(self, batch)
        return (
            TargetOutput(torch.full_like(output.aux_hidden_states, torch.nan), output.last_hidden_state)
            if self.at >= step
            else output
        )

    HFTarget.compute_hidden_states = poisoned


if __name__ == "__main__":
    training.Heartbeat = partial(Heartbeat, beat=0.3, stall=1.0)
    health.COMPARED_STEPS, health.SLOW_RATIO = 3, 1.2
    fault, step, *overrides = sys.argv[1:]
    fault, _, rank = fault.partition(":")
    # A fault is not injected again into ranks that a launcher has restarted.
    if rank in ("", os.environ.get("RANK")) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        globals()[fault](int(step))
    sys.argv = ["train_eagle3.py", *overrides]
    runpy.run_path(str(ROOT / "recipes" / "train_eagle3.py"), run_name="__main__")
