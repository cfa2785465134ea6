"""A benchmark: measures every point of every server in turn; each result is on disk as soon as it is measured."""

import asyncio
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_speculative.checkpoint.metadata import find_model, update_speculative_settings
from nemo_speculative.config.schema import BenchmarkJob, ModelConfig
from nemo_speculative.data.chat_template import prompt_ids
from nemo_speculative.evaluation.server_benchmark.results import BenchMetrics, BenchPoint, BenchResult, ResultsLog
from nemo_speculative.evaluation.server_benchmark.servers import BenchServer, servers_of
from nemo_speculative.evaluation.server_benchmark.suites import Prompt, Suite, load_suite
from nemo_speculative.serving.client import Answer, Client
from nemo_speculative.targets.describe import load_tokenizer
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import Refused, Unauthorized, Unreachable, api_key

SCORER_THREADS = 4
"""Answers scored at the same time, each maybe in a process of its own."""


class Benchmark:
    """The points of a job, and the log of their results; no server is started yet.

    Raises UserError if the suite, the checkpoint, the server or the target's tokenizer is not available.
    """

    def __init__(self, job: BenchmarkJob):
        self.job, self.suite, self.servers = job, load_suite(job.suite), servers_of(job)
        target = resolve_target(ModelConfig(path=self.servers[-1].target), weights=False, key="target")
        self.tokenizer = load_tokenizer(target, job.server.trust_remote_code)
        self.log = ResultsLog(Path(job.results))
        name, digest, limit = self.suite.name, self.suite.digest, self.suite.max_new_tokens
        self.points = [
            [
                BenchPoint(name, digest, limit, concurrency, temperature, server.server, server.draft)
                for temperature in job.temperature
                for concurrency in job.concurrency
            ]
            for server in self.servers
        ]
        """The points of each server, in the order of measurement."""

    def run(self) -> None:
        """Measures every point without metrics; a point that fails is recorded with the reason.

        Raises Unauthorized if a server expects another token.
        """
        pending = [deque(point for point in points if not self.log.has(point)) for points in self.points]
        if any(pending) and self.suite.scorer and self.suite.scorer.note:
            _print(self.suite.scorer.note)
        # SIGTERM stops the server first, like Ctrl-C.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for server, points in zip(self.servers, pending, strict=True):
                while points:
                    self._serve(server, points)
        finally:
            signal.signal(signal.SIGTERM, before)

    def _serve(self, server: BenchServer, points: deque[BenchPoint]) -> None:
        """Measures with one start of the server until ``points`` is empty or the server is lost."""
        _print(f"{points[0].setting}: waiting for the server")
        try:
            with server.running() as url:
                asyncio.run(self._measure(url, points))
        except Unauthorized:
            raise
        except UserError as error:  # the server would not start or answer for the next point either
            while points:
                self._record(points.popleft(), error)

    async def _measure(self, url: str, points: deque[BenchPoint]) -> None:
        suite, warmup = self.suite, self.suite.prompts[: self.job.warmup]
        async with Client(url, api_key()) as client:
            try:
                await client.server_info()
                await converse(client, self.tokenizer, warmup, suite.max_new_tokens, len(warmup) or 1, 0.0)
                while points:
                    outcome = await self._measure_point(client, points[0])
                    self._record(points.popleft(), outcome)
            except Unreachable as error:
                self._record(points.popleft(), error)

    async def _measure_point(self, client: Client, point: BenchPoint) -> BenchMetrics | UserError:
        try:
            metrics = await measure(client, self.tokenizer, self.suite, point.concurrency, point.temperature)
        except (Unauthorized, Unreachable):
            raise
        except UserError as error:
            return error
        if point.draft is None or metrics.verifications:
            return metrics
        return UserError(
            "the server reported not one verification: expected some of a draft; does it speculate, and are the "
            "answers longer than a token (suite.max_new_tokens)?"
        )

    def _record(self, point: BenchPoint, outcome: BenchMetrics | UserError) -> None:
        if isinstance(outcome, UserError):
            self.log.append(BenchResult(point, None, str(outcome)))
            _print(f"{point}: failed: {outcome}")
        else:
            self.log.append(BenchResult(point, outcome))
            refused = f", {outcome.refused} turn(s) refused" if outcome.refused else ""
            _print(f"{point}: {outcome.output_tokens_per_second:.1f} tokens/s{refused}")

    @property
    def comparable(self) -> list[BenchResult]:
        """Results of this job, and those in the results directory of other settings of the same draft."""
        own = [point for points in self.points for point in points]
        keys, drafts = {point.comparison_key for point in own}, {point.weights for point in own}
        return [r for r in self.log if r.point.comparison_key in keys and r.point.weights in {*drafts, None}]

    def require_success(self) -> None:
        """Raises UserError if a point failed."""
        results = [self.log.get(point) for points in self.points for point in points]
        failed = [result for result in results if result and result.metrics is None]
        if failed:
            raise UserError(
                f"{len(failed)} point(s) failed, the first, {failed[0].point}: {failed[0].error}; the same command "
                "measures them again"
            )

    def write_back(self, best: BenchResult | None) -> None:
        """Stores the settings of ``best`` in the checkpoint, to be served with; raises UserError if it is None."""
        speculative = best.point.speculative if best else None
        if speculative is None:
            raise UserError(f"write_back={self.job.write_back}: no setting of the draft was measured there")
        model = find_model(self.job.checkpoint or "")
        update_speculative_settings(model, speculative)
        print(f"{model} is now served with {speculative}")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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

    Raises UserError if the server does not answer, or refuses every prompt.
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
