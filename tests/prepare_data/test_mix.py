"""Several sources in one mix."""

from dataclasses import replace

import pytest

from nemo_speculative.config.schema import (
    SourceConfig,
)
from nemo_speculative.prepare_data.run import prepare
from nemo_speculative.utils.errors import UserError
from tests.prepare_data.cases import chat, job_for, mix_job, rows_of, write


def test_a_mix_keeps_its_shares_after_every_row_until_a_source_ends(tmp_path):
    for name, count in (("a", 600), ("b", 200)):
        write(tmp_path / f"{name}.jsonl", [chat(f"{name}{n}", "x") if n % 3 else {"foo": 1} for n in range(count)])
    sources = [SourceConfig(str(tmp_path / "a.jsonl"), weight=2), SourceConfig(str(tmp_path / "b.jsonl"))]
    counts = prepare(mix_job(tmp_path, sources)).counts
    assert {name: (each.read, each.kept) for name, each in counts.items()} == {"a": (600, 400), "b": (200, 133)}
    order = [row["source"] for row in rows_of(tmp_path / "mix", "train")]
    for upto in range(1, 301):
        assert order[:upto].count("b") / upto == pytest.approx(1 / 3, abs=2.5 / upto + 0.03)  # some are held out
    assert set(order[-100:]) == {"a"}, "what is left when b has ended"
    assert prepare(mix_job(tmp_path, sources)).up_to_date
    sources[1].weight = 1.5
    assert not prepare(mix_job(tmp_path, sources)).up_to_date


@pytest.mark.parametrize(
    ("weights", "limit", "reported"), [((2, 1), None, True), ((2, 1), 5, False), ((2, 2), None, False)]
)
def test_weights_without_a_limit_only_order_the_rows_and_this_is_reported(tmp_path, capsys, weights, limit, reported):
    sources = []
    for name, weight in zip("ab", weights, strict=True):
        write(tmp_path / f"{name}.jsonl", [chat(f"{name}{n}", "x") for n in range(9)])
        sources.append(SourceConfig(str(tmp_path / f"{name}.jsonl"), weight=weight))
    job = replace(mix_job(tmp_path, sources), max_conversations=limit)
    prepare(job)
    assert ("the weights determine the order alone" in capsys.readouterr().out) == reported


def test_a_row_is_on_the_same_side_alone_and_in_a_mix(tmp_path):
    """Although its id differs in a mix: a held-out row of one is a training row of neither."""
    alone = prepare(job_for(tmp_path, [chat(f"q{n}", "a", id=f"c{n}") for n in range(80)], share=0.1)).directory
    rows = str(tmp_path / "rows.jsonl")
    write(tmp_path / "more.jsonl", [chat(f"other {n}", "a", id=f"m{n}") for n in range(20)])
    prepare(mix_job(tmp_path, [SourceConfig(rows), SourceConfig(str(tmp_path / "more.jsonl"))]))
    mixed = {row["id"].partition("/")[2] for row in rows_of(tmp_path / "mix", "held_out")}
    assert {row["id"] for row in rows_of(alone, "held_out")} == mixed & {f"c{n}" for n in range(80)} != set()


def test_a_mix_has_no_duplicates_and_unique_ids(tmp_path):
    for name in "ab":
        write(
            tmp_path / f"{name}.jsonl", [chat(f"{name}{n % 9}" if n < 9 else "same", "x", id=str(n)) for n in range(12)]
        )
    counts = prepare(mix_job(tmp_path, [SourceConfig(str(tmp_path / f"{name}.jsonl")) for name in "ab"])).counts
    assert sum(each.kept for each in counts.values()) == 19
    ids = {row["id"] for row in rows_of(tmp_path / "mix")}
    assert len(ids) == 19 and {"a/0", "b/0"} < ids


def test_a_source_of_a_mix_may_be_an_option_of_conf(tmp_path):
    path = write(tmp_path / "copy.json", [{"question": f"q{n}", "answer": "a"} for n in range(20)])
    counts = prepare(mix_job(tmp_path, [SourceConfig("gsm8k", path=path), SourceConfig(path)])).counts
    assert {name: (each.kept, each.left_out) for name, each in counts.items()} == {
        "gsm8k": (10, {"duplicate": 10}), "copy": (10, {"duplicate": 10}),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["nowhere"], "data.path: nowhere does not exist"), (["tiny"], "data: nothing to prepare here")],
)
def test_a_mix_of_missing_sources(tmp_path, names, expected):
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
