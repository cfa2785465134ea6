"""Code that a model wrote, run apart: a process of its own, limited, without network.

Meant against mistakes, not against an attacker, for whom a container is the answer.  See :mod:`.jail` for what is
refused by the kernel and what by an audit hook.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nemo_speculative.evaluation.server_benchmark import code_limits

PASSED = range(3, 256)
"""Exit codes of which one, drawn anew, says that a program came to its end: one that leaves early knows none."""


@dataclass(frozen=True)
class Sandbox:
    """What a program may use."""

    seconds: float
    """Of wall time and of CPU time."""
    memory_mb: int
    """Address space, the interpreter's included."""

    def passes(self, program: str) -> bool:
        """Whether ``program``, Python with the standard library, comes to its end without an exception."""
        passed = secrets.choice(PASSED)
        with tempfile.TemporaryDirectory(prefix="nemo-sandbox-") as directory:
            process = subprocess.Popen(
                # Isolated: neither our packages nor our environment, in which there may be tokens.
                [
                    sys.executable,
                    "-I",
                    "-S",
                    "-B",
                    code_limits.__file__,
                    str(self.seconds),
                    str(self.memory_mb),
                    str(passed),
                ],
                cwd=directory,
                env={"HOME": directory, "PATH": ""},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
                process.communicate(program.encode(errors="replace"), timeout=self.seconds)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return process.wait() == passed


@cache
def network_guard() -> str:
    """What keeps the network away on this machine."""
    probe = [sys.executable, "-I", "-S", "-B", str(Path(code_limits.__file__)), "--guard"]
    return subprocess.run(probe, capture_output=True, text=True, check=True).stdout.strip()
