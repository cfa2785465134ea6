"""Comparison with a chat server: templates that agree, and one for each kind of difference."""

import json
from dataclasses import dataclass

import pytest

from nemo_speculative.data.chat_template import tokenize
from nemo_speculative.data.conversations import Conversation, TokenRow
from nemo_speculative.inspect_data.comparison import (
    ByTemplate,
    Comparison,
    as_served,
    common_prefix,
    mask_offset,
    thinking,
)
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import Refused
from tests.conftest import PREFIX_TEMPLATE, TEMPLATE, make_tokenizer
from tests.inspect_data.conftest import END, dialogue

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|system|>You help.<|end|>{% endif %}"
SYSTEM = TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}" + DEFAULT_SYSTEM)
STRIPS = TEMPLATE.replace(
    "{{ m['content'] }}<|end|>{% endgeneration %}",
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|end|>{% endgeneration %}",
)
"""Renders the reasoning of the last message only."""
THINKS = TEMPLATE.replace("%}<|assistant|>{%", "%}<|assistant|><think>{%")
CALLS = TEMPLATE.replace(
    "{{ m['content'] }}<|end|>{% endgeneration %}",
    "{{ m['content'] or '' }}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}<|end|>"
    "{% endgeneration %}",
)
TALKS = [
    dialogue("u:the quick fox", "a:jumps over"),
    dialogue("s:be brief", "u:hello", "a:hi", "u:again", "a:hi again"),
    dialogue("u:größer é 🦊", "a:🦊 naïve  two  spaces", "t:42", "a:so 42"),
]


def compared(template: str, *items: Conversation | TokenRow, server=None, max_length=10_000, most=100, **reads):
    tokenizer = make_tokenizer(template)
    comparison = Comparison(tokenizer, server or ByTemplate(tokenizer), max_length, most)
    for item in items:
        row = item
        if isinstance(item, Conversation):
            try:
                row = tokenize(tokenizer, item, {END})
            except UserError:
                row = None
        comparison.add(item, row)
    assert comparison.equal + comparison.causes.total() == comparison.turns
    return comparison


def only_cause(comparison: Comparison) -> str:
    (cause,) = comparison.causes
    assert {difference.cause for difference in comparison.differences} == {cause}
    return cause


@dataclass
class TemplateServer:
    """A server with its own template, which may change the ids."""

    template: str
    change: object = staticmethod(lambda ids: ids)

    def prompt_ids(self, messages, tools):
        tokenizer = make_tokenizer(self.template)
        rendered = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=True)
        return self.change(rendered["input_ids"])


@pytest.mark.parametrize("template", [TEMPLATE, PREFIX_TEMPLATE, CHATML, LLAMA3, SYSTEM])
def test_templates_that_training_and_serving_render_equally(template):
    comparison = compared(template, *TALKS)
    assert (comparison.turns, comparison.equal, comparison.conversations) == (5, 5, 3)
    assert comparison.differences == []


def test_the_first_difference_is_that_of_a_naive_search():
    """The server adds a system prompt that the data lacks."""
    tokenizer, talk = make_tokenizer(), dialogue("u:the quick", "a:fox", identity="it")
    comparison = compared(TEMPLATE, talk, server=TemplateServer(SYSTEM))
    trained = tokenizer.apply_chat_template(talk.messages)["input_ids"]
    served = make_tokenizer(SYSTEM).apply_chat_template(talk.messages[:1], add_generation_prompt=True)["input_ids"]
    position = next(n for n in range(len(served)) if trained[n] != served[n])
    (difference,) = comparison.differences
    assert (difference.id, difference.message, difference.position) == ("it", 1, position)
    assert difference.before == [tokenizer.decode([i]) for i in trained[:position]]
    assert difference.trained == [tokenizer.decode([i]) for i in trained[position : position + 8]]
    assert difference.served == [tokenizer.decode([i]) for i in served[position : position + 8]]
    assert "default system prompt" in difference.cause


def without_merges(ids: list[int]) -> list[int]:
    """The ids of the same text with one token per byte."""
    tokenizer = make_tokenizer()
    pieces = [[i] if tokenizer.decode([i]).startswith("<|") else _bytes(tokenizer, i) for i in ids]
    return [i for piece in pieces for i in piece]


def _bytes(tokenizer, i: int) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(tokenizer.convert_ids_to_tokens(i)))


@pytest.mark.parametrize(
    ("template", "server", "cause"),
    [
        (TEMPLATE, TemplateServer(SYSTEM), "something else before the first question"),
        (SYSTEM, TemplateServer(TEMPLATE), "something else before the first question"),
        (TEMPLATE, TemplateServer(TEMPLATE, lambda ids: [0, *ids]), "the start token is doubled"),
        (TEMPLATE, TemplateServer(TEMPLATE, without_merges), "the same text in other tokens"),
        (THINKS, None, "the generation prompt is not how the answer begins"),
        (TEMPLATE, TemplateServer(TEMPLATE.replace("m['content']", "m['content'] | upper")), "for another reason"),
    ],
)
def test_common_causes(template, server, cause):
    assert only_cause(compared(template, dialogue("u:the quick fox", "a:ok"), server=server)).startswith(cause)


def test_tools_that_the_server_renders_differently():
    template = TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ tools | tojson if tools }}")
    talk = dialogue("u:weather?", "a:sun", tools=[{"name": "f"}])
    assert compared(template, talk).equal == 1
    server = TemplateServer(template.replace("tools | tojson", "'TOOLS ' + tools | tojson"))
    assert only_cause(compared(template, talk, server=server)) == "tools are written otherwise"


def test_reasoning_that_a_template_drops_when_more_turns_follow():
    talk = dialogue("u:a", "a:<think>hm</think>one", "u:b", "a:<think>so</think>two")
    comparison = compared(STRIPS, talk)
    assert (comparison.turns, comparison.equal) == (2, 1)
    assert only_cause(comparison).startswith("an answer is rendered otherwise once more turns follow")
    assert comparison.differences[0].message == 1
    assert "".join(comparison.differences[0].served).startswith("<think>hm")


def test_reasoning_of_earlier_turns_that_only_the_server_drops():
    talk = dialogue("u:a", "a:<think>hm</think>one", "u:b", "a:two")
    comparison = compared(TEMPLATE, talk, server=TemplateServer(STRIPS))
    assert only_cause(comparison) == "the thinking of earlier turns is on one side only"
    assert comparison.differences[0].message == 3


def called(arguments) -> Conversation:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    talk = dialogue("u:do", "a:", "t:done", "a:fine")
    talk.messages[1] |= {"content": None, "tool_calls": [call]}
    return talk


@pytest.mark.parametrize("arguments", ['{"x": 1}', {"x": 1}, "no JSON"])
def test_tool_calls_and_messages_without_text(arguments):
    assert compared(CALLS, called(arguments)).equal == 2


def test_two_answers_in_a_row_and_one_before_any_question():
    comparison = compared(TEMPLATE, dialogue("u:a", "a:one", "a:two"), dialogue("a:hello", "u:a", "a:b"))
    assert set(comparison.causes) == {
        "two answers in a row: a server takes the first for the user's",
        "the assistant writes first: no server renders a prompt for that",
    }
    assert (comparison.turns, comparison.equal) == (4, 2)


def test_a_mask_that_does_not_start_with_the_answer():
    late = TEMPLATE.replace("{% generation %}{{ m['content'] }}", "{{ m['content'] }}{% generation %}")
    comparison = compared(late, dialogue("u:a", "a:xyz"))
    assert only_cause(comparison) == "the mask does not begin where the model does"
    assert comparison.differences[0].note == "later by 3"


@pytest.mark.parametrize(
    ("mask", "start", "note"),
    [
        ("0011", 2, ""), ("0111", 2, "earlier by 1"), ("1111", 2, "earlier by 2"), ("0001", 2, "later by 1"),
        ("1000", 2, "nothing after it is supervised"), ("00", 2, "nothing after it is supervised"), ("111", 0, ""),
    ],
)  # fmt: skip
def test_the_distance_of_a_mask_in_words(mask, start, note):
    assert mask_offset([c == "1" for c in mask], start) == note


def test_a_conversation_that_training_refuses_is_still_compared():
    forgets = PREFIX_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '…' }}", 1)
    talk = dialogue("u:a", "a:one", "u:b", "a:two")
    with pytest.raises(UserError):
        tokenize(make_tokenizer(forgets), talk, {END})
    comparison = compared(forgets, talk)
    assert comparison.turns == 2 and only_cause(comparison).startswith(
        "an answer is rendered otherwise once more turns follow"
    )


def test_turns_after_max_length_are_counted_as_cut_off():
    comparison = compared(TEMPLATE, TALKS[1], max_length=20)
    assert (comparison.turns, comparison.cut_off) == (1, 1)


def test_the_number_compared_is_limited_and_excludes_rows_of_ids():
    row = TokenRow("r", [1, 2], [True, True], "f:1")
    comparison = compared(TEMPLATE, row, *TALKS, most=2)
    assert (comparison.not_comparable, comparison.conversations) == (1, 1)
    broken = compared("{{ raise_exception('no') }}", *TALKS)
    assert (broken.not_comparable, broken.turns) == (3, 0)


def test_a_prompt_that_the_server_refuses_is_a_difference():
    class Refuses:
        def prompt_ids(self, messages, tools):
            raise Refused("HTTP 400: roles must alternate")

    comparison = compared(TEMPLATE, TALKS[0], server=Refuses())
    assert only_cause(comparison) == "the server refuses the prompt"
    assert comparison.differences[0].note == "HTTP 400: roles must alternate"


def test_only_the_first_differences_of_a_cause_are_stored():
    comparison = compared(THINKS, *TALKS * 10, dialogue("a:first"))
    assert comparison.turns == comparison.causes.total() == 51
    assert len(comparison.differences) == 5 + 1


def test_messages_in_the_form_of_a_server():
    talk = called('{"x": [1]}')
    talk.messages[1]["name"] = None
    served = as_served([*talk.messages[:2], {"role": "user", "content": "u"}])
    assert served[1]["content"] == "" and "name" not in served[1]
    assert served[1]["tool_calls"][0]["function"]["arguments"] == {"x": [1]}
    assert json.loads(talk.messages[1]["tool_calls"][0]["function"]["arguments"]) == {"x": [1]}, "left as it was"
    assert as_served(dialogue("u:a", "a:b").messages)[-1] == {"role": "user", "content": "b"}
    assert as_served(called("no JSON").messages)[1]["tool_calls"] == called("no JSON").messages[1]["tool_calls"]


@pytest.mark.parametrize(
    ("message", "thought"),
    [
        ({"content": "<think>hm\n</think>yes"}, "hm"),
        ({"content": "yes", "reasoning_content": "why"}, "why"),
        ({"content": "yes"}, ""),
        ({"content": None}, ""),
    ],
)
def test_reasoning_of_a_message(message, thought):
    assert thinking(message) == thought


@pytest.mark.parametrize(("one", "other", "length"), [("abc", "abd", 2), ("ab", "abc", 2), ("", "a", 0), ("x", "y", 0)])
def test_common_prefix(one, other, length):
    assert common_prefix(list(map(ord, one)), list(map(ord, other))) == length
