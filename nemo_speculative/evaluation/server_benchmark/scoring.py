"""What makes an answer right: the published rules of the suites that have one."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, ClassVar

from nemo_speculative.evaluation.server_benchmark.sandbox import Sandbox, network_guard

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


class Scorer(ABC):
    """Decides whether an answer is right."""

    columns: ClassVar[tuple[str, ...]]
    """What it needs of a suite's row."""

    @property
    def note(self) -> str:
        """What whoever lets it run should know; empty: nothing."""
        return ""

    @abstractmethod
    def right(self, answer: str, row: Mapping[str, Any]) -> bool:
        """Whether ``answer``, to the last turn, is."""

    def __repr__(self) -> str:  # a part of a cell's identity
        return f"{type(self).__name__}()"


class LastNumber(Scorer):
    """GSM8K (https://arxiv.org/abs/2110.14168): the number behind ``####``, else the last one of the answer."""

    columns = ("answer",)

    def right(self, answer: str, row: Mapping[str, Any]) -> bool:
        said = last_number(answer)
        return said is not None and said == last_number(str(row["answer"]))


def last_number(text: str) -> Decimal | None:
    """The number behind the last ``####``, else the last number; thousands separators are none of it."""
    _, marked, behind = text.rpartition("####")
    found = (NUMBER.findall(behind)[:1] if marked else []) or NUMBER.findall(text)[-1:]
    try:
        return Decimal(found[0].replace(",", "")) if found else None
    except InvalidOperation:
        return None


class Boxed(Scorer):
    r"""MATH (https://arxiv.org/abs/2103.03874): what the last ``\boxed{}`` holds, compared as :func:`normalized`."""

    columns = ("answer",)

    def right(self, answer: str, row: Mapping[str, Any]) -> bool:
        said, meant = last_boxed(answer), normalized(str(row["answer"]))
        return said is not None and (normalized(said) == meant or _same_number(normalized(said), meant))


def last_boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{}`` or ``\fbox{}``, braces within included; None: there is none."""
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
    r"""Without what changes the look only: spaces, ``\left``, ``\text``, units of percent and degree, separators."""
    text = SPACING.sub("", expression)
    for pattern, plain in SYNONYMS:
        text = pattern.sub(plain, text)
    return text.rstrip(".")


def _same_number(one: str, other: str) -> bool:
    values = _value(one), _value(other)
    return values[0] is not None and values[0] == values[1]


def _value(text: str) -> Fraction | None:
    """``3``, ``.5``, ``1/2`` and ``\\frac{1}{2}`` as a number."""
    plain = FRACTION.sub(r"\1\2/\3", text)
    if not PLAIN.match(plain):  # Fraction takes exponents as well, and 1e999999999 would fill the memory
        return None
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None


class _Tests(Scorer):
    """Runs an answer's code with tests behind it.

    Args:
        seconds, memory_mb: the limits of :class:`Sandbox`.
    """

    def __init__(self, seconds: float, memory_mb: int):
        self._sandbox = Sandbox(seconds, memory_mb)

    @property
    def note(self) -> str:
        return f"the answers' code runs without network, by {network_guard()}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._sandbox})"


class HumanEval(_Tests):
    """HumanEval (https://arxiv.org/abs/2107.03374): the function, or what goes on its head, passes ``check``."""

    columns = ("prompt", "test", "entry_point")

    def right(self, answer: str, row: Mapping[str, Any]) -> bool:
        head, name, code = row["prompt"], row["entry_point"], code_of(answer)
        if f"def {name}" in code:  # the whole function: of the prompt only what stands above it
            head = head[: head.rfind(f"def {name}")]
        return self._sandbox.passes(f"{head}{code}\n\n{row['test']}\n\ncheck({name})\n")


class MBPP(_Tests):
    """MBPP (https://arxiv.org/abs/2108.07732): the code passes every assertion of ``test_list``."""

    columns = ("test_list",)

    def right(self, answer: str, row: Mapping[str, Any]) -> bool:
        setup = [row.get("test_setup_code") or "", *(row.get("test_imports") or ())]
        return self._sandbox.passes("\n".join([*setup, code_of(answer), *row["test_list"]]) + "\n")


def code_of(answer: str) -> str:
    """The longest fenced block of an answer, also one that the answer's end cuts off; without one all of it."""
    return max(FENCED.findall(answer), key=len, default=answer)
