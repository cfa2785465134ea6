"""Data files, line by line."""

import json

import pytest

from nemo_speculative.data.conversations import Conversation, ConversationFile, TokenRow
from nemo_speculative.utils.errors import UserError

GOOD = {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
TOKENS = {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}


def turns(*messages) -> dict:
    return {"conversations": list(messages)}


MALFORMED = [
    ('{"conversations": [', "not JSON (", "expected one object a line"),
    ("[1, 2]", "found a list", "expected a JSON object"),
    ("7", "found a int", "expected a JSON object"),
    ({"text": "hello", "id": 4}, "found the keys ['id', 'text']", '"input_ids" and "loss_mask"'),
    (turns(), "[]", '"conversations" must be a list of messages'),
    ({"conversations": "hello"}, "'hello'", '"conversations" must be a list of messages'),
    (turns("hello"), "message 0 is 'hello'", "expected a role among system, user, assistant, tool"),
    (turns({"role": "user", "content": "q"}, {"role": "bot", "content": "a"}), "message 1 is {'role': 'bot'", "role"),
    (turns({"from": "human", "value": "q"}), "message 0 is {'from': 'human'", "expected a role among"),
    (turns({"role": "user"}), "message 0 has the content None", "expected text"),
    (turns({"role": "user", "content": ["q"]}), "message 0 has the content ['q']", "expected text"),
    ({"input_ids": [], "loss_mask": []}, '"input_ids"', "must be a list of token ids"),
    ({"input_ids": "5 6", "loss_mask": [1]}, '"input_ids"', "must be a list of token ids"),
    ({"input_ids": [5, -1], "loss_mask": [0, 1]}, '"input_ids"', "must be a list of token ids"),
    ({"input_ids": [5, 1.5], "loss_mask": [0, 1]}, '"input_ids"', "must be a list of token ids"),
    ({"input_ids": [True, False], "loss_mask": [0, 1]}, '"input_ids"', "must be a list of token ids"),
    ({"input_ids": [5, 6]}, '"loss_mask"', 'as long as "input_ids" (2)'),
    ({"input_ids": [5, 6], "loss_mask": [1]}, '"loss_mask"', 'as long as "input_ids" (2)'),
    ({"input_ids": [5, 6], "loss_mask": [0, 2]}, '"loss_mask"', "a list of 0 and 1"),
    ({"input_ids": [5, 6], "loss_mask": 1}, '"loss_mask"', "a list of 0 and 1"),
    (turns({"role": "user", "content": None, "tool_calls": [{}]}), "message 0 has the content None", "expected text"),
    (turns({"role": "assistant", "content": None, "tool_calls": []}), "message 0 has the content None", "text"),
    (turns({"role": "assistant", "content": "a", "tool_calls": "f()"}), 'has the "tool_calls"', "expected a list"),
    (turns({"role": "assistant", "content": "a", "reasoning_content": 7}), '"reasoning_content" 7', "expected text"),
    (turns({"role": "user", "content": "q"}, *[{"role": "assistant", "content": "a"}] * 2), "message 2", "in a row"),
    (turns({"role": "user", "content": "q"}, {"role": "system", "content": "s"}), "message 1", "expected first"),
    (turns({"role": "user", "content": " \n"}), "message 0 of the user is empty", "expected text"),
    (turns({"role": "user", "content": "q"}, {"role": "assistant", "content": ""}), "message 1", "is empty"),
    (GOOD | {"tools": "search"}, "'search'", '"tools" must be a list of JSON objects'),
    (GOOD | {"rows": []}, "[]", '"rows" must be a list of'),
    (GOOD | {"rows": [{"input_ids": [5], "loss_mask": []}]}, '"loss_mask"', 'as long as "input_ids" (1)'),
]


@pytest.mark.parametrize(("line", "found", "expected"), MALFORMED)
def test_a_malformed_line_is_named_with_its_number(tmp_path, line, found, expected):
    file = tmp_path / "data.jsonl"
    bad = line if isinstance(line, str) else json.dumps(line)
    file.write_text(f"{json.dumps(GOOD)}\n\n{bad}\n{json.dumps(GOOD)}\n")
    with pytest.raises(UserError) as caught:
        ConversationFile(file)
    message = str(caught.value)
    assert message.startswith(f"{file}:3: ")
    assert "\n" not in message
    assert found in message
    assert expected in message


def test_a_long_value_is_not_printed_whole(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"conversations": "x" * 10_000}))
    with pytest.raises(UserError) as caught:
        ConversationFile(file)
    assert len(str(caught.value)) < 300


def test_a_line_that_is_not_utf8(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\n" + b'{"conversations": "caf\xe9"}\n')
    with pytest.raises(UserError) as caught:
        ConversationFile(file)
    assert str(caught.value) == f"{file}:2: not UTF-8 (invalid continuation byte at byte 22); convert the file"


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_an_empty_file(tmp_path, content):
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        ConversationFile(file)
    assert str(caught.value) == f"data.path: {file} is empty; expected one JSON object a line"


@pytest.mark.parametrize(
    ("name", "found"), [("missing.jsonl", "does not exist or is not a file"), (".", "is a directory")]
)
def test_a_file_that_is_missing_or_a_directory(tmp_path, name, found):
    with pytest.raises(UserError) as caught:
        ConversationFile(tmp_path / name)
    assert str(caught.value) == f"data.path: {tmp_path / name} {found}; expected a JSONL file"


def test_rows_are_read_as_they_were_written(tmp_path):
    file = tmp_path / "data.jsonl"
    umlaut = turns({"role": "system", "content": "Größe"}, {"role": "tool", "content": "\u2028"})
    lines = [GOOD, umlaut | {"id": "named"}, TOKENS, TOKENS | {"id": 7}, GOOD | {"id": None}]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    assert list(ConversationFile(file)) == [
        Conversation("1", GOOD["conversations"], f"{file}:1"),
        Conversation("named", umlaut["conversations"], f"{file}:2"),
        TokenRow("3", [5, 6, 7], [False, True, True], f"{file}:3"),
        TokenRow("7", [5, 6, 7], [False, True, True], f"{file}:4"),
        Conversation("5", GOOD["conversations"], f"{file}:5"),
    ]


def test_tools_and_what_a_target_generated(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "a"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    lines = [
        {"id": "with tools", "conversations": messages, "tools": tools, "source": "calls"},
        {"id": "one", **GOOD, "rows": [TOKENS]},
        {"id": "two", **GOOD, "rows": [TOKENS, {"input_ids": [8], "loss_mask": [1]}], "source": "s"},
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(ConversationFile(file)) == [
        Conversation("with tools", messages, f"{file}:1", tools, "calls"),
        TokenRow("one", [5, 6, 7], [False, True, True], f"{file}:2"),
        TokenRow("two#0", [5, 6, 7], [False, True, True], f"{file}:3", "s"),
        TokenRow("two#1", [8], [True], f"{file}:3", "s"),
    ]


def test_a_last_line_without_a_newline_counts(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\r\n{json.dumps(TOKENS)}")
    assert [type(row) for row in ConversationFile(file)] == [Conversation, TokenRow]


@pytest.mark.parametrize(("length", "expected"), [(5, 3), (3, 3), (2, 2), (1, 1)])
def test_cut(length, expected):
    row = TokenRow("a", [5, 6, 7], [False, True, True], "here")
    cut = row.cut(length)
    assert cut == TokenRow("a", row.input_ids[:expected], row.loss_mask[:expected], "here")
    assert (cut is row) == (expected == 3)
