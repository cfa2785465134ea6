"""Answers of the real SGLang to generate_data.py against those of the target in this process."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_speculative.config.schema import EndpointConfig, EngineConfig, GenerateJob, HFEngineConfig, ModelConfig
from nemo_speculative.config.schema import ReasoningConfig as Reasoning
from nemo_speculative.generate_data import endpoint
from nemo_speculative.generate_data.run import Outcome, generate_data
from nemo_speculative.serving.command import serve_command, serve_environment
from nemo_speculative.serving.server import Server
from tests.sglang.conftest import START_SECONDS, chatting

NUM_QUESTIONS, MAX_NEW_TOKENS = 8, 24


@pytest.fixture(scope="module")
def options(tmp_path_factory, options_for):
    """A draft whose target has a chat template."""
    return chatting(options_for, tmp_path_factory.mktemp("runs"), NUM_QUESTIONS, MAX_NEW_TOKENS)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Conversations of one turn to three, and one that is longer than the context."""
    records = []
    for n in range(NUM_QUESTIONS):
        first = " ".join(f"t{(7 * n + 3 * i) % 200 + 10}" for i in range(4 + n))
        texts = [first, "OLD", "t9 t8", "OLD", "t33", "OLD"][: 2 * (1 + n % 3)]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        records.append({"id": f"q{n}", "conversations": messages})
    records.append({"id": "long", "conversations": [{"role": "user", "content": "t5 " * 600}]})
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(scope="module")
def url(options, tmp_path_factory) -> Iterator[str]:
    """A server with the draft: several tokens arrive at a time, a stop token among them."""
    command = serve_command(options, sys.executable)
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(command, serve_environment(options), options.host, options.port, log) as server:
        server.wait_until_healthy(START_SECONDS)
        yield server.url


def generated(options, questions: Path, output: Path, engine: EngineConfig, **sampling: Any) -> Outcome:
    keep = Reasoning("nemo_speculative.generate_data.rollout.Keep")
    model = ModelConfig(path=str(options.target))
    job = GenerateJob(model=model, engine=engine, path=str(questions), output=str(output), reasoning=keep,
                      max_new_tokens=MAX_NEW_TOKENS, **sampling)  # fmt: skip
    return generate_data(job)


def test_greedy_ids_are_those_of_the_target_in_this_process(url, options, questions, tmp_path):
    served = generated(options, questions, tmp_path / "served", EndpointConfig(urls=[url], concurrency=3))
    local = generated(options, questions, tmp_path / "local", HFEngineConfig(batch_size=4, device="cpu"))
    assert (served.answered, served.skipped.total(), served.failed.total()) == (NUM_QUESTIONS, 1, 0)
    assert served.text_only == 0 and served.finishes["stop"] and served.finishes["length"]
    assert (served.directory / "answers.jsonl").read_bytes() == (local.directory / "answers.jsonl").read_bytes()
    manifest = json.loads((served.directory / "manifest.json").read_text())
    assert manifest["protocol"] == "sglang" and manifest["target"] == str(options.target)


def test_v1_completions_of_sglang_gives_the_same_ids(url, options, questions, tmp_path, monkeypatch):
    """The route of other servers for token ids, on a server that has both."""
    native = generated(options, questions, tmp_path / "native", EndpointConfig(urls=[url]))
    get = endpoint.Server._get

    async def hidden(self, path: str) -> Any:
        return None if "model_info" in path else await get(self, path)

    monkeypatch.setattr(endpoint.Server, "_get", hidden)
    other = generated(options, questions, tmp_path / "other", EndpointConfig(urls=[url]))
    assert json.loads((other.directory / "manifest.json").read_text())["protocol"] == "completions"
    assert (native.directory / "answers.jsonl").read_bytes() == (other.directory / "answers.jsonl").read_bytes()
