"""Conversations with a client that records its calls."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from nemo_speculative.evaluation.server_benchmark.run import converse, measure
from nemo_speculative.evaluation.server_benchmark.scoring import Scorer
from nemo_speculative.evaluation.server_benchmark.suites import Prompt, Suite
from nemo_speculative.serving.client import Answer
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import Refused, Unreachable
from tests.conftest import make_tokenizer


class RecordingClient:
    """Answers with the prompt's length; raises ``error`` for prompts of the lengths ``wrong``."""

    def __init__(self, wrong: tuple[int, ...] = (), error: type[UserError] = Refused):
        self.prompts: list[list[int]] = []
        self.now = self.most = self.flushed = 0
        self.wrong, self.error = wrong, error

    async def flush_cache(self) -> None:
        assert not self.prompts, "before the first prompt"
        self.flushed += 1

    async def generate(self, ids: list[int], *, temperature: float, max_new_tokens: int) -> Answer:
        assert (temperature, max_new_tokens) == (0.5, 7)
        self.prompts.append(ids)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.01)
        self.now -= 1
        if len(ids) in self.wrong:
            raise self.error(f"{len(ids)} is no good")
        return Answer(f"said {len(ids)}", len(ids), 2, 1, (1,), ((0.1, 1), (0.2, 2)), True)


class Marked(Scorer):
    """Takes the result from the row, and records the answers."""

    columns = ("right",)

    def __init__(self) -> None:
        self.answers: list[str] = []

    def right(self, answer: str, row: Mapping[str, Any]) -> bool:
        self.answers.append(answer)
        return row["right"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def suite(*prompts: tuple[str, ...], scorer: Scorer | None = None, right: Sequence[bool] = ()) -> Suite:
    rows = [{"right": mark} for mark in right] or [{}] * len(prompts)
    return Suite("some", tuple(Prompt(turns, row) for turns, row in zip(prompts, rows, strict=True)), 7, scorer)


def metrics_of(client: RecordingClient, suite: Suite, tokenizer: Any):
    return asyncio.run(measure(client, tokenizer, suite, concurrency=2, temperature=0.5))


@pytest.mark.parametrize("concurrency", [1, 3, 50])
def test_the_concurrency_is_the_number_of_conversations_in_flight(concurrency, tokenizer):
    client = RecordingClient()
    prompts = suite(*[("a" * n, "b") for n in range(1, 11)]).prompts
    asyncio.run(converse(client, tokenizer, prompts, 7, concurrency, 0.5))
    assert client.most == min(concurrency, 10) and len(client.prompts) == 20


def test_a_turn_contains_the_previous_answer(tokenizer):
    client = RecordingClient()
    metrics_of(client, suite(("the fox", "and then")), tokenizer)
    first, second = (tokenizer.decode(ids) for ids in client.prompts)
    assert second.startswith(first) and f"said {len(client.prompts[0])}" in second and "and then" in second
    assert client.flushed == 1


def test_accuracy_counts_the_last_answers(tokenizer):
    client, scorer = RecordingClient(), Marked()
    scored = suite(("a",), ("aa",), ("aaa", "b"), ("aaaa",), scorer=scorer, right=(True, False, True, True))
    assert metrics_of(client, scored, tokenizer).accuracy == 3 / 4
    assert len(scorer.answers) == 4 and f"said {max(map(len, client.prompts))}" in scorer.answers, (
        "the second turn's answer"
    )
    assert metrics_of(RecordingClient(), suite(("a",)), tokenizer).accuracy is None


def test_a_refused_turn_ends_its_conversation_and_is_wrong(tokenizer):
    sizes = RecordingClient()
    prompts = ("aa",), ("aaaa", "b")
    metrics_of(sizes, suite(*prompts), tokenizer)
    long = max(len(ids) for ids in sizes.prompts)
    result = metrics_of(RecordingClient(wrong=(long,)), suite(*prompts, scorer=Marked(), right=(True, True)), tokenizer)
    assert (result.answers, result.refused, result.accuracy) == (2, 1, 1 / 2)
    with pytest.raises(UserError, match=r"every prompt of some was refused: .* is no good"):
        metrics_of(RecordingClient(wrong=tuple(range(100))), suite(*prompts), tokenizer)


def test_an_unreachable_server_ends_the_measurement(tokenizer):
    with pytest.raises(Unreachable):
        metrics_of(RecordingClient(tuple(range(100)), Unreachable), suite(("a",), ("b",)), tokenizer)
