"""Scorers, which decide whether an answer is right by the published rule of its suite; code runs in a sandbox."""

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import cache
from typing import Any, ClassVar

from nemo_speculative.evaluation.server_benchmark import code_limits

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
BOXES = ("\\boxed{", "\\fbox{")
FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
SPACING = re.compile(r"\\[!,;:]|\\ |\\left|\\right|\\displaystyle|\s|~|\\?\$")
SYNONYMS = (
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\^\{?\\circ\}?|\\degree"), ""),
    (re.compile(r"\\%|%"), ""),
    (re.compile(r"\\frac(\d)(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))"), ""),
    (re.compile(r"^[a-zA-Z]="), ""),
)
PLAIN = re.compile(r"^[-+]?[\d./]+$")
FRACTION = re.compile(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$")
EXIT_CODES = range(3, 256)
"""One of these, drawn at random, signals that a program reached its end; a program that exits early cannot know it."""


class Scorer(ABC):
    """Decides whether an answer is right."""

    columns: ClassVar[tuple[str, ...]]
    """Columns of a suite's row that it reads."""
    note = ""
    """A note for the user, printed before a benchmark; empty for none."""

    @abstractmethod
    def right(self, answer: str, row: Mapping[str, Any]) -> bool:
        """Whether ``answer``, the one to the last turn, is right."""

    def __repr__(self) -> str:  # part of a suite's digest
        return f"{type(self).__name__}()"


class LastNumber(Scorer):
    """GSM8K (https://arxiv.org/abs/2110.14168): the number after ``####``, otherwise the last one of the answer."""

    columns = ("answer",)

    def right(self, answer: str, row: Mapping[str, Any]) -> bool:
        number = last_number(answer)
        return number is not None and number == last_number(str(row["answer"]))


def last_number(text: str) -> Decimal | None:
    """The number after the last ``####``, otherwise the last number, without thousands separators."""
    _, marker, after = text.rpartition("####")
    numbers = (NUMBER.findall(after)[:1] if marker else []) or NUMBER.findall(text)[-1:]
    with suppress(InvalidOperation, IndexError):
        return Decimal(numbers[0].replace(",", ""))
    return None


class Boxed(Scorer):
    r"""MATH (https://arxiv.org/abs/2103.03874): the content of the last ``\boxed{}``, after :func:`normalized`."""

    columns = ("answer",)

    def right(self, answer: str, row: Mapping[str, Any]) -> bool:
        boxed, expected = last_boxed(answer), normalized(str(row["answer"]))
        if boxed is None:
            return False
        value = _value(normalized(boxed))
        return normalized(boxed) == expected or (value is not None and value == _value(expected))


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{}`` or ``\fbox{}``, which may contain braces; None: there is none."""
    start = max(text.rfind(box) + len(box) if box in text else -1 for box in BOXES)
    if start < 0:
        return None
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def normalized(expression: str) -> str:
    r"""The expression without formatting: spaces, ``\left``, ``\text``, percent and degree signs, separators."""
    text = SPACING.sub("", expression)
    for pattern, plain in SYNONYMS:
        text = pattern.sub(plain, text)
    return text.rstrip(".")


def _value(text: str) -> Fraction | None:
    """The number written as ``3``, ``.5``, ``1/2`` or ``\\frac{1}{2}``; None: it is not one."""
    plain = FRACTION.sub(r"\1\2/\3", text)
    if PLAIN.match(plain):  # Fraction also accepts exponents, and 1e999999999 would fill the memory
        with suppress(ValueError, ZeroDivisionError):
            return Fraction(plain)
    return None


@dataclass(frozen=True)
class Sandbox:
    """Runs code that a model wrote in a limited process without network.

    A protection against mistakes, not against an attacker, who needs a container.  See :mod:`.code_limits` for what is
    refused by the kernel and what by an audit hook.
    """

    seconds: float
    """Limit of wall time and of CPU time."""
    memory_mb: int
    """Limit of the address space, which includes the interpreter."""

    def passes(self, program: str) -> bool:
        """Whether ``program``, in Python with the standard library, reaches its end without an exception."""
        passed = secrets.choice(EXIT_CODES)
        with tempfile.TemporaryDirectory(prefix="nemo-sandbox-") as directory:
            process = subprocess.Popen(
                [*_limited_python(), str(self.seconds), str(self.memory_mb), str(passed)],
                cwd=directory,
                env={"HOME": directory, "PATH": ""},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            with suppress(subprocess.TimeoutExpired, BrokenPipeError):
                process.communicate(program.encode(errors="replace"), timeout=self.seconds)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return process.wait() == passed


def _limited_python() -> list[str]:
    # Isolated (-I): neither our packages nor our environment, which may hold tokens.
    return [sys.executable, "-I", "-S", "-B", code_limits.__file__]


@cache
def network_guard() -> str:
    """The mechanism that blocks the network for sandboxed code on this machine."""
    return subprocess.run([*_limited_python(), "--guard"], capture_output=True, text=True, check=True).stdout.strip()


class _RunsTests(Scorer):
    """Runs an answer's code followed by tests, under the limits of :class:`Sandbox`."""

    def __init__(self, seconds: float, memory_mb: int):
        self._sandbox = Sandbox(seconds, memory_mb)
        self.note = f"the answers' code runs without network, by {network_guard()}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._sandbox})"


class HumanEval(_RunsTests):
    """HumanEval (https://arxiv.org/abs/2107.03374): the function, or the body for its given head, passes ``check``."""

    columns = ("prompt", "test", "entry_point")

    def right(self, answer: str, row: Mapping[str, Any]) -> bool:
        head, name, code = row["prompt"], row["entry_point"], code_of(answer)
        if f"def {name}" in code:  # the whole function: keep only the part of the prompt before it
            head = head[: head.rfind(f"def {name}")]
        return self._sandbox.passes(f"{head}{code}\n\n{row['test']}\n\ncheck({name})\n")


class MBPP(_RunsTests):
    """MBPP (https://arxiv.org/abs/2108.07732): the code passes every assertion of ``test_list``."""

    columns = ("test_list",)

    def right(self, answer: str, row: Mapping[str, Any]) -> bool:
        setup = [row.get("test_setup_code") or "", *(row.get("test_imports") or ())]
        return self._sandbox.passes("\n".join([*setup, code_of(answer), *row["test_list"]]) + "\n")


def code_of(answer: str) -> str:
    """The longest fenced block of an answer, which may be cut off by its end; without a block the whole answer."""
    return max(FENCED.findall(answer), key=len, default=answer)
