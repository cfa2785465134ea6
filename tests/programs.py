"""The repository's programs as their users start them, without the seconds in which Python imports torch each time.

A process that has imported what they import is forked for each; they see their own command line and environment.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from nemo_speculative.utils.network import free_port

ROOT = Path(__file__).parents[1]
IMPORTED = [
    "nemo_speculative.config.app", "nemo_speculative.training.run", "nemo_speculative.evaluation.acceptance",
    "nemo_speculative.targets.remote.server",
]  # fmt: skip
LOOK_SECONDS = 0.02

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(IMPORTED)


class Program:
    """``python *command`` in a directory, under way: what of ``subprocess.Popen`` the tests use."""

    def __init__(self, *command: str, environment: Mapping[str, str], cwd: Path = ROOT):
        self.args = command
        self._directory = tempfile.TemporaryDirectory()
        said = [Path(self._directory.name) / stream for stream in ("out", "err")]
        for file in said:
            file.touch()
        self._process = _forks.Process(target=_become, args=(command, dict(environment), cwd, *said))
        self._process.start()
        self.stdout, self.stderr = (self._lines(file) for file in said)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait(None)

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None) -> int:
        """
        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def _lines(self, file: Path) -> Iterator[str]:
        """What it prints, line by line, until it has ended."""
        with file.open() as lines:
            ended = False
            while not ended:
                ended = not self._process.is_alive()
                yield from iter(lines.readline, "")
                time.sleep(LOOK_SECONDS)


def run_program(
    *command: str, environment: Mapping[str, str], timeout: float = 240, ranks: int = 1, cwd: Path = ROOT,
    grace: float = 0,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """``python *command``, to its end; as so many ranks of one job, of which one that fails ends the others.

    Args:
        grace: seconds that they are given to end by themselves before that.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``timeout`` seconds, and was killed.
    """
    started = [Program(*command, environment={**environment, **rank}, cwd=cwd) for rank in ranks_of(ranks)]
    deadline = time.monotonic() + timeout
    try:
        while any(program.returncode is None for program in started) and not any(p.returncode for p in started):
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(command, timeout)
            time.sleep(LOOK_SECONDS)
        alone = time.monotonic() + grace
        while any(program.returncode is None for program in started) and time.monotonic() < alone:
            time.sleep(LOOK_SECONDS)
    finally:
        for program in started:
            program.kill()
            program.wait(None)
    code = next((program.returncode for program in started if program.returncode), 0)
    said = ("".join(line for one in started for line in getattr(one, stream)) for stream in ("stdout", "stderr"))
    return subprocess.CompletedProcess(command, code, *said)


def ranks_of(count: int) -> list[dict[str, str]]:
    """What torchrun tells each of its processes."""
    if count == 1:
        return [{}]
    job = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(free_port())}  # fmt: skip
    return [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _become(command: tuple[str, ...], environment: dict[str, str], cwd: Path, out: Path, err: Path) -> None:
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
