"""What is written while training goes on, on N ranks, is what M ranks read; and a damage is found, whatever it is."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from nemo_speculative.checkpoint.run_dir import RunDirectory
from nemo_speculative.config.schema import OptimizerConfig, ParallelismConfig
from nemo_speculative.distributed import titan
from nemo_speculative.distributed.parallelism import data_rank, mesh, set_gradient_sync, shard_draft
from nemo_speculative.training.checkpointer import Checkpointer, PendingSave, check_newest
from nemo_speculative.training.ema import WeightAverage
from nemo_speculative.training.optimizer import build_optimizers, build_schedules
from nemo_speculative.training.resume_state import Position, ResumeState, checksums
from nemo_speculative.training.trainer import TTTModule
from nemo_speculative.utils.errors import UserError
from tests.algorithms.objectives.cases import eagle3, lay_out, make_documents
from tests.training.ranks import on_ranks

RANKS = {1: {}, 2: {"shard": -1}, 4: {"replicate": 2, "shard": 2}}
ROWS, BEFORE, AFTER = 4, 2, 3
START = Position(0, {}, {"seed": 0}, "target", "data")


class Run:
    """A draft in training on the ranks at hand, in the layout of their number."""

    def __init__(self):
        titan.bind_device("cpu")
        case = eagle3(draft_vocab=15)
        self.dims, self.goal = mesh(ParallelismConfig(**RANKS[dist.get_world_size()])), case.make_objective()
        self.trainee = shard_draft(TTTModule(case.make_draft(), self.goal), self.dims, torch.float32)
        self.optimizers = build_optimizers(OptimizerConfig(lr=1e-2), self.trainee)
        self.schedules = build_schedules(OptimizerConfig(lr=1e-2), self.optimizers, BEFORE + AFTER)
        self.average = WeightAverage(self.trainee, 0.9)
        self.state = ResumeState(self.trainee, self.optimizers, self.schedules, self.average, torch.device("cpu"))

    def steps(self, numbers: range) -> list[float]:
        return [self._step(n) for n in numbers]

    def _step(self, n: int) -> float:
        torch.manual_seed(n)
        made = [lay_out([make_documents([9, 14], seed=ROWS * n + row)], 32) for row in range(ROWS)]
        rows = [(self.goal.schedule(batch), supervision) for batch, supervision in made]
        counts = sum(schedule.counts for schedule, _ in rows)
        rank, ranks = data_rank(self.dims)
        mine, loss = rows[rank::ranks], torch.zeros(())
        for number, (schedule, supervision) in enumerate(mine):
            set_gradient_sync(self.trainee, last=number + 1 == len(mine))
            out = self.trainee(schedule, supervision, counts)
            out.loss.backward()
            loss += out.loss.detach()
        self.optimizers.step()
        self.schedules.step()
        self.optimizers.zero_grad()
        self.average.update(n + 1)
        dist.all_reduce(loss)
        return float(loss)


def whole(x):
    return getattr(x, "full_tensor", lambda: x)().detach().clone()


def save_and_go_on(folder: str):
    """The files are written only after more steps were trained: they must hold what was there before."""
    gate, write = threading.Event(), dcp.FileSystemWriter.write_data
    dcp.FileSystemWriter.write_data = lambda self, *a: (gate.wait(60), write(self, *a))[1]
    run = Run()
    run.steps(range(BEFORE))
    averages = {name: whole(x) for name, x in run.average.state_dict().items()}
    written = run.state.save(Path(folder))
    losses = run.steps(range(BEFORE, BEFORE + AFTER))
    assert not written.done()
    gate.set()
    written.result()
    read = run.state.weights(Path(folder))
    same = [torch.equal(read[name], averages[name]) for name in averages]
    return {"losses": losses, "same": same, "buffers": sorted(read.keys() - averages.keys())}


def go_on(folders: list[str]):
    found = []
    for folder in folders:
        run = Run()
        run.state.load(Path(folder))
        found.append(run.steps(range(BEFORE, BEFORE + AFTER)))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By the number of ranks: a checkpoint's place and what its run went on to lose."""
    folders = {ranks: tmp_path_factory.mktemp("saved") / str(ranks) for ranks in RANKS}
    return {ranks: (str(folder), on_ranks(ranks, save_and_go_on, str(folder))) for ranks, folder in folders.items()}


@pytest.mark.parametrize("ranks", RANKS)
def test_what_is_exported_is_the_average_at_the_save_whatever_was_trained_since(saved, ranks):
    found = saved[ranks][1][0]
    assert len(found["same"]) > 5 and all(found["same"])
    assert found["buffers"] == ["draft.d2t", "draft.t2d"]


@pytest.mark.parametrize("ranks", RANKS)
def test_saved_on_any_number_of_ranks_it_goes_on_with_the_same_losses_on_any_other(saved, ranks):
    uninterrupted = saved[1][1][0]["losses"]
    for losses in on_ranks(ranks, go_on, [folder for folder, _ in saved.values()])[0]:
        assert losses == pytest.approx(uninterrupted, rel=1e-6)


def init_of_the_draft():
    """Its whole weights before the first step."""
    return {name: whole(x) for name, x in Run().trainee.named_parameters()}


def test_the_draft_begins_alike_on_any_number_of_ranks():
    one, *others = [on_ranks(ranks, init_of_the_draft)[0] for ranks in RANKS]
    assert all(torch.equal(one[name], other[name]) for other in others for name in one)


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def saver_of(root: Path, **how) -> Checkpointer:
    none = dict.fromkeys(("draft", "shape", "provenance", "export_dtype", "special_ids", "measure", "minutes"))
    return Checkpointer(run=RunDirectory(root), keep=2, start=START, **none | how)


def checkpoints(root: Path, *steps: int) -> Path:
    """Of files that only their checksums have to fit; the last one's tensors."""
    run = RunDirectory(root)
    for step in steps:
        state = run.begin(step) / "state"
        (state / ".metadata").write_bytes(b"where it is")
        (state / "__1_0.distcp").write_bytes(bytes(range(200)))
        replace(START, step=step, files=checksums(state)).write(run.partial(step))
        run.publish(step, None, keep=9)
    return run.path(steps[-1]) / "state" / "__1_0.distcp"


class Loads:
    """A resume state that takes everything."""

    def load(self, checkpoint):
        self.loaded = checkpoint


DAMAGES = {
    "is missing": lambda file: file.unlink(),
    "has 100 bytes, 200 were written": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "holds other bytes than were written": lambda file: file.write_bytes(b"\1" + file.read_bytes()[1:]),
}


@pytest.mark.parametrize("said", DAMAGES)
@pytest.mark.parametrize("steps, offered", [((40, 60), "step_40: remove"), ((60,), "none before it: remove")])
def test_a_damaged_shard_is_refused_by_name_and_the_one_before_it_offered(alone, tmp_path, said, steps, offered):
    DAMAGES[said](checkpoints(tmp_path, *steps))
    with pytest.raises(UserError) as refused:
        check_newest(RunDirectory(tmp_path), START.config)
    line = str(refused.value)
    assert "step_60: is damaged (state/__1_0.distcp" in line and said in line and offered in line and "\n" not in line


def test_a_whole_one_is_loaded_and_one_without_a_position_is_not(alone, tmp_path):
    file, state = checkpoints(tmp_path, 40, 60), Loads()
    position = saver_of(tmp_path).load_latest(state)
    assert position and position.step == 60 and state.loaded.name == "step_60"
    file.with_name("position.json").write_text('{"step": 6')
    for read in (
        lambda: saver_of(tmp_path).load_latest(Loads()),
        lambda: check_newest(RunDirectory(tmp_path), START.config),
    ):
        with pytest.raises(UserError, match=r"is damaged \(state/position.json: .*step_40: remove this directory"):
            read()


def test_another_configuration_is_refused_before_anything_is_loaded_and_no_checkpoint_is_none_to_refuse(tmp_path):
    check_newest(RunDirectory(tmp_path), {"seed": 1})
    checkpoints(tmp_path, 40)
    check_newest(RunDirectory(tmp_path), START.config)
    run = RunDirectory(tmp_path)
    replace(START, step=40, config={"seed": 0}, files={}).write(run.path(40))
    with pytest.raises(UserError, match=r"step_40: cannot go on from it: seed is 1, the run was started with 0"):
        check_newest(run, {"seed": 1})


def test_a_clock_asks_for_a_checkpoint_on_the_first_rank(alone, tmp_path):
    assert not saver_of(tmp_path).due
    assert not saver_of(tmp_path, minutes=60).due
    assert saver_of(tmp_path, minutes=1e-9).due


def test_a_checkpoint_that_could_not_be_written_leaves_the_others_and_the_line_says_why(alone, tmp_path):
    checkpoints(tmp_path, 40)
    saver = saver_of(tmp_path)
    saver.run.begin(60)
    failed: Future[None] = Future()
    failed.set_exception(OSError(28, "No space left on device"))
    saver.under_way = PendingSave(60, failed, 0.0)
    assert saver.written
    with pytest.raises(UserError, match=r"step_60: could not be written .*No space left.*last good .*step_40; make"):
        saver.finish(measure=False, before_publishing=lambda figures: None)
    assert saver.run.steps() == [40] and not saver.run.partial(60).exists() and saver.under_way is None


def finish_with_a_late_thread(root: str) -> bool:
    """Whether what this rank had to write was on the disk when the checkpoint got its name."""
    saver = saver_of(Path(root))
    late = ThreadPoolExecutor(1).submit(time.sleep, 0.0 if saver.first else 1.0)
    if saver.first:
        saver.run.begin(60)
    saver.under_way = PendingSave(60, late, 0.0)
    saver.finish(measure=False, before_publishing=lambda figures: None)
    return late.done()


def test_no_rank_leaves_a_save_before_its_own_thread_has(tmp_path):
    assert on_ranks(2, finish_with_a_late_thread, str(tmp_path)) == [True, True]
