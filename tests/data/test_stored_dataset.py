"""Tokenized rows on disk, compared with the same rows in memory."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nemo_speculative.config.schema import DataConfig
from nemo_speculative.data import tokenized_dataset
from nemo_speculative.data.batch import pack
from nemo_speculative.data.conversations import Conversation, ConversationFile, ConversationList, TokenRow, shuffled
from nemo_speculative.data.tokenized_dataset import Tokenization, load_or_tokenize
from nemo_speculative.utils.errors import UserError
from tests.conftest import PREFIX_TEMPLATE, make_tokenizer
from tests.programs import ROOT, run_program
from tests.target_servers import until

END = 2


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def how(tokenizer):
    return Tokenization(tokenizer, frozenset({END}), 24, 300)


def lines(count):
    for n in range(count):
        if n % 7 == 3:
            mask = [0] * 9 if n % 2 else [0, *[1] * 8]
            yield {"id": f"r{n}", "input_ids": [(n + i) % 300 for i in range(9)], "loss_mask": mask, "source": "ids"}
        else:
            words = "ab " * (1 + n % 12)
            messages = [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": words}]
            yield {"id": f"c{n} ü", "conversations": messages, "source": "" if n % 2 else "text"}


@pytest.fixture
def items(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines(40)))
    return ConversationFile(file)


@pytest.fixture
def config(tmp_path):
    return DataConfig(path="x", cache_dir=str(tmp_path / "cache"), workers=1)


def assert_equal(stored, expected):
    assert [dataclasses.replace(row, origin="") for row in stored.rows] == [
        dataclasses.replace(row, origin="") for row in expected.rows
    ]
    assert list(stored.lengths) == list(expected.lengths)
    assert list(stored.counts) == list(expected.counts) == ["", "ids", "text"]
    assert all(torch.equal(stored.counts[source], expected.counts[source]) for source in expected.counts)
    assert (stored.unsupervised, stored.truncated, stored.supervised_tokens_cut) == (
        expected.unsupervised, expected.truncated, expected.supervised_tokens_cut
    )  # fmt: skip
    assert stored.unsupervised and stored.truncated
    assert stored.report() == expected.report() and stored.fingerprint == expected.fingerprint


@pytest.mark.parametrize("chunk", [3, 512])
def test_stored_rows_equal_those_in_memory(items, how, config, monkeypatch, chunk):
    monkeypatch.setattr(tokenized_dataset, "CHUNK", chunk)
    expected = how(list(items))
    assert_equal(load_or_tokenize(items, how, config, "t"), expected)
    again = load_or_tokenize(items, how, config, "t")
    assert_equal(again, expected)
    assert again.rows[-1].id == expected.rows[-1].id and [row.id for row in again.rows[2:9:3]] == [
        row.id for row in expected.rows[2:9:3]
    ]
    with pytest.raises(IndexError):
        again.rows[len(again.rows)]
    assert list(pack(again.lengths, 48, 0)) == list(pack(expected.lengths, 48, 0))


def test_worker_processes_give_the_same_rows(items, how, config, monkeypatch):
    monkeypatch.setattr(tokenized_dataset, "MIN_ITEMS_FOR_WORKERS", 1)
    monkeypatch.setattr(tokenized_dataset, "CHUNK", 4)
    assert_equal(load_or_tokenize(items, how, dataclasses.replace(config, workers=2), "t"), how(list(items)))


def test_stored_rows_are_not_tokenized_again(items, how, config, monkeypatch):
    load_or_tokenize(items, how, config, "t")
    monkeypatch.setattr(tokenized_dataset, "_create", lambda *_: pytest.fail("tokenized again"))
    load_or_tokenize(items, how, config, "t")


def test_the_key_depends_on_everything_that_shapes_the_rows(items, how, config, tokenizer, tmp_path):
    other = make_tokenizer(PREFIX_TEMPLATE)
    with_token = make_tokenizer()
    with_token.add_tokens(["zebra"])
    keys = {
        how.key(given)
        for given in (items, items[:39], ConversationList(list(items)[1:]),
                      ConversationList([TokenRow("a", [1], [True], "")]))
    } | {
        dataclasses.replace(how, **change).key(items)
        for change in ({"max_length": 23}, {"stop_ids": {3}}, {"vocab_size": 301}, {"tokenizer": other},
                       {"tokenizer": with_token})
    }  # fmt: skip
    assert len(keys) == 9
    moved = tmp_path / "moved.jsonl"
    shutil.copy(items.path, moved)
    assert how.key(ConversationFile(moved)) == how.key(items)
    assert Tokenization(make_tokenizer(), frozenset({END}), 24, 300).key(items) == how.key(items)


@pytest.mark.parametrize("file", [tokenized_dataset.ROWS, tokenized_dataset.COUNTS, tokenized_dataset.META])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_damaged_rows_are_tokenized_again(items, how, config, file, damage):
    load_or_tokenize(items, how, config, "t")
    (directory,) = (file for file in (items.path.parent / "cache/tokens").iterdir())
    if damage == "gone":
        (directory / file).unlink()
    else:
        (directory / file).write_bytes((directory / file).read_bytes()[:-20])
    assert_equal(load_or_tokenize(items, how, config, "t"), how(list(items)))


def test_an_empty_dataset(how, config):
    empty = load_or_tokenize(ConversationList([]), how, config, "t")
    assert len(empty.rows) == 0 and empty.tokens == 0 and list(pack(empty.lengths, 8, 0)) == []
    assert empty.report() == "0 conversations, 0 tokens, 0% supervised"


def left_in(items):
    """The files of the cache, except locks."""
    return [file for file in (items.path.parent / "cache/tokens").glob("*/*") if file.name != ".lock"]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_leaves_no_files(items, how, config, monkeypatch, workers):
    monkeypatch.setattr(tokenized_dataset, "MIN_ITEMS_FOR_WORKERS", 1)
    silent = ConversationList([*items, Conversation("x", [{"role": "user", "content": "q"}], "somewhere:7")])
    with pytest.raises(UserError, match="somewhere:7: the conversation has no assistant turn"):
        load_or_tokenize(silent, how, dataclasses.replace(config, workers=workers), "t")
    assert left_in(items) == []


class KilledAt(ConversationList):
    """Kills the process that reads its last item."""

    def _item(self, index):
        if index == len(self) - 1:
            subprocess.run(["sh", "-c", "kill -9 $PPID"])
        return super()._item(index)


def test_a_killed_worker_is_one_line(items, how, config, monkeypatch):
    monkeypatch.setattr(tokenized_dataset, "MIN_ITEMS_FOR_WORKERS", 1)
    monkeypatch.setattr(tokenized_dataset, "CHUNK", 8)
    with pytest.raises(UserError, match=r"data\.workers: a process that tokenized was killed"):
        load_or_tokenize(KilledAt(list(items)), how, dataclasses.replace(config, workers=2), "t")
    assert left_in(items) == []


class Endless(ConversationList):
    """Blocks the process that reads its last item."""

    def _item(self, index):
        if index == len(self) - 1:
            time.sleep(60)
        return super()._item(index)


LEAVES = """
import os, sys
from multiprocessing import active_children
from nemo_speculative.config.schema import DataConfig
from nemo_speculative.data import tokenized_dataset
from tests.conftest import make_tokenizer
from tests.data.test_stored_dataset import END, Endless, TokenRow
rows = [TokenRow(str(n), [5, 6], [False, True], "") for n in range(9)]
tokenized_dataset.MIN_ITEMS_FOR_WORKERS, tokenized_dataset.CHUNK = 1, 4
def check_canceled():
    if len(active_children()) == 2:
        print(*(child.pid for child in active_children()), flush=True)
        os._exit(3)
if __name__ == "__main__":
    how = tokenized_dataset.Tokenization(make_tokenizer(), frozenset({END}), 24, 300)
    config = DataConfig(path="x", cache_dir=sys.argv[1], workers=2)
    tokenized_dataset.load_or_tokenize(Endless(rows), how, config, "t", check_canceled)
"""


def test_workers_do_not_outlive_their_parent(tmp_path):
    program = tmp_path / "leaves.py"
    program.write_text(LEAVES)
    done = run_program(str(program), str(tmp_path / "cache"), environment=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 3, done.stderr
    for process in map(int, done.stdout.split()):
        until(lambda process=process: not running(process), seconds=40)


def running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_tokenizing_stops_at_once_when_canceled(items, how, config, monkeypatch):
    """Also while the writer waits for a chunk."""
    monkeypatch.setattr(tokenized_dataset, "MIN_ITEMS_FOR_WORKERS", 1)
    monkeypatch.setattr(tokenized_dataset, "CHUNK", 40)
    calls = iter(range(3))

    def check_canceled():
        if next(calls, None) is None:
            raise LookupError

    endless = Endless(list(items))
    with pytest.raises(LookupError):
        load_or_tokenize(endless, how, dataclasses.replace(config, workers=2), "t", check_canceled)
    assert left_in(items) == []


def test_the_order_of_a_selection_does_not_change_the_stored_rows(items, how, config):
    one, two = (load_or_tokenize(shuffled(items, seed), how, config, "t") for seed in (0, 1))
    assert one.fingerprint == two.fingerprint == how(list(items)).fingerprint
    assert len(list((items.path.parent / "cache/tokens").iterdir())) == 1
    some = load_or_tokenize(shuffled(items, 0)[:9], how, config, "t")
    assert [row.id for row in some.rows] == [
        row.id for row in how(sorted(shuffled(items, 0)[:9], key=list(items).index)).rows
    ]


def test_concurrent_requests_for_the_same_rows_tokenize_once(items, how, config, monkeypatch):
    expected = []
    make = tokenized_dataset._create
    monkeypatch.setattr(
        tokenized_dataset, "_create", lambda *given: (expected.append(1), time.sleep(0.2), make(*given))[-1]
    )
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: load_or_tokenize(items, how, config, "t").fingerprint, range(4)))
    assert expected == [1] and set(found) == {how(list(items)).fingerprint}


def test_a_full_disk_names_the_directory_and_leaves_no_files(items, how, config, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenized_dataset, "save_file", full)
    with pytest.raises(UserError, match=r"data\.cache_dir: .*cache/tokens/\w+ cannot be written \(.*No space left"):
        load_or_tokenize(items, how, config, "t")
    assert left_in(items) == []
    monkeypatch.undo()
    assert_equal(load_or_tokenize(items, how, config, "t"), how(list(items)))
