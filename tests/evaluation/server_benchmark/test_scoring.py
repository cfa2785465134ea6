"""Answers with known results for each published scoring rule."""

from decimal import Decimal

import pytest

from nemo_speculative.evaluation.server_benchmark.scoring import (
    MBPP,
    Boxed,
    HumanEval,
    LastNumber,
    code_of,
    last_boxed,
    last_number,
)

GSM8K = {"question": "…", "answer": "She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 1,018"}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("So she makes $1,018 a day.\n#### 1018", True),
        ("#### 1,018.00", True),
        ("She makes 9 * 2 and then some, so the answer is **1018**.", True),
        ("The answer is 1018 dollars in 30 days.", False),  # the last number is another
        ("#### 1018 dollars, of 2000", True),
        ("#### -1018", False),
        ("#### about a thousand. First I said 1018", True),
        ("no number at all", False),
        ("", False),
    ],
)
def test_gsm8k(answer, right):
    assert LastNumber().right(answer, GSM8K) is right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-3", "-3"),
        ("it is .5", "0.5"),
        ("7.", "7"),
        ("1,234,567.25 in all", "1234567.25"),
        ("3-4", "-4"),
        ("#### 42\n", "42"),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{3}", "3"),
        (r"\boxed{1} and then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\fbox{a} \boxed{b}", "b"),
        (r"\boxed{b} \fbox{a}", "a"),
        (r"\boxed{\text{(A)} \{1\}}", r"\text{(A)} \{1\}"),
        (r"\boxed{never closed", None),
        ("42", None),
    ],
)
def test_the_last_box(text, inside):
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    ("boxed", "expected", "right"),
    [
        (r"\frac{1}{2}", r"\dfrac{1}{2}", True),
        (r"\frac12", r"\frac{1}{2}", True),
        ("0.5", r"\frac{1}{2}", True),
        ("1/2", r"\frac{1}{2}", True),
        (".5", "0.5", True),
        ("10{,}000", "10,000", True),
        ("10,000", "10000", True),
        ("(1,2)", "(1, 2)", True),
        ("12", "(1,2)", False),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\left(3,\frac{\pi}{2}\right)", True),
        (r"\text{Evelyn}", "Evelyn", True),
        ("90^\\circ", "90", True),
        (r"50\%", "50", True),
        (r"\$18", "18", True),
        ("$18$", "18", True),
        ("x=5", "5", True),
        ("5", "-5", False),
        (r"\frac{3}{0}", "3", False),
        ("2\\sqrt{3}", "2 \\sqrt{3}", True),
        ("", "5", False),
    ],
)
def test_math(boxed, expected, right):
    assert Boxed().right(f"Thus \\boxed{{{boxed}}}.", {"answer": expected}) is right


def test_math_without_a_box_is_wrong():
    assert not Boxed().right("The answer is 5.", {"answer": "5"})


HUMAN_EVAL = {
    "prompt": "from math import floor\n\n\ndef helper(x):\n    return floor(x)\n\n\n"
    'def double(x):\n    """Twice x."""\n',
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(2.5) == 5\n",
    "entry_point": "double",
}


@pytest.mark.parametrize("boxed", ["1e999999999", "1E99999999", "-2.5e+99999999"])
def test_a_number_with_an_exponent_is_not_a_number(boxed):
    assert not Boxed().right(f"\\boxed{{{boxed}}}", {"answer": "3"})
    assert not Boxed().right("\\boxed{1e2}", {"answer": "100"}), "not even a small one"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("```python\ndef double(x):\n    return floor(2 * x)\n```", True),  # needs the prompt's import
        ("Sure!\n\n```python\ndef double(x):\n    return helper(x * 2)\n```\nIt uses the helper.", True),
        ("    return 2 * x\n", True),  # a completion of the prompt
        ("```python\ndef double(x):\n    return x + 2\n```", False),
        ("```python\ndef double(x):\n    exit(0)\n```", False),
        ("```python\nimport sys\nsys.exit(0)\ndef double(x): ...\n```", False),
        ("```python\ndef other(x):\n    return 2 * x\n```", False),
        ("I cannot do that.", False),
    ],
)
def test_humaneval(answer, right):
    assert HumanEval(seconds=5, memory_mb=512).right(answer, HUMAN_EVAL) is right


def test_humaneval_with_a_head_that_is_not_a_function_yet():
    row = {"prompt": "def double(x):\n", "test": HUMAN_EVAL["test"], "entry_point": "double"}
    scorer = HumanEval(seconds=5, memory_mb=512)
    assert scorer.right("```python\ndef double(x):\n    return 2 * x\n```", row)
    assert scorer.right("    return 2 * x\n", row)


def test_mbpp():
    row = {"test_list": ["assert area(3) == N", "assert area(0) == 0"], "test_setup_code": "N = 9"}
    scorer = MBPP(seconds=5, memory_mb=512)
    assert scorer.right("```python\ndef area(s):\n    return s * s\n```", row)
    assert not scorer.right("```python\ndef area(s):\n    return 9\n```", row), "the second test fails"
    assert not scorer.right("```python\ndef area(s)\n    return s * s\n```", row), "not Python"
    sanitized = {"test_list": ["assert math.isclose(area(3), 9)"], "test_imports": ["import math"]}
    assert scorer.right("def area(s):\n    return s * s\n", sanitized)


def test_the_code_of_an_answer():
    assert code_of("```\na = 1\n```\nor\n```python\na = 1\nb = 2\n```") == "a = 1\nb = 2\n"
    assert code_of("Here:\n```python\ncut = 'off") == "cut = 'off"
    assert code_of("plain = 1") == "plain = 1"


def test_limits_are_part_of_the_digest():
    assert repr(MBPP(5, 512)) != repr(MBPP(5, 256)) != repr(HumanEval(5, 256))
    assert "network" in MBPP(5, 512).note
