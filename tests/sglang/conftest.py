"""SGLang as the judge.  Run with the python of an environment that holds SGLang; elsewhere all of it is skipped.

NEMO_RUN=RUN judges the best checkpoint of a run on RUN/questions.jsonl, else small random models are made here.
NEMO_QUESTIONS (20) and NEMO_MAX_NEW_TOKENS (48) say on how much.
"""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nemo_speculative.serving.command import (
    ServeOptions,
    from_checkpoint,
    serve_command,
    serve_environment,
    sglang_installed,
)
from nemo_speculative.serving.server import Server

RUN = os.environ.get("NEMO_RUN")
NUM_QUESTIONS = int(os.environ.get("NEMO_QUESTIONS", "20"))
MAX_NEW_TOKENS = int(os.environ.get("NEMO_MAX_NEW_TOKENS", "48"))
START_SECONDS = 240


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    if not sglang_installed():
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="SGLang is not installed here; see requirements-sglang.txt"))


@dataclass(frozen=True)
class Answer:
    """What SGLang answered, and how it says it came about."""

    tokens: list[int]
    verifications: int
    histogram: list[int]
    """Verifications that accepted 0, 1, 2 … draft tokens."""


@dataclass(frozen=True)
class Case:
    """A checkpoint on trial."""

    name: str
    options: ServeOptions
    questions: list[list[int]]
    stop_ids: tuple[int, ...]
    max_new_tokens: int = MAX_NEW_TOKENS


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small are fastest on one thread."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if RUN:
        return {"run": Path(RUN)}
    from tests.sglang.random_run import make_runs  # torch and transformers, which a skipped session need not load

    return make_runs(tmp_path_factory.mktemp("runs"), NUM_QUESTIONS)


@pytest.fixture(scope="session", params=["run"] if RUN else ["random", "trained"])
def case(request: pytest.FixtureRequest, runs: dict[str, Path], free_port: int) -> Case:
    from nemo_speculative.checkpoints.servable import read_servable
    from nemo_speculative.targets.hf import HFTarget

    run = runs[request.param]
    options = from_checkpoint(run, {"device": "cpu", "port": free_port})
    lines = (run / "questions.jsonl").read_text().splitlines()[:NUM_QUESTIONS]
    questions = [json.loads(line)["input_ids"] for line in lines]
    target = HFTarget(Path(options.target), aux_layers=list(read_servable(options.draft).shape.aux_layers))
    return Case(request.param, options, questions, tuple(target.stop_ids))


@pytest.fixture(scope="session")
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case, list[str]], list[Answer]]:
    """Asks all questions of a case, one after the other, of a server that lives for that long."""

    @contextmanager
    def serving(options: ServeOptions, command: list[str]) -> Iterator[str]:
        log = tmp_path_factory.mktemp("server") / "log"
        with Server(command, serve_environment(options), options.host, options.port, log) as server:
            server.wait_until_healthy(START_SECONDS)
            yield server.url

    def ask_all(case: Case, command: list[str]) -> list[Answer]:
        with serving(case.options, command) as url:
            return [_generate(url, question, case) for question in case.questions]

    return ask_all


def _generate(url: str, question: list[int], case: Case) -> Answer:
    sampling = {"temperature": 0, "max_new_tokens": case.max_new_tokens, "stop_token_ids": list(case.stop_ids)}
    body = json.dumps({"input_ids": question, "sampling_params": sampling}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as reply:
        answer = json.load(reply)
    info = answer["meta_info"]
    # Both are left out where the prefill alone finished the answer.
    return Answer(answer["output_ids"], info.get("spec_verify_ct", 0), info.get("spec_correct_drafts_histogram", []))


@pytest.fixture(scope="session")
def plain(case: Case, ask: Callable, request: pytest.FixtureRequest) -> list[Answer]:
    """SGLang without the draft: asked once for each target and its questions."""
    cache = request.session.stash.setdefault(PLAIN, {})
    key = (case.options.target, json.dumps(case.questions))
    if key not in cache:
        cache[key] = ask(case, without_draft(serve_command(case.options, sys.executable)))
    return cache[key]


PLAIN = pytest.StashKey[dict[Any, list[Answer]]]()


def without_draft(command: list[str]) -> list[str]:
    """The target alone, on SGLang's own attention: our stand-in has no part in it."""
    dropped = ("--speculative-", "--prefill-attention-", "--decode-attention-")
    return [w for i, w in enumerate(command) if not w.startswith(dropped) and not command[i - 1].startswith(dropped)]


@pytest.fixture(scope="session")
def served(case: Case, ask: Callable) -> list[Answer]:
    """SGLang with the draft, served as the checkpoint remembers."""
    return ask(case, serve_command(case.options, sys.executable))


@pytest.fixture(scope="session")
def served_as_tree(case: Case, ask: Callable) -> list[Answer]:
    tree = replace(case.options.speculative, num_steps=3, topk=4, num_draft_tokens=8)
    return ask(case, serve_command(replace(case.options, speculative=tree), sys.executable))


@pytest.fixture(scope="session")
def inspect() -> Callable[..., dict[str, Any]]:
    """SGLang's reading of a command; with load=True also of the draft that it names."""

    def run(options: ServeOptions, *, load: bool = False) -> dict[str, Any]:
        words = serve_command(options, sys.executable)
        flags = words[words.index("sglang.launch_server") + 1 :]
        script = [sys.executable, str(Path(__file__).with_name("inspect_draft.py")), *["--load"] * load, *flags]
        environment = {**os.environ, **serve_environment(replace(options, device="cpu"))}
        done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=START_SECONDS)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
