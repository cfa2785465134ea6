import pytest

from nemo_speculative.data.conversations import Conversation
from nemo_speculative.generate_data.rollout import Completion, Drop, Keep, Limits, Rollout, Split, Unanswerable
from tests.conftest import PREFIX_TEMPLATE, make_tokenizer

LIMITS = Limits(50, 500)
STRIPPING = PREFIX_TEMPLATE.replace("{{ m['content'] }}<|end|>", "{{ m['content'].split('</think>')[-1] }}<|end|>", 1)
"""A template that, as those of reasoning models do, leaves out the reasoning of earlier turns."""


def dialogue(template=PREFIX_TEMPLATE, reasoning=None, questions=("one", "two", "three")):
    messages = [{"role": "user", "content": q} for q in questions]
    turns_with_answers = [m for question in messages for m in (question, {"role": "assistant", "content": "OLD"})]
    return Rollout(
        Conversation("x", turns_with_answers, "file:1", source="s"), make_tokenizer(template), reasoning or Keep()
    )


def converse_with(rollout, *texts):
    """Answers as a target gives them, and the prompts that it saw."""
    prompts = []
    for turn, text in enumerate(texts):
        request = rollout.request(turn, LIMITS, seed=0)
        prompts.append(rollout.tokenizer.decode(request.prompt))
        ids = rollout.tokenizer.encode(text, add_special_tokens=False)
        rollout.add(turn, request, Completion([*ids, 1], stopped=True))
    return prompts


def test_turns_form_one_row_while_each_prompt_extends_the_row():
    rollout = dialogue()
    converse_with(rollout, "a b", "c d", "e")
    (row,) = rollout.rows()
    turns = zip(("one", "two", "three"), ("a b", "c d", "e"), strict=True)
    text = "".join(f"<|user|>{question}<|end|><|assistant|>{answer}<|end|>" for question, answer in turns)
    assert rollout.tokenizer.decode(row.input_ids) == f"<|begin|>{text}"
    supervised = [i for i, m in zip(row.input_ids, row.loss_mask, strict=True) if m]
    assert rollout.tokenizer.decode(supervised) == "a b<|end|>c d<|end|>e<|end|>"
    assert (row.id, row.source, len(row.loss_mask)) == ("x", "s", len(row.input_ids))


def test_a_template_that_changes_earlier_answers_splits_the_rows():
    rollout = dialogue(STRIPPING)
    prompts = converse_with(rollout, "<think>hm</think>a", "b", "<think>so</think>c")
    assert "hm" not in prompts[1]
    rows = rollout.rows()
    assert [row.id for row in rows] == ["x#0", "x#1"]
    decoded = [rollout.tokenizer.decode(row.input_ids) for row in rows]
    assert decoded[0].endswith("<|assistant|><think>hm</think>a<|end|>"), "generated ids hold the reasoning"
    assert decoded[1].startswith(prompts[1]) and decoded[1].endswith("<think>so</think>c<|end|>")
    assert [sum(row.loss_mask) for row in rows] == [
        len(rollout.tokenizer.encode("<think>hm</think>a")) + 1,
        len(rollout.tokenizer.encode("b")) + 1 + len(rollout.tokenizer.encode("<think>so</think>c")) + 1,
    ]


@pytest.mark.parametrize(
    ("prompt", "text", "split"),
    [
        ("", "<think>\nhm\n</think>\n\nyes", ("yes", "hm")),
        ("<|assistant|><think>\n", "hm\n</think>\n\nyes", ("yes", "hm")),
        ("<|assistant|><think>\n", "hm, and on", ("", "hm, and on")),  # cut off
        ("", "<think>hm, and on", ("", "hm, and on")),
        ("", "<think>a</think>b</think>c", ("b</think>c", "a")),
        ("", "no reasoning", ("no reasoning", None)),
        ("", "write </think> behind it", ("write </think> behind it", None)),
        ("<think>\n\n</think>\n\n", "write </think> behind it", ("write </think> behind it", None)),
        ("", "from <think> to </think>", ("from <think> to </think>", None)),
    ],
)
def test_reasoning_is_kept_split_or_dropped(prompt, text, split):
    message = {"role": "assistant", "content": text}
    assert Keep().apply(message, prompt) == message
    content, reasoning = split
    parted = {"role": "assistant", "content": content}
    assert Drop().apply(message, prompt) == parted
    assert Split().apply(message, prompt) == (
        parted if reasoning is None else parted | {"reasoning_content": reasoning}
    )


def test_dropped_reasoning_is_hidden_from_later_turns_and_stays_in_the_ids():
    rollout = dialogue(reasoning=Drop())
    prompts = converse_with(rollout, "<think>hm</think>a", "b", "c")
    assert "hm" not in prompts[1] + prompts[2]
    assert [m["content"] for m in rollout.messages] == ["one", "a", "two", "b", "three", "c"]
    assert "hm" in rollout.tokenizer.decode(rollout.rows()[0].input_ids)


@pytest.mark.parametrize("opened", [True, False])
def test_an_opening_tag_at_the_end_of_the_prompt_starts_the_reasoning(opened):
    opening = "{% if add_generation_prompt %}<|assistant|>" + "<think>" * opened
    rollout = dialogue(
        PREFIX_TEMPLATE.replace("{% if add_generation_prompt %}<|assistant|>", opening), Split(), ["one"]
    )
    (prompt,) = converse_with(rollout, "hm</think>a")
    assert prompt.rstrip().endswith("<think>") == opened
    answer = {"content": "a", "reasoning_content": "hm"} if opened else {"content": "hm</think>a"}
    assert rollout.messages[-1] == {"role": "assistant", **answer}


def test_a_last_question_without_an_answer_is_answered():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rollout = Rollout(Conversation("x", messages, "file:1"), make_tokenizer(), Keep())
    assert len(rollout.questions) == 1
    converse_with(rollout, "yes")
    assert [m["role"] for m in rollout.messages] == ["system", "user", "assistant"]


def test_tool_messages_are_kept_and_answered():
    roles = ["user", "assistant", "tool", "assistant"]
    messages = [{"role": role, "content": f"{role}{n}"} for n, role in enumerate(roles)]
    rollout = Rollout(Conversation("x", messages, "file:1"), make_tokenizer(), Keep())
    prompts = converse_with(rollout, "call", "done")
    assert "<|tool|>tool2<|end|>" in prompts[1]
    assert [m["content"] for m in rollout.messages] == ["user0", "call", "tool2", "done"]


def test_a_rejection_by_the_template_names_the_conversation_once():
    rollout = dialogue("{{ raise_exception('no system here') }}")
    with pytest.raises(Unanswerable, match=r"^file:1: the chat template rejects") as caught:
        rollout.request(0, LIMITS, 0)
    assert caught.value.reason.startswith("the chat template rejects")
