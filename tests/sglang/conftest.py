"""Tests with the real SGLang, run in an environment that contains it; skipped elsewhere.

NEMO_RUN=RUN judges the best checkpoint of a run on RUN/questions.jsonl, else small drafts of the family are made here.
NEMO_QUESTIONS (20) and NEMO_MAX_NEW_TOKENS (48) say on how much; NEMO_ALL=1 serves every draft by the program as well.
"""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
from nemo_speculative.utils.network import free_port

RUN = os.environ.get("NEMO_RUN")
NUM_QUESTIONS = int(os.environ.get("NEMO_QUESTIONS", "20"))
MAX_NEW_TOKENS = int(os.environ.get("NEMO_MAX_NEW_TOKENS", "48"))
START_SECONDS = 300
SERVERS = min(4, os.cpu_count() or 1)
"""Concurrent servers: most of their time is start-up, on a core or two."""
ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}{{ 't1 ' if m['role'] == 'user' else 't2 ' }}{{ m['content'] }} {% endfor %}t3"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.sglang)
    if not sglang_installed():
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="SGLang is not installed here; see requirements-sglang.txt"))


@dataclass(frozen=True)
class Answer:
    """An answer of SGLang and its acceptance counts."""

    tokens: list[int]
    verifications: int
    histogram: list[int]
    """Verifications that accepted 0, 1, 2 … draft tokens."""


@dataclass(frozen=True)
class PromptFile:
    """Prompts for a target."""

    prompts: list[list[int]]
    stop_ids: tuple[int, ...]
    max_new_tokens: int = MAX_NEW_TOKENS


CommandFor = Callable[[ServeOptions], list[str]]
Ask = Callable[[CommandFor, ServeOptions, PromptFile], Future[list[Answer]]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small are fastest on one thread."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def options_for() -> Callable[[Path], ServeOptions]:
    """Serving options of a checkpoint for these tests; a server gets a free port when it starts."""
    return lambda checkpoint: from_checkpoint(checkpoint, {"device": "cpu", "port": 31234})


def chatting(
    options_for: Callable[[Path], ServeOptions], root: Path, num_questions: int, max_new_tokens: int
) -> ServeOptions:
    """A small EAGLE-3 draft, written to ``root``, whose target has a chat template."""
    from tests.sglang.random_run import make_runs

    run = make_runs(root, num_questions, max_new_tokens)["eagle3"]
    options = replace(options_for(run), port=free_port())
    file = Path(options.target) / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    return options


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Returns the answers of a temporary server; several servers run at a time, and answers are cached."""
    cache: dict[tuple[tuple[str, ...], str], Future[list[Answer]]] = {}
    pool = ThreadPoolExecutor(SERVERS)

    def submit(command_for: CommandFor, options: ServeOptions, questions: PromptFile) -> Future[list[Answer]]:
        key = tuple(command_for(options)), repr(questions)
        if key not in cache:
            log = tmp_path_factory.mktemp("server") / "log"
            cache[key] = pool.submit(_answers, command_for, options, questions, log)
        return cache[key]

    yield submit
    pool.shutdown(cancel_futures=True)


def _answers(command_for: CommandFor, options: ServeOptions, questions: PromptFile, log: Path) -> list[Answer]:
    """Answers to the questions, in order."""
    options = replace(options, port=free_port())
    with Server(command_for(options), serve_environment(options), options.host, options.port, log) as server:
        server.wait_until_healthy(START_SECONDS)
        return [_generate(server.url, prompt, questions) for prompt in questions.prompts]


def with_draft(options: ServeOptions) -> list[str]:
    """The command of users."""
    return serve_command(options, sys.executable)


def without_draft(options: ServeOptions) -> list[str]:
    """The target alone, with SGLang's own attention instead of the stand-in."""
    command, dropped = with_draft(options), ("--speculative-", "--prefill-attention-", "--decode-attention-")
    return [w for i, w in enumerate(command) if not w.startswith(dropped) and not command[i - 1].startswith(dropped)]


def _generate(url: str, prompt: list[int], questions: PromptFile) -> Answer:
    limits = {"max_new_tokens": questions.max_new_tokens, "stop_token_ids": list(questions.stop_ids)}
    body = json.dumps({"input_ids": prompt, "sampling_params": {"temperature": 0, **limits}}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as reply:
        answer = json.load(reply)
    info = answer["meta_info"]
    # Both are left out where the prefill alone finished the answer.
    return Answer(answer["output_ids"], info.get("spec_verify_ct", 0), info.get("spec_correct_drafts_histogram", []))


@pytest.fixture(scope="session")
def inspect(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """SGLang's reading of commands and checkpoints, see :mod:`tests.sglang.inspect_drafts`; the first starts it."""

    def run(commands: Mapping[str, ServeOptions], drafts: Mapping[str, Path]) -> dict[str, Any]:
        wanted = tmp_path_factory.mktemp("inspect") / "wanted.json"
        flags = {name: _flags(options) for name, options in commands.items()}
        wanted.write_text(json.dumps({"commands": flags, "drafts": {name: str(path) for name, path in drafts.items()}}))
        script = [sys.executable, "-m", "tests.sglang.inspect_drafts", str(wanted)]
        environment = {**os.environ, **serve_environment(next(iter(commands.values())))}
        done = subprocess.run(
            script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=START_SECONDS, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def _flags(options: ServeOptions) -> list[str]:
    words = with_draft(options)
    return words[words.index("sglang.launch_server") + 1 :]
