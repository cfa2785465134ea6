"""A training reads a prepared dataset of conf/data, and refuses one prepared from other data."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from nemo_speculative.config.schema import (
    DatasetConfig,
    FilterConfig,
    PrepareJob,
    SourceConfig,
)
from nemo_speculative.prepare_data import streams
from nemo_speculative.prepare_data.load import load_prepared
from nemo_speculative.prepare_data.run import prepare
from nemo_speculative.utils.errors import UserError
from tests.prepare_data.cases import chat, contents, mix_job, rows_of, write


def dataset(tmp_path: Path, **more) -> DatasetConfig:
    return DatasetConfig(repository="nobody/nothing", prepared=str(tmp_path / "prepared"), held_out_share=0.2, **more)


def test_training_prepares_a_missing_dataset_and_reads_it(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "rows.json", [{"question": f"q{n}", "answer": "a"} for n in range(50)])
    split = load_prepared(dataset(tmp_path, path=path), seed=0)
    assert len(split.training) + len(split.held_out) == 50 and split.held_out
    assert {row.id for row in split.held_out} == {r["id"] for r in rows_of(tmp_path / "prepared", "held_out")}
    monkeypatch.setattr(streams, "hub_parts", lambda *_: pytest.fail("it is prepared, so the hub is not needed"))
    capsys.readouterr()
    again = load_prepared(dataset(tmp_path), seed=0)
    assert "was prepared from files (data.path), not from the hub" in capsys.readouterr().out
    assert [row.id for row in again.training] == [row.id for row in split.training]


def test_training_accepts_other_options_and_refuses_other_content(tmp_path):
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


def test_training_on_data_that_another_version_prepared_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", [chat(f"q{n}", "a") for n in range(50)])
    load_prepared(dataset(tmp_path, path=path), seed=0)
    manifest = tmp_path / "prepared" / "manifest.json"
    manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != "asked"}))
    with pytest.raises(UserError, match=r"^data\.held_out_share: .* was prepared with no such key, not 0\.2; run"):
        load_prepared(dataset(tmp_path, path=path), seed=0)


def test_another_slice_of_a_repository_is_prepared_again(tmp_path, monkeypatch):
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
    assert asked("train[20:]") == (False, {f"other {n}" for n in range(20, 50)}), "the content of a branch may change"


def test_training_on_a_dataset_that_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match=r"^data\.repository: nobody/nothing cannot be loaded here"):
        load_prepared(dataset(tmp_path), seed=0)
    assert not list(tmp_path.iterdir())
