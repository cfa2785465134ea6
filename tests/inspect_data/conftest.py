"""Conversations, random rows and the tokenization of the tests."""

import random

import pytest

from nemo_speculative.data.conversations import Conversation, TokenRow
from nemo_speculative.data.tokenized_dataset import Tokenization
from tests.conftest import make_tokenizer

END = 1
VOCAB = 300


def dialogue(*turns: str, identity: str = "c", **fields) -> Conversation:
    """``"u:hello"`` is a user's message, ``"a:…"`` an assistant's, ``"s:…"`` a system message, ``"t:…"`` a tool's."""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    messages = [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]
    return Conversation(identity, messages, fields.pop("origin", "data.jsonl:1"), **fields)


def random_rows(count: int, seed: int = 0, longest: int = 700) -> list[TokenRow]:
    """Rows of random ids and runs of the mask; some have no supervised token, some only late ones."""
    draw = random.Random(seed)
    rows = []
    for n in range(count):
        length, mask = draw.randint(1, longest), []
        while len(mask) < length:
            mask += [draw.random() < 0.4] * draw.randint(1, 90)
        ids = [min(int(draw.expovariate(0.05)), VOCAB - 1) for _ in range(length)]
        rows.append(TokenRow(f"r{n}", ids, mask[:length], f"data.jsonl:{n + 1}", draw.choice(["", "code", "math"])))
    return rows


@pytest.fixture
def tokenization() -> Tokenization:
    """The tokenization of a training with conversations of at most 256 tokens."""
    return Tokenization(make_tokenizer(), {END}, 256, VOCAB)
