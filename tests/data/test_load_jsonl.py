"""A JSONL file as the source of conversations, and its split into training and held out."""

import hashlib
import json
from pathlib import Path

import pytest

from nemo_speculative.config.schema import DataConfig
from nemo_speculative.data.conversations import ConversationList, TokenRow, load_jsonl, shuffled
from nemo_speculative.utils.errors import UserError


def messages(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]


def write(file: Path, numbers, key: str = "conversations", with_ids: bool = True) -> str:
    lines = [{key: messages(n)} | ({"id": f"c{n}"} if with_ids else {}) for n in numbers]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def ids(rows) -> list[str]:
    return [row.id for row in rows]


def naive_share(identity: str) -> float:
    """The first 32 bits of a SHA-256 of the id, read as a fraction."""
    return int(hashlib.sha256(f"side in training:{identity}".encode()).hexdigest()[:8], 16) / 2**32


@pytest.fixture
def many(tmp_path) -> str:
    return write(tmp_path / "many.jsonl", range(400))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_the_share_held_out_is_chosen_by_id(many, share):
    split = load_jsonl(DataConfig(path=many, held_out_share=share), seed=0)
    assert set(ids(split.held_out)) == {f"c{n}" for n in range(400) if naive_share(f"c{n}") < share}
    assert sorted(ids(split.training) + ids(split.held_out)) == sorted(f"c{n}" for n in range(400))
    assert len(split.held_out) / 400 == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("with_ids", [True, False])
def test_no_row_changes_sides_when_rows_are_added(tmp_path, with_ids):
    """Rows without an id of their own are known by their line."""
    config = DataConfig(path=write(tmp_path / "a.jsonl", range(200), with_ids=with_ids), held_out_share=0.1)
    before = load_jsonl(config, seed=0)
    write(tmp_path / "a.jsonl", range(300), with_ids=with_ids)
    after = load_jsonl(config, seed=9)
    assert set(ids(before.training)) <= set(ids(after.training))
    assert set(ids(before.held_out)) <= set(ids(after.held_out))


def test_the_split_does_not_depend_on_the_order_of_the_lines(tmp_path, many):
    reverse = write(tmp_path / "reverse.jsonl", reversed(range(400)))
    held_out = [set(ids(load_jsonl(DataConfig(path=path), seed=0).held_out)) for path in (many, reverse)]
    assert held_out[0] == held_out[1]


@pytest.mark.parametrize(("count", "kept_out"), [(1, 0), (2, 1), (3, 1)])
def test_a_small_file_keeps_one_row_out(tmp_path, count, kept_out):
    numbers = [n for n in range(400) if naive_share(f"c{n}") > 0.5][:count]
    split = load_jsonl(DataConfig(path=write(tmp_path / "few.jsonl", numbers), held_out_share=0.05), seed=0)
    assert (len(split.training), len(split.held_out)) == (count - kept_out, kept_out)


def test_no_share_keeps_nothing_out(many):
    split = load_jsonl(DataConfig(path=many, held_out_share=0.0), seed=0)
    assert (len(split.training), len(split.held_out)) == (400, 0)


def test_a_share_that_leaves_nothing_to_train_on(tmp_path):
    numbers = [n for n in range(400) if naive_share(f"c{n}") < 0.5][:3]
    path = write(tmp_path / "few.jsonl", numbers)
    with pytest.raises(UserError) as caught:
        load_jsonl(DataConfig(path=path, held_out_share=0.5), seed=0)
    assert str(caught.value) == "data: 3 conversations leave nothing to train on; lower data.held_out_share"


def test_a_held_out_file_of_its_own(tmp_path, many):
    other = write(tmp_path / "other.jsonl", range(1000, 1005))
    split = load_jsonl(DataConfig(path=many, held_out_path=other), seed=0)
    assert sorted(ids(split.training)) == sorted(f"c{n}" for n in range(400))
    assert sorted(ids(split.held_out)) == [f"c{n}" for n in range(1000, 1005)]


@pytest.mark.parametrize("key", ["path", "held_out_path"])
@pytest.mark.parametrize(("content", "complaint"), [(None, "does not exist"), ("", "is empty")])
def test_a_file_that_cannot_be_read_names_its_key(tmp_path, many, key, content, complaint):
    bad = tmp_path / "bad.jsonl"
    if content is not None:
        bad.write_text(content)
    with pytest.raises(UserError) as caught:
        load_jsonl(DataConfig(**({"path": many} | {key: str(bad)})), seed=0)
    message = str(caught.value)
    assert message.startswith(f"data.{key}: {bad} {complaint}")
    assert "\n" not in message


@pytest.mark.parametrize("limit", [1, 10, 10_000])
def test_max_conversations_takes_the_first_of_a_seeded_order(many, limit):
    whole = load_jsonl(DataConfig(path=many), seed=3)
    some = load_jsonl(DataConfig(path=many, max_conversations=limit), seed=3)
    assert ids(some.training) == ids(whole.training)[:limit]
    assert ids(some.held_out) == ids(whole.held_out), "what is measured on stays the same"


def test_the_order_is_that_of_the_seed(many):
    first, again, other = (load_jsonl(DataConfig(path=many), seed=s) for s in (0, 0, 1))
    assert ids(first.training) == ids(again.training)
    assert ids(first.training) != ids(other.training)
    assert sorted(ids(first.training)) == sorted(ids(other.training))


def test_shuffled_leaves_its_argument_alone():
    items = ConversationList([TokenRow(str(n), [n], [True], "here") for n in range(50)])
    assert sorted(int(row.id) for row in shuffled(items, 0)) == [int(row.id) for row in items] == list(range(50))
    assert ids(shuffled(items, 0)) != ids(items)
