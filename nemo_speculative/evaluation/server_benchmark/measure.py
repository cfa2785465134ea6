"""Measurement of one benchmark point: the conversations of a suite, ``concurrency`` at a time, and their metrics."""

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from nemo_speculative.data.chat_template import prompt_ids
from nemo_speculative.decoding.tau import acceptance_length, acceptance_per_position
from nemo_speculative.evaluation.server_benchmark.suites import Prompt, Suite
from nemo_speculative.serving.client import Answer, Client
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import Refused

SCORER_THREADS = 4
"""Answers scored at the same time, each maybe in a process of its own."""
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class BenchMetrics:
    """The metrics of one benchmark point."""

    answers: int
    """Number of answers, one per turn."""
    refused: int
    """Turns that the server refused, as too long for its context; no other metric includes them."""
    stopped: float
    """Share of the answers that ended with a stop token."""
    completion_tokens: int
    verifications: int
    tau: float | None
    """Σ completion tokens / Σ verifications: each token weighs the same.  The prefill's token of each answer counts, as
    in SGLang's ``spec_accept_length``.  None: nothing was verified."""
    histogram: list[int]
    """Number of verifications that accepted 0, 1, 2, … draft tokens."""
    acceptance_per_position: list[float]
    """Share of the verifications that accepted a draft token at depth i + 1."""
    seconds: float
    """Seconds from the first request to the last token."""
    output_tokens_per_second: float
    """Total over all conversations."""
    time_to_first_token: dict[str, float]
    """Seconds by percentile, like the next two."""
    inter_token_latency: dict[str, float]
    """See :attr:`~nemo_speculative.serving.client.Answer.inter_token_latencies`."""
    latency: dict[str, float]
    """Latency of whole answers."""
    accuracy: float | None
    """Share of the conversations whose last answer is right; None: the suite has no scorer."""

    @classmethod
    def of(cls, answers: Sequence[Answer], seconds: float, refused: int, accuracy: float | None) -> "BenchMetrics":
        """The metrics of ``answers`` that arrived within ``seconds``."""
        tokens = sum(answer.completion_tokens for answer in answers)
        verifications = sum(answer.verifications for answer in answers)
        histogram = [sum(counts) for counts in zip_longest(*(a.histogram for a in answers), fillvalue=0)]
        return cls(
            answers=len(answers),
            refused=refused,
            stopped=sum(answer.stopped for answer in answers) / len(answers),
            completion_tokens=tokens,
            verifications=verifications,
            tau=acceptance_length(tokens, verifications),
            histogram=histogram,
            acceptance_per_position=acceptance_per_position(histogram),
            seconds=seconds,
            output_tokens_per_second=tokens / seconds,
            time_to_first_token=percentiles([answer.time_to_first_token for answer in answers]),
            inter_token_latency=percentiles([gap for answer in answers for gap in answer.inter_token_latencies]),
            latency=percentiles([answer.latency for answer in answers]),
            accuracy=accuracy,
        )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Nearest-rank percentiles: the smallest value that p percent of ``values`` do not exceed; empty for no values."""
    ordered = sorted(values)
    ranks = {f"p{p}": max(math.ceil(p / 100 * len(ordered)), 1) - 1 for p in PERCENTILES}
    return {name: ordered[rank] for name, rank in ranks.items()} if ordered else {}


@dataclass
class Conversation:
    """A prompt and the answers to its turns so far."""

    prompt: Prompt
    answers: list[Answer] = field(default_factory=list)
    refusal: str | None = None
    """The server's reason for refusing the next turn, which ends the conversation."""

    @property
    def refused_turns(self) -> int:
        return len(self.prompt.turns) - len(self.answers)


async def measure(client: Client, tokenizer: Any, suite: Suite, concurrency: int, temperature: float) -> BenchMetrics:
    """The metrics of ``suite`` with ``concurrency`` conversations in flight.

    Raises:
        UserError: the server does not answer, or refuses every prompt.
    """
    await client.flush_cache()
    started = time.perf_counter()
    conversations = await converse(client, tokenizer, suite.prompts, suite.max_new_tokens, concurrency, temperature)
    seconds = time.perf_counter() - started
    answers = [answer for conversation in conversations for answer in conversation.answers]
    if not answers:
        raise UserError(f"every prompt of {suite.name} was refused: {conversations[0].refusal}")
    refused = sum(conversation.refused_turns for conversation in conversations)
    return BenchMetrics.of(answers, seconds, refused, accuracy(suite, conversations))


async def converse(
    client: Client, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int, concurrency: int, temperature: float
) -> list[Conversation]:
    """Runs the conversations, ``concurrency`` at a time; each turn is sent after the previous one is answered."""
    semaphore = asyncio.Semaphore(concurrency)

    async def run(prompt: Prompt) -> Conversation:
        conversation, messages = Conversation(prompt), []
        async with semaphore:
            for turn in prompt.turns:
                messages.append({"role": "user", "content": turn})
                ids = prompt_ids(tokenizer, messages, "suite")
                try:
                    answer = await client.generate(ids, temperature=temperature, max_new_tokens=max_new_tokens)
                except Refused as error:
                    conversation.refusal = str(error)
                    break
                conversation.answers.append(answer)
                messages.append({"role": "assistant", "content": answer.text})
        return conversation

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(prompt)) for prompt in prompts]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def accuracy(suite: Suite, conversations: Sequence[Conversation]) -> float | None:
    """Share of the conversations whose last answer is right, refused ones being wrong; None without a scorer."""
    scorer = suite.scorer
    if scorer is None:
        return None

    def right(conversation: Conversation) -> bool:
        complete = conversation.refused_turns == 0
        return complete and scorer.right(conversation.answers[-1].text, conversation.prompt.row)

    with ThreadPoolExecutor(SCORER_THREADS) as pool:
        return sum(pool.map(right, conversations)) / len(conversations)
