"""Rows that pass the filters, and the reasons for which others are left out."""

import random
import string

import pytest

from nemo_speculative.config.schema import FilterConfig
from nemo_speculative.prepare_data.readers import LeftOut
from nemo_speculative.prepare_data.run import check
from nemo_speculative.utils.errors import UserError

NAMES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def conversation(roles: str, content: str = "some words"):
    return {"conversations": [{"role": NAMES[role], "content": content} for role in roles]}


def reason(item, keep_unanswered=False, **filters):
    try:
        check(item, FilterConfig(**filters), keep_unanswered)
    except LeftOut as left_out:
        return left_out.reason
    return None


@pytest.mark.parametrize("roles", ["ua", "sua", "uaua", "suauau", "uata", "uatta", "uatatau"])
def test_roles_in_order(roles):
    assert reason(conversation(roles)) is None


@pytest.mark.parametrize("roles", ["uu", "uaa", "usa", "suas", "ta", "ut", "s", "ssua", "uatu"])
def test_roles_out_of_order(roles):
    assert reason(conversation(roles)) == "roles out of order"


@pytest.mark.parametrize("roles", ["a", "au", "aua", "sau"])
def test_the_assistant_does_not_start(roles):
    assert reason(conversation(roles)) == "starts with the assistant"


@pytest.mark.parametrize("roles", ["u", "su"])
def test_without_an_answer(roles):
    assert reason(conversation(roles)) == "no answer"
    assert reason(conversation(roles), keep_unanswered=True) is None


@pytest.mark.parametrize("content", ["", " \n\t", "\u2003"])
def test_empty_content(content):
    item = conversation("uaua")
    item["conversations"][3]["content"] = content
    assert reason(item) == "empty content"
    item["conversations"][3]["tool_calls"] = [{}]
    assert reason(item) is None, "a call is content"
    assert reason({"conversations": []}) == "empty content"


def test_lengths_count_all_messages_and_reasoning():
    item = conversation("ua", "x" * 10)  # 21 with the line between
    assert reason(item, min_characters=21) is None and reason(item, min_characters=22) == "too short"
    assert reason(item, max_characters=21) is None and reason(item, max_characters=20) == "too long"
    item["conversations"][1]["reasoning_content"] = "hm"
    assert reason(item, max_characters=21) == "too long"


@pytest.mark.parametrize("unit", ["I am. ", "啊", "لا ", "ab"])
def test_repetition_in_any_language(unit):
    assert reason(conversation("ua", unit * 6000)) == "repetitive"
    assert reason(conversation("ua", unit * 6000), min_variety=0) is None
    assert reason(conversation("ua", unit * 5)) is None


@pytest.mark.parametrize(
    "alphabet", [string.ascii_lowercase + " ", "的一是不了人我在有他这为之大来以个中上们", "абвгдеёжзий ", "01 "]
)
def test_text_in_any_language_is_not_repetitive(alphabet):
    text = "".join(random.Random(0).choices(alphabet, k=20_000))
    assert reason(conversation("ua", text)) is None


def test_control_characters():
    clean = "tab\tline\nreturn\r " * 10
    assert reason(conversation("ua", clean)) is None
    assert reason(conversation("ua", clean + "\x1b[0m")) is None, "one of many is allowed"
    for odd in ("\x00", "\ufffd", "\x9d"):
        assert reason(conversation("ua", clean + odd * 20)) == "control characters"
    assert reason(conversation("ua", clean + "\ud800")) == "control characters", "a lone surrogate is not text"


def test_rows_of_tokens():
    assert reason({"input_ids": [1, 2], "loss_mask": [0, 1]}) is None
    assert reason({"input_ids": [1, 2], "loss_mask": [0, 0]}) == "nothing supervised"
    assert reason({"input_ids": [], "loss_mask": []}) == "nothing supervised"
    assert reason({"input_ids": [1, 2], "loss_mask": [0, 1]}, max_tokens=1) == "too long"


@pytest.mark.parametrize("given", [{"min_characters": -1}, {"max_characters": 0}, {"min_variety": -0.1}])
def test_filter_values_out_of_range(given):
    with pytest.raises(UserError, match=rf"^filters\.{next(iter(given))} is "):
        FilterConfig(**given)
