"""A benchmark: every server in turn, every cell of it, each on disk as soon as it is measured."""

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
from nemo_speculative.evaluation.server_benchmark.endpoints import Endpoint, endpoints_of
from nemo_speculative.evaluation.server_benchmark.measure import converse, measure
from nemo_speculative.evaluation.server_benchmark.metrics import Figures
from nemo_speculative.evaluation.server_benchmark.results_log import Cell, Measured, ResultsLog
from nemo_speculative.evaluation.server_benchmark.suites import Suite, load_suite
from nemo_speculative.serving.client import Client
from nemo_speculative.serving.server import ServerError
from nemo_speculative.targets.embedding_and_head import load_tokenizer
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import Unauthorized, Unreachable, api_key


@dataclass(frozen=True)
class Benchmark:
    """What a job measures, and where it goes."""

    job: BenchmarkJob
    suite: Suite
    endpoints: Sequence[Endpoint]
    tokenizer: Any
    ledger: ResultsLog

    @classmethod
    def of(cls, job: BenchmarkJob) -> "Benchmark":
        """What ``job`` asks for; nothing is started yet.

        Raises:
            UserError: the suite, the checkpoint, the server or the target's tokenizer is not to be had.
        """
        suite, endpoints = load_suite(job.suite), endpoints_of(job)
        target = resolve_target(ModelConfig(path=endpoints[-1].target), weights=False, key="target")
        tokenizer = load_tokenizer(target, job.server.trust_remote_code)
        return cls(job, suite, endpoints, tokenizer, ResultsLog(Path(job.results)))

    def cells(self, endpoint: Endpoint) -> list[Cell]:
        """All of an endpoint's, in the order that they are measured in."""
        suite = self.suite
        return [
            Cell(suite.name, suite.digest, suite.max_new_tokens, at_once, heat, endpoint.server, endpoint.draft)
            for heat in self.job.temperature
            for at_once in self.job.concurrency
        ]

    def run(self) -> None:
        """Measures every cell that has no figures yet; one that fails is recorded with the reason.

        Raises:
            Unauthorized: a server wants another token.
        """
        left = [(one, deque(cell for cell in self.cells(one) if not self.ledger.has(cell))) for one in self.endpoints]
        if any(pending for _, pending in left) and self.suite.scorer is not None and self.suite.scorer.note:
            _say(self.suite.scorer.note)
        # Asked to end, it stops its server first, as after Ctrl-C.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for endpoint, pending in left:
                while pending:
                    self._serve(endpoint, pending)
        finally:
            signal.signal(signal.SIGTERM, before)

    def _serve(self, endpoint: Endpoint, pending: deque[Cell]) -> None:
        """Measures with one server until all of ``pending`` is, or the server is lost."""
        _say(f"{pending[0].setting}: waiting for the server")
        try:
            with endpoint.up() as url:
                asyncio.run(self._measure(url, pending))
        except Unauthorized:
            raise
        except UserError as error:  # it would not come up, or answer, for the next cell either
            if isinstance(error, ServerError):
                print(error.log_tail, file=sys.stderr)
            while pending:
                self._fail(pending, error)

    async def _measure(self, url: str, pending: deque[Cell]) -> None:
        suite = self.suite
        async with Client(url, api_key()) as client:
            try:
                await client.server_info()
                warmup = suite.prompts[: self.job.warmup]
                await converse(client, self.tokenizer, warmup, suite.max_new_tokens, len(warmup) or 1, 0.0)
                while pending:
                    await self._measure_next(client, pending)
            except Unreachable as error:
                self._fail(pending, error)

    async def _measure_next(self, client: Client, pending: deque[Cell]) -> None:
        cell = pending[0]
        try:
            figures = await measure(client, self.tokenizer, self.suite, cell.concurrency, cell.temperature)
            if cell.draft is not None:
                _require_verified(figures)
        except (Unauthorized, Unreachable):
            raise
        except UserError as error:
            self._fail(pending, error)
        else:
            self.ledger.append(Measured(pending.popleft(), figures))
            refused = f", {figures.refused} turn(s) refused" if figures.refused else ""
            _say(f"{_name(cell)}: {figures.output_tokens_per_second:.1f} tokens/s{refused}")

    def _fail(self, pending: deque[Cell], error: UserError) -> None:
        cell = pending.popleft()
        self.ledger.append(Measured(cell, None, str(error)))
        _say(f"{_name(cell)}: failed: {error}")

    @property
    def comparable(self) -> list[Measured]:
        """This job's cells, and what the results directory holds of other settings of the same draft."""
        own = [cell for endpoint in self.endpoints for cell in self.cells(endpoint)]
        rivals, drafts = {cell.rivals for cell in own}, {cell.weights for cell in own}
        return [one for one in self.ledger if one.cell.rivals in rivals and one.cell.weights in {*drafts, None}]

    @property
    def failed(self) -> list[Measured]:
        """This job's cells that have no figures."""
        found = [self.ledger.get(cell) for endpoint in self.endpoints for cell in self.cells(endpoint)]
        return [measured for measured in found if measured is not None and measured.figures is None]


def require_success(benchmark: Benchmark) -> None:
    """Makes failed cells the program's failure.

    Raises:
        UserError: there are some.
    """
    failed = benchmark.failed
    if failed:
        raise UserError(
            f"{len(failed)} cell(s) failed, the first, {_name(failed[0].cell)}: {failed[0].error}; the same command "
            "measures them again"
        )


def write_back(benchmark: Benchmark, best: Measured | None) -> None:
    """Makes the setting of ``best`` what the checkpoint remembers to be served with.

    Raises:
        UserError: no setting was measured.
    """
    speculative = best.cell.speculative if best else None
    if speculative is None:
        raise UserError(f"write_back={benchmark.job.write_back}: no setting of the draft was measured there")
    model = find_model(benchmark.job.checkpoint or "")
    update_speculative_settings(model, speculative)
    print(f"{model} is now served with {speculative}")


def _require_verified(figures: Figures) -> None:
    if not figures.verifications:
        raise UserError(
            "the server reported not one verification: expected some of a draft; does it speculate, and are the "
            "answers longer than a token (suite.max_new_tokens)?"
        )


def _name(cell: Cell) -> str:
    return f"{cell.setting}, {cell.suite}, {cell.concurrency} at once, temperature {cell.temperature:g}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
