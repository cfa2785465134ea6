"""Files, folders and tables give the same records, and name the place of an error."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from nemo_speculative.prepare_data import readers
from nemo_speculative.prepare_data.readers import LeftOut, hub_parts, local_parts
from nemo_speculative.utils.errors import UserError

RECORDS = [{"question": f'Ünï {n} "]}},[{{ 世界', "answer": "a\n" * n, "number": n} for n in range(300)]


def lines(records=RECORDS) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def array(indent=None) -> bytes:
    return json.dumps(RECORDS, indent=indent).encode()


def rows(path: Path, split=None) -> list:
    return [row for part in local_parts(str(path), "data.path", split) for row in part.rows()]


def records(path: Path, split=None) -> list:
    return [row.record for row in rows(path, split)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines()),
        ("bom.jsonl", b"\xef\xbb\xbf" + lines()),
        ("blank.jsonl", lines().replace(b"\n", b"\n\n \n")),
        ("a.jsonl.gz", gzip.compress(lines())),
        ("a.json", array()),
        ("bom.json", b"\xef\xbb\xbf" + array(indent=2)),
        ("indented.json", b"\n  " + array(indent=2)),
        ("a.json.gz", gzip.compress(array())),
        ("lines_that_are_called.json", lines()),
        ("an_array_that_is_called.jsonl", array()),
    ],
)
@pytest.mark.parametrize("chunk", [3, 1000, 1 << 20])
def test_json_in_every_form(tmp_path, monkeypatch, name, content, chunk):
    """Whatever the size of the chunks in which an array is read."""
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", chunk)
    (tmp_path / name).write_bytes(content)
    assert records(tmp_path / name) == RECORDS


def test_parquet(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet", row_group_size=70)
    assert records(tmp_path / "a.parquet") == RECORDS


def test_keys_that_only_other_rows_have_are_absent(tmp_path):
    calls = [{"m": [{"arguments": {"a": 1}}]}, {"m": [{"arguments": {"b": 2}}]}]
    parquet.write_table(pyarrow.Table.from_pylist(calls), tmp_path / "a.parquet")
    assert records(tmp_path / "a.parquet") == calls


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.jsonl").write_bytes(lines(RECORDS[100:200]))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS[:100]).encode()))
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS[200:]), tmp_path / "deep" / "c.parquet")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "d.jsonl").write_bytes(lines())
    (tmp_path / "README.md").write_text("not data")
    assert records(tmp_path) == RECORDS


def test_a_dataset_that_datasets_saved(tmp_path):
    datasets.disable_progress_bars()
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_list(RECORDS[:200]), test=datasets.Dataset.from_list(RECORDS[200:])
    )
    both.save_to_disk(tmp_path / "both")
    both["train"].save_to_disk(tmp_path / "one")
    assert records(tmp_path / "one") == RECORDS[:200]
    assert records(tmp_path / "both") == RECORDS
    assert records(tmp_path / "both", split="test") == RECORDS[200:]
    assert rows(tmp_path / "both", split="test")[3].origin == f"{tmp_path}/both:test:3"
    with pytest.raises(UserError, match=r"has the splits train, test, not 'dev'; set data\.split"):
        records(tmp_path / "both", split="dev")


def test_origins_and_sizes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + lines())
    (tmp_path / "b.json").write_bytes(array())
    for name, origin in (("a.jsonl", "a.jsonl:6"), ("b.json", "b.json[4]")):
        found = rows(tmp_path / name)
        assert found[4].origin == f"{tmp_path}/{origin}"
        assert sum(row.size for row in found) == (tmp_path / name).stat().st_size


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ('{"a": "ü"}'.encode("latin-1"), "not UTF-8"),
        (b"[1, 2]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
    ],
)
def test_a_bad_line_is_left_out_and_the_others_are_read(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(lines(RECORDS[:2]) + line + b"\n" + lines(RECORDS[2:4]))
    found = rows(tmp_path / "a.jsonl")
    assert [row.record for row in found if not isinstance(row.record, LeftOut)] == RECORDS[:4]
    assert found[2].origin.endswith(":3") and found[2].record.reason == reason


@pytest.mark.parametrize("chunk", [5, 64, 1 << 20])
def test_an_array_with_an_error_gives_the_elements_before_it_and_names_the_line(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", chunk)
    text = json.dumps(RECORDS[:9], indent=1).splitlines()
    at = next(i for i, line in enumerate(text) if '"number": 6' in line)
    text[at] = ' "number": six'
    (tmp_path / "a.json").write_text("\n".join(text))
    found = []
    with pytest.raises(UserError, match=rf"a\.json: not JSON at line {at + 1} \(.*element 6\)") as caught:
        for row in local_parts(str(tmp_path / "a.json"), "data.path", None)[0].rows():
            found.append(row.record)
    assert found == RECORDS[:6] and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("cut.json", array()[:-40], "not JSON at line 1"),
        ("empty_ended.json", b"[", "not JSON at line 1"),
        # Reading on after the error would report the byte at the end instead, and fill the memory up to there.
        ("not_read_on.json", b'[{"a": six}' + b" " * (3 << 20) + b"\xff", "not JSON at line 1"),
        ("latin.json", '[{"a": "ü"}]'.encode("latin-1"), "not UTF-8"),
        ("cut.jsonl.gz", gzip.compress(lines())[:-200], "cannot be unzipped"),
        ("broken.jsonl.gz", gzip.compress(lines())[:10] + b"\xff" * 300, "cannot be unzipped (error: Error -3"),
        ("deep.json", b'[{"a": 1},\n{"a": ' + b"[" * 100_000, "element 1 is nested too deeply"),
        ("cut.parquet", b"PAR1" + bytes(100), "cannot be read as Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_further(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        rows(tmp_path / name)
    assert f"{tmp_path / name}: {expected}" in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_to_read(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"^data\.path: .* does not exist; expected a file or folder"):
        rows(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"^data\.path: .* holds none of \*\.json, "):
        rows(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="what `datasets` saved there cannot be read"):
        rows(tmp_path)


def test_a_repository_that_cannot_be_downloaded(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        hub_parts("nobody/nothing-at-all", "train", None, None)
    message = str(caught.value)
    assert message.startswith("data.repository: nobody/nothing-at-all cannot be loaded here (")
    assert "data.path=FILE_OR_FOLDER" in message and "\n" not in message


def test_a_repository(tmp_path, monkeypatch):
    """A directory stands in for the hub: the library reads both in the same way."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "train.jsonl").write_bytes(lines(RECORDS[:9]))
    (tmp_path / "here" / "test.jsonl").write_bytes(lines(RECORDS[9:12]))
    (part,) = hub_parts(str(tmp_path / "here"), "test", None, None)
    assert [row.record for row in part.rows()] == RECORDS[9:12]
    assert part.files and part.sha256() == hub_parts(str(tmp_path / "here"), "test", None, None)[0].sha256()


def test_the_hash_depends_on_the_content_alone(tmp_path):
    for name, content in (("a.jsonl", b"{}\n"), ("b.jsonl", b"{}\n"), ("c.jsonl", b"{} \n")):
        (tmp_path / name).write_bytes(content)
    parts = [local_parts(str(tmp_path / f"{name}.jsonl"), "data.path", None) for name in "abc"]
    a, b, c = (part.sha256() for (part,) in parts)
    assert a == b != c
