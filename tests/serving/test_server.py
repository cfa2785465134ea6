"""The server process, with a small program in place of SGLang."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemo_speculative.serve_sglang import main
from nemo_speculative.serving.command import from_checkpoint, serve_command
from nemo_speculative.serving.server import Server, ServerError, require_free
from nemo_speculative.utils.errors import UsageError

pytestmark = pytest.mark.usefixtures("fake_sglang")


@pytest.fixture
def options(run_dir, free_port):
    return from_checkpoint(run_dir, {"port": free_port})


@pytest.fixture
def server(options, tmp_path):
    with Server(serve_command(options, sys.executable), {}, options.host, options.port, tmp_path / "log") as server:
        yield server


def child_of(log: Path) -> int:
    return int(next(line for line in log.read_text().splitlines() if line.startswith("child")).split()[1])


def ended(pid: int) -> bool:
    """Whether a process has ended; a zombie counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def eventually(holds, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def test_wait_until_healthy_returns_when_health_answers(server):
    server.wait_until_healthy(30)
    assert urllib.request.urlopen(f"{server.url}/health").status == 200


def test_stopping_ends_the_whole_process_group(server, options):
    server.wait_until_healthy(30)
    child = child_of(server.log)
    assert not ended(child)
    server.stop()
    assert eventually(lambda: ended(child))
    require_free(options.host, options.port)


def test_an_interrupted_stop_kills_the_whole_process_group(server, monkeypatch):
    server.wait_until_healthy(30)
    child, wait = child_of(server.log), server._process.wait

    def interrupted(timeout: float | None = None) -> int:
        if timeout:
            raise KeyboardInterrupt
        return wait()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(server._process, "wait", interrupted)
        server.stop()
    assert eventually(lambda: ended(child))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_server_is_stopped_is_delayed(options, tmp_path, monkeypatch, number):
    monkeypatch.setattr(Server, "stop", lambda _: (signal.raise_signal(number), stops.append(number)))
    stops, handler = [], signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Server([sys.executable, "-c", ""], {}, "", 0, tmp_path / "log"):
            pass
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stops == [number]


def test_another_thread_than_the_main_one_stops_a_server_too(tmp_path):
    def start_and_stop() -> int:
        with Server([sys.executable, "-c", "input()"], {}, "", 0, tmp_path / "log") as server:
            pid = server._process.pid
        return pid

    with ThreadPoolExecutor(1) as threads:
        assert ended(threads.submit(start_and_stop).result())


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


def test_a_server_that_dies_later_is_an_error(server):
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
        for _ in range(2):  # the second one does not interrupt the cleanup
            process.send_signal(number)
        assert process.wait(30) == 0
    assert eventually(lambda: ended(child))


@pytest.mark.parametrize(
    ("behavior", "message"),
    [
        ("no_draft", "answered with 8 tokens and verified no draft"),
        ("no_tokens", "answers with no token"),
        ("crash", "does not answer /generate (ValueError: HTTP 500"),
    ],
)
def test_a_server_that_does_not_speculate_is_ended(
    capsys, run_dir, free_port, monkeypatch, tmp_path, behavior, message
):
    monkeypatch.setenv("FAKE_SGLANG", behavior)
    log = tmp_path / "sglang.log"
    arguments = ["--draft", str(run_dir), "--device", "cpu", "--port", str(free_port), "--log", str(log)]
    assert main([*arguments, "--timeout", "60"]) == 1
    *shown, last = capsys.readouterr().err.splitlines()
    assert any(line.startswith("request /generate") for line in shown)
    assert last.startswith("error: ") and message in last and last.endswith(f"its log is {log}")
    assert eventually(lambda: ended(child_of(log)))
    require_free("127.0.0.1", free_port)


def test_the_smoke_test_sends_the_api_key(server, tmp_path):
    server.wait_until_healthy(30)
    assert server.smoke_test(30, "s3cret") == (8, 3)
    assert "request /generate Bearer s3cret" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("key", ["s3cret", "c2VjcmV0PQ=="])
@pytest.mark.parametrize("extra", [("--api-key", "{}"), ("--api-key={}",), ("--x", "y", "--api-key", "{}")])
def test_the_api_key_is_read_from_the_extra_flags(run_dir, extra, key):
    assert from_checkpoint(run_dir, {"extra": tuple(word.format(key) for word in extra)}).api_key == key
    assert from_checkpoint(run_dir, {"extra": ("--x", "s3cret")}).api_key is None


@pytest.mark.parametrize("name", ["no such folder/log", ".", "pipe"])
def test_a_log_that_cannot_be_written_or_read_back_is_refused(capsys, run_dir, free_port, tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    arguments = ["--draft", str(run_dir), "--device", "cpu", "--port", str(free_port)]
    assert main([*arguments, "--log", str(tmp_path / name)]) == 2
    os.close(reader)
    assert f"error: --log {tmp_path / name}" in capsys.readouterr().err


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(UsageError, match=r"--host 192\.0\.2\.1"):
        require_free("192.0.2.1", 30000)
