"""Every shape is read as the same conversation; other records are left out with a reason."""

import json

import pytest

from nemo_speculative.data.conversations import parse_line
from nemo_speculative.prepare_data.readers import LeftOut
from nemo_speculative.prepare_data.shapes import recognize

BAD_TOOLS, BAD_IDS = "tools or tool calls cannot be read", "token ids or mask cannot be read"
ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
AGAIN = [*ASKED, {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}]
TOLD = [{"role": "system", "content": "s"}, *ASKED]
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "r"},
    {"role": "assistant", "content": "a"},
]


def spelt(messages, role="from", content="value", names=None):
    return [{role: (names or {}).get(m["role"], m["role"]), content: m["content"]} for m in messages]


VICUNA = {"user": "human", "assistant": "gpt"}
CHATS = [
    ({"messages": ASKED}, ASKED),
    ({"conversations": AGAIN, "source": "theirs"}, AGAIN),
    ({"conversation": ASKED}, ASKED),
    ({"prompt": "q", "messages": ASKED}, ASKED),
    ({"conversations": spelt(AGAIN, names=VICUNA)}, AGAIN),
    ({"conversations": spelt(TOLD, names=VICUNA | {"assistant": "chatgpt"})}, TOLD),
    ({"system": "s", "conversations": spelt(ASKED)}, TOLD),
    ({"system": " ", "conversations": spelt(ASKED)}, ASKED),
    ({"system": "other", "conversations": TOLD}, TOLD),
    ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, ASKED),
    ({"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}, ASKED),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASKED[1]]}, ASKED),
    ({"messages": [{"role": "developer", "content": "s"}, *ASKED]}, TOLD),
]
PAIRS = [
    ({"instruction": "q", "input": "", "output": "a"}, ASKED),
    ({"instruction": "do", "input": "this", "output": "a"}, [{"role": "user", "content": "do\n\nthis"}, ASKED[1]]),
    ({"instruction": "q", "input": None, "response": "a"}, ASKED),
    ({"question": "do", "input": "this", "answer": "a"}, [{"role": "user", "content": "do\n\nthis"}, ASKED[1]]),
    ({"prompt": "do", "input": "this", "output": "a"}, [{"role": "user", "content": "do\n\nthis"}, ASKED[1]]),
    ({"prompt": ASKED[:1], "input": "", "completion": "a"}, ASKED),
    ({"instruction": "q2", "output": "a2", "history": [["q", "a"]]}, AGAIN),
    ({"question": "q", "answer": "a"}, ASKED),
    ({"system_prompt": "s", "question": "q", "response": "a", "id": "flan.1"}, TOLD),
    ({"prompt": "q", "response": "a"}, ASKED),
    ({"prompt": "q", "completion": "a"}, ASKED),
    ({"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED),
    ({"prompt": AGAIN[:3], "response": "a2"}, AGAIN),
    ({"query": "q", "response": "a"}, ASKED),
    ({"input": "q", "output": "a", "domain": "algorithmic", "unit_tests": "[]"}, ASKED),
    ({"problem": "q", "solution": "a", "answer": "42"}, ASKED),
    ({"instruction": "q", "input": "", "output": "a", "text": "### formatted"}, ASKED),
    ({"prompt": "q"}, ASKED[:1]),
]
TOOL_USES = [
    ({"conversations": [{"from": "human", "value": "q"},
                        {"from": "function_call", "value": json.dumps(CALL["function"])},
                        {"from": "observation", "value": "r"}, {"from": "gpt", "value": "a"}],
      "tools": json.dumps([FUNCTION])}, CALLED),
    ({"messages": [CALLED[0], {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]}, *CALLED[2:]],
      "tools": TOOLS}, CALLED),
    ({"query": "q", "tools": json.dumps([FUNCTION]), "answers": json.dumps([CALL["function"]])}, CALLED[:2]),
    ({"query": "q", "tools": [FUNCTION], "answers": [{"name": "f", "arguments": {"x": 1}}]}, CALLED[:2]),
]  # fmt: skip


@pytest.mark.parametrize(("record", "expected"), CHATS + PAIRS)
def test_a_conversation_in_every_shape(record, expected):
    assert recognize(record) == {"conversations": expected}


@pytest.mark.parametrize(("record", "expected"), TOOL_USES)
def test_tools_in_openais_form(record, expected):
    item = recognize(record)
    assert item == {"conversations": expected, "tools": TOOLS}
    (read,) = parse_line(json.dumps(item).encode(), "a.jsonl", 1)
    assert read.tools == TOOLS and read.messages == expected


def test_calls_in_separate_messages_become_one_answer():
    calls = [{"from": "function_call", "value": json.dumps({"name": name, "arguments": {}})} for name in "fg"]
    messages = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "let me see"}, *calls]
    (_, answer) = recognize({"conversations": messages})["conversations"]
    assert answer["content"] == "let me see"
    assert [call["function"]["name"] for call in answer["tool_calls"]] == ["f", "g"]


def test_a_call_keeps_its_id():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": {"rain": True}, "tool_call_id": "c1", "name": "f"}]  # fmt: skip
    messages = recognize({"messages": messages})["conversations"]
    assert messages[1]["tool_calls"][0]["id"] == "c1"
    assert messages[2] == {"role": "tool", "content": '{"rain": true}', "tool_call_id": "c1", "name": "f"}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept(key):
    messages = [{**ASKED[0], key: "not the assistant's"}, {**ASKED[1], key: "hm"}]
    assert recognize({"messages": messages})["conversations"] == [ASKED[0], {**ASKED[1], "reasoning_content": "hm"}]


def test_reasoning_inside_an_answer_is_unchanged():
    messages = [ASKED[0], {"role": "assistant", "content": "<think>hm</think>a"}]
    assert recognize({"messages": messages})["conversations"] == messages


@pytest.mark.parametrize(
    ("key", "mask"),
    [("loss_mask", [0, 1, 1]), ("labels", [-100, 5, 6]), ("assistant_mask", [False, True, True]),
     ("assistant_masks", [0, 1, 1])],
)  # fmt: skip
def test_token_ids_with_a_mask(key, mask):
    assert recognize({"input_ids": [4, 5, 6], key: mask}) == {"input_ids": [4, 5, 6], "loss_mask": [0, 1, 1]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"foo": 1, "bar": 2}, "unknown shape"),
        ({}, "unknown shape"),
        ({"conversations": "text"}, "unknown shape"),
        ({"input_ids": [1]}, "unknown shape"),
        ({"output": "a"}, "unknown shape"),
        ({"messages": [{"role": "narrator", "content": "q"}]}, "unknown role"),
        ({"messages": [ASKED[0], "a"]}, "unknown role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content is not text"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is not text"),
        ({"question": 3, "answer": "a"}, "content is not text"),
        ({"question": "q", "input": 3, "answer": "a"}, "content is not text"),
        ({"prompt": ASKED[:1], "input": "this", "completion": "a"}, "unknown shape"),
        ({"messages": ASKED, "tools": "no JSON"}, BAD_TOOLS),
        ({"messages": ASKED, "tools": [{"parameters": {}}]}, BAD_TOOLS),
        ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, BAD_TOOLS),
        ({"query": "q", "tools": "[]", "answers": '[{"name": "f", "arguments": [1]}]'}, BAD_TOOLS),
        ({"input_ids": [1, -2], "loss_mask": [0, 1]}, BAD_IDS),
        ({"input_ids": [1, 2], "loss_mask": [0]}, BAD_IDS),
        ({"input_ids": [1, 2], "loss_mask": [0, 7]}, BAD_IDS),
        ({"input_ids": "12", "loss_mask": [0, 1]}, BAD_IDS),
    ],
)
def test_a_record_without_a_valid_conversation(record, reason):
    with pytest.raises(LeftOut) as caught:
        recognize(record)
    assert caught.value.reason == reason


def test_an_unknown_shape_names_its_keys():
    with pytest.raises(LeftOut) as caught:
        recognize({"foo": 1, "bar": 2})
    assert caught.value.found == "the keys bar, foo"
