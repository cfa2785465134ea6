"""Training against target servers in other processes: the same losses, also when servers fail."""

import contextlib
import json
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from safetensors.torch import load

from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.targets.remote.protocol import TargetIdentity, pack_batch
from tests.integration.conftest import ENVIRONMENT, metrics, run, train
from tests.integration.test_training import only_error
from tests.programs import Program
from tests.target_servers import batch_of, until

QUICK = ["backend.attempts=2", "backend.backoff_seconds=0.2", "backend.connect_timeout=2"]
PROGRAM = ["-m", "nemo_speculative.serve_target"]
SLOW = ["tests/integration/serve_slowly.py", "0.3"]
"""Delay of a batch, so long that the server is killed before the run ends."""


class Served:
    """A server's process and its address."""

    def __init__(self, process):
        self.process = process
        line = next((line for line in process.stdout if line.startswith("serving")), None)
        assert line, "".join(process.stderr)
        self.url = line.split(" on ")[1].split()[0]

    def wait_for(self, word):
        assert any(line.startswith(word) for line in self.process.stdout)

    def end(self, number):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def served(target_dir, *overrides, program=PROGRAM, **environment):
    """Starts a target server by its command line."""
    command = [*program, "model=local", f"model.path={target_dir}", "port=0", *overrides]
    with Program(*command, environment=ENVIRONMENT | environment) as process:
        yield Served(process)


def remote(settings, directory, *urls, steps=6):
    return [*settings, f"output_dir={directory}", "backend=remote", f"backend.urls=[{','.join(urls)}]", *QUICK,
            f"trainer.max_steps={steps}", "optimizer.decay_ratio=0"]  # fmt: skip


def kill_after(step, directory, server):
    """Kills (-9) the server when the run in ``directory`` has logged ``step``."""
    file = directory / "metrics.jsonl"
    until(lambda: file.exists() and len(file.read_text().splitlines()) >= step, seconds=200)
    server.process.kill()


@pytest.fixture(scope="module")
def in_process(settings, tmp_path_factory):
    """Metrics of six steps with backend=hf, without those of decoding."""
    directory = tmp_path_factory.mktemp("hf") / "run"
    done = train(settings, directory, "trainer.max_steps=6", "optimizer.decay_ratio=0")
    assert done.returncode == 0, done.stderr
    return learned(directory)


def learned(directory):
    return [{k: v for k, v in line.items() if k != "val/tau_decoded"} for line in metrics(directory)]


def test_metrics_equal_those_of_the_target_in_process(settings, target_dir, in_process, tmp_path, monkeypatch):
    """The token is saved nowhere."""
    directory, token = tmp_path / "run", "s3cret-token"
    monkeypatch.setitem(ENVIRONMENT, "NEMO_TARGET_TOKEN", token)
    with served(target_dir) as one:
        done = run("recipes/train_eagle3.py", *remote(settings, directory, one.url))
        assert done.returncode == 0, done.stderr
        assert one.end(signal.SIGTERM) == 0
    assert learned(directory) == in_process
    assert "only backend=hf decodes" in done.stdout
    files = [file for file in directory.rglob("*") if file.is_file()]
    assert json.loads((directory / "summary.json").read_text())["tau"] is None
    assert len(files) > 5 and not any(token.encode() in file.read_bytes() for file in files)
    assert token not in done.stdout + done.stderr


def test_a_run_survives_the_loss_of_one_of_two_servers(settings, target_dir, in_process, tmp_path):
    """Two ranks use two servers; the losses do not change."""
    with served(target_dir, program=SLOW) as one, served(target_dir) as two, ThreadPoolExecutor(1) as thread:
        killing = thread.submit(kill_after, 2, tmp_path / "run", one)
        overrides = remote(settings, tmp_path / "run", one.url, two.url)
        done = run("recipes/train_eagle3.py", *overrides, ranks=2)
        killing.result()
        assert done.returncode == 0 and f"target server {one.url} fails" in done.stderr, done.stderr
    result = [line["train/loss"] for line in metrics(tmp_path / "run")]
    assert result == pytest.approx([line["train/loss"] for line in in_process], rel=1e-5)


def test_a_run_that_lost_all_servers_ends_with_one_line_and_can_be_resumed(settings, target_dir, in_process, tmp_path):
    directory = tmp_path / "run"
    with served(target_dir, program=SLOW) as one, ThreadPoolExecutor(1) as thread:
        killing = thread.submit(kill_after, 4, directory, one)
        line = only_error(run("recipes/train_eagle3.py", *remote(settings, directory, one.url)))
        killing.result()
        assert "no target server answers any more" in line and one.url in line
    with served(target_dir) as two:
        done = run("recipes/train_eagle3.py", *remote(settings, directory, two.url), "resume=auto")
        assert done.returncode == 0 and "resumed from step 3" in done.stdout, done.stderr
    assert learned(directory) == in_process


def test_a_training_with_another_target_or_no_server_is_refused(settings, target_dir, tmp_path):
    with served(target_dir, "model.dtype=bfloat16") as one:
        line = only_error(run("recipes/train_eagle3.py", *remote(settings, tmp_path / "run", one.url)))
    assert f"{one.url} runs another target: dtype is bfloat16 there and float32 here" in line
    line = only_error(run("recipes/train_eagle3.py", *remote(settings, tmp_path / "run", one.url)))
    assert f"{one.url} does not answer as a target server" in line and not (tmp_path / "run").exists()


def test_a_run_whose_server_hangs_ends_on_sigterm(settings, target_dir, tmp_path):
    """It ends with one line, long before the timeout of 300 seconds."""
    hangs = ["tests/integration/serve_slowly.py", "1000"]
    with served(target_dir, program=hangs) as one:
        command = ["recipes/train_eagle3.py", *remote(settings, tmp_path / "run", one.url)]
        with Program(*command, environment=ENVIRONMENT) as process:
            one.wait_for("reading")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 130
            message = "".join(process.stderr)
    assert "Traceback" not in message, message
    assert [line for line in message.splitlines() if line.startswith("error: interrupted") and "resume=auto" in line]


def request(url, target, batch):
    tag = TargetIdentity.of(target).tag
    return httpx.post(f"{url}/supervise", content=pack_batch(batch), headers={"If-Match": tag}, timeout=60)


def test_sigterm_answers_accepted_requests_and_accepts_no_more(target_dir):
    """One request runs and two wait; then another one is sent."""
    target, batches = HFTarget(target_dir, aux_layers=None), [batch_of(*range(n, n + 12)) for n in range(3)]
    slow = ["tests/integration/serve_slowly.py", "1"]
    with served(target_dir, program=slow) as one, ThreadPoolExecutor(3) as clients:
        futures = [clients.submit(request, one.url, target, batch) for batch in batches]
        one.wait_for("reading")
        until(lambda: "queue_depth 3" in httpx.get(f"{one.url}/metrics").text)
        one.process.send_signal(signal.SIGTERM)
        one.wait_for("reading")  # the second
        with pytest.raises(httpx.TransportError):
            request(one.url, target, batches[0])
        for answer, batch in zip(futures, batches, strict=True):
            result = load(answer.result().content)["aux"]
            torch.testing.assert_close(
                result, target.compute_hidden_states(batch).aux_hidden_states, rtol=1e-4, atol=1e-4
            )
        assert one.process.wait(30) == 0
        assert "every accepted request was answered" in "".join(one.process.stdout)


def test_a_drain_that_takes_too_long_is_cut_off(target_dir):
    target = HFTarget(target_dir, aux_layers=None)
    slow = ["tests/integration/serve_slowly.py", "100"]
    with served(target_dir, "drain=1", program=slow) as one, ThreadPoolExecutor(1) as clients:
        futures = clients.submit(request, one.url, target, batch_of(*range(12)))
        one.wait_for("reading")
        assert one.end(signal.SIGTERM) == 1
        assert "drain=1: 1 requests were not answered" in "".join(one.process.stderr)
        assert futures.exception() or futures.result().status_code >= 500
