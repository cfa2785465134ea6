"""inspect_data.py's model of SGLang's rendering against the rendering of SGLang."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.data.conversations import Conversation
from nemo_speculative.evaluation.server_benchmark.servers import split
from nemo_speculative.inspect_data.comparison import ByTemplate, Comparison, RunningServer
from nemo_speculative.serving.command import ServeOptions, serve_command, serve_environment
from nemo_speculative.serving.server import Server
from nemo_speculative.utils.http import Refused
from nemo_speculative.utils.network import free_port
from tests.conftest import make_target
from tests.sglang.conftest import START_SECONDS

TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|system|>You help.<|end|>{% endif %}"
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "x": [1, 2]}}}
]


def turn(role: str, content: str | None, **more) -> dict:
    return {"role": role, "content": content, **more}


def called(arguments, content: str | None = "") -> list[dict]:
    call = {"id": "c0", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        turn("user", "do"), turn("assistant", content, tool_calls=[call]), turn("tool", "done", tool_call_id="c0"),
        turn("assistant", "fine"),
    ]  # fmt: skip


ALIKE = {
    "one turn": [turn("user", "the quick fox"), turn("assistant", "jumps")],
    "three turns": [
        turn("system", "be brief"), turn("user", "größer é 🦊"), turn("assistant", " naïve  two \n"),
        turn("user", "<|assistant|> quoted"), turn("assistant", "so"), turn("user", ""), turn("assistant", "x"),
    ],
    "thinking": [turn("user", "a"), turn("assistant", "b", reasoning_content="hm"), turn("user", "c"),
                 turn("assistant", "d")],
    "arguments": called({"x": [1, "é"]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 320}
    return make_target(tmp_path_factory.mktemp("target"), template=TEMPLATE, **shape)


@pytest.fixture(scope="module")
def server(target, tmp_path_factory) -> Iterator[RunningServer]:
    none = SpeculativeSettings(num_steps=1, topk=1, num_draft_tokens=2)
    options = ServeOptions(target, str(target), "EAGLE3", "float32", none, device="cpu", port=free_port())
    command, _ = split(serve_command(options, sys.executable))
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(command, serve_environment(options), options.host, options.port, log) as running:
        running.wait_until_healthy(START_SECONDS)
        with RunningServer(running.url) as connection:
            yield connection


@pytest.fixture(scope="module")
def tokenizer(target):
    return AutoTokenizer.from_pretrained(target)


@pytest.mark.parametrize("messages", [*ALIKE.values(), called('{"x": 1}', None)], ids=[*ALIKE, "text, null"])
def test_sglang_renders_as_modeled(server, tokenizer, messages):
    believed = ByTemplate(tokenizer)
    for turn in range(1, len(messages)):  # an answer in front is the user's to a server: among them are such prompts
        assert server.prompt_ids(messages[:turn], None) == believed.prompt_ids(messages[:turn], None), turn


def test_sglang_adds_a_field_to_tools(server, tokenizer):
    """Templates that print tools unchanged, as most do, print more than in training; see docs/data.md."""
    messages = ALIKE["arguments"][:3]
    seen = [tool | {"defer_loading": None} for tool in TOOLS]
    assert server.prompt_ids(messages, TOOLS) == ByTemplate(tokenizer).prompt_ids(messages, seen)
    comparison = Comparison(tokenizer, server, 10_000, 100)
    comparison.add(Conversation("tools", ALIKE["arguments"], "tools", TOOLS), None)
    assert dict(comparison.causes) == {"tools are written otherwise": 2}


def test_training_renders_as_sglang(server, tokenizer):
    server.check()
    comparison = Comparison(tokenizer, server, 10_000, 100)
    for name, messages in (ALIKE | {"text": called('{"x": 1}'), "null": called({"x": 1}, None)}).items():
        comparison.add(Conversation(name, messages, name), None)
    assert (comparison.turns, comparison.equal) == (12, 12), comparison.differences


def test_differences_are_found(server, tokenizer):
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = TEMPLATE.replace("<|system|>You help.<|end|>", "")
    comparison = Comparison(other, server, 10_000, 100)
    comparison.add(Conversation("system", ALIKE["one turn"], "system"), None)
    (cause,) = comparison.causes
    assert cause.startswith("something else before the first question")


def test_refused_conversations(server):
    with pytest.raises(Refused, match="HTTP 400"):
        server.prompt_ids([], None)
