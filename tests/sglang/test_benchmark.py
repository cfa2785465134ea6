"""The benchmark's metrics against those of the real SGLang, requested another way."""

import asyncio
import json
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from nemo_speculative.evaluation.server_benchmark.results import BenchMetrics
from nemo_speculative.evaluation.server_benchmark.run import Conversation, converse, measure
from nemo_speculative.evaluation.server_benchmark.servers import split
from nemo_speculative.evaluation.server_benchmark.suites import Prompt, Suite
from nemo_speculative.serving.client import Client
from nemo_speculative.serving.command import serve_command, serve_environment
from nemo_speculative.serving.server import Server
from tests.sglang.conftest import START_SECONDS, chatting

NUM_PROMPTS, MAX_NEW_TOKENS = 6, 24


@pytest.fixture(scope="module")
def options(tmp_path_factory, options_for):
    """A small EAGLE-3 draft whose target has a chat template."""
    return chatting(options_for, tmp_path_factory.mktemp("runs"), NUM_PROMPTS, MAX_NEW_TOKENS)


@pytest.fixture(scope="module")
def tokenizer(options):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(options.target)


@pytest.fixture(scope="module")
def suite() -> Suite:
    """Conversations of one turn and of two."""
    first = [" ".join(f"t{(7 * n + 3 * i) % 200 + 10}" for i in range(4 + n)) for n in range(NUM_PROMPTS)]
    return Suite(
        "some",
        tuple(Prompt((text, "t9 t8")[: 1 + n % 2], {}) for n, text in enumerate(first)),
        MAX_NEW_TOKENS,
        None,
    )


@pytest.fixture(scope="module", params=["draft", "baseline"])
def url(request, options, tmp_path_factory) -> Iterator[str]:
    command = serve_command(options, sys.executable)
    if request.param == "baseline":
        command, _ = split(command)
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(command, serve_environment(options), options.host, options.port, log) as server:
        server.wait_until_healthy(START_SECONDS)
        yield server.url


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as reply:
        return json.load(reply)


def measured(url: str, tokenizer: Any, suite: Suite) -> tuple[BenchMetrics, list[Conversation]]:
    async def both() -> tuple[BenchMetrics, list[Conversation]]:
        async with Client(url) as client:
            await client.server_info()
            figures = await measure(client, tokenizer, suite, concurrency=2, temperature=0.0)
            return figures, await converse(client, tokenizer, suite.prompts, MAX_NEW_TOKENS, 1, 0.0)

    return asyncio.run(both())


def raw(url: str, tokenizer: Any, prompt: Prompt) -> list[dict[str, Any]]:
    """The result of /generate for each turn, not streamed, for a prompt rendered as text."""
    text, answers = "", []
    for turn in prompt.turns:
        text += f"t1 {turn} "
        sampling = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS}
        ids = tokenizer(text + "t3")["input_ids"]
        answers.append(post(f"{url}/generate", {"input_ids": ids, "sampling_params": sampling}))
        text += f"t2 {answers[-1]['text']} "
    return answers


def test_the_figures_are_those_of_each_answer(url, tokenizer, suite):
    figures, conversations = measured(url, tokenizer, suite)
    expected = [answer for prompt in suite.prompts for answer in raw(url, tokenizer, prompt)]
    infos = [answer["meta_info"] for answer in expected]
    answers = [answer for conversation in conversations for answer in conversation.answers]
    assert [answer.text for answer in answers] == [answer["text"] for answer in expected]
    assert [answer.completion_tokens for answer in answers] == [info["completion_tokens"] for info in infos]
    assert [answer.verifications for answer in answers] == [info.get("spec_verify_ct", 0) for info in infos]

    tokens, verifications = sum(i["completion_tokens"] for i in infos), sum(i.get("spec_verify_ct", 0) for i in infos)
    assert (figures.completion_tokens, figures.verifications) == (tokens, verifications)
    assert figures.tau == (tokens / verifications if verifications else None)
    counts: Counter[int] = Counter()
    for info in infos:
        counts.update(dict(enumerate(info.get("spec_correct_drafts_histogram", []))))
    total = sum(counts.values())
    shares = [
        sum(n for accepted, n in counts.items() if accepted > depth) / total for depth in range(max(counts, default=0))
    ]
    assert figures.acceptance_per_position == shares
    assert figures.histogram == [counts[accepted] for accepted in sorted(counts)]


def test_a_stream_shows_every_token(url, tokenizer, suite):
    _, conversations = measured(url, tokenizer, suite)
    for answer in (answer for conversation in conversations for answer in conversation.answers):
        assert answer.arrivals[0][1] == 1, "the prefill's token comes by itself"
        assert answer.arrivals[-1][1] == answer.completion_tokens
        assert len(answer.inter_token_latencies) == answer.completion_tokens - 1
        assert 0 < answer.time_to_first_token <= answer.latency


def test_the_chat_endpoint_answers_the_same(url, tokenizer, suite):
    """It renders the conversation with the same template."""
    _, conversations = measured(url, tokenizer, suite)
    for conversation in conversations:
        messages: list[dict[str, str]] = []
        for turn, answer in zip(conversation.prompt.turns, conversation.answers, strict=True):
            messages.append({"role": "user", "content": turn})
            body = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": MAX_NEW_TOKENS}
            chat = post(f"{url}/v1/chat/completions", body)
            assert chat["choices"][0]["message"]["content"] == answer.text
            assert chat["usage"]["prompt_tokens"] == answer.prompt_tokens
            messages.append({"role": "assistant", "content": answer.text})
