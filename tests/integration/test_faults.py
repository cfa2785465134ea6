"""Faults of ranks (killed, stopped, slow, not finite): the job ends with one line, and resumes exactly."""

import json
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_speculative.checkpoint.draft_checkpoint import read_servable
from nemo_speculative.checkpoint.run_dir import RunDirectory
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.targets.sharded import FSDP2Target
from nemo_speculative.utils.errors import PeerLostError
from tests.integration.conftest import ENVIRONMENT, drive, metrics, torchrun, train
from tests.programs import Program, ranks_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ENDS_WITHIN = 60.0
"""Seconds, on a busy machine, from a rank's death to the end of the others."""
STEPS = 60
KILLS = 20


def state(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint: weights, moments, step counts."""
    folder = directory / "checkpoints" / "latest" / "state"
    metadata = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in metadata.items() if hasattr(m, "size")}
    dcp.load(tensors, checkpoint_id=str(folder), no_dist=True)
    return tensors


def model(directory: Path) -> bytes:
    return (directory / "checkpoints" / "latest" / "model" / "model.safetensors").read_bytes()


def assert_the_same_run(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    assert model(one) == model(other)
    a, b = state(one), state(other)
    assert a.keys() == b.keys() and any("exp_avg" in name for name in a)
    assert all(torch.equal(a[name], b[name]) for name in b)


def errors(process) -> list[str]:
    """The error lines of a failed program, which prints no traceback."""
    assert process.returncode not in (0, None) and "Traceback" not in process.stderr, process.stderr
    return [line for line in process.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """The directory of an undisturbed run on two ranks."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    done = train(settings, directory, ranks=2)
    assert done.returncode == 0, done.stderr
    return directory


def test_a_killed_rank_ends_the_other_and_the_job_resumes_exactly(settings, whole, tmp_path):
    """One run, killed again and again: in a step, in a save, in a validation, in the decoder's measurement."""
    run = tmp_path / "run"
    faults = [
        ("kill_in_step:1", 2, {None}), ("kill_in_write:1", 3, {None}), ("kill_in_write:0", 3, {None}),
        ("kill_in_measurement:0", 3, {None}), ("kill_in_measurement:1", 6, {6}), ("kill_in_validation:1", 8, {6}),
        ("kill_in_step:0", 10, {6, 9}),
    ]  # fmt: skip
    for fault, step, newest in faults:
        ended = drive(fault, step, settings, run, ranks=2, grace=ENDS_WITHIN)
        (line,) = errors(ended)
        assert ended.returncode == (-signal.SIGKILL if fault[-1] == "0" else PeerLostError.exit_code)
        assert f"rank {fault[-1]}" in line and "is gone" in line and "resume=auto" in line, (fault, line)
        assert max(RunDirectory(run).steps(), default=None) in newest, fault
        assert all(read_servable(path).provenance for path in (run / "checkpoints").glob("step_*"))
    done = train(settings, run, "resume=auto", ranks=2)
    assert done.returncode == 0 and re.search(r"resumed from step [69]", done.stdout), done.stderr
    assert_the_same_run(run, whole)


def kill_at(lines: int, rank: int, run: Path, command: list[str]) -> int:
    """Starts the job, kills ``rank`` when that many steps are logged, then the other one; returns the step.

    The other rank is killed, too, so that its few seconds of looking for the first one are not waited for.
    """
    started = [Program(*command, environment={**ENVIRONMENT, **names}) for names in ranks_of(2)]
    try:
        while len(steps := written(run)) < lines:
            assert all(program.returncode is None for program in started), "".join(started[0].stderr)
            time.sleep(0.004)
        started[rank].kill()
        started[rank].wait(None)
        assert started[rank].returncode == -signal.SIGKILL
        return steps[-1]
    finally:
        for program in started:
            program.kill()
            program.wait(None)


def written(run: Path) -> list[int]:
    """The steps of metrics.jsonl, whose last line may be partial."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def test_twenty_random_kills_of_one_run_change_nothing(settings, tmp_path):
    """Each kill is at a later step than the one before, so that all of them take effect; saves are every five steps."""
    long = [*settings, f"trainer.max_steps={STEPS}", "trainer.save_interval=5", "trainer.val_interval=7", "logger=none"]
    assert train(long, tmp_path / "whole", ranks=2).returncode == 0
    run, chance = tmp_path / "run", random.Random(0)
    command = ["recipes/train_eagle3.py", *long, f"output_dir={run}", "resume=auto"]
    for lines in sorted(chance.sample(range(1, STEPS - 2), KILLS)):
        assert kill_at(lines, chance.randrange(2), run, command) >= lines
    done = train(long, run, "resume=auto", ranks=2)
    assert done.returncode == 0 and re.search(r"resumed from step \d", done.stdout), done.stderr
    assert_the_same_run(run, tmp_path / "whole")


def test_sigterm_to_one_rank_saves_and_ends_both_with_0_and_sigint_with_130(settings, whole, tmp_path):
    """A scheduler that preempts the machine sends SIGTERM; the next start resumes from that step."""
    stopped = drive("terminate_in_step:1", 5, settings, tmp_path / "run", ranks=2)
    assert stopped.returncode == 0 and "interrupted: saved step" in stopped.stdout, stopped.stderr
    stopped = drive("interrupt_in_step:1", 8, settings, tmp_path / "run", ranks=2, grace=ENDS_WITHIN)
    assert stopped.returncode == 130 and "resumed from step" in stopped.stdout, stopped.stderr
    done = train(settings, tmp_path / "run", "resume=auto", ranks=2)
    assert done.returncode == 0, done.stderr
    resumed, uninterrupted = ([line["train/loss"] for line in metrics(d)] for d in (tmp_path / "run", whole))
    assert resumed == uninterrupted
    assert model(tmp_path / "run") == model(whole)


def test_a_nan_on_one_rank_ends_both_and_names_its_conversations(settings, tmp_path):
    lines = errors(drive("poison_from:1", 5, settings, tmp_path / "run", ranks=2, grace=ENDS_WITHIN))
    (own,) = [line for line in lines if "step 5: the loss or its gradient is not finite on the batch of" in line]
    assert sum("not finite on another rank" in line for line in lines) == 1
    assert re.search(r"batch of \d+", own) and "step_3" in own and len(lines) == 2
    assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == "step_3"


def test_a_rank_that_does_not_answer_is_named_after_the_timeout(settings, tmp_path):
    slow = [*settings, "trainer.timeout_seconds=4"]
    ended = drive("sleep_in_step:1", 5, slow, tmp_path / "run", ranks=2, grace=ENDS_WITHIN)
    line = errors(ended)[0]
    assert re.search(r"rank 1 \(host \S+, at step 4 \(target\)\) does not answer", line), line
    assert len(re.findall(r"rank 1 \(host \S+\) has been at step 4 \(target\) for \d s, the others", ended.stdout)) == 1


@pytest.mark.parametrize(("fault", "backend"), [("slow_target:1", "hf"), ("slow_draft:1", "hf_fsdp2")])
def test_a_rank_that_is_slow_in_every_step_is_named_once(settings, tmp_path, fault, backend):
    """The driver compares the ranks after steps 4, 7 and 10; tests/distributed/test_health.py tests the rules."""
    long = [*settings, "trainer.save_interval=100", f"backend={backend}"]
    long += ["trainer.micro_batch_size=4", "trainer.global_batch_size=8"]
    ended = drive(fault, 1, long, tmp_path / "run", ranks=2)
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    compared = {line["step"]: line["perf/slowest_rank"] for line in lines if "perf/slowest_rank" in line}
    assert compared == {4: 1, 7: 1, 10: 1}
    assert re.findall(r"rank (\d) \(host \S+\) computes \S+ times as long as most", ended.stdout) == ["1"]


class LateTarget(FSDP2Target):
    """A target divided over ranks, with the driver's faults for one that each rank holds whole."""

    def compute_hidden_states(self, batch):
        time.sleep(10 * (getattr(HFTarget, "at", 0) == 5))
        return super().compute_hidden_states(batch)


def test_the_timeout_applies_in_the_group_of_a_distributed_target(settings, tmp_path):
    """Waits in the process group of the target."""
    late = [*settings, "backend=hf_fsdp2", f"backend._target_={__name__}.LateTarget", "trainer.timeout_seconds=4"]
    ended = drive("sleep_in_step:1", 5, late, tmp_path / "run", ranks=2, grace=ENDS_WITHIN)
    first, other = errors(ended)
    assert re.search(r"rank 1 \(host \S+, at step 4 \(target\)\) does not answer", first), first
    assert "rank 0" in other, other


def test_a_rank_killed_while_a_distributed_target_computes_ends_the_other(settings, tmp_path):
    sharded = [*settings, "backend=hf_fsdp2"]
    (line,) = errors(drive("kill_in_validation:1", 4, sharded, tmp_path / "run", ranks=2, grace=ENDS_WITHIN))
    assert "rank 1" in line and "is gone" in line and "resume=auto" in line, line


def test_torchrun_restarts_a_killed_group_and_the_run_ends_unchanged(settings, whole, tmp_path):
    done = drive("kill_in_step:1", 8, settings, tmp_path / "run", run=torchrun, restarts=1)
    assert done.returncode == 0 and re.search(r"resumed from step [36]", done.stdout), done.stderr
    assert_the_same_run(tmp_path / "run", whole)


def test_a_data_error_on_one_rank_ends_both(settings, tmp_path):
    lines = errors(drive("break_data_at:1", 5, settings, tmp_path / "run", ranks=2, grace=ENDS_WITHIN))
    assert any("data: the next batch could not be made (KeyError: 'rows.arrow'" in line for line in lines), lines
    assert any("rank 1 (host " in line and "has ended" in line for line in lines), lines


def test_checkpoints_are_written_by_time(settings, tmp_path):
    done = train(settings, tmp_path / "run", "trainer.save_minutes=1e-9", "trainer.save_interval=100", ranks=2)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^saved step_", done.stdout, re.MULTILINE)) > 5
