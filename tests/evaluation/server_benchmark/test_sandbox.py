"""Attempts that the sandbox must refuse: a program passes only if its attempt raises the expected error."""

import os
import time

import pytest

from nemo_speculative.evaluation.server_benchmark.scoring import Sandbox, network_guard

SANDBOX = Sandbox(seconds=5, memory_mb=512)
REFUSED = """
try:
    {attempt}
except {error}:
    pass
else:
    raise AssertionError("it was let through")
"""


def refused(attempt: str, error: str = "PermissionError", before: str = "") -> bool:
    return SANDBOX.passes(before + REFUSED.format(attempt=attempt, error=error))


def test_a_program_passes_at_its_end_only():
    assert SANDBOX.passes("assert sum(range(4)) == 6\nprint('much ' * 10**5)")
    for program in (
        "assert False",
        "exit(0)",
        "raise SystemExit(87)",
        "syntax error",
        "import sys; sys.exit()",
        "import os; os._exit(0)",
    ):
        assert not SANDBOX.passes(program), program


def test_exiting_early_with_a_guessed_code_does_not_pass():
    for program in ("import os; os._exit(87)", "import os, sys; os._exit(int(sys.argv[3]))"):
        assert not all(SANDBOX.passes(program) for _ in range(4)), "one in 253 is the right one by chance"


def test_only_the_standard_library_can_be_imported():
    assert SANDBOX.passes(
        "import math, collections, itertools, re, heapq, typing, functools, hashlib, datetime, random"
    )
    assert refused("import nemo_speculative", "ImportError")
    assert refused("import torch", "ImportError")


def test_an_endless_loop_is_stopped():
    started = time.monotonic()
    assert not Sandbox(seconds=0.5, memory_mb=512).passes("while True: pass")
    assert not Sandbox(seconds=0.5, memory_mb=512).passes("import time; time.sleep(600)")
    assert time.monotonic() - started < 60


def test_a_program_that_ignores_signals_is_stopped():
    deaf = "import signal\nfor n in {*range(1, 32)} - {9, 19}: signal.signal(n, signal.SIG_IGN)"
    assert SANDBOX.passes(deaf)
    for program in (f"{deaf}\nwhile True: pass", f"{deaf}\nimport time\ntime.sleep(600)"):
        assert not Sandbox(seconds=0.5, memory_mb=512).passes(program)


def test_a_memory_bomb_is_refused():
    assert refused("x = bytearray(600 << 20)", "MemoryError")
    assert not SANDBOX.passes("x = []\nwhile True: x.append(bytearray(1 << 20))")


@pytest.mark.parametrize(
    "attempt",
    [
        "os.fork()", "subprocess.Popen(['/bin/true'])", "os.system('true')", "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})", "os.kill(os.getppid(), 9)",
        "multiprocessing.Process(target=print).start()",
    ],
)  # fmt: skip
def test_another_process_is_refused(attempt):
    assert refused(attempt, before="import os, subprocess, multiprocessing\n")


def test_a_fork_bomb_leaves_no_process():
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    before = len([name for name in os.listdir("/proc") if name.isdigit()])
    assert not Sandbox(seconds=0.5, memory_mb=512).passes(bomb)
    assert len([name for name in os.listdir("/proc") if name.isdigit()]) < before + 50


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.socket()", "socket.create_connection(('127.0.0.1', 80))", "socket.getaddrinfo('example.org', 80)",
        "urllib.request.urlopen('http://127.0.0.1/')",
    ],
)  # fmt: skip
def test_a_socket_is_refused(attempt):
    assert refused(attempt, "OSError", before="import socket, urllib.request\n")


def test_the_network_is_blocked_even_without_the_hook(monkeypatch):
    """Without the hook, the kernel's namespace alone does not reach a server of this machine."""
    if "namespace" not in network_guard():
        pytest.skip("user namespaces are not permitted here")
    monkeypatch.setattr("nemo_speculative.evaluation.server_benchmark.code_limits.__file__", _limits_without_hook())
    assert refused("import socket; socket.create_connection(('127.0.0.1', 80), 1)", "OSError", "import socket\n")
    assert SANDBOX.passes("import socket\nassert [name for _, name in socket.if_nameindex()] == ['lo']")


def _limits_without_hook() -> str:
    import tempfile
    from pathlib import Path

    from nemo_speculative.evaluation.server_benchmark import code_limits

    source = Path(code_limits.__file__).read_text()
    assert "    guard(directory)\n" in source
    file = Path(tempfile.mkdtemp()) / "code_limits.py"
    file.write_text(source.replace("    guard(directory)\n", ""))
    return str(file)


def test_files_are_written_in_its_own_directory_only(tmp_path):
    outside = tmp_path / "kept"
    outside.write_text("as it was")
    assert SANDBOX.passes(
        "open('mine', 'w').write('x'); import os; os.rename('mine', 'b'); os.mkdir('d'); os.remove('b')"
    )
    for attempt in (
        f"open({str(outside)!r}, 'w')", f"open({str(outside)!r}, 'r+')", f"os.open({str(outside)!r}, os.O_WRONLY)",
        f"os.remove({str(outside)!r})", f"os.rename({str(outside)!r}, 'here')", f"os.chmod({str(outside)!r}, 0)",
        f"shutil.rmtree({str(tmp_path)!r})", f"pathlib.Path({str(tmp_path / 'new')!r}).touch()", "open('../up', 'w')",
        f"os.symlink({str(tmp_path)!r}, 'way')", f"os.chdir({str(tmp_path)!r}); open('new', 'w')",
        f"sqlite3.connect({str(tmp_path / 'new')!r})",
        f"os.remove('kept', dir_fd=os.open({str(tmp_path)!r}, os.O_RDONLY))",
    ):  # fmt: skip
        assert refused(attempt, before="import os, shutil, sqlite3, pathlib\n"), attempt
    for name in ("os.mkfifo", "os.mknod", "signal.pidfd_send_signal"):
        assert refused(name, "AttributeError", "import os, signal\n"), name
    assert outside.read_text() == "as it was" and os.listdir(tmp_path) == ["kept"]
    assert refused("open('big', 'wb').write(bytes(32 << 20))", "OSError", "import signal\n"), "files are limited"


def test_foreign_functions_are_refused():
    assert refused("import ctypes; ctypes.CDLL(None)")
    assert refused("import ctypes; ctypes.pythonapi.PyErr_Clear")


def test_no_environment_variables_are_inherited(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert SANDBOX.passes("import os\nassert 'HF_TOKEN' not in os.environ and len(os.environ) < 5, os.environ")


def test_its_directory_is_deleted_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    SANDBOX.passes("open('left', 'w').write('x')")
    assert not list(tmp_path.iterdir())
