"""An append-only log keeps every complete line, whatever ended its writer."""

import errno
import json

import pytest

from nemo_speculative.utils import append_log
from nemo_speculative.utils.append_log import AppendLog, read_lines, rewrite


def records(file):
    return [json.loads(line.data) for line in read_lines(file)]


def test_lines_are_read_back_with_their_number_and_offset(tmp_path):
    log = AppendLog(tmp_path / "log.jsonl")
    log.append({"a": 1})
    log.append({"b": "ü"})
    first, second = read_lines(tmp_path / "log.jsonl")
    log.close()
    assert (first.number, first.offset, second.number, second.offset) == (1, 0, 2, len(first.data))
    assert records(tmp_path / "log.jsonl") == [{"a": 1}, {"b": "ü"}]
    assert log.size == (tmp_path / "log.jsonl").stat().st_size


def test_a_missing_file_has_no_lines(tmp_path):
    assert records(tmp_path / "none.jsonl") == [] and append_log.complete_size(tmp_path / "none.jsonl") == 0


@pytest.mark.parametrize("torn", [b'{"b": ', b"x" * 3 * append_log.TAIL_BYTES])
def test_a_torn_last_line_is_not_read_and_is_removed_before_the_next(tmp_path, torn):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"a": 1}\n' + torn)
    assert records(file) == [{"a": 1}]
    AppendLog(file).append({"c": 3})
    assert records(file) == [{"a": 1}, {"c": 3}]


def test_a_log_can_be_cut_to_the_size_that_a_checkpoint_vouches_for(tmp_path):
    file = tmp_path / "log.jsonl"
    log = AppendLog(file)
    log.append({"a": 1})
    size = log.size
    log.append({"b": 2})
    AppendLog(file, size=size).append({"c": 3})
    assert records(file) == [{"a": 1}, {"c": 3}]


def test_an_append_to_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "log.jsonl"
    log = AppendLog(file, sync_seconds=0)
    log.append({"a": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(append_log.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*log\.jsonl"):
        log.append({"b": 2})
    assert records(file) == [{"a": 1}]


def test_half_a_surrogate_pair_is_escaped(tmp_path):
    AppendLog(tmp_path / "log.jsonl").append({"a": "\ud800"})
    assert records(tmp_path / "log.jsonl") == [{"a": "\ud800"}]


def test_a_log_is_rewritten_in_one_step(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b"1\n2\n")

    def lines():
        yield b"2\n"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        rewrite(file, lines())
    assert file.read_bytes() == b"1\n2\n"
    rewrite(file, [b"2\n", b"1\n"])
    assert file.read_bytes() == b"2\n1\n" and list(tmp_path.iterdir()) == [file]
