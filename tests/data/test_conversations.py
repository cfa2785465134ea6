"""Conversations in a file, compared with the same ones in memory."""

import json
import pickle
import random
import shutil
import tracemalloc
from pathlib import Path

import pytest

from nemo_speculative.data.conversations import (
    SPLIT_SALT,
    Conversation,
    ConversationFile,
    ConversationList,
    TokenRow,
    hash_fraction,
    parse_line,
    shuffled,
    split_by_hash,
)
from nemo_speculative.utils.errors import UserError


def line(number: int, text: str = "hello") -> dict:
    messages = [{"role": "user", "content": f"{number} {text}"}, {"role": "assistant", "content": text}]
    return {"id": f"c{number}", "conversations": messages}


def generated(number: int, turns: int) -> dict:
    return line(number) | {"rows": [{"input_ids": [number, n], "loss_mask": [0, 1]} for n in range(turns)]}


def write(file, lines) -> str:
    file.write_text("\n".join(json.dumps(one) if one else "" for one in lines) + "\n")
    return str(file)


@pytest.fixture
def mixed(tmp_path) -> str:
    """Conversations, generated rows, empty lines, and characters of several bytes."""
    lines = [line(0), {}, line(1, "größer 漢字 🙂"), generated(2, 3), {}, {}, generated(3, 1), line(4)]
    return write(tmp_path / "mixed.jsonl", lines)


def test_every_item_equals_that_of_the_whole_file_read_at_once(mixed):
    items = ConversationFile(mixed)
    lines = [(n, line) for n, line in enumerate(Path(mixed).read_bytes().split(b"\n"), start=1) if line.strip()]
    whole = [item for n, line in lines for item in parse_line(line, mixed, n)]
    assert list(items) == whole and len(items) == 7
    assert [items[n] for n in reversed(range(7))] == whole[::-1]
    assert items[-1] == whole[-1] and list(items[2:5]) == whole[2:5] and list(items[:-3:2]) == whole[:-3:2]
    with pytest.raises(IndexError):
        items[7]


def test_another_process_reads_the_same(mixed):
    items = ConversationFile(mixed)
    first = items[0]
    copy = pickle.loads(pickle.dumps(items))
    assert copy[0] == first and list(copy) == list(items)


def test_the_fingerprint_depends_on_content_and_not_on_the_path(mixed, tmp_path):
    items = ConversationFile(mixed)
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copy(mixed, moved)
    assert ConversationFile(moved).fingerprint == items.fingerprint
    moved.write_bytes(moved.read_bytes().replace(b"hello", b"hallo", 1))
    assert ConversationFile(moved).fingerprint != items.fingerprint
    chosen = [shuffled(items, 0), shuffled(items, 1), items[:3], items[1:4], items[:]]
    assert len({some.fingerprint for some in chosen}) == len(chosen)
    assert shuffled(items, 0).fingerprint == chosen[0].fingerprint


@pytest.mark.parametrize("change", ["id", "source", "ids", "mask", "text", "tools"])
def test_the_fingerprint_of_a_list_depends_on_every_field(change):
    def items(**changed):
        row = {"id": "a", "input_ids": [1, 2], "loss_mask": [False, True], "origin": "here", "source": ""} | changed
        return ConversationList([TokenRow(**row)])

    changes = {"id": {"id": "b"}, "source": {"source": "s"}, "ids": {"input_ids": [1, 3]},
               "mask": {"loss_mask": [True, True]}}  # fmt: skip
    if change in changes:
        assert items(**changes[change]).fingerprint != items().fingerprint
    else:
        base = Conversation("a", [{"role": "user", "content": "q"}], "here")
        other = Conversation("a", [{"role": "user", "content": "q" if change == "tools" else "r"}], "here",
                             [{"name": "f"}] if change == "tools" else None)  # fmt: skip
        assert ConversationList([base]).fingerprint != ConversationList([other]).fingerprint
    assert items(origin="elsewhere").fingerprint == items().fingerprint


def test_all_rows_of_one_conversation_are_on_the_same_side(tmp_path):
    items = ConversationFile(write(tmp_path / "a.jsonl", [generated(n, 1 + n % 3) for n in range(300)]))
    training, held_out = split_by_hash(items, 0.2)
    sides = [{row.id.split("#")[0] for row in side} for side in (training, held_out)]
    assert not sides[0] & sides[1]
    assert sides[1] == {f"c{n}" for n in range(300) if hash_fraction(f"c{n}", SPLIT_SALT) < 0.2}
    assert len(training) + len(held_out) == len(items)


def test_the_order_equals_that_of_a_shuffled_list(tmp_path):
    items = ConversationFile(write(tmp_path / "a.jsonl", [line(n) for n in range(100)]))
    listed = list(items)
    random.Random(5).shuffle(listed)
    assert list(shuffled(items, 5)) == listed


def test_a_malformed_line_is_named_when_the_file_is_opened(tmp_path):
    file = tmp_path / "a.jsonl"
    write(file, [line(n) for n in range(5)])
    file.write_bytes(file.read_bytes() + b'{"id": 1\n' + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl:6: not JSON"):
        ConversationFile(file)
    file.write_bytes(file.read_bytes().replace(b"hello", b"h\xffllo", 1))
    with pytest.raises(UserError, match=r"a\.jsonl:1: not UTF-8"):
        ConversationFile(file)


def test_memory_does_not_grow_with_the_length_of_lines(tmp_path):
    """Ten times the text in the same number of lines takes no more memory."""
    taken = []
    for length in (1_000, 10_000):
        file = write(tmp_path / f"{length}.jsonl", [line(n, "x" * length) for n in range(300)])
        ConversationFile(file)[0]
        tracemalloc.start()
        selections = split_by_hash(ConversationFile(file), 0.1), shuffled(ConversationFile(file), 0)
        taken.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(selections[1]) == 300
    assert taken[1] < taken[0] + 20_000 and taken[1] < 300 * 1_000
