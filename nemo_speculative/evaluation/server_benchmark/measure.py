"""One cell: every conversation of the suite, so many at a time."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from nemo_speculative.data.chat_template import prompt_ids
from nemo_speculative.evaluation.server_benchmark.metrics import Figures, figures_of
from nemo_speculative.evaluation.server_benchmark.suites import Prompt, Suite
from nemo_speculative.serving.client import Answer, Client
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import Refused

SCORERS = 4
"""Programs of answers that run at a time."""


@dataclass
class Conversation:
    """A prompt, and how far it was answered."""

    prompt: Prompt
    answers: list[Answer] = field(default_factory=list)
    refusal: str | None = None

    @property
    def refused_turns(self) -> int:
        return len(self.prompt.turns) - len(self.answers)


async def measure(client: Client, tokenizer: Any, suite: Suite, concurrency: int, temperature: float) -> Figures:
    """The figures of ``suite`` with ``concurrency`` conversations in flight.

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
    return figures_of(answers, seconds, refused, accuracy(suite, conversations))


async def converse(
    client: Client, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int, concurrency: int, temperature: float
) -> list[Conversation]:
    """Has the conversations, ``concurrency`` of them at a time, each turn when the one before is answered."""
    places = asyncio.Semaphore(concurrency)

    async def have(prompt: Prompt) -> Conversation:
        async with places:
            return await _have(client, tokenizer, prompt, max_new_tokens, temperature)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(have(prompt)) for prompt in prompts]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def _have(client: Client, tokenizer: Any, prompt: Prompt, max_new_tokens: int, heat: float) -> Conversation:
    conversation, messages = Conversation(prompt), []
    for turn in prompt.turns:
        messages.append({"role": "user", "content": turn})
        ids = prompt_ids(tokenizer, messages, "suite")
        try:
            answer = await client.generate(ids, temperature=heat, max_new_tokens=max_new_tokens)
        except Refused as error:
            conversation.refusal = str(error)
            break
        conversation.answers.append(answer)
        messages.append({"role": "assistant", "content": answer.text})
    return conversation


def accuracy(suite: Suite, conversations: Sequence[Conversation]) -> float | None:
    """Share of the conversations whose last turn is answered rightly; one that was refused is not."""
    scorer = suite.scorer
    if scorer is None:
        return None

    def right(conversation: Conversation) -> bool:
        answered = conversation.refused_turns == 0
        return answered and scorer.right(conversation.answers[-1].text, conversation.prompt.row)

    with ThreadPoolExecutor(SCORERS) as pool:
        return sum(pool.map(right, conversations)) / len(conversations)
