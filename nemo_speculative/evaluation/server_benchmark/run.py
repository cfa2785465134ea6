"""A benchmark: measures every point of every server in turn; each result is on disk as soon as it is measured."""

import asyncio
import signal
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_speculative.checkpoint.metadata import find_model, update_speculative_settings
from nemo_speculative.config.schema import BenchmarkJob, ModelConfig
from nemo_speculative.evaluation.server_benchmark.measure import converse, measure
from nemo_speculative.evaluation.server_benchmark.results_log import BenchPoint, BenchResult, ResultsLog
from nemo_speculative.evaluation.server_benchmark.servers import BenchServer, servers_of
from nemo_speculative.evaluation.server_benchmark.suites import Suite, load_suite
from nemo_speculative.serving.client import Client
from nemo_speculative.serving.server import ServerError
from nemo_speculative.targets.embedding_and_head import load_tokenizer
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import Unauthorized, Unreachable, api_key


@dataclass(frozen=True)
class Benchmark:
    """The suite and servers of a job, and the log of its results."""

    job: BenchmarkJob
    suite: Suite
    servers: Sequence[BenchServer]
    tokenizer: Any
    log: ResultsLog

    @classmethod
    def of(cls, job: BenchmarkJob) -> "Benchmark":
        """The benchmark of ``job``; no server is started yet.

        Raises:
            UserError: the suite, the checkpoint, the server or the target's tokenizer is not available.
        """
        suite, servers = load_suite(job.suite), servers_of(job)
        target = resolve_target(ModelConfig(path=servers[-1].target), weights=False, key="target")
        tokenizer = load_tokenizer(target, job.server.trust_remote_code)
        return cls(job, suite, servers, tokenizer, ResultsLog(Path(job.results)))

    def points(self, server: BenchServer) -> list[BenchPoint]:
        """All points of a server, in the order of measurement."""
        suite = self.suite
        return [
            BenchPoint(
                suite.name, suite.digest, suite.max_new_tokens, concurrency, temperature, server.server, server.draft
            )
            for temperature in self.job.temperature
            for concurrency in self.job.concurrency
        ]

    def run(self) -> None:
        """Measures every point without metrics; a point that fails is recorded with the reason.

        Raises:
            Unauthorized: a server expects another token.
        """
        pending = [
            (server, deque(point for point in self.points(server) if not self.log.has(point)))
            for server in self.servers
        ]
        if any(points for _, points in pending) and self.suite.scorer is not None and self.suite.scorer.note:
            _print(self.suite.scorer.note)
        # SIGTERM stops the server first, like Ctrl-C.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for server, points in pending:
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
            if isinstance(error, ServerError):
                print(error.log_tail, file=sys.stderr)
            while points:
                self._fail(points, error)

    async def _measure(self, url: str, points: deque[BenchPoint]) -> None:
        suite = self.suite
        async with Client(url, api_key()) as client:
            try:
                await client.server_info()
                warmup = suite.prompts[: self.job.warmup]
                await converse(client, self.tokenizer, warmup, suite.max_new_tokens, len(warmup) or 1, 0.0)
                while points:
                    await self._measure_next(client, points)
            except Unreachable as error:
                self._fail(points, error)

    async def _measure_next(self, client: Client, points: deque[BenchPoint]) -> None:
        point = points[0]
        try:
            metrics = await measure(client, self.tokenizer, self.suite, point.concurrency, point.temperature)
            if point.draft is not None and not metrics.verifications:
                raise UserError(
                    "the server reported not one verification: expected some of a draft; does it speculate, and are "
                    "the answers longer than a token (suite.max_new_tokens)?"
                )
        except (Unauthorized, Unreachable):
            raise
        except UserError as error:
            self._fail(points, error)
        else:
            self.log.append(BenchResult(points.popleft(), metrics))
            refused = f", {metrics.refused} turn(s) refused" if metrics.refused else ""
            _print(f"{point}: {metrics.output_tokens_per_second:.1f} tokens/s{refused}")

    def _fail(self, points: deque[BenchPoint], error: UserError) -> None:
        point = points.popleft()
        self.log.append(BenchResult(point, None, str(error)))
        _print(f"{point}: failed: {error}")

    @property
    def comparable(self) -> list[BenchResult]:
        """Results of this job, and those in the results directory of other settings of the same draft."""
        own = [point for server in self.servers for point in self.points(server)]
        keys, drafts = {point.comparison_key for point in own}, {point.weights for point in own}
        return [r for r in self.log if r.point.comparison_key in keys and r.point.weights in {*drafts, None}]

    @property
    def failed(self) -> list[BenchResult]:
        """Results of this job without metrics."""
        results = [self.log.get(point) for server in self.servers for point in self.points(server)]
        return [result for result in results if result is not None and result.metrics is None]


def require_success(benchmark: Benchmark) -> None:
    """Checks that no point failed.

    Raises:
        UserError: at least one failed.
    """
    failed = benchmark.failed
    if failed:
        raise UserError(
            f"{len(failed)} point(s) failed, the first, {failed[0].point}: {failed[0].error}; the same command "
            "measures them again"
        )


def write_back(benchmark: Benchmark, best: BenchResult | None) -> None:
    """Stores the settings of ``best`` in the checkpoint as those that it is served with.

    Raises:
        UserError: no setting was measured.
    """
    speculative = best.point.speculative if best else None
    if speculative is None:
        raise UserError(f"write_back={benchmark.job.write_back}: no setting of the draft was measured there")
    model = find_model(benchmark.job.checkpoint or "")
    update_speculative_settings(model, speculative)
    print(f"{model} is now served with {speculative}")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
