"""How conversations are had, with a client that takes notes."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from nemo_speculative.evaluation.server_benchmark.measure import converse, measure
from nemo_speculative.evaluation.server_benchmark.scoring import Scorer
from nemo_speculative.evaluation.server_benchmark.suites import Prompt, Suite
from nemo_speculative.serving.client import Answer
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import Refused, Unreachable
from tests.conftest import make_tokenizer


class Notes:
    """Answers with the prompt's length; ``wrong`` are lengths that it refuses, and ``error`` how."""

    def __init__(self, wrong: tuple[int, ...] = (), error: type[UserError] = Refused):
        self.asked: list[list[int]] = []
        self.now = self.most = self.flushed = 0
        self.wrong, self.error = wrong, error

    async def flush_cache(self) -> None:
        assert not self.asked, "before the first prompt"
        self.flushed += 1

    async def generate(self, ids: list[int], *, temperature: float, max_new_tokens: int) -> Answer:
        assert (temperature, max_new_tokens) == (0.5, 7)
        self.asked.append(ids)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.01)
        self.now -= 1
        if len(ids) in self.wrong:
            raise self.error(f"{len(ids)} is no good")
        return Answer(f"said {len(ids)}", len(ids), 2, 1, (1,), ((0.1, 1), (0.2, 2)), True)


class Marked(Scorer):
    """Right is what the row says; notes what it is shown."""

    columns = ("right",)

    def __init__(self) -> None:
        self.shown: list[str] = []

    def right(self, answer: str, row: Mapping[str, Any]) -> bool:
        self.shown.append(answer)
        return row["right"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def suite(*prompts: tuple[str, ...], scorer: Scorer | None = None, right: Sequence[bool] = ()) -> Suite:
    rows = [{"right": mark} for mark in right] or [{}] * len(prompts)
    return Suite("some", tuple(Prompt(turns, row) for turns, row in zip(prompts, rows, strict=True)), 7, scorer)


def figures(notes: Notes, asked: Suite, tokenizer: Any):
    return asyncio.run(measure(notes, tokenizer, asked, concurrency=2, temperature=0.5))


@pytest.mark.parametrize("concurrency", [1, 3, 50])
def test_so_many_are_in_flight(concurrency, tokenizer):
    notes = Notes()
    prompts = suite(*[("a" * n, "b") for n in range(1, 11)]).prompts
    asyncio.run(converse(notes, tokenizer, prompts, 7, concurrency, 0.5))
    assert notes.most == min(concurrency, 10) and len(notes.asked) == 20


def test_a_turn_sees_the_answer_before(tokenizer):
    notes = Notes()
    figures(notes, suite(("the fox", "and then")), tokenizer)
    first, second = (tokenizer.decode(ids) for ids in notes.asked)
    assert second.startswith(first) and f"said {len(notes.asked[0])}" in second and "and then" in second
    assert notes.flushed == 1


def test_accuracy_is_of_the_last_answers(tokenizer):
    notes, scorer = Notes(), Marked()
    asked = suite(("a",), ("aa",), ("aaa", "b"), ("aaaa",), scorer=scorer, right=(True, False, True, True))
    assert figures(notes, asked, tokenizer).accuracy == 3 / 4
    assert len(scorer.shown) == 4 and f"said {max(map(len, notes.asked))}" in scorer.shown, "the second turn's answer"
    assert figures(Notes(), suite(("a",)), tokenizer).accuracy is None


def test_a_refused_turn_ends_its_conversation_and_is_wrong(tokenizer):
    sizes = Notes()
    prompts = ("aa",), ("aaaa", "b")
    figures(sizes, suite(*prompts), tokenizer)
    long = max(len(ids) for ids in sizes.asked)
    found = figures(Notes(wrong=(long,)), suite(*prompts, scorer=Marked(), right=(True, True)), tokenizer)
    assert (found.answers, found.refused, found.accuracy) == (2, 1, 1 / 2)
    with pytest.raises(UserError, match=r"every prompt of some was refused: .* is no good"):
        figures(Notes(wrong=tuple(range(100))), suite(*prompts), tokenizer)


def test_a_lost_server_ends_the_cell(tokenizer):
    with pytest.raises(Unreachable):
        figures(Notes(tuple(range(100)), Unreachable), suite(("a",), ("b",)), tokenizer)
