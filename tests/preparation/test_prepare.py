"""The whole preparation: what is written, that nothing is lost or doubled, and that it goes on where it stopped."""

import errno
import hashlib
import json
import multiprocessing
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from nemo_speculative.config.schema import (
    DataConfig,
    DatasetConfig,
    FilterConfig,
    MixDataConfig,
    PrepareJob,
    SourceConfig,
)
from nemo_speculative.data.chat import tokenize
from nemo_speculative.data.conversations import Conversation, read_jsonl
from nemo_speculative.errors import UserError
from nemo_speculative.locks import exclusive
from nemo_speculative.preparation import output, reasons, run, sources
from nemo_speculative.preparation.load import load_prepared
from nemo_speculative.preparation.run import prepare
from nemo_speculative.preparation.table import table
from tests.conftest import make_tokenizer


def chat(question: str, answer: str, **more) -> dict:
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def write(file: Path, records: list) -> str:
    file.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return str(file)


def rows_of(directory: Path, *names: str) -> list[dict]:
    return [
        json.loads(line) for name in names or ("train", "held_out") for line in (directory / f"{name}.jsonl").open()
    ]


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != ".lock"}


def naive_share(identity: str) -> float:
    return int(hashlib.sha256(identity.encode()).hexdigest()[:8], 16) / 2**32


MIXED = [
    *(chat(f"question {n}", f"answer {n}", id=f"c{n}") for n in range(40)),
    chat("question 3", " answer   3\n", id="again"),
    {"question": "how much", "answer": "so much"},
    chat("", "nothing"),
    {"conversations": chat("q", "a")["conversations"][::-1]},
    {"foo": 1},
    "{broken\n",
    {"input_ids": [1, 2, 3], "loss_mask": [0, 0, 1]},
    {"input_ids": [1, 2, 3], "labels": [-100, -100, -100]},
    chat("different", "but the same id", id="c0"),
]
EXPECTED = {
    reasons.DUPLICATE: 1, reasons.EMPTY_CONTENT: 1, reasons.STARTS_WITH_ASSISTANT: 1, reasons.UNKNOWN_SHAPE: 1,
    reasons.BAD_JSON: 1, reasons.NOTHING_SUPERVISED: 1,
}  # fmt: skip


def job_for(tmp_path: Path, records: list = MIXED, share: float = 0.2, **more) -> PrepareJob:
    data = DataConfig(path=write(tmp_path / "rows.jsonl", records), held_out_share=share)
    return PrepareJob(data=data, output=str(tmp_path / "out"), **more)


def test_every_row_is_written_or_left_out_with_its_reason(tmp_path):
    (counts,) = prepare(job_for(tmp_path)).counts.values()
    assert counts.left_out == EXPECTED
    assert counts.read == len(MIXED) == counts.train + counts.held_out + sum(EXPECTED.values())
    assert (counts.train, counts.held_out) == tuple(len(rows_of(tmp_path / "out", s)) for s in ("train", "held_out"))
    left_out = rows_of(tmp_path / "out", "left_out")
    assert Counter(row["reason"] for row in left_out) == EXPECTED
    by_reason = {row["reason"]: row for row in left_out}
    assert by_reason[reasons.DUPLICATE]["id"] == "again"
    assert by_reason[reasons.BAD_JSON]["origin"] == by_reason[reasons.BAD_JSON]["id"] == f"{tmp_path}/rows.jsonl:46"
    assert by_reason[reasons.UNKNOWN_SHAPE]["found"] == "the keys foo"


def test_what_is_written_is_what_training_reads(tmp_path):
    prepare(job_for(tmp_path))
    read = [*read_jsonl(tmp_path / "out" / "train.jsonl"), *read_jsonl(tmp_path / "out" / "held_out.jsonl")]
    assert len({row.id for row in read}) == len(read) == len(MIXED) - sum(EXPECTED.values())
    assert {f"c{n}" for n in range(40)} < {row.id for row in read}
    assert {row.source for row in read} == {"rows"}
    said = {row.messages[1]["content"] for row in read if isinstance(row, Conversation)}
    assert said == {f"answer {n}" for n in range(40)} | {"so much", "but the same id"}


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


def test_ids_sides_and_sources_do_not_depend_on_where_the_result_goes(tmp_path):
    results = []
    for name in ("one", "other"):
        job = job_for(tmp_path, [chat(f"q{n}", "a") for n in range(60)])
        prepare(replace(job, output=str(tmp_path / name)))
        results.append([rows_of(tmp_path / name, side) for side in ("train", "held_out")])
    assert results[0] == results[1] and all(results[0])


def test_an_id_by_content_is_of_messages_and_tools_alone(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    told = [chat("q", "a"), chat("q", "a", tools=tools), chat("q", "b")]
    for name, extra in (("here", {}), ("there", {"score": 3})):
        path = write(tmp_path / f"{name}.jsonl", [record | extra for record in told])
        prepare(PrepareJob(DataConfig(path=path, held_out_share=0.0), output=str(tmp_path / name)))
    here, there = ([row["id"] for row in rows_of(tmp_path / name)] for name in ("here", "there"))
    assert here == there and len(set(here)) == 3


def generated(question: str, *rows: dict, **more) -> dict:
    """A line of recipes/generate_data.py."""
    return {"index": 0} | chat(question, "a", rows=list(rows), **more) | {"finish": ["stop"]}


def test_ids_that_a_target_generated_are_kept_as_they_are(tmp_path):
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
    assert counts.left_out == {reasons.NOTHING_SUPERVISED: 1, reasons.BAD_IDS: 2, reasons.TOO_LONG: 1}
    first, second, plain = rows_of(tmp_path / "out", "train")
    assert first == {**chat("q1", "a"), "id": "g", "rows": rows, "source": "code"}
    assert second["rows"] == [rows[1], silent] and second["source"] == "rows"
    assert "rows" not in plain and plain["source"] == "rows"
    read = read_jsonl(tmp_path / "out" / "train.jsonl")
    assert [row.input_ids for row in read[:2]] == [row["input_ids"] for row in rows]


@pytest.mark.parametrize(("depth", "left_out"), [(400, {}), (100_000, {reasons.BAD_JSON: 1, reasons.BAD_TOOLS: 1})])
def test_what_is_nested_too_deeply_is_left_out(tmp_path, depth, left_out):
    tool = f'[{{"name": "f", "parameters": {"[" * depth}{"]" * depth}}}]'
    line = json.dumps(chat("q", "a", tools=0)).replace('"tools": 0', f'"tools": {tool}') + "\n"
    records = [line, chat("q2", "a", tools=tool), chat("q3", "a")]
    (counts,) = prepare(job_for(tmp_path, [chat(f"other {n}", "a") for n in range(9)] + records)).counts.values()
    assert counts.left_out == left_out and counts.read == 12


def test_a_held_out_file_of_its_own_comes_first(tmp_path):
    """A conversation of it must not be trained on."""
    job = job_for(tmp_path, [chat(f"q{n}", f"a{n}") for n in range(9)])
    job.data.held_out_path = write(tmp_path / "held.jsonl", [chat("q3", "a3"), chat("other", "one")])
    counts = prepare(job).counts
    assert [row["conversations"][0]["content"] for row in rows_of(tmp_path / "out", "held_out")] == ["q3", "other"]
    assert counts["rows"].train == 8 and counts["rows"].left_out == {reasons.DUPLICATE: 1}


def test_again_is_up_to_date_whatever_the_path_until_the_content_changes(tmp_path):
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


def test_a_result_that_was_cut_is_made_again(tmp_path):
    prepare(job_for(tmp_path))
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "train.jsonl").write_bytes(before["train.jsonl"][:100])
    assert not prepare(job_for(tmp_path)).up_to_date
    assert contents(tmp_path / "out") == before


MANY = [chat(f"question {n % 700}", f"answer {n % 700}", id=f"r{n}") for n in range(1000)]


def _killed(directory: Path, at: int) -> None:
    put = run._Preparation._put
    calls = iter(range(at + 1))

    def dying(*args):
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        put(*args)

    run._Preparation._put = dying
    output.ROWS_BETWEEN_STATES = 100
    prepare(job_for(directory, MANY))


def _run_killed(directory: Path, at: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(directory, at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("at", [50, 250, 999])
def test_a_killed_run_is_gone_on_with(tmp_path, at, monkeypatch, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    prepare(job_for(whole, MANY))
    _run_killed(killed, at)
    assert not (killed / "out" / "train.jsonl").exists()
    put, seen = run._Preparation._put, []
    monkeypatch.setattr(run._Preparation, "_put", lambda *args: (seen.append(args[3].id), put(*args)))
    prepare(job_for(killed, MANY))
    assert seen == [f"r{n}" for n in range(at // 100 * 100, 1000)], "only what came after the last state"
    said = [f"{killed}/out: going on behind row {at // 100 * 100}"] if at >= 100 else []
    assert said == [line for line in capsys.readouterr().out.splitlines() if "going on" in line]
    results = [{**contents(d / "out"), "left_out.jsonl": b""} for d in (whole, killed)]  # holds the path
    assert results[0].keys() == results[1].keys()
    for name in ("train.jsonl", "held_out.jsonl"):
        assert results[0][name] == results[1][name]
    assert json.loads(results[0]["manifest.json"])["counts"] == json.loads(results[1]["manifest.json"])["counts"]


def test_what_was_begun_for_other_input_is_not_gone_on_with(tmp_path):
    _run_killed(tmp_path, 500)
    (counts,) = prepare(job_for(tmp_path, MANY[:300])).counts.values()
    assert counts.read == counts.taken == 300


def test_a_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "ROWS_BETWEEN_STATES", 100)
    replace = output._replace
    states = iter(range(100))

    def full(file, value):
        if next(states) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(file, value)

    monkeypatch.setattr(output, "_replace", full)
    with pytest.raises(UserError, match=r"^output: .*: the disk is full; make room and run again"):
        prepare(job_for(tmp_path, MANY))
    assert not (tmp_path / "out" / "manifest.json").exists()
    kept = (tmp_path / "out" / ".train.partial").read_text().splitlines()
    assert kept and all(json.loads(line) for line in kept)
    monkeypatch.setattr(output, "_replace", replace)
    (counts,) = prepare(job_for(tmp_path, MANY)).counts.values()
    assert (counts.read, counts.taken) == (1000, 700)


def test_two_processes_do_not_write_the_same_output(tmp_path):
    with exclusive(tmp_path / "out", "output"), pytest.raises(UserError, match=r"^output: another process writes into"):
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
def test_a_file_that_is_not_what_was_meant(tmp_path, records, expected):
    with pytest.raises(UserError) as caught:
        prepare(job_for(tmp_path, records))
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/rows.jsonl: ") and expected in said and "\n" not in said


@pytest.mark.parametrize(
    ("records", "expected"),
    [([], "none of 0 rows can be used (there are none);"),
     ([{"prompt": "q"}] * 3 + [chat("", "a")], "none of 4 rows can be used (3 no answer, 1 empty content);")],
)  # fmt: skip
def test_nothing_to_train_on(tmp_path, records, expected):
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            prepare(job_for(tmp_path, records))
        assert str(caught.value) == f"data: {expected} {tmp_path}/out/left_out.jsonl says why of each"


def test_columns_of_other_names(tmp_path):
    records = [{"talk": chat("q", f"a{n}")["conversations"]} for n in range(5)]
    (counts,) = prepare(job_for(tmp_path, records, columns={"talk": "messages"})).counts.values()
    assert counts.taken == 5


def test_options_of_what_is_kept(tmp_path):
    records = [{"prompt": "question"}, *[chat("q2", "a" * n, id=f"r{n}") for n in (1, 50, 50, 50)]]
    job = job_for(tmp_path, records, 0.0, keep_unanswered=True, deduplicate=False, filters=FilterConfig(5))
    prepare(job)
    rows = rows_of(tmp_path / "out")
    assert [len(row["conversations"]) for row in rows] == [1, 2, 2, 2]
    assert len({row["id"] for row in rows}) == 4
    prepare(job_for(tmp_path, [chat(f"q{n}", "a") for n in range(50)], 0.0, max_conversations=7))
    assert [row["conversations"][0]["content"] for row in rows_of(tmp_path / "out")] == [f"q{n}" for n in range(7)]


def mix_job(tmp_path: Path, sources: list[SourceConfig], **more) -> PrepareJob:
    data = MixDataConfig(sources=sources, prepared=str(tmp_path / "mix"), held_out_share=0.1)
    return PrepareJob(data=data, **more)


def test_a_mix_keeps_its_shares_at_every_moment_until_a_source_ends(tmp_path):
    for name, count in (("a", 600), ("b", 200)):
        write(tmp_path / f"{name}.jsonl", [chat(f"{name}{n}", "x") if n % 3 else {"foo": 1} for n in range(count)])
    sources = [SourceConfig(str(tmp_path / "a.jsonl"), weight=2), SourceConfig(str(tmp_path / "b.jsonl"))]
    counts = prepare(mix_job(tmp_path, sources)).counts
    assert {name: (each.read, each.taken) for name, each in counts.items()} == {"a": (600, 400), "b": (200, 133)}
    order = [row["source"] for row in rows_of(tmp_path / "mix", "train")]
    for upto in range(1, 301):
        assert order[:upto].count("b") / upto == pytest.approx(1 / 3, abs=2.5 / upto + 0.03)  # some are held out
    assert set(order[-100:]) == {"a"}, "what is left when b has ended"
    assert prepare(mix_job(tmp_path, sources)).up_to_date
    sources[1].weight = 1.5
    assert not prepare(mix_job(tmp_path, sources)).up_to_date


def test_a_row_lies_on_the_same_side_alone_and_in_a_mix(tmp_path):
    """Though its name is another there: what is held out of one is trained on with neither."""
    alone = prepare(job_for(tmp_path, [chat(f"q{n}", "a", id=f"c{n}") for n in range(80)], share=0.1)).directory
    rows = str(tmp_path / "rows.jsonl")
    write(tmp_path / "more.jsonl", [chat(f"other {n}", "a", id=f"m{n}") for n in range(20)])
    prepare(mix_job(tmp_path, [SourceConfig(rows), SourceConfig(str(tmp_path / "more.jsonl"))]))
    mixed = {row["id"].partition("/")[2] for row in rows_of(tmp_path / "mix", "held_out")}
    assert {row["id"] for row in rows_of(alone, "held_out")} == mixed & {f"c{n}" for n in range(80)} != set()


def test_a_mix_has_no_duplicates_and_ids_of_its_own(tmp_path):
    for name in "ab":
        write(
            tmp_path / f"{name}.jsonl", [chat(f"{name}{n % 9}" if n < 9 else "same", "x", id=str(n)) for n in range(12)]
        )
    counts = prepare(mix_job(tmp_path, [SourceConfig(str(tmp_path / f"{name}.jsonl")) for name in "ab"])).counts
    assert sum(each.taken for each in counts.values()) == 19
    ids = {row["id"] for row in rows_of(tmp_path / "mix")}
    assert len(ids) == 19 and {"a/0", "b/0"} < ids


def test_a_source_of_a_mix_may_be_an_option_of_conf(tmp_path):
    path = write(tmp_path / "copy.json", [{"question": f"q{n}", "answer": "a"} for n in range(20)])
    counts = prepare(mix_job(tmp_path, [SourceConfig("gsm8k", path=path), SourceConfig(path)])).counts
    assert {name: (each.taken, each.left_out) for name, each in counts.items()} == {
        "gsm8k": (10, {reasons.DUPLICATE: 10}), "copy": (10, {reasons.DUPLICATE: 10}),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["nowhere"], "data.path: nowhere does not exist"), (["tiny"], "data: nothing to prepare here")],
)
def test_a_mix_of_what_is_not_there(tmp_path, names, expected):
    with pytest.raises(UserError) as caught:
        prepare(mix_job(tmp_path, [SourceConfig(name) for name in names]))
    assert str(caught.value).startswith(expected)


def test_a_mix_of_one_source_twice(tmp_path):
    path = write(tmp_path / "a.jsonl", [chat("q", "a")])
    with pytest.raises(UserError, match=r"^data\.sources: .*: give each a name of its own"):
        prepare(mix_job(tmp_path, [SourceConfig(path), SourceConfig(path)]))


@pytest.mark.parametrize("key", ["path", "held_out_path"])
def test_a_mix_reads_its_sources_only(tmp_path, key):
    job = mix_job(tmp_path, [SourceConfig(write(tmp_path / "a.jsonl", [chat("q", "a")]))])
    with pytest.raises(UserError, match=rf"^data\.{key} is other\.jsonl, and a mix reads data\.sources only"):
        prepare(replace(job, data=replace(job.data, **{key: "other.jsonl"})))


def test_formatted_text_is_masked_as_the_conversation_that_it_shows(tmp_path):
    """The oracle is what training makes of the same conversation in messages."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    told = [chat("the fox", "jumps")["conversations"] + chat("a dog?", "lazy\n\nover there")["conversations"],
            [{"role": "system", "content": "quick"}, *chat("what", " five dozen ")["conversations"]]]  # fmt: skip
    texts = [{"text": tokenizer.apply_chat_template(messages, tokenize=False)} for messages in told]
    job = job_for(tmp_path, [*texts, {"text": "no chat at all"}], 0.0, tokenizer=str(tmp_path / "tokenizer"))
    (counts,) = prepare(job).counts.values()
    assert counts.left_out == {reasons.NO_SPAN: 1}
    for row, messages in zip(read_jsonl(tmp_path / "out" / "train.jsonl"), told, strict=True):
        expected = tokenize(tokenizer, Conversation("", messages, ""), [tokenizer.eos_token_id])
        assert (row.input_ids, row.loss_mask) == (expected.input_ids, expected.loss_mask)


def test_formatted_text_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: its `text` is formatted already; give tokenizer=DIR"):
        prepare(job_for(tmp_path, [{"text": "<|user|>q<|assistant|>a"}]))


def test_a_tokenizer_that_cannot_tell_answers(tmp_path):
    with pytest.raises(UserError, match=r"^tokenizer: /nowhere cannot be had here"):
        prepare(job_for(tmp_path, tokenizer="/nowhere"))
    make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}").save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match=r"^tokenizer: the chat template of .* puts no mark around an answer"):
        prepare(job_for(tmp_path, tokenizer=str(tmp_path / "plain")))


def dataset(tmp_path: Path, **more) -> DatasetConfig:
    return DatasetConfig(repository="nobody/nothing", prepared=str(tmp_path / "prepared"), held_out_share=0.2, **more)


def test_training_prepares_what_is_not_there_and_reads_it(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.json", [{"question": f"q{n}", "answer": "a"} for n in range(50)])
    split = load_prepared(dataset(tmp_path, path=path), seed=0)
    assert len(split.training) + len(split.held_out) == 50 and split.held_out
    assert {row.id for row in split.held_out} == {r["id"] for r in rows_of(tmp_path / "prepared", "held_out")}
    monkeypatch.setattr(sources, "hub_parts", lambda *_: pytest.fail("it is prepared: nobody need ask the hub"))
    again = load_prepared(dataset(tmp_path), seed=0)
    assert [row.id for row in again.training] == [row.id for row in split.training]


def test_training_keeps_what_was_prepared_with_options_of_its_own_and_refuses_other_content(tmp_path):
    path = write(tmp_path / "rows.jsonl", [chat(f"q{n}", "a" * n) for n in range(1, 50)])
    config = dataset(tmp_path, path=path)
    prepare(PrepareJob(config, filters=FilterConfig(max_characters=20)))
    before = contents(tmp_path / "prepared")
    load_prepared(config, seed=0)
    assert contents(tmp_path / "prepared") == before
    write(tmp_path / "rows.jsonl", [chat("other", "content")])
    with pytest.raises(UserError, match=r"^data\.path: .*prepared was prepared with \"sha256:.*; run recipes"):
        load_prepared(config, seed=0)
    assert contents(tmp_path / "prepared") == before


OTHERS = [
    ("repository", "nobody/other", "nobody/nothing"), ("subset", "main", None), ("revision", "v2", None),
    ("split", "train[50:]", "train"), ("held_out_split", "test", None), ("held_out_share", 0.5, 0.2),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "before"), OTHERS)
def test_training_on_another_dataset_than_was_prepared_is_refused(tmp_path, key, value, before):
    path = write(tmp_path / "rows.jsonl", [chat(f"q{n}", "a") for n in range(50)])
    load_prepared(dataset(tmp_path, path=path), seed=0)
    changed = replace(dataset(tmp_path), **{key: value})
    with pytest.raises(UserError) as caught:
        load_prepared(changed, seed=0)
    assert str(caught.value) == (
        f"data.{key}: {tmp_path}/prepared was prepared with {json.dumps(before)}, not {json.dumps(value)}; "
        "run recipes/prepare_data.py again, or name another data.prepared"
    )


def test_training_on_other_held_out_rows_than_were_prepared_is_refused(tmp_path):
    path, held = (write(tmp_path / f"{x}.jsonl", [chat(f"{x}{n}", "a") for n in range(50)]) for x in "rh")
    load_prepared(dataset(tmp_path, path=path, held_out_path=held), seed=0)
    with pytest.raises(UserError, match=r"^data\.held_out_path: .* was prepared with \"sha256:.*\", not null; run"):
        load_prepared(dataset(tmp_path, path=path), seed=0)


def test_training_on_another_mix_than_was_prepared_is_refused(tmp_path):
    a, b = (write(tmp_path / f"{x}.jsonl", [chat(f"{x}{n}", "a") for n in range(50)]) for x in "ab")

    def load(*sources: SourceConfig):
        return load_prepared(mix_job(tmp_path, list(sources)).data, seed=0)

    before = load(SourceConfig(a), SourceConfig("gsm8k", b))
    assert len(load(SourceConfig(a), SourceConfig("gsm8k", b)).training) == len(before.training)
    for changed, (key, said) in (
        ([SourceConfig(a)], ("data.sources: ", ' with ["a", "gsm8k"], not ["a"]; ')),
        ([SourceConfig(a, weight=2.0), SourceConfig("gsm8k", b)], ("data.sources[a].weight: ", " with 1.0, not 2.0; ")),
        ([SourceConfig(a), SourceConfig("gsm8k", a)], ("data.sources[gsm8k].path: ", ' with "sha256:')),
    ):
        with pytest.raises(UserError) as caught:
            load(*changed)
        assert str(caught.value).startswith(key) and said in str(caught.value)
    write(tmp_path / "a.jsonl", [chat("new", "row")])
    with pytest.raises(UserError, match=r"^data\.sources\[a\]\.path: "):
        load(SourceConfig(a), SourceConfig("gsm8k", b))


def test_training_on_what_another_version_prepared_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", [chat(f"q{n}", "a") for n in range(50)])
    load_prepared(dataset(tmp_path, path=path), seed=0)
    manifest = tmp_path / "prepared" / "manifest.json"
    manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != "asked"}))
    with pytest.raises(UserError, match=r"^data\.held_out_share: .* was prepared with no such key, not 0\.2; run"):
        load_prepared(dataset(tmp_path, path=path), seed=0)


def test_another_slice_of_a_repository_is_prepared_anew(tmp_path, monkeypatch):
    """A directory stands in for the hub; both slices are of the same files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    (tmp_path / "here").mkdir()
    write(tmp_path / "here" / "train.jsonl", [{"question": f"q{n}", "answer": "a"} for n in range(50)])

    def asked(split: str) -> tuple[bool, set[str]]:
        config = replace(dataset(tmp_path), repository=str(tmp_path / "here"), split=split)
        done = prepare(PrepareJob(config))
        return done.up_to_date, {row["conversations"][0]["content"] for row in rows_of(done.directory)}

    first, second = ({f"q{n}" for n in numbers} for numbers in (range(20), range(20, 50)))
    assert [asked(s) for s in ("train[:20]", "train[:20]", "train[20:]")] == [
        (False, first), (True, first), (False, second)
    ]  # fmt: skip
    assert {row["source"] for row in rows_of(tmp_path / "prepared")} == {"here"}
    write(tmp_path / "here" / "train.jsonl", [{"question": f"other {n}", "answer": "a"} for n in range(50)])
    assert asked("train[20:]") == (False, {f"other {n}" for n in range(20, 50)}), "a branch may have gone on"


def test_training_on_a_dataset_that_cannot_be_had(tmp_path):
    with pytest.raises(UserError, match=r"^data\.repository: nobody/nothing cannot be had here"):
        load_prepared(dataset(tmp_path), seed=0)
    assert not list(tmp_path.iterdir())


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


def test_where_the_result_goes():
    assert PrepareJob(DataConfig(path="/x/my.data.jsonl.gz")).directory == Path("cache/dataset/my")
    assert PrepareJob(DatasetConfig(repository="a/b", prepared="p")).directory == Path("p")
    with pytest.raises(UserError, match="nothing to prepare here"):
        _ = PrepareJob(DataConfig(path=None)).directory
    with pytest.raises(UserError, match="max_conversations is 0"):
        PrepareJob(DataConfig(path="x"), max_conversations=0)
