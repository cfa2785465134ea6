import json
import re
import shutil
import signal

import pytest
import torch
from tokenizers.normalizers import Lowercase
from transformers import AutoTokenizer

from nemo_speculative.config.schema import MergeJob
from nemo_speculative.data.conversations import ConversationFile, TokenRow
from nemo_speculative.generate_data.merge import merge
from nemo_speculative.generate_data.run import generate_data, require_success, summary_table
from nemo_speculative.utils.append_log import AppendLog
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import dir_lock
from tests.conftest import PREFIX_TEMPLATE, WORDS, make_target, make_tokenizer
from tests.generate_data.conftest import conversation, read, write


def answers_of(outcome):
    return outcome.directory / "answers.jsonl"


def greedy(target, prompt, limit):
    """Greedy decoding of one token at a time, without a cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        ids.append(int(target.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in target.stop_ids:
            break
    return ids[len(prompt) :]


def naive_answers(target, messages, limit):
    """The conversation with new answers, and the prompt and answer ids of each turn."""
    answered, turns = [], []
    for message in messages:
        if message["role"] != "assistant":
            answered.append(message)
            continue
        rendered = target.tokenizer.apply_chat_template(answered, add_generation_prompt=True, return_dict=True)
        ids = greedy(target, rendered["input_ids"], limit)
        turns.append((rendered["input_ids"], ids))
        answered.append({"role": "assistant", "content": target.tokenizer.decode(ids, skip_special_tokens=True)})
    return answered, turns


def test_every_turn_is_answered_and_sees_the_new_answers_before_it(target, job, questions):
    outcome = generate_data(job())
    records = read(answers_of(outcome))
    assert [r["index"] for r in records] == list(range(12))
    for record, question in zip(records, read(questions), strict=True):
        messages, turns = naive_answers(target, question["conversations"], 12)
        assert record["id"] == question["id"]
        assert record["conversations"] == messages
        assert "OLD" not in json.dumps(record["conversations"])
        # Each turn's ids stand at the end of a row's supervised runs, in order, however rows were joined.
        supervised = [i for row in record["rows"] for i, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m]
        assert supervised == [i for _, ids in turns for i in ids]
        assert record["rows"][-1]["input_ids"] == turns[-1][0] + turns[-1][1]


def test_training_reads_the_rows_as_they_were_generated(job):
    outcome = generate_data(job())
    rows = ConversationFile(answers_of(outcome))
    stored = [row for record in read(answers_of(outcome)) for row in record["rows"]]
    assert all(isinstance(row, TokenRow) for row in rows)
    assert [row.input_ids for row in rows] == [row["input_ids"] for row in stored]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_depends_on_neither_batch_nor_range_nor_order(job, tmp_path, questions, temperature):
    settings = {"temperature": temperature, "top_p": 0.9, "top_k": 50}
    whole = read(answers_of(generate_data(job(**settings))))
    alone = read(answers_of(generate_data(job(**settings, batch_size=1, output=str(tmp_path / "alone")))))
    wide = read(answers_of(generate_data(job(**settings, batch_size=16, output=str(tmp_path / "wide")))))
    some = read(answers_of(generate_data(job(**settings, range="3:7"))))
    assert whole == alone == wide
    assert some == whole[3:7]
    other = read(answers_of(generate_data(job(**settings, seed=1, output=str(tmp_path / "other")))))
    assert (whole == other) == (temperature == 0)


def test_a_resumed_run_equals_an_uninterrupted_one(job, tmp_path, monkeypatch):
    whole = answers_of(generate_data(job(temperature=1.0, output=str(tmp_path / "whole")))).read_bytes()
    _stop_after(monkeypatch, 5)
    with pytest.raises(RuntimeError, match="stopped"):
        generate_data(job(temperature=1.0))
    monkeypatch.undo()
    part = tmp_path / "out" / "0-end" / "answers.jsonl"
    stored = part.read_bytes()
    assert stored.count(b"\n") == 5
    with part.open("ab") as torn:
        torn.write(b'{"index": 11, "id": "c11", "conv')
    resumed = answers_of(generate_data(job(temperature=1.0))).read_bytes()
    assert resumed == whole
    assert sorted(stored.splitlines()) == sorted(set(stored.splitlines()) & set(resumed.splitlines()))


def _stop_after(monkeypatch, answers):
    append, done = AppendLog.append, []

    def counted(self, *args):
        if len(done) == answers:
            raise RuntimeError("stopped")
        done.append(append(self, *args))

    monkeypatch.setattr(AppendLog, "append", counted)


def test_a_finished_run_loads_no_weights(job, monkeypatch):
    before = answers_of(generate_data(job())).read_bytes()
    monkeypatch.setattr("nemo_speculative.generate_data.engines.HFTarget", lambda *_, **__: pytest.fail("loaded again"))
    assert answers_of(generate_data(job())).read_bytes() == before


def test_a_full_disk_is_one_line_and_loses_no_answer(job, tmp_path, monkeypatch):
    whole = answers_of(generate_data(job(output=str(tmp_path / "whole")))).read_bytes()

    class Full:
        """A file on a disk that is full after some bytes; the last write is partial."""

        def __init__(self, out, room):
            self.out, self.room = out, room

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            data = data[: self.room]
            self.room -= len(data)
            return self.out.write(data)

        def __getattr__(self, name):
            return getattr(self.out, name)

    opened = AppendLog.__init__

    def full(self, file, **options):
        opened(self, file, **options)
        self._out = Full(self._out, 1500)

    monkeypatch.setattr(AppendLog, "__init__", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        generate_data(job())
    monkeypatch.undo()
    part = tmp_path / "out" / "0-end" / "answers.jsonl"
    assert caught.value.filename == str(part)
    assert len(ConversationFile(part)) > 0 and part.read_bytes().endswith(b"}\n")
    assert answers_of(generate_data(job())).read_bytes() == whole


def test_a_second_process_in_a_range_is_refused(job, tmp_path):
    with dir_lock(tmp_path / "out" / "0-end", "output"), pytest.raises(UserError, match="output: another process"):
        generate_data(job())
    generate_data(job(range="0:3"))


def test_other_settings_or_inputs_are_refused_by_name(job, questions, tmp_path):
    generate_data(job())
    with pytest.raises(UserError, match=r"temperature=0.0, and it is 0.5 now; give another output"):
        generate_data(job(temperature=0.5))
    with pytest.raises(UserError, match="max_new_tokens=12, and it is 13"):
        generate_data(job(max_new_tokens=13))
    with pytest.raises(UserError, match=r"reasoning=\['Keep'"):
        generate_data(job(reasoning="Drop"))
    moved = shutil.copy(questions, tmp_path / "moved.jsonl")
    generate_data(job(path=str(moved)))
    before = (tmp_path / "out" / "0-end" / "answers.jsonl").read_bytes()
    write(moved, [record | {"id": f"other {record['id']}"} for record in read(moved)])
    with pytest.raises(UserError, match=r"holds answers to none of the lines of .*moved.jsonl; give another output"):
        generate_data(job(path=str(moved)))
    assert (tmp_path / "out" / "0-end" / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(("stored_format", "named"), [(1, "1"), (None, "none"), (3, "3")])
def test_answers_in_another_format_are_refused_and_can_be_trained_on(job, tmp_path, stored_format, named):
    """Format 1 lacks the hash of the answered line."""
    outcome = generate_data(job())
    file, manifest = answers_of(outcome), outcome.directory / "manifest.json"
    records = [{key: value for key, value in record.items() if key != "asked"} for record in read(file)]
    write(file, records)
    old = {key: value for key, value in json.loads(manifest.read_text()).items() if key != "format"}
    manifest.write_text(json.dumps(old if stored_format is None else {"format": stored_format, **old}))
    before = file.read_bytes()
    expected = rf"manifest.json: found answers in format {named} of .*, expected 2; .* another output"
    for refused in (
        lambda: generate_data(job()),
        lambda: merge(MergeJob(parts=[str(tmp_path / "out")], output=str(tmp_path / "merged.jsonl"))),
    ):
        with pytest.raises(UserError, match=expected) as caught:
            refused()
        assert "\n" not in str(caught.value) and file.read_bytes() == before
    assert [r.input_ids for r in ConversationFile(file)] == [row["input_ids"] for r in records for row in r["rows"]]


def test_a_damaged_line_is_named_and_answered_again_after_its_removal(job):
    file = answers_of(generate_data(job()))
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:4], lines[4][:60] + b"\n", *lines[5:]]))
    with pytest.raises(UserError, match=r"/answers\.jsonl:5: not a line that was written here .* remove that line"):
        generate_data(job())
    file.write_bytes(b"".join([*lines[:4], *lines[5:]]))
    assert answers_of(generate_data(job())).read_bytes() == whole


def test_another_target_or_template_is_refused_by_name(job, tmp_path):
    generate_data(job())
    other = make_target(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="started with target="):
        generate_data(job(model=type(job().model)(path=str(other))))
    shutil.copytree(job().model.path, tmp_path / "same", dirs_exist_ok=True)
    make_tokenizer(PREFIX_TEMPLATE).save_pretrained(tmp_path / "same")
    with pytest.raises(UserError, match="started with tokenizer="):
        generate_data(job(model=type(job().model)(path=str(tmp_path / "same"))))
    same_template = AutoTokenizer.from_pretrained(job().model.path)
    same_template.backend_tokenizer.normalizer = Lowercase()
    same_template.save_pretrained(tmp_path / "same")
    with pytest.raises(UserError, match="started with tokenizer="):
        generate_data(job(model=type(job().model)(path=str(tmp_path / "same"))))


def test_unanswerable_lines_are_counted_by_reason(job, tmp_path):
    records = [
        conversation("fine", "hello"),
        conversation("long", WORDS),
        {"id": "silent", "conversations": [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "?"}]},
        {"id": "nothing", "input_ids": [4, 5, 6], "loss_mask": [0, 0, 0]},
        {"id": "prompt", "conversations": [{"role": "system", "content": "be brief"}]},
    ]
    file = write(tmp_path / "mixed.jsonl", records)
    outcome = generate_data(job(path=str(file)))
    assert (outcome.total, outcome.answered, outcome.skipped.total(), outcome.failed.total()) == (5, 1, 4, 0)
    left = {record["id"]: record for record in read(outcome.directory / "left_out.jsonl")}
    assert set(left) == {"long", "silent", "nothing", "prompt"}
    assert "leaves no room" in left["long"]["reason"] and "asks nothing" in left["silent"]["reason"]
    assert all(record["outcome"] == "skipped" for record in left.values())
    shown = summary_table(outcome)
    assert re.search("^skipped +4$", shown, re.M) and re.search("^ +2  the conversation asks nothing", shown, re.M)
    require_success(outcome)


def test_lines_with_the_same_id_are_all_answered_and_counted(job, tmp_path):
    records = [conversation("a", "one"), conversation("b", "two"), conversation("a", "three"), conversation("a", WORDS)]
    outcome = generate_data(job(path=str(write(tmp_path / "same.jsonl", records))))
    assert (outcome.answered, outcome.skipped.total(), outcome.num_duplicate_ids) == (3, 1, 2)
    assert re.search("^ +2  of them have the id of an earlier line", summary_table(outcome), re.M)
    assert "earlier line" not in summary_table(generate_data(job(output=str(tmp_path / "other"))))


@pytest.mark.parametrize("busy_with", ["run.build_engine", "engines.HFTarget"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_run_while_the_target_is_created_or_loaded(busy_with, number, job, monkeypatch):
    def busy(*_, **__):
        signal.raise_signal(number)
        pytest.fail("it went on")

    monkeypatch.setattr(f"nemo_speculative.generate_data.{busy_with}", busy)
    with pytest.raises(KeyboardInterrupt):
        generate_data(job())


def test_a_conversation_ends_at_the_context_length(job, tmp_path, target):
    file = write(tmp_path / "long.jsonl", [conversation("a", "hello", "OLD", WORDS, "OLD")])
    outcome = generate_data(job(path=str(file), max_length=100))
    (record,) = read(answers_of(outcome))
    assert [m["role"] for m in record["conversations"]] == ["user", "assistant"]
    assert record["finish"][-1] == "context" and outcome.finishes["context"] == 1
    with pytest.raises(UserError, match="max_length is 257: the target's context is 256"):
        generate_data(job(path=str(file), max_length=257, output=str(tmp_path / "more")))


def test_truncated_answers_are_kept_or_left_out(job, tmp_path):
    stored = generate_data(job(max_new_tokens=2))
    assert stored.finishes["length"] and stored.answered == 12
    left = generate_data(job(max_new_tokens=2, keep_cut=False, output=str(tmp_path / "strict")))
    cut = {r["id"] for r in read(answers_of(stored)) if "length" in r["finish"]}
    assert {r["id"] for r in read(left.directory / "left_out.jsonl")} == cut
    assert left.answered == 12 - len(cut)


def test_token_rows_sources_tools_and_earlier_answers(job, tmp_path, target_dir, target):
    template = PREFIX_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ tools[0].name if tools else '' }}")
    model = shutil.copytree(target_dir, tmp_path / "told")
    make_tokenizer(template).save_pretrained(model)
    before = {"rows": [{"input_ids": [0, 9], "loss_mask": [0, 1]}]}
    records = [
        {"id": "ids", "input_ids": [0, 9, 8, 7, 6], "loss_mask": [0, 0, 0, 1, 1], "source": "s"},
        conversation("tools", "quick", "OLD", tools=[{"name": "wizards"}], source="t"),
        conversation("again", "quick", "OLD", **before),
    ]
    file = write(tmp_path / "kinds.jsonl", records)
    outcome = generate_data(job(path=str(file), model=type(job().model)(path=str(model))))
    ids, tools, again = read(answers_of(outcome))
    assert ids["input_ids"] == [0, 9, 8, *greedy(target, [0, 9, 8], 12)] and "conversations" not in ids
    assert ids["loss_mask"] == [0] * 3 + [1] * (len(ids["input_ids"]) - 3)
    assert (ids["source"], tools["source"], tools["tools"]) == ("s", "t", [{"name": "wizards"}])
    assert target.tokenizer.decode(tools["rows"][0]["input_ids"]).startswith("<|begin|>wizards<|user|>quick")
    assert target.tokenizer.decode(again["rows"][0]["input_ids"]).startswith("<|begin|><|user|>quick")


@pytest.mark.parametrize(
    ("content", "range_", "expected"),
    [
        (b'{"id": "a"}\n', None, "found the keys"),
        (b'{"conversations": [{"role": "user", "content": "x"}]}\nnope\n', None, r"bad.jsonl:2: not JSON"),
        (b'{"conversations": [{"role": "user", "content": "\xff"}]}\n', None, r"bad.jsonl:1: not UTF-8"),
        (
            b'{"conversations": [{"role": "user", "content": " "}]}\n',
            None,
            r"bad.jsonl:1: message 0 of the user is empty",
        ),
        (b"\n", None, "is empty"),
        (b'{"conversations": [{"role": "user", "content": "x"}]}\n', "0:2", r"range is 0:2: .* has 1 lines"),
        (b'{"conversations": [{"role": "user", "content": "x"}]}\n', "1:", r"range is 1:"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(job, tmp_path, monkeypatch, content, range_, expected):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    monkeypatch.setattr("nemo_speculative.generate_data.run.build_engine", lambda _: pytest.fail("started"))
    with pytest.raises(UserError, match=expected) as caught:
        generate_data(job(path=str(file), range=range_))
    assert "\n" not in str(caught.value)


def test_an_invalid_range_is_refused(job):
    for wrong in ("3", "a:b", "5:5", "7:3", "-1:3"):
        with pytest.raises(UserError, match="range is"):
            job(range=wrong)


def test_a_target_without_a_template_is_refused(job, tmp_path, target_dir):
    model = shutil.copytree(target_dir, tmp_path / "bare")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        generate_data(job(model=type(job().model)(path=str(model))))
