"""Runs recipes/train_eagle3.py as its user would, and kills it (-9) at a named moment: ``driver.py MOMENT STEP …``.

The moments are places in the package; nothing in the package knows of them.  ``MOMENT:RANK`` is one rank's alone.
"""

import os
import runpy
import signal
import sys
import time
from functools import partial
from pathlib import Path

from torch.distributed.checkpoint import FileSystemWriter

from nemo_speculative.algorithms.common.ttt import TTTObjective
from nemo_speculative.checkpoint.run_dir import RunDirectory
from nemo_speculative.distributed import health
from nemo_speculative.distributed.health import Heartbeat
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.training import run as training
from nemo_speculative.training.checkpointer import Checkpointer
from nemo_speculative.training.prefetch import BatchPrefetcher
from nemo_speculative.training.trainer import DraftTrainer
from nemo_speculative.utils.append_log import AppendLog

ROOT = Path(__file__).parents[2]


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_answer(count):
    """Before any step: the target has answered so many questions but for the end of the last one's line."""
    append, lines = AppendLog.append_line, []

    def append_line(self, line):
        lines.append(line)
        append(self, line) if len(lines) < count else die(self._out.write(line[:-9]))

    AppendLog.append_line = append_line


def kill_in_step(step):
    """After the loss of a step, before its optimizer step."""
    advance = DraftTrainer.train_step

    def train_step(self):
        if self.step + 1 == step:
            self.optimizers.step = die
        return advance(self)

    DraftTrainer.train_step = train_step


def kill_in_write(step):
    """Within a save: the tensors are copied, and the thread that writes them has just begun."""
    write = FileSystemWriter.write_data
    FileSystemWriter.write_data = lambda self, plan, planner: (
        die if f"step_{step}.partial" in str(self.path) else write
    )(self, plan, planner)


def kill_in_validation(step):
    validate = DraftTrainer.validate
    DraftTrainer.validate = lambda self: (die if self.step == step else validate)(self)


def kill_in_measurement(step):
    """While the first rank decodes: the first itself, or another that waits for it."""
    finish = Checkpointer.finish

    def finish_or_die(self, **how):
        if self.pending.step == step:
            self.measure = die
        return die() if self.pending.step == step and not self.is_first_rank else finish(self, **how)

    Checkpointer.finish = finish_or_die


def terminate_in_step(step):
    """As a scheduler does that takes its machine back."""
    interrupt_in_step(step, signal.SIGTERM)


def tarry_in_target(_step):
    """The target of this rank takes longer in every step."""
    HFTarget.compute_hidden_states = tarrying(HFTarget.compute_hidden_states)


def tarry_in_draft(_step):
    """The loss of this rank takes longer in every step."""
    TTTObjective.rows_loss = tarrying(TTTObjective.rows_loss)


def tarrying(call):
    """``call``, which then takes four times as long, however fast the machine is."""

    def called(*given):
        started = time.perf_counter()
        found = call(*given)
        time.sleep(3 * (time.perf_counter() - started))
        return found

    return called


def sleep_in_step(step):
    """The target of this rank answers late; the first rank waits a second before it says so."""
    advance, compute_hidden_states = DraftTrainer.train_step, HFTarget.compute_hidden_states
    HFTarget.at = 0
    DraftTrainer.train_step = lambda self: (setattr(HFTarget, "at", self.step + 1), advance(self))[1]
    HFTarget.compute_hidden_states = lambda self, batch: (
        time.sleep(10 * (self.at == step)),
        compute_hidden_states(self, batch),
    )[1]


def break_feed_at(step):
    """The thread that packs the batches meets rows that are gone."""
    make = BatchPrefetcher._make

    def broken(self):
        if self.loader.rows_consumed == (step - 1) * self.loader.global_batch_size:
            raise KeyError("rows.arrow")
        return make(self)

    BatchPrefetcher._make = broken


def kill_in_save(step):
    """Within a save: the resume state is on disk, the model is not."""
    write = Checkpointer._write_model
    Checkpointer._write_model = lambda self, at, state: (die if at == step else write)(self, at, state)


def kill_after_rename(step):
    """Within a save: the checkpoint has its name, the links still point to the one before."""
    link = RunDirectory._link_all

    def link_all(self):
        (die if self.steps()[-1:] == [step] else link)(self)

    RunDirectory._link_all = link_all


def interrupt_in_step(step, number=signal.SIGINT):
    """Ctrl-C in the middle of a step."""
    advance = DraftTrainer.train_step

    def train_step(self):
        if self.step + 1 == step:
            os.kill(os.getpid(), number)
        return advance(self)

    DraftTrainer.train_step = train_step


def fill_disk_at(step):
    """No file may grow past 20 kB from the save of ``step`` on: what the system says then is what a full disk says."""
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
    HFTarget.at = 0  # it is asked before the first step too: whether it keeps documents apart
    DraftTrainer.train_step = lambda self: (setattr(HFTarget, "at", self.step + 1), advance(self))[1]

    def poisoned(self, batch):
        made = compute_hidden_states(self, batch)
        return (
            TargetOutput(torch.full_like(made.aux_hidden_states, torch.nan), made.last_hidden_state)
            if self.at >= step
            else made
        )

    HFTarget.compute_hidden_states = poisoned


if __name__ == "__main__":
    training.Heartbeat = partial(Heartbeat, beat=0.3, stall=1.0)
    health.COMPARED_STEPS, health.SLOW_RATIO = 3, 1.2
    moment, step, *overrides = sys.argv[1:]
    moment, _, rank = moment.partition(":")
    # What has happened once does not happen again to those that a launcher starts in their place.
    if rank in ("", os.environ.get("RANK")) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        globals()[moment](int(step))
    sys.argv = ["train_eagle3.py", *overrides]
    runpy.run_path(str(ROOT / "recipes" / "train_eagle3.py"), run_name="__main__")
