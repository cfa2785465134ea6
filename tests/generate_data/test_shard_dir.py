"""Changes of the input between runs: answers belong to questions, not to line numbers."""

import json
import random
from itertools import count

import pytest

from nemo_speculative.config.schema import MergeJob
from nemo_speculative.generate_data import shard_dir
from nemo_speculative.generate_data.merge import merge
from nemo_speculative.generate_data.rollout import Rollout
from nemo_speculative.generate_data.run import generate_data, summary_table
from nemo_speculative.utils.append_log import TAIL_BYTES, AppendLog, rewrite
from nemo_speculative.utils.errors import UserError
from tests.generate_data.conftest import conversation, read, write

LIVELY = {"temperature": 1.0}


@pytest.fixture
def answered_ids(monkeypatch):
    """The ids of the conversations that are answered, turn by turn."""
    ids, add = [], Rollout.add
    monkeypatch.setattr(Rollout, "add", lambda self, *args: (ids.append(self.item.id), add(self, *args))[1])
    return ids


def changed(records):
    """Lines reordered, some removed, one with other words, and new ones before and after."""
    remaining = [r for r in records if r["id"] not in ("c2", "c7")]
    random.Random(0).shuffle(remaining)
    other = [conversation("c5", "something else", "OLD") if r["id"] == "c5" else r for r in remaining]
    return [conversation("first", "the quick"), *other, conversation("last", "brown fox", "OLD", "jumps")]


@pytest.fixture
def fresh(job, tmp_path):
    """Returns the answers of a single run of a file, as bytes."""

    numbers = count()

    def answer(file):
        outcome = generate_data(job(path=str(file), output=str(tmp_path / f"fresh{next(numbers)}"), **LIVELY))
        return (outcome.directory / "answers.jsonl").read_bytes()

    return answer


def test_lines_may_be_added_removed_changed_and_moved(job, questions, answered_ids, fresh, capsys):
    generate_data(job(**LIVELY))
    before = {r["id"]: r for r in read(questions)}
    records = changed(list(before.values()))
    write(questions, records)
    answered_ids.clear()
    outcome = generate_data(job(**LIVELY))
    assert set(answered_ids) == {"first", "last", "c5"}
    assert "9 answers are to questions that it still has, 3 to others (set_aside.jsonl)" in capsys.readouterr().out
    assert (outcome.total, outcome.answered) == (len(records), len(records))
    content = (outcome.directory / "answers.jsonl").read_bytes()
    assert content == fresh(questions)
    # With the original input, restored answers are not generated again.
    write(questions, list(before.values()))
    answered_ids.clear()
    assert generate_data(job(**LIVELY)).answered == 12 and not answered_ids


def test_an_interrupted_run_resumes_with_a_changed_input(job, questions, answered_ids, fresh, monkeypatch):
    append, written = AppendLog.append, []

    def until_five(self, *args):
        if len(written) == 5:
            raise RuntimeError("stopped")
        written.append(args[0]["id"])
        append(self, *args)

    monkeypatch.setattr(AppendLog, "append", until_five)
    with pytest.raises(RuntimeError, match="stopped"):
        generate_data(job(**LIVELY))
    monkeypatch.setattr(AppendLog, "append", append)
    records = changed(read(questions))
    write(questions, records)
    answered_ids.clear()
    outcome = generate_data(job(**LIVELY))
    assert set(answered_ids) == {r["id"] for r in records} - (set(written) - {"c5"})
    assert (outcome.directory / "answers.jsonl").read_bytes() == fresh(questions)


@pytest.mark.parametrize("at", ["_set_aside", "put", "manifest"])
def test_an_interrupted_renumbering_loses_no_answer_and_is_not_merged(
    job, questions, answered_ids, fresh, monkeypatch, tmp_path, at
):
    generate_data(job(**LIVELY))
    original = read(questions)
    write(questions, changed(original))
    replaced = []

    def stop(*_):
        raise RuntimeError("stopped")

    def replace_one(file, lines):
        if replaced:
            stop()
        replaced.append(file)
        rewrite(file, lines)

    if at == "_set_aside":
        monkeypatch.setattr(shard_dir, "_set_aside", stop)
    elif at == "put":
        monkeypatch.setattr(shard_dir, "rewrite", replace_one)
    else:
        write_manifest = shard_dir.write_manifest
        monkeypatch.setattr(shard_dir, "write_manifest", lambda *args: stop() if replaced else write_manifest(*args))
        monkeypatch.setattr(shard_dir, "rewrite", lambda *args: (replaced.append(1), rewrite(*args)))
    with pytest.raises(RuntimeError, match="stopped"):
        generate_data(job(**LIVELY))
    monkeypatch.undo()
    with pytest.raises(UserError, match="out/0-end was left while it took over a changed input; start its"):
        merge(MergeJob(parts=[str(tmp_path / "out")], output=str(tmp_path / "merged.jsonl")))
    # The input may be the original or the changed one.
    for records in (original, changed(original)):
        write(questions, records)
        content = (generate_data(job(**LIVELY)).directory / "answers.jsonl").read_bytes()
        assert content == fresh(questions)


def test_ranges_of_a_changed_input_are_merged_to_the_result_of_one_run(job, questions, answered_ids, fresh, tmp_path):
    for lines in ("0:5", "5:"):
        generate_data(job(**LIVELY, range=lines))
    records = read(questions)
    write(questions, [*records[:3], conversation("new", "lazy dog"), *records[3:]])
    answered_ids.clear()
    generate_data(job(**LIVELY, range="5:"))
    with pytest.raises(UserError, match=r"made with input \(the content of path\)="):
        merge(MergeJob(parts=[str(tmp_path / "out")], output=str(tmp_path / "merged.jsonl")))
    generate_data(job(**LIVELY, range="0:5"))
    # The line that moved to another range is answered there again, with the same result.
    assert set(answered_ids) == {"new", "c4"}
    merge(MergeJob(parts=[str(tmp_path / "out")], output=str(tmp_path / "merged.jsonl")))
    assert (tmp_path / "merged.jsonl").read_bytes() == fresh(questions)


def test_a_skipped_line_stays_skipped_until_its_content_changes(job, tmp_path, answered_ids):
    silent = {"id": "s", "conversations": [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "?"}]}
    file = write(tmp_path / "mixed.jsonl", [silent, conversation("a", "hello")])
    assert generate_data(job(path=str(file))).skipped.total() == 1
    write(file, [conversation("b", "dog"), conversation("a", "hello"), silent])
    outcome = generate_data(job(path=str(file)))
    assert (outcome.answered, outcome.skipped.total()) == (2, 1)
    (left,) = read(outcome.directory / "left_out.jsonl")
    assert (left["index"], left["id"]) == (2, "s")
    write(file, [conversation("a", "hello"), conversation("s", "now it asks")])
    answered_ids.clear()
    outcome = generate_data(job(path=str(file)))
    assert (outcome.answered, outcome.skipped.total(), answered_ids) == (2, 0, ["s"])
    assert read(outcome.directory / "left_out.jsonl") == []


def test_equal_lines_and_equal_ids_have_an_answer_each(job, tmp_path, answered_ids, fresh):
    twin, namesake = conversation("a", "the fox"), conversation("a", "the dog")
    file = write(tmp_path / "same.jsonl", [twin, namesake, twin])
    outcome = generate_data(job(path=str(file), **LIVELY))
    assert outcome.num_duplicate_ids == 2 and "have the id of an earlier line (a)" in summary_table(outcome)
    write(file, [conversation("b", "wizards"), twin, twin, namesake])
    answered_ids.clear()
    outcome = generate_data(job(path=str(file), **LIVELY))
    assert answered_ids == ["b"] and outcome.answered == 4
    assert (outcome.directory / "answers.jsonl").read_bytes() == fresh(file)
    write(file, [twin])
    assert generate_data(job(path=str(file), **LIVELY)).answered == 1


def test_a_record_has_the_number_it_was_made_with(tmp_path):
    written = AppendLog(tmp_path / "j.jsonl")
    written.append(shard_dir.make_record(7, 255, {"id": '{"index": 7, ', "conversations": []}))
    written.close()
    (record,) = shard_dir.read_records(tmp_path / "j.jsonl")
    assert (record.index, record.prompt_hash) == (7, 255)
    assert json.loads(record.renumbered(12)) == json.loads(record.line) | {"index": 12}


def test_a_concurrent_reader_sees_no_mixture_of_two_lines(tmp_path):
    """A partial line, left by a kill, is replaced while the line before it is read."""
    file, long = tmp_path / "j.jsonl", TAIL_BYTES * 3
    written = AppendLog(file)
    for prompt in (1, 2):
        written.append(shard_dir.make_record(0, prompt, {"rows": str(prompt) * long}))
    written.close()
    file.write_bytes(file.read_bytes()[: -long // 2])
    whole = shard_dir.read_records(file)
    assert next(whole).content()["rows"] == "1" * long
    again = AppendLog(file)
    again.append(shard_dir.make_record(0, 3, {"rows": "3" * long}))
    again.close()
    assert list(whole) == []
    assert [record.prompt_hash for record in shard_dir.read_records(file)] == [1, 3]
