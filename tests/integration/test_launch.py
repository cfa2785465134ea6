"""The launcher in a complete run."""

import os
import shutil
import signal
import time
from itertools import count

import pytest

from tests.integration.conftest import ENVIRONMENT, metrics
from tests.listening import listening, with_descendants
from tests.programs import Program, run_program

POLL_SECONDS, CHECK_SOCKETS_EVERY = 0.05, 5


def test_a_launched_run_listens_on_the_loopback_only_and_survives_the_loss_of_a_rank(settings, finished, tmp_path):
    directory = tmp_path / "run"
    options = ["--nproc-per-node", "2", "--max-restarts", "1"]
    run = ["recipes/train_eagle3.py", *settings, f"output_dir={directory}", "resume=auto", "parallelism=fsdp2"]
    addresses, killed = set(), False
    with Program("-m", "nemo_speculative.launch", *options, *run, environment=ENVIRONMENT) as program:
        for n in count():
            if program.returncode is not None:
                break
            if n % CHECK_SOCKETS_EVERY == 0:
                addresses |= {address for _, address in listening(program.pid)}
            if not killed and (directory / "checkpoints" / "latest").exists():
                os.kill(list(with_descendants(program.pid))[-1], signal.SIGKILL)
                killed = True
            time.sleep(POLL_SECONDS)
        output = "".join(program.stdout), "".join(program.stderr)
    assert program.returncode == 0, output
    assert killed and "resumed from step" in output[0], output
    assert addresses == {"127.0.0.1"}
    for one, two in zip(metrics(finished), metrics(directory), strict=True):
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)


def test_a_damaged_checkpoint_is_reported_once(settings, finished, tmp_path):
    directory = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    shard = next((directory / "checkpoints" / "latest" / "state").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    run = ["recipes/train_eagle3.py", *settings, f"output_dir={directory}", "resume=auto", "parallelism=fsdp2"]
    options = ["--nproc-per-node", "2", "--max-restarts", "2"]
    done = run_program("-m", "nemo_speculative.launch", *options, *run, environment=ENVIRONMENT)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and sum("is damaged" in line for line in errors) == 1, done.stderr
    assert errors[-1] == "error: rank 0 failed, and a restart would not help; its output is above"
