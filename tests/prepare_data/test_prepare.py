"""The whole preparation: its output, that no row is lost or duplicated, and that it resumes where it stopped."""

import errno
import json
import multiprocessing
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_speculative.config.schema import (
    DataConfig,
    DatasetConfig,
    FilterConfig,
    PrepareJob,
)
from nemo_speculative.data.chat_template import tokenize
from nemo_speculative.data.conversations import Conversation, ConversationFile
from nemo_speculative.prepare_data import output, run
from nemo_speculative.prepare_data.output import table
from nemo_speculative.prepare_data.run import prepare
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import dir_lock
from tests.conftest import make_tokenizer
from tests.prepare_data.cases import EXPECTED, MIXED, chat, contents, job_for, naive_share, rows_of, write


def test_every_row_is_written_or_left_out_with_its_reason(tmp_path):
    (counts,) = prepare(job_for(tmp_path)).counts.values()
    assert counts.left_out == EXPECTED
    assert counts.read == len(MIXED) == counts.train + counts.held_out + sum(EXPECTED.values())
    assert (counts.train, counts.held_out) == tuple(len(rows_of(tmp_path / "out", s)) for s in ("train", "held_out"))
    left_out = rows_of(tmp_path / "out", "left_out")
    assert Counter(row["reason"] for row in left_out) == EXPECTED
    by_reason = {row["reason"]: row for row in left_out}
    assert by_reason["duplicate"]["id"] == "again"
    assert by_reason["not JSON"]["origin"] == by_reason["not JSON"]["id"] == f"{tmp_path}/rows.jsonl:46"
    assert by_reason["unknown shape"]["found"] == "the keys foo"


def test_training_reads_the_rows_that_were_written(tmp_path):
    prepare(job_for(tmp_path))
    read = [*ConversationFile(tmp_path / "out" / "train.jsonl"), *ConversationFile(tmp_path / "out" / "held_out.jsonl")]
    assert len({row.id for row in read}) == len(read) == len(MIXED) - sum(EXPECTED.values())
    assert {f"c{n}" for n in range(40)} < {row.id for row in read}
    assert {row.source for row in read} == {"rows"}
    answers = {row.messages[1]["content"] for row in read if isinstance(row, Conversation)}
    assert answers == {f"answer {n}" for n in range(40)} | {"so much", "but the same id"}


def test_the_split_is_by_id_and_survives_added_and_moved_rows(tmp_path):
    prepare(job_for(tmp_path))
    before = {row["id"] for row in rows_of(tmp_path / "out", "held_out")}
    assert before == {row["id"] for row in rows_of(tmp_path / "out") if naive_share(row["id"].split("#")[0]) < 0.2}
    added = [chat(f"new {n}", f"new {n}") for n in range(50)]
    prepare(job_for(tmp_path, added + MIXED[::-1]))
    after = {row["id"]: row["conversations"] for row in rows_of(tmp_path / "out") if "conversations" in row}
    held_out = {row["id"] for row in rows_of(tmp_path / "out", "held_out")}
    stable = {name for name in before if "#" not in name} - {
        "c0",
        "c3",
        "again",
    }  # of the same id or content: the first that comes is kept
    assert stable <= held_out and stable and len(after) > 80


def test_ids_sides_and_sources_do_not_depend_on_the_output_directory(tmp_path):
    results = []
    for name in ("one", "other"):
        job = job_for(tmp_path, [chat(f"q{n}", "a") for n in range(60)])
        prepare(replace(job, output=str(tmp_path / name)))
        results.append([rows_of(tmp_path / name, side) for side in ("train", "held_out")])
    assert results[0] == results[1] and all(results[0])


def test_an_id_by_content_depends_on_messages_and_tools_alone(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    records = [chat("q", "a"), chat("q", "a", tools=tools), chat("q", "b")]
    for name, extra in (("here", {}), ("there", {"score": 3})):
        path = write(tmp_path / f"{name}.jsonl", [record | extra for record in records])
        prepare(PrepareJob(DataConfig(path=path, held_out_share=0.0), output=str(tmp_path / name)))
    here, there = ([row["id"] for row in rows_of(tmp_path / name)] for name in ("here", "there"))
    assert here == there and len(set(here)) == 3


def generated(question: str, *rows: dict, **more) -> dict:
    """A line of recipes/generate_data.py."""
    return {"index": 0} | chat(question, "a", rows=list(rows), **more) | {"finish": ["stop"]}


def test_token_ids_that_a_target_generated_are_kept_unchanged(tmp_path):
    rows = [{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}, {"input_ids": [8, 9], "loss_mask": [0, 1]}]
    silent = {"input_ids": [1, 2], "loss_mask": [0, 0]}
    bad = {"input_ids": [1, 2], "loss_mask": [0]}
    long = {"input_ids": [1] * 9, "loss_mask": [1] * 9}
    records = [
        generated("q1", *rows, id="g", source="code"), generated("q2", rows[1], silent), generated("q3", silent),
        generated("q4", bad), generated("q5", {"input_ids": [1]}), generated("q6", rows[0], long),
        chat("q7", "a", rows=["of a table"], source="theirs"),
    ]  # fmt: skip
    (counts,) = prepare(job_for(tmp_path, records, 0.0, filters=FilterConfig(max_tokens=8))).counts.values()
    assert counts.left_out == {"nothing supervised": 1, "token ids or mask cannot be read": 2, "too long": 1}
    first, second, plain = rows_of(tmp_path / "out", "train")
    assert first == {**chat("q1", "a"), "id": "g", "rows": rows, "source": "code"}
    assert second["rows"] == [rows[1], silent] and second["source"] == "rows"
    assert "rows" not in plain and plain["source"] == "rows"
    read = ConversationFile(tmp_path / "out" / "train.jsonl")
    assert [row.input_ids for row in read[:2]] == [row["input_ids"] for row in rows]


DEEP = [(400, {}), (100_000, {"not JSON": 1, "tools or tool calls cannot be read": 1})]


@pytest.mark.parametrize(("depth", "left_out"), DEEP)
def test_a_row_nested_too_deeply_is_left_out(tmp_path, depth, left_out):
    tool = f'[{{"name": "f", "parameters": {"[" * depth}{"]" * depth}}}]'
    line = json.dumps(chat("q", "a", tools=0)).replace('"tools": 0', f'"tools": {tool}') + "\n"
    records = [line, chat("q2", "a", tools=tool), chat("q3", "a")]
    (counts,) = prepare(job_for(tmp_path, [chat(f"other {n}", "a") for n in range(9)] + records)).counts.values()
    assert counts.left_out == left_out and counts.read == 12


def test_a_separate_held_out_file_is_read_first(tmp_path):
    """No conversation of it must be trained on."""
    job = job_for(tmp_path, [chat(f"q{n}", f"a{n}") for n in range(9)])
    job.data.held_out_path = write(tmp_path / "held.jsonl", [chat("q3", "a3"), chat("other", "one")])
    counts = prepare(job).counts
    assert [row["conversations"][0]["content"] for row in rows_of(tmp_path / "out", "held_out")] == ["q3", "other"]
    assert counts["rows"].train == 8 and counts["rows"].left_out == {"duplicate": 1}


def test_a_second_run_is_up_to_date_whatever_the_path_until_the_content_changes(tmp_path):
    first = prepare(job_for(tmp_path))
    before = contents(tmp_path / "out")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    again = prepare(PrepareJob(job_for(elsewhere).data, output=str(tmp_path / "out")))
    assert again.up_to_date and not first.up_to_date and again.counts == first.counts
    assert contents(tmp_path / "out") == before
    changed = prepare(job_for(tmp_path, [chat("new", "row"), *MIXED]))
    assert not changed.up_to_date and changed.counts["rows"].read == len(MIXED) + 1
    assert not prepare(job_for(tmp_path, share=0.5)).up_to_date, "nor with other options"
    renamed = Path(job_for(tmp_path, share=0.5).data.path).rename(tmp_path / "renamed.jsonl")
    prepare(PrepareJob(DataConfig(path=str(renamed), held_out_share=0.5), output=str(tmp_path / "out")))
    assert {row["source"] for row in rows_of(tmp_path / "out")} == {"renamed"}, "its rows say where they are from"


def test_replacing_an_earlier_result_is_reported(tmp_path, capsys):
    job = job_for(tmp_path, [chat(f"q{n}", "a") for n in range(9)])
    prepare(job)
    prepare(job)
    assert capsys.readouterr().out == ""
    filters = replace(job.filters, min_characters=1)
    prepare(replace(job, max_conversations=5, filters=filters))
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        f"{job.directory}: the rows there were prepared with max_conversations=null, not 5; "
        f"filters.min_characters={job.filters.min_characters}, not 1; they are replaced"
    )


def test_a_truncated_result_is_prepared_again(tmp_path):
    prepare(job_for(tmp_path))
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "train.jsonl").write_bytes(before["train.jsonl"][:100])
    assert not prepare(job_for(tmp_path)).up_to_date
    assert contents(tmp_path / "out") == before


MANY = [chat(f"question {n % 700}", f"answer {n % 700}", id=f"r{n}") for n in range(1000)]


def _killed(directory: Path, at: int) -> None:
    put = run._Preparation._process_row
    calls = iter(range(at + 1))

    def dying(*args):
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        put(*args)

    run._Preparation._process_row = dying
    output.ROWS_BETWEEN_STATES = 100
    prepare(job_for(directory, MANY))


def _run_killed(directory: Path, at: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(directory, at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("at", [50, 250, 999])
def test_a_killed_run_is_resumed(tmp_path, at, monkeypatch, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    prepare(job_for(whole, MANY))
    _run_killed(killed, at)
    assert not (killed / "out" / "train.jsonl").exists()
    put, seen = run._Preparation._process_row, []
    monkeypatch.setattr(run._Preparation, "_process_row", lambda *args: (seen.append(args[3].id), put(*args)))
    prepare(job_for(killed, MANY))
    assert seen == [f"r{n}" for n in range(at // 100 * 100, 1000)], "only what came after the last state"
    expected = [f"{killed}/out: resuming after row {at // 100 * 100}"] if at >= 100 else []
    assert expected == [line for line in capsys.readouterr().out.splitlines() if "resuming" in line]
    results = [{**contents(d / "out"), "left_out.jsonl": b""} for d in (whole, killed)]  # holds the path
    assert results[0].keys() == results[1].keys()
    for name in ("train.jsonl", "held_out.jsonl"):
        assert results[0][name] == results[1][name]
    assert json.loads(results[0]["manifest.json"])["counts"] == json.loads(results[1]["manifest.json"])["counts"]


def test_a_run_of_other_input_is_not_resumed(tmp_path):
    _run_killed(tmp_path, 500)
    (counts,) = prepare(job_for(tmp_path, MANY[:300])).counts.values()
    assert counts.read == counts.kept == 300


def test_a_full_disk_keeps_the_rows_written_so_far(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "ROWS_BETWEEN_STATES", 100)
    write_manifest = output.write_manifest
    states = iter(range(100))

    def full(file, value):
        if next(states) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_manifest(file, value)

    monkeypatch.setattr(output, "write_manifest", full)
    with pytest.raises(UserError, match=r"^output: .*: the disk is full; make room and run again"):
        prepare(job_for(tmp_path, MANY))
    assert not (tmp_path / "out" / "manifest.json").exists()
    kept = (tmp_path / "out" / ".train.partial").read_text().splitlines()
    assert kept and all(json.loads(line) for line in kept)
    monkeypatch.setattr(output, "write_manifest", write_manifest)
    (counts,) = prepare(job_for(tmp_path, MANY)).counts.values()
    assert (counts.read, counts.kept) == (1000, 700)


def test_two_processes_do_not_write_the_same_output(tmp_path):
    with dir_lock(tmp_path / "out", "output"), pytest.raises(UserError, match=r"^output: another process writes into"):
        prepare(job_for(tmp_path))
    assert prepare(job_for(tmp_path)).counts


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([{"foo": 1, "bar": 2}] * 3, "unknown shape (the keys bar, foo); known: "),
        ([{"foo": 1}] * 60 + [chat(f"q{n}", "a") for n in range(500)], "60 of the first 100 rows cannot be read"),
        (["{broken\n"] * 3 + [chat("q", "a")], "not JSON (Expecting property name"),
    ],
)
def test_a_file_without_known_shapes_is_refused(tmp_path, records, expected):
    with pytest.raises(UserError) as caught:
        prepare(job_for(tmp_path, records))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/rows.jsonl: ") and expected in message and "\n" not in message


@pytest.mark.parametrize(
    ("records", "expected"),
    [([], "none of 0 rows can be used (there are none);"),
     ([{"prompt": "q"}] * 3 + [chat("", "a")], "none of 4 rows can be used (3 no answer, 1 empty content);")],
)  # fmt: skip
def test_nothing_to_train_on(tmp_path, records, expected):
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            prepare(job_for(tmp_path, records))
        assert str(caught.value) == f"data: {expected} {tmp_path}/out/left_out.jsonl has the reason for each"


def test_columns_of_other_names(tmp_path):
    records = [{"talk": chat("q", f"a{n}")["conversations"]} for n in range(5)]
    (counts,) = prepare(job_for(tmp_path, records, columns={"talk": "messages"})).counts.values()
    assert counts.kept == 5


def test_the_options_that_keep_rows(tmp_path):
    records = [{"prompt": "question"}, *[chat("q2", "a" * n, id=f"r{n}") for n in (1, 50, 50, 50)]]
    job = job_for(tmp_path, records, 0.0, keep_unanswered=True, deduplicate=False, filters=FilterConfig(5))
    prepare(job)
    rows = rows_of(tmp_path / "out")
    assert [len(row["conversations"]) for row in rows] == [1, 2, 2, 2]
    assert len({row["id"] for row in rows}) == 4
    prepare(job_for(tmp_path, [chat(f"q{n}", "a") for n in range(50)], 0.0, max_conversations=7))
    assert [row["conversations"][0]["content"] for row in rows_of(tmp_path / "out")] == [f"q{n}" for n in range(7)]


def test_formatted_text_has_the_mask_of_its_conversation(tmp_path):
    """The oracle is the row that training makes of the same conversation in messages."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    conversations = [chat("the fox", "jumps")["conversations"] + chat("a dog?", "lazy\n\nover there")["conversations"],
            [{"role": "system", "content": "quick"}, *chat("what", " five dozen ")["conversations"]]]  # fmt: skip
    texts = [{"text": tokenizer.apply_chat_template(messages, tokenize=False)} for messages in conversations]
    job = job_for(tmp_path, [*texts, {"text": "no chat at all"}], 0.0, tokenizer=str(tmp_path / "tokenizer"))
    (counts,) = prepare(job).counts.values()
    assert counts.left_out == {"no answer found in the formatted text": 1}
    for row, messages in zip(ConversationFile(tmp_path / "out" / "train.jsonl"), conversations, strict=True):
        expected = tokenize(tokenizer, Conversation("", messages, ""), [tokenizer.eos_token_id])
        assert (row.input_ids, row.loss_mask) == (expected.input_ids, expected.loss_mask)


def test_formatted_text_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: its `text` is formatted already; give tokenizer=DIR"):
        prepare(job_for(tmp_path, [{"text": "<|user|>q<|assistant|>a"}]))


def test_a_tokenizer_whose_template_does_not_mark_answers(tmp_path):
    with pytest.raises(UserError, match=r"^tokenizer: /nowhere cannot be loaded here"):
        prepare(job_for(tmp_path, tokenizer="/nowhere"))
    make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}").save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match=r"^tokenizer: the chat template of .* does not mark answers"):
        prepare(job_for(tmp_path, tokenizer=str(tmp_path / "plain")))


def test_the_table_adds_up():
    counts = {
        "a": output.Counts(5, 3, 1, {"duplicate": 1}),
        "b": output.Counts(4, 1, 0, {"not JSON": 1, "duplicate": 2}),
    }
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(counts).splitlines()]
    assert lines == [
        ["source", "rows", "train", "held out", "left out", "why"],
        ["---"] * 6,
        ["a", "5", "3", "1", "1", "1 duplicate"],
        ["b", "4", "1", "0", "3", "2 duplicate"],
        ["", "", "", "", "", "1 not JSON"],
        ["all", "9", "4", "1", "4", "3 duplicate"],
        ["", "", "", "", "", "1 not JSON"],
    ]


def test_the_output_directory():
    assert PrepareJob(DataConfig(path="/x/my.data.jsonl.gz")).directory == Path("cache/dataset/my")
    assert PrepareJob(DatasetConfig(repository="a/b", prepared="p")).directory == Path("p")
    with pytest.raises(UserError, match="nothing to prepare here"):
        _ = PrepareJob(DataConfig(path=None)).directory
    with pytest.raises(UserError, match="max_conversations is 0"):
        PrepareJob(DataConfig(path="x"), max_conversations=0)
