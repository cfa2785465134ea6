"""The server's process, with a small program in SGLang's place."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from nemo_speculative.errors import UsageError
from nemo_speculative.serve_sglang import main
from nemo_speculative.serving.command import from_checkpoint, serve_command
from nemo_speculative.serving.server import Server, ServerError, require_free

pytestmark = pytest.mark.usefixtures("fake_sglang")


@pytest.fixture
def options(run_dir, free_port):
    return from_checkpoint(run_dir, {"port": free_port})


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(options, tmp_path):
    with Server(serve_command(options, sys.executable), {}, options.host, options.port, tmp_path / "log") as server:
        yield server


def child_of(log: Path) -> int:
    return int(next(line for line in log.read_text().splitlines() if line.startswith("child")).split()[1])


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def eventually(holds, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def test_it_waits_until_the_server_is_healthy(server):
    server.wait_until_healthy(30)
    assert urllib.request.urlopen(f"{server.url}/health").status == 200


def test_stopping_ends_the_whole_process_group(server, options):
    server.wait_until_healthy(30)
    child = child_of(server.log)
    assert not gone(child)
    server.stop()
    assert eventually(lambda: gone(child))
    require_free(options.host, options.port)


def test_a_server_that_dies_shows_its_last_lines(capsys, run_dir, free_port, monkeypatch):
    monkeypatch.setenv("FAKE_SGLANG", "die")
    assert main(["--draft", str(run_dir), "--device", "cpu", "--port", str(free_port), "--timeout", "60"]) == 1
    *log, last = capsys.readouterr().err.splitlines()
    assert log[-1] == "CUDA error: out of memory"
    assert last.startswith("error: SGLang ended with code 7")


def test_a_server_that_never_answers_is_ended(capsys, run_dir, free_port, monkeypatch):
    monkeypatch.setenv("FAKE_SGLANG", "hang")
    assert main(["--draft", str(run_dir), "--device", "cpu", "--port", str(free_port), "--timeout", "1"]) == 1
    *log, last = capsys.readouterr().err.splitlines()
    assert log[-1].startswith("fake SGLang:")
    assert last.startswith("error: SGLang was not ready after 1 s")


def test_a_server_that_goes_down_later_is_an_error(server):
    server.wait_until_healthy(30)
    os.kill(server._process.pid, signal.SIGKILL)
    with pytest.raises(ServerError, match="ended with code -9 while it served"):
        server.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_program_and_server(run_dir, free_port, number):
    program = [sys.executable, "-m", "nemo_speculative.serve_sglang", "--device", "cpu"]
    program += ["--draft", str(run_dir), "--port", str(free_port)]
    with subprocess.Popen([*program, "--", "--some-flag"], stdout=subprocess.PIPE, text=True) as process:
        log = Path(process.stdout.readline().split()[-1])
        serving = process.stdout.readline()
        assert serving.startswith("serving ") and f"http://127.0.0.1:{free_port}" in serving
        assert "--some-flag" in log.read_text()
        child = child_of(log)
        process.send_signal(number)
        assert process.wait(30) == 0
    assert eventually(lambda: gone(child))


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(UsageError, match=r"--host 192\.0\.2\.1"):
        require_free("192.0.2.1", 30000)
