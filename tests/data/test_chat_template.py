"""The chat template, and the tokens that it marks as the assistant's."""

import pytest

from nemo_speculative.data.chat_template import chat_template_of, prompt_ids, rules_digest, tokenize, tokenizer_digest
from nemo_speculative.data.conversations import Conversation
from nemo_speculative.utils.errors import UserError
from tests.conftest import PREFIX_TEMPLATE, TEMPLATE, make_tokenizer

END = 1


def with_newlines(template: str) -> str:
    """The template with a newline after every stop token, as ChatML has it; the tag covers it too."""
    return template.replace("<|end|>", "<|end|>\n")


def dialogue(*turns: str, identity: str = "c") -> Conversation:
    """``"u:hello"`` is a user's message, ``"a:…"`` an assistant's, ``"s:…"`` a system message."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    messages = [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]
    return Conversation(identity, messages, "data.jsonl:1")


DIALOGUES = [
    dialogue("u:the quick fox", "a:jumps over"),
    dialogue("u:one", "a:two", "u:three", "a:four, the lazy dog"),
    dialogue("s:be brief", "u:hello", "a:hi"),
    dialogue("s:be brief", "u:hello", "a:hi", "u:again", "a:hi again", "u:and now?"),
    dialogue("u:größer é 🦊", "a:🦊 naïve  two  spaces"),
    dialogue("u:x", "a:"),
    dialogue("u:the role <|assistant|> in a text", "a:quoted <|assistant|> too"),
    dialogue("u:repeat the quick", "a:the quick the quick", "u:the quick", "a:the quick the quick"),
    dialogue("u:two in a row", "a:first", "a:second"),
    dialogue("u:no answer"),
]


def naive(tokenizer, conversation: Conversation, newline: str = "") -> tuple[list[int], list[bool]]:
    """Message by message: the role, the content, the stop token; special tokens keep the pieces apart."""

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    ids, mask = encode("<|begin|>"), [False]
    for message in conversation.messages:
        role, content = encode(f"<|{message['role']}|>"), [*encode(message["content"]), END]
        suffix = encode(newline)
        ids += role + content + suffix
        mask += [False] * len(role) + [message["role"] == "assistant"] * len(content) + [False] * len(suffix)
    return ids, mask


@pytest.mark.parametrize("template", [TEMPLATE, PREFIX_TEMPLATE], ids=["tag", "prefixes"])
@pytest.mark.parametrize("newline", ["", "\n"], ids=["plain", "newline"])
@pytest.mark.parametrize("conversation", DIALOGUES, ids=lambda c: c.messages[0]["content"][:12])
def test_the_mask_is_that_of_a_naive_rendering(template, newline, conversation):
    """Both ways of masking, on the same conversations; what follows the stop token is never the assistant's."""
    tokenizer = make_tokenizer(with_newlines(template) if newline else template)
    row = tokenize(tokenizer, conversation, {END})
    assert (row.input_ids, row.loss_mask) == naive(tokenizer, conversation, newline)
    assert (row.id, row.origin) == (conversation.id, conversation.origin)


@pytest.mark.parametrize("template", [TEMPLATE, PREFIX_TEMPLATE], ids=["tag", "prefixes"])
def test_without_a_stop_token_the_whole_turn_is_the_assistants(template):
    tokenizer = make_tokenizer(with_newlines(template))
    row = tokenize(tokenizer, dialogue("u:q", "a:answer"), frozenset())
    supervised = [i for i, inside in zip(row.input_ids, row.loss_mask, strict=True) if inside]
    assert tokenizer.decode(supervised) == "answer<|end|>\n"


@pytest.mark.parametrize("spelling", ["{%- generation -%}", "{%generation%}", "{%+ generation %}"])
def test_other_spellings_of_the_tag(spelling):
    tokenizer = make_tokenizer(TEMPLATE.replace("{% generation %}", spelling))
    conversation = dialogue("u:one", "a:two", "u:three", "a:four")
    row = tokenize(tokenizer, conversation, {END})
    assert (row.input_ids, row.loss_mask) == naive(tokenizer, conversation)


def test_the_prompt_ends_where_the_answer_begins():
    tokenizer = make_tokenizer()
    conversation = dialogue("s:brief", "u:one", "a:two")
    row = tokenize(tokenizer, conversation, {END})
    prompt = prompt_ids(tokenizer, conversation.messages[:2], "here")
    assert prompt == row.input_ids[: row.loss_mask.index(True)]


FORGETFUL = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}…{% else %}{{ m['content'] }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Shortens earlier answers, as templates of reasoning models do: only the last answer is rendered in full."""
OTHER_PROMPT = PREFIX_TEMPLATE.replace("%}<|assistant|>{%", "%}<|assistant|>think{%")
"""A template whose generation prompt differs from the start of an answer within a conversation."""


@pytest.mark.parametrize(
    ("template", "conversation", "turn"),
    [
        (FORGETFUL, dialogue("u:one", "a:two", "u:three", "a:four"), 1),
        (OTHER_PROMPT, dialogue("u:one", "a:two"), 1),
        (OTHER_PROMPT, dialogue("s:brief", "u:one", "a:two"), 2),
    ],
)
def test_a_template_whose_prefixes_disagree_is_refused(template, conversation, turn):
    with pytest.raises(UserError) as caught:
        tokenize(make_tokenizer(template), conversation, {END})
    message = str(caught.value)
    assert message.startswith("data.jsonl:1: the chat template of ")
    assert f"renders message {turn} differently" in message
    assert "add {% generation %} to the template, or give input_ids and loss_mask" in message
    assert "\n" not in message


def test_messages_reach_the_template_as_servers_pass_them():
    """No null, and the arguments of calls as objects: a template that prints them shows it."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.name is defined %}{{ m.name }}{% endif %}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}<|end|>{% endfor %}"
    )
    call = {"function": {"name": "f", "arguments": '{"x": "fox"}'}}
    messages = [
        {"role": "user", "content": "q", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": "no JSON"}}]},
    ]
    text = tokenizer.decode(tokenize(tokenizer, Conversation("x", messages, "here"), {END}).input_ids)
    assert text == '<|user|>q<|end|><|assistant|>{"x": "fox"}<|end|><|tool|>t<|end|><|assistant|>a"no JSON"<|end|>'
    assert messages[1]["content"] is None and call["function"]["arguments"] == '{"x": "fox"}', "left as it was"


def test_a_single_turn_of_such_a_template_is_accepted():
    tokenizer, conversation = make_tokenizer(FORGETFUL), dialogue("u:one", "a:two")
    row = tokenize(tokenizer, conversation, {END})
    assert (row.input_ids, row.loss_mask) == naive(tokenizer, conversation)


@pytest.mark.parametrize("use", [chat_template_of, lambda t: tokenize(t, DIALOGUES[0], {END})])
@pytest.mark.parametrize("template", [None, ""])
def test_no_template(use, template):
    with pytest.raises(UserError) as caught:
        use(make_tokenizer(template))
    message = str(caught.value)
    assert "the tokenizer has no chat template; add one" in message
    assert '{"input_ids", "loss_mask"}' in message
    assert "\n" not in message


RAISES = "{{ raise_exception('roles must alternate\nuser/assistant') }}"
BROKEN = "{{ messages[0]['content'].no_such_method() }}"


@pytest.mark.parametrize(("template", "reason"), [(RAISES, "roles must alternate user/assistant"), (BROKEN, "no_such")])
@pytest.mark.parametrize("tag", ["", "{% generation %}{% endgeneration %}"])
def test_a_template_that_raises_is_quoted_on_one_line(template, reason, tag):
    with pytest.raises(UserError) as caught:
        tokenize(make_tokenizer(template + tag), DIALOGUES[0], {END})
    message = str(caught.value)
    assert message.startswith("data.jsonl:1: the chat template rejects this conversation: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("template", [TEMPLATE, PREFIX_TEMPLATE], ids=["tag", "prefixes"])
def test_tools_reach_the_template(template):
    tokenizer = make_tokenizer("{% for tool in tools or [] %}{{ tool.name }}{% endfor %}" + template)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    without = tokenize(tokenizer, Conversation("x", messages, "here"), {END})
    row = tokenize(tokenizer, Conversation("x", messages, "here", [{"name": "fox"}], "calls"), {END})
    added = tokenizer("fox", add_special_tokens=False)["input_ids"]
    assert row.input_ids == added + without.input_ids and row.source == "calls"
    assert row.loss_mask == [False] * len(added) + without.loss_mask
    assert prompt_ids(tokenizer, messages[:1], "here", [{"name": "fox"}])[: len(added)] == added


def test_the_digest_differs_between_tokenizers_and_ignores_what_calls_change():
    tokenizer, other, grown = make_tokenizer(), make_tokenizer(PREFIX_TEMPLATE), make_tokenizer()
    grown.add_tokens(["zebra"])
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "much longer"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(tokenizer) == tokenizer_digest(make_tokenizer()) == before
    assert len({before, tokenizer_digest(other), tokenizer_digest(grown)}) == 3
    assert rules_digest(other) == rules_digest(tokenizer) != rules_digest(grown)
