"""Checkpoints: written during training on N ranks and read on M, and checked for damage and for another run."""

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
from nemo_speculative.training.checkpointer import (
    Checkpointer,
    PendingSave,
    ResumeMetadata,
    ResumeState,
    check_newest,
    crc32,
    root_cause,
)
from nemo_speculative.training.optimizer import WeightAverage, build_optimizers, build_schedules
from nemo_speculative.training.trainer import TTTModule
from nemo_speculative.utils.errors import UserError
from tests.algorithms.cases import eagle3, lay_out, make_documents
from tests.training.ranks import on_ranks

RANKS = {1: {}, 2: {"shard": -1}, 4: {"replicate": 2, "shard": 2}}
ROWS, BEFORE, AFTER = 4, 2, 3
START = ResumeMetadata(0, {}, {"seed": 0}, "target", "data")


class Run:
    """A draft in training, in the layout for this number of ranks."""

    def __init__(self):
        titan.bind_device("cpu")
        case = eagle3(draft_vocab=15)
        self.dims, self.objective = mesh(ParallelismConfig(**RANKS[dist.get_world_size()])), case.make_objective()
        self.module = shard_draft(TTTModule(case.make_draft(), self.objective), self.dims, torch.float32)
        self.optimizers = build_optimizers(OptimizerConfig(lr=1e-2), self.module)
        self.schedules = build_schedules(OptimizerConfig(lr=1e-2), self.optimizers, BEFORE + AFTER)
        self.average = WeightAverage(self.module, 0.9)
        self.state = ResumeState(self.module, self.optimizers, self.schedules, self.average, torch.device("cpu"))

    def steps(self, numbers: range) -> list[float]:
        return [self._step(n) for n in numbers]

    def _step(self, n: int) -> float:
        torch.manual_seed(n)
        packed = [lay_out([make_documents([9, 14], seed=ROWS * n + row)], 32) for row in range(ROWS)]
        rows = [(self.objective.schedule(batch), supervision) for batch, supervision in packed]
        counts = sum(schedule.counts for schedule, _ in rows)
        rank, ranks = data_rank(self.dims)
        own_rows, loss = rows[rank::ranks], torch.zeros(())
        for number, (schedule, supervision) in enumerate(own_rows):
            set_gradient_sync(self.module, last=number + 1 == len(own_rows))
            out = self.module(schedule, supervision, counts)
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


def save_and_continue(folder: str):
    """Delays the writing until more steps were trained: the files must hold the state at the save."""
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


def resume(folders: list[str]):
    losses = []
    for folder in folders:
        run = Run()
        run.state.load(Path(folder))
        losses.append(run.steps(range(BEFORE, BEFORE + AFTER)))
    return losses


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By the number of ranks: a checkpoint's directory and the losses of its run after the save."""
    folders = {ranks: tmp_path_factory.mktemp("saved") / str(ranks) for ranks in RANKS}
    return {ranks: (str(folder), on_ranks(ranks, save_and_continue, str(folder))) for ranks, folder in folders.items()}


@pytest.mark.parametrize("ranks", RANKS)
def test_the_exported_weights_are_the_average_at_the_save(saved, ranks):
    result = saved[ranks][1][0]
    assert len(result["same"]) > 5 and all(result["same"])
    assert result["buffers"] == ["draft.d2t", "draft.t2d"]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_checkpoint_of_n_ranks_resumes_with_the_same_losses_on_m(saved, ranks):
    uninterrupted = saved[1][1][0]["losses"]
    for losses in on_ranks(ranks, resume, [folder for folder, _ in saved.values()])[0]:
        assert losses == pytest.approx(uninterrupted, rel=1e-6)


def initial_weights():
    """Full weights of the draft before the first step."""
    return {name: whole(x) for name, x in Run().module.named_parameters()}


def test_initial_weights_are_equal_on_any_number_of_ranks():
    one, *others = [on_ranks(ranks, initial_weights)[0] for ranks in RANKS]
    assert all(torch.equal(one[name], other[name]) for other in others for name in one)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_checkpointer(root: Path) -> Checkpointer:
    return Checkpointer(run=RunDirectory(root), keep=2, start=START, export=None, measure=None)


def checkpoints(root: Path, *steps: int) -> Path:
    """Writes checkpoints of arbitrary bytes with valid checksums; returns the tensor file of the last one."""
    run = RunDirectory(root)
    for step in steps:
        state = run.begin(step) / "state"
        (state / ".metadata").write_bytes(b"where it is")
        (state / "__1_0.distcp").write_bytes(bytes(range(200)))
        replace(START, step=step, files={f.name: [f.stat().st_size, crc32(f)] for f in state.iterdir()}).write(
            run.partial(step)
        )
        run.publish(step, None, keep=9)
    return run.path(steps[-1]) / "state" / "__1_0.distcp"


class AnyState:
    """A resume state that loads anything."""

    def load(self, checkpoint):
        self.loaded = checkpoint


DAMAGES = {
    "is missing": lambda file: file.unlink(),
    "has 100 bytes, 200 were written": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "holds other bytes than were written": lambda file: file.write_bytes(b"\1" + file.read_bytes()[1:]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("steps, offered", [((40, 60), "step_40: remove"), ((60,), "none before it: remove")])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_offered(one_rank, tmp_path, damage, steps, offered):
    DAMAGES[damage](checkpoints(tmp_path, *steps))
    with pytest.raises(UserError) as error:
        check_newest(RunDirectory(tmp_path), START.config)
    line = str(error.value)
    assert "step_60: is damaged (state/__1_0.distcp" in line and damage in line and offered in line and "\n" not in line


def test_an_intact_checkpoint_is_loaded_and_one_without_metadata_is_rejected(one_rank, tmp_path):
    file, state = checkpoints(tmp_path, 40, 60), AnyState()
    metadata = make_checkpointer(tmp_path).load_latest(state)
    assert metadata and metadata.step == 60 and state.loaded.name == "step_60"
    file.with_name("position.json").write_text('{"step": 6')
    for read in (
        lambda: make_checkpointer(tmp_path).load_latest(AnyState()),
        lambda: check_newest(RunDirectory(tmp_path), START.config),
    ):
        with pytest.raises(UserError, match=r"is damaged \(state/position.json: .*step_40: remove this directory"):
            read()


def test_another_configuration_is_rejected_before_anything_is_loaded(tmp_path):
    check_newest(RunDirectory(tmp_path), {"seed": 1})
    checkpoints(tmp_path, 40)
    check_newest(RunDirectory(tmp_path), START.config)
    run = RunDirectory(tmp_path)
    replace(START, step=40, config={"seed": 0}, files={}).write(run.path(40))
    with pytest.raises(UserError, match=r"step_40: cannot resume from it: seed is 1, the run was started with 0"):
        check_newest(run, {"seed": 1})


def test_a_failed_write_leaves_earlier_checkpoints_and_explains_itself(one_rank, tmp_path):
    checkpoints(tmp_path, 40)
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.run.begin(60)
    failed: Future[None] = Future()
    failed.set_exception(OSError(28, "No space left on device"))
    checkpointer.pending = PendingSave(60, failed, 0.0)
    with pytest.raises(UserError, match=r"step_60: could not be written .*No space left.*last good .*step_40; free"):
        checkpointer.finish(measure=False, before_publishing=lambda metrics: None)
    assert (
        checkpointer.run.steps() == [40] and not checkpointer.run.partial(60).exists() and checkpointer.pending is None
    )


def finish_with_a_slow_thread(root: str) -> bool:
    """Whether this rank had written its part when ``finish`` returned."""
    checkpointer = make_checkpointer(Path(root))
    slow = ThreadPoolExecutor(1).submit(time.sleep, 0.0 if checkpointer.is_first_rank else 1.0)
    if checkpointer.is_first_rank:
        checkpointer.run.begin(60)
    checkpointer.pending = PendingSave(60, slow, 0.0)
    checkpointer.finish(measure=False, before_publishing=lambda metrics: None)
    return slow.done()


def test_finish_waits_for_the_ranks_own_thread(tmp_path):
    assert on_ranks(2, finish_with_a_slow_thread, str(tmp_path)) == [True, True]


CONFIG = {
    "seed": 0,
    "resume": "never",
    "optimizer": {"lr": 0.003, "betas": [0.9, 0.95]},
    "trainer": {"max_steps": 10, "global_batch_size": 4, "micro_batch_size": 2},
    "exporter": {"num_steps": 3, "dtype": None},
}


def metadata(target="a", data="b", **changed):
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in CONFIG.items()}
    for key, value in changed.items():
        *groups, name = key.split("__")
        node = config
        for group in groups:
            node = node[group]
        node[name] = value
    return ResumeMetadata(5, {}, config, target, data)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"seed": 1}, "seed is 1, the run was started with 0"),
        ({"optimizer__lr": 0.001}, "optimizer.lr is 0.001, the run was started with 0.003"),
        ({"optimizer__betas": [0.9, 0.999]}, "optimizer.betas"),
        ({"trainer__global_batch_size": 8}, "trainer.global_batch_size is 8"),
        ({"exporter__num_steps": 5}, "exporter.num_steps is 5"),
        ({"target": "x"}, "another target"),
        ({"data": "x"}, "other data"),
    ],
)
def test_a_change_of_results_is_rejected_by_name(changed, message):
    with pytest.raises(UserError) as error:
        metadata().check_same_run(metadata(**changed), Path("step_5"))
    assert message in str(error.value) and "step_5" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changed",
    [{}, {"resume": "auto"}, {"trainer__max_steps": 20}, {"trainer__micro_batch_size": 1}, {"exporter__dtype": "x"}],
)
def test_settings_without_effect_on_results_may_change(changed):
    metadata().check_same_run(metadata(**changed), Path("step_5"))


def test_torchs_error_on_a_full_disk_is_explained():
    """The message of torch 2.13 where a tensor does not fit on the disk."""
    message = root_cause(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"))
    assert "the disk is full" in message and "inline_container" not in message
    assert root_cause(OSError(28, "No space left on device")) == "[Errno 28] No space left on device"
