import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch

from nemo_speculative.data.conversations import Conversation, ConversationList, TokenRow
from nemo_speculative.generate_data import answers
from nemo_speculative.generate_data.answers import answer, unanswered
from nemo_speculative.generate_data.engines import Decoder
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils import files
from nemo_speculative.utils.append_log import AppendLog
from nemo_speculative.utils.errors import UserError
from tests.conftest import WORDS

LIMITS = {"max_answer_tokens": 12, "max_length": 120, "title": "answering"}


def question_about(*contents, identity="a"):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return Conversation(identity, messages, "file:1")


def greedy(target, prompt, limit):
    """Greedy decoding of one token at a time, without a cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        ids.append(int(target.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in target.stop_ids:
            break
    return ids


def test_answers_are_greedy_answers_of_the_target(target, tmp_path):
    items = [question_about(WORDS[i : i + 9 + 5 * i], identity=str(i)) for i in range(5)]
    rows = answer(target, items, batch_size=2, cache_dir=str(tmp_path), **LIMITS)
    assert [r.id for r in rows] == [i.id for i in items]
    for row in rows:
        prompt = row.input_ids[: row.loss_mask.index(True)]
        assert row.input_ids == greedy(target, prompt, 12)
        assert target.tokenizer.decode(prompt).endswith("<|assistant|>")


def test_each_turn_sees_the_new_answers_before_it(target, tmp_path):
    rows = answer(target, [question_about("one", "OLD", "two", "OLD")], batch_size=4, cache_dir=str(tmp_path), **LIMITS)
    assert [r.id for r in rows] == ["a#0", "a#1"]
    first = rows[0].input_ids[rows[0].loss_mask.index(True) :]
    text = target.tokenizer.decode(first, skip_special_tokens=True)
    messages = [*question_about("one", text, "two").messages]
    expected = target.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert rows[1].input_ids[: rows[1].loss_mask.index(True)] == expected
    assert "OLD" not in target.tokenizer.decode(rows[1].input_ids)


def test_token_rows_are_answered_from_their_first_supervised_token(target, tmp_path):
    item = TokenRow("x", [0, 9, 8, 7, 6], [False, False, False, True, True], "file:1")
    (row,) = answer(target, [item], batch_size=4, cache_dir=str(tmp_path), **LIMITS)
    assert row.input_ids == greedy(target, [0, 9, 8], 12)
    assert row.loss_mask == [False] * 3 + [True] * (len(row.input_ids) - 3)


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that the target answers, in order."""
    requested, complete = [], Decoder.complete
    monkeypatch.setattr(
        Decoder, "complete", lambda self, request: (requested.append(request.prompt), complete(self, request))[1]
    )
    return requested


@pytest.fixture
def mixed():
    """Nine items of nine questions, of which one leaves no room, and two are the same."""
    items = [question_about(WORDS[3 * i : 15 + 9 * i], identity=str(i)) for i in range(5)]
    several = question_about("one", "OLD", "two", "OLD", "three", identity="several")
    return [
        *items[:3],
        several,
        question_about(WORDS * 9, identity="long"),
        TokenRow("ids", [0, 9, 8, 7], [False, False, True, True], "file:7"),
        *items[3:],
        items[0],
    ]


def cached(directory):
    (file,) = directory.glob("*/answers.jsonl")
    return file


def test_cached_answers_are_reused_for_other_data(target, mixed, prompts, tmp_path):
    options = {"batch_size": 4, "cache_dir": str(tmp_path), **LIMITS}
    rows = answer(target, mixed, **options)
    assert len(prompts) == 9
    prompts.clear()
    assert answer(target, mixed, **options) == rows
    remaining = [row for row in rows if row.id not in ("1", "2")]
    assert answer(target, [mixed[0], *mixed[3:]], **options) == remaining and not prompts
    other = answer(target, [question_about("new", identity="1"), *mixed[3:]], **options)
    assert len(prompts) == 1 and other[1:] == remaining[1:]
    answer(target, mixed, **options | {"max_answer_tokens": 3})
    assert len(prompts) == 10


def test_complete_answers_are_read_without_a_lock_and_the_data_once(target, mixed, prompts, tmp_path, monkeypatch):
    read = []

    class Counted(ConversationList):
        def _item(self, index):
            read.append(index)
            return super()._item(index)

    options = {"batch_size": 4, "cache_dir": str(tmp_path), **LIMITS}
    rows = answer(target, mixed[:5], **options)
    more = answer(target, Counted(mixed), **options)
    assert sorted(read) == sorted([*range(len(mixed)), 5, 6, 7]) and more[: len(rows)] == rows
    read.clear()
    prompts.clear()
    monkeypatch.setattr(answers, "dir_lock", lambda *_, **__: pytest.fail("waits for writers"))
    assert answer(target, Counted(mixed), **options) == more
    assert read == list(range(len(mixed))) and not prompts


def in_float64(target):
    target.model = copy.deepcopy(target.model).to(torch.float64)


def with_another_template(target):
    target.tokenizer = copy.deepcopy(target.tokenizer)
    target.tokenizer.chat_template += "{# #}"


OTHERS = {
    "weights": lambda target: setattr(target, "fingerprint", "another"),
    "dtype": in_float64,
    "chat template": with_another_template,
    "stop tokens": lambda target: setattr(target, "stop_ids", target.stop_ids | {7}),
}


@pytest.fixture
def another(target):
    """A copy of the target, for a test to change."""
    return copy.copy(target)


@pytest.mark.parametrize("change", [*OTHERS.values(), None], ids=[*OTHERS, "nothing"])
def test_answers_of_another_target_are_not_reused(target, another, prompts, tmp_path, change):
    item = TokenRow("x", [0, 9, 8, 7, 6], [False, False, False, True, True], "file:1")
    options = {"batch_size": 1, "cache_dir": str(tmp_path), **LIMITS}
    answer(target, [item], **options)
    if change:
        change(another)
    for _ in range(2):
        answer(another, [item], **options)
    assert len(prompts) == 1 + bool(change)


@pytest.mark.parametrize("change", [{"max_answer_tokens": 11}, {"max_length": 119}])
def test_answers_with_other_lengths_are_not_reused(target, prompts, tmp_path, change):
    options = {"batch_size": 1, "cache_dir": str(tmp_path), **LIMITS}
    for lengths in ({}, change, {}, change):
        answer(target, [question_about("hi")], **options | lengths)
    assert len(prompts) == 2


def test_answers_of_another_recipe_version_are_not_reused(target, prompts, tmp_path, monkeypatch):
    options = {"batch_size": 1, "cache_dir": str(tmp_path), **LIMITS}
    answer(target, [question_about("hi")], **options)
    monkeypatch.setattr(answers, "RECIPE_VERSION", answers.RECIPE_VERSION + 1)
    answer(target, [question_about("hi")], **options)
    assert len(prompts) == 2


@pytest.mark.parametrize("lines", [0, 0.5, 1, 4, 5.4, 7.99])
def test_a_killed_run_resumes_with_the_missing_answers(target, mixed, prompts, tmp_path, capsys, lines):
    """A kill may truncate the last line at any byte."""
    options = {"batch_size": 2, "cache_dir": str(tmp_path), **LIMITS}
    rows = answer(target, mixed, **options)
    whole = cached(tmp_path).read_bytes().splitlines(keepends=True)
    remaining, torn = whole[: int(lines)], whole[int(lines)][: int(len(whole[int(lines)]) * (lines % 1))]
    cached(tmp_path).write_bytes(b"".join([*remaining, torn]))
    prompts.clear()
    capsys.readouterr()
    assert answer(target, mixed, **options) == rows
    assert len(prompts) == 9 - sum(len(json.loads(line)["rows"]) for line in remaining)
    assert (f"answering: {len(remaining)} of 8 were answered before (" in capsys.readouterr().out) == bool(remaining)
    again = cached(tmp_path).read_bytes().splitlines(keepends=True)
    assert again[: len(remaining)] == remaining and len(again) == 8


@pytest.mark.parametrize(
    ("text", "damage"),
    [(b"", b"torn"), (b'"rows": [["', b'"raws'), (b'"rows"', b'"raws'), (b'"rows": ', b'"rows": 1, "was": ')],
    ids=["other text", "cut", "not JSON", "rows of another kind"],
)
def test_a_damaged_line_is_named_before_any_generation(target, mixed, prompts, tmp_path, text, damage):
    options = {"batch_size": 2, "cache_dir": str(tmp_path), **LIMITS}
    answer(target, mixed, **options)
    lines = cached(tmp_path).read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(text, damage) if text else damage + b"\n"
    cached(tmp_path).write_bytes(b"".join(lines[:5]))
    prompts.clear()
    with pytest.raises(UserError, match=r"/answers\.jsonl:3: not a line that was written here .*; restore") as caught:
        answer(target, mixed, **options)
    assert "\n" not in str(caught.value) and not prompts
    cached(tmp_path).write_bytes(b"".join([*lines[:2], *lines[3:5]]))
    answer(target, mixed, **options)
    assert prompts


def test_two_concurrent_runs_generate_each_answer_once(target, mixed, prompts, tmp_path, monkeypatch):
    printed, waits = [], Event()
    monkeypatch.setattr(files, "print", lambda line, **_: (printed.append(line), waits.set()), raising=False)
    options = {"batch_size": 4, "cache_dir": str(tmp_path), **LIMITS}
    answer(target, mixed[3:5], **options)
    monkeypatch.setattr(answers, "AppendLog", lambda file: (waits.wait(60), AppendLog(file))[1])
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda _: answer(target, mixed, **options), range(2))
    assert one == other and len(prompts) == 9
    directory = cached(tmp_path).parent
    assert len(cached(tmp_path).read_bytes().splitlines()) == 8
    assert printed == [f"data.cache_dir: another process writes into {directory}; waiting for it"]


def test_no_row_exceeds_max_length(target, tmp_path):
    items = [question_about(WORDS[: 20 * i], identity=str(i)) for i in range(1, 6)]
    limits = LIMITS | {"max_length": 40}
    rows = answer(target, items, batch_size=3, cache_dir=str(tmp_path), **limits)
    assert rows and max(len(r.input_ids) for r in rows) <= 40


def test_a_conversation_without_a_question_is_refused(target, tmp_path):
    silent = Conversation("a", [{"role": "assistant", "content": "hello"}], "file:3")
    with pytest.raises(UserError, match="file:3: the conversation asks nothing"):
        answer(target, [silent], batch_size=1, cache_dir=str(tmp_path), **LIMITS)


def test_sampling_settings_of_the_model_change_no_answer(target, target_dir, tmp_path):
    """Instruct models ship a repetition penalty; greedy decoding, which the draft is measured with, has none."""
    items = [question_about(WORDS[i : i + 30], identity=str(i)) for i in range(4)]
    shutil.copytree(target_dir, tmp_path / "target")
    settings = {"repetition_penalty": 1.9, "do_sample": True, "temperature": 0.3, "top_k": 2, "eos_token_id": 1}
    (tmp_path / "target" / "generation_config.json").write_text(json.dumps(settings))
    other = HFTarget(tmp_path / "target", aux_layers=None)
    plain = answer(target, items, batch_size=4, cache_dir=str(tmp_path / "a"), **LIMITS)
    assert answer(other, items, batch_size=4, cache_dir=str(tmp_path / "b"), **LIMITS) == plain


def test_items_without_an_answer_are_listed(target, tmp_path):
    silent = TokenRow("silent", [0, 5, 6], [False] * 3, "file:2")
    items = [
        question_about("hi", identity="ok"),
        question_about(WORDS * 9, identity="long"),
        silent,
        question_about("a", "b", "c", identity="two"),
    ]
    rows = answer(target, items, batch_size=4, cache_dir=str(tmp_path), **LIMITS)
    assert unanswered(items, rows) == ["long", "silent"]
