"""Fixtures: questions, jobs that answer them, and fake servers."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_speculative.config.schema import EndpointConfig, GenerateJob, HFEngineConfig, ModelConfig, ReasoningConfig
from nemo_speculative.utils import network
from tests.conftest import WORDS
from tests.generate_data import fake_server
from tests.programs import Program


def conversation(identity: str, *contents: str, **further: Any) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return {"id": identity, "conversations": messages, **further}


def write(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def questions(tmp_path) -> Path:
    """Twelve conversations of one to three turns, all of whose answers are to be replaced."""
    records = []
    for n in range(12):
        contents = [turn for i in range(n % 3 + 1) for turn in (WORDS[3 * n + i : 9 * n + 14 + i], "OLD")]
        records.append(conversation(f"c{n}", *contents))
    return write(tmp_path / "questions.jsonl", records)


@pytest.fixture
def job(tmp_path, target_dir, questions) -> Callable[..., GenerateJob]:
    """A job that answers ``questions`` in this process, with changed settings."""

    def make(**changed: Any) -> GenerateJob:
        reasoning = ReasoningConfig(f"nemo_speculative.generate_data.rollout.{changed.pop('reasoning', 'Keep')}")
        batch_size = changed.pop("batch_size", 4)
        usual = {
            "model": ModelConfig(path=str(target_dir)),
            "engine": HFEngineConfig(batch_size=batch_size, device="cpu"),
            "path": str(questions),
            "output": str(tmp_path / "out"),
            "max_new_tokens": 12,
        }
        return GenerateJob(**{**usual, **changed}, reasoning=reasoning)

    return make


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts a :mod:`~tests.generate_data.fake_server` and returns its URL; ``processes`` lists them."""
    processes: list[subprocess.Popen] = []

    def start(kind: str, model: str = "the-target", port: int | None = None, log: str = "", **environment: str) -> str:
        port = port or network.free_port()
        command = [sys.executable, fake_server.__file__, kind, model, str(port), *([log] if log else [])]
        processes.append(subprocess.Popen(command, env={**os.environ, **environment}))
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(200):
            try:
                opener.open(f"http://127.0.0.1:{port}/nothing").close()
            except urllib.error.HTTPError:
                return f"http://127.0.0.1:{port}"
            except OSError:
                time.sleep(0.05)
        raise AssertionError("the fake server did not come up")

    start.processes = processes
    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def endpoint_job(job) -> Callable[..., GenerateJob]:
    """A job that answers ``questions`` by servers."""

    def make(*urls: str, model: str | None = None, **changed: Any) -> GenerateJob:
        patient = {"attempts": 3, "timeout": 5.0, "give_up_after": 20.0, "concurrency": 4}
        settings = {key: changed.pop(key, value) for key, value in patient.items()}
        return job(engine=EndpointConfig(urls=list(urls), model=model, **settings), **changed)

    return make


def start_recipe(name: str, *arguments: str) -> Program:
    """A running recipe, started as a user starts it."""
    return Program(f"recipes/{name}", *arguments, environment=os.environ | {"OMP_NUM_THREADS": "1"})
