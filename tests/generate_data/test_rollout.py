import pytest

from nemo_speculative.data.conversations import Conversation
from nemo_speculative.generate_data.rollout import Completion, Drop, Keep, Limits, Rollout, Split, Unanswerable
from tests.conftest import PREFIX_TEMPLATE, make_tokenizer

LIMITS = Limits(50, 500)
STRIPPING = PREFIX_TEMPLATE.replace("{{ m['content'] }}<|end|>", "{{ m['content'].split('</think>')[-1] }}<|end|>", 1)
"""A template that, as those of reasoning models do, leaves out the reasoning of earlier turns."""


def dialogue(template=PREFIX_TEMPLATE, reasoning=None, questions=("one", "two", "three")):
    messages = [{"role": "user", "content": q} for q in questions]
    given = [m for question in messages for m in (question, {"role": "assistant", "content": "OLD"})]
    return Rollout(Conversation("x", given, "file:1", source="s"), make_tokenizer(template), reasoning or Keep())


def answered(asked, *texts):
    """Answers as a target gives them, and the prompts that it saw."""
    prompts = []
    for turn, text in enumerate(texts):
        request = asked.request(turn, LIMITS, seed=0)
        prompts.append(asked.tokenizer.decode(request.prompt))
        ids = asked.tokenizer.encode(text, add_special_tokens=False)
        asked.add(turn, request, Completion([*ids, 1], stopped=True))
    return prompts


def test_turns_are_one_row_where_each_prompt_begins_with_all_before_it():
    asked = dialogue()
    answered(asked, "a b", "c d", "e")
    (row,) = asked.rows()
    turns = zip(("one", "two", "three"), ("a b", "c d", "e"), strict=True)
    text = "".join(f"<|user|>{question}<|end|><|assistant|>{said}<|end|>" for question, said in turns)
    assert asked.tokenizer.decode(row.input_ids) == f"<|begin|>{text}"
    supervised = [i for i, m in zip(row.input_ids, row.loss_mask, strict=True) if m]
    assert asked.tokenizer.decode(supervised) == "a b<|end|>c d<|end|>e<|end|>"
    assert (row.id, row.source, len(row.loss_mask)) == ("x", "s", len(row.input_ids))


def test_a_template_that_renders_earlier_answers_differently_makes_rows_of_their_own():
    asked = dialogue(STRIPPING)
    prompts = answered(asked, "<think>hm</think>a", "b", "<think>so</think>c")
    assert "hm" not in prompts[1]
    rows = asked.rows()
    assert [row.id for row in rows] == ["x#0", "x#1"]
    decoded = [asked.tokenizer.decode(row.input_ids) for row in rows]
    assert decoded[0].endswith("<|assistant|><think>hm</think>a<|end|>"), "generated ids hold the reasoning"
    assert decoded[1].startswith(prompts[1]) and decoded[1].endswith("<think>so</think>c<|end|>")
    assert [sum(row.loss_mask) for row in rows] == [
        len(asked.tokenizer.encode("<think>hm</think>a")) + 1,
        len(asked.tokenizer.encode("b")) + 1 + len(asked.tokenizer.encode("<think>so</think>c")) + 1,
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
def test_reasoning_is_kept_split_off_or_dropped(prompt, text, split):
    message = {"role": "assistant", "content": text}
    assert Keep().apply(message, prompt) == message
    content, reasoning = split
    parted = {"role": "assistant", "content": content}
    assert Drop().apply(message, prompt) == parted
    assert Split().apply(message, prompt) == (
        parted if reasoning is None else parted | {"reasoning_content": reasoning}
    )


def test_dropped_reasoning_is_seen_by_no_later_turn_and_stays_in_the_ids():
    asked = dialogue(reasoning=Drop())
    prompts = answered(asked, "<think>hm</think>a", "b", "c")
    assert "hm" not in prompts[1] + prompts[2]
    assert [m["content"] for m in asked.messages] == ["one", "a", "two", "b", "three", "c"]
    assert "hm" in asked.tokenizer.decode(asked.rows()[0].input_ids)


@pytest.mark.parametrize("opened", [True, False])
def test_the_end_of_the_prompt_tells_whether_it_opened_the_reasoning(opened):
    opening = "{% if add_generation_prompt %}<|assistant|>" + "<think>" * opened
    asked = dialogue(PREFIX_TEMPLATE.replace("{% if add_generation_prompt %}<|assistant|>", opening), Split(), ["one"])
    (prompt,) = answered(asked, "hm</think>a")
    assert prompt.rstrip().endswith("<think>") == opened
    said = {"content": "a", "reasoning_content": "hm"} if opened else {"content": "hm</think>a"}
    assert asked.messages[-1] == {"role": "assistant", **said}


def test_a_question_that_no_answer_followed_is_answered_too():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    asked = Rollout(Conversation("x", messages, "file:1"), make_tokenizer(), Keep())
    assert asked.num_turns == 1
    answered(asked, "yes")
    assert [m["role"] for m in asked.messages] == ["system", "user", "assistant"]


def test_messages_of_tools_are_kept_and_answered():
    roles = ["user", "assistant", "tool", "assistant"]
    messages = [{"role": role, "content": f"{role}{n}"} for n, role in enumerate(roles)]
    asked = Rollout(Conversation("x", messages, "file:1"), make_tokenizer(), Keep())
    prompts = answered(asked, "call", "done")
    assert "<|tool|>tool2<|end|>" in prompts[1]
    assert [m["content"] for m in asked.messages] == ["user0", "call", "tool2", "done"]


def test_a_template_that_rejects_a_conversation_says_so_without_naming_it_twice():
    asked = dialogue("{{ raise_exception('no system here') }}")
    with pytest.raises(Unanswerable, match=r"^file:1: the chat template rejects") as caught:
        asked.request(0, LIMITS, 0)
    assert caught.value.reason.startswith("the chat template rejects")
