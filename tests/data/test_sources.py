"""Where conversations come from, and what is kept out of training."""

import hashlib
import json
from pathlib import Path

import datasets
import pytest

from nemo_speculative.config.schema import DataConfig, HubDataConfig
from nemo_speculative.data import sources
from nemo_speculative.data.sources import Split, load_hub, load_jsonl, load_stdlib, shuffled
from nemo_speculative.errors import UserError


def messages(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]


def write(file: Path, numbers, key: str = "conversations", with_ids: bool = True) -> str:
    lines = [{key: messages(n)} | ({"id": f"c{n}"} if with_ids else {}) for n in numbers]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def ids(rows) -> list[str]:
    return [row.id for row in rows]


def naive_share(identity: str) -> float:
    """The first 32 bits of the id's SHA-256, read as a fraction."""
    return int(hashlib.sha256(identity.encode()).hexdigest()[:8], 16) / 2**32


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
    items = list(range(50))
    assert sorted(shuffled(items, 0)) == items == list(range(50))
    assert shuffled(items, 0) != items


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A directory that the `datasets` library reads, with its cache beside it and the network off."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    (tmp_path / "repository").mkdir()
    return tmp_path / "repository"


def test_a_directory_of_jsonl_files(hub):
    write(hub / "train.jsonl", range(200), key="messages")
    split = load_hub(HubDataConfig(repository=str(hub), held_out_share=0.2), seed=0)
    both = {row.id: row for row in [*split.training, *split.held_out]}
    assert both.keys() == {f"train/{n}" for n in range(200)}
    assert set(ids(split.held_out)) == {i for i in both if naive_share(i) < 0.2}
    assert all(both[f"train/{n}"].messages == messages(n) for n in range(200))
    assert both["train/7"].origin == f"{hub}:train:7"


def test_a_split_held_out_and_a_column_of_another_name(hub):
    write(hub / "train.jsonl", range(20), key="talk")
    write(hub / "test.jsonl", range(100, 105), key="talk")
    config = HubDataConfig(repository=str(hub), held_out_split="test", messages_key="talk", max_conversations=5)
    split = load_hub(config, seed=0)
    assert len(split.training) == 5
    assert sorted(ids(split.held_out)) == [f"test/{n}" for n in range(5)]
    assert {row.messages[0]["content"] for row in split.held_out} == {f"question {n}" for n in range(100, 105)}


def test_a_column_that_is_missing_is_named_with_those_there_are(hub):
    write(hub / "train.jsonl", range(3), key="talk")
    with pytest.raises(UserError) as caught:
        load_hub(HubDataConfig(repository=str(hub)), seed=0)
    assert str(caught.value) == f"data.messages_key: {hub} has the columns ['talk', 'id'], not 'messages'"


def test_a_row_that_is_no_conversation_is_named(hub):
    lines = [{"messages": messages(0)}, {"messages": [{"role": "human", "content": "q"}]}]
    (hub / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError) as caught:
        load_hub(HubDataConfig(repository=str(hub)), seed=0)
    assert str(caught.value).startswith(f"{hub}:train:1: message 0 is {{'role': 'human'")
    assert "expected a role among" in str(caught.value)


def test_a_column_that_holds_text_is_named_by_its_own_name(hub):
    (hub / "train.jsonl").write_text('{"talk": "hello"}\n')
    with pytest.raises(UserError) as caught:
        load_hub(HubDataConfig(repository=str(hub), messages_key="talk"), seed=0)
    assert str(caught.value) == f"{hub}:train:0: \"talk\" must be a list of messages, not 'hello'"


@pytest.mark.parametrize("option", [{"split": "validation"}, {"held_out_split": "validation"}])
def test_a_split_that_is_missing(hub, option):
    write(hub / "train.jsonl", range(3), key="messages")
    with pytest.raises(UserError) as caught:
        load_hub(HubDataConfig(repository=str(hub), **option), seed=0)
    message = str(caught.value)
    assert message.startswith(f"data.repository: {hub} cannot be loaded (")
    assert "validation" in message
    assert "\n" not in message


@pytest.mark.parametrize("repository", ["nobody/nothing-at-all", "/no/such/directory"])
def test_a_repository_that_cannot_be_had(hub, repository):
    with pytest.raises(UserError) as caught:
        load_hub(HubDataConfig(repository=repository), seed=0)
    message = str(caught.value)
    assert message.startswith(f"data.repository: {repository} cannot be loaded (")
    assert "data=jsonl data.path=FILE" in message
    assert "\n" not in message


@pytest.mark.parametrize("error", [RuntimeError(), RuntimeError("first\nsecond"), RuntimeError("x" * 5000)])
def test_whatever_the_library_raises_is_one_short_line(hub, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError) as caught:
        load_hub(HubDataConfig(repository="some/thing"), seed=0)
    message = str(caught.value)
    assert message.startswith("data.repository: some/thing cannot be loaded (RuntimeError: ")
    assert "\n" not in message
    assert len(message) < 400


def test_the_standard_library_source_shuffles_and_limits(monkeypatch):
    sides = {False: [f"t{n}" for n in range(50)], True: [f"h{n}" for n in range(20)]}
    monkeypatch.setattr(sources, "stdlib_conversations", lambda held_out: sides[held_out])
    split = load_stdlib(DataConfig(path=None, max_conversations=30), seed=1)
    assert isinstance(split, Split)
    assert len(set(split.training)) == 30
    assert set(split.training) <= set(sides[False])
    assert split.training == shuffled(sides[False], 1)[:30]
    assert sorted(split.held_out) == sorted(sides[True])
