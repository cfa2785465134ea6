import json
import shutil

import pytest

from nemo_speculative.config.schema import MergeJob
from nemo_speculative.generate_data.merge import merge
from nemo_speculative.generate_data.run import generate_data
from nemo_speculative.utils.errors import UserError
from tests.conftest import WORDS
from tests.generate_data.conftest import conversation, read, write


@pytest.fixture
def parts(job, tmp_path):
    """Answers of 0:5 and 5:12 in two directories, and of the whole in a third."""
    generate_data(job(range="0:5", temperature=1.0, output=str(tmp_path / "a")))
    generate_data(job(range="5:12", temperature=1.0, output=str(tmp_path / "b")))
    generate_data(job(temperature=1.0, output=str(tmp_path / "whole")))
    return tmp_path


def merged(parts, *names, **changed):
    target = parts / "merged.jsonl"
    target.unlink(missing_ok=True)
    return merge(MergeJob(parts=[str(parts / name) for name in names], output=str(target), **changed)), target


def test_the_merged_parts_equal_one_run_byte_for_byte(parts):
    whole = (parts / "whole" / "0-end" / "answers.jsonl").read_bytes()
    for names in (("a", "b"), ("b", "a"), ("b/5-12", "a/0-5"), ("whole",)):
        result, file = merged(parts, *names)
        assert file.read_bytes() == whole
        assert result == "12 conversations answered, 0 skipped"


def test_equal_overlaps_are_merged(parts):
    _, file = merged(parts, "a", "b", "whole")
    assert file.read_bytes() == (parts / "whole" / "0-end" / "answers.jsonl").read_bytes()


def test_different_overlaps_are_refused_by_line(parts):
    answers = parts / "b" / "5-12" / "answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    record = json.loads(lines[2])
    record["conversations"][-1]["content"] = "tampered"
    lines[2] = json.dumps(record) + "\n"
    answers.write_text("".join(lines))
    with pytest.raises(UserError, match=r"line 7 has one answer in .* and another in"):
        merged(parts, "b", "whole")
    assert not (parts / "merged.jsonl").exists()


def test_gaps_are_listed(parts):
    with pytest.raises(UserError, match=r"of 12 lines there are 5 missing \(0:5\); name the directories that hold"):
        merged(parts, "b")
    result, file = merged(parts, "b", allow_missing=True)
    assert result == "7 conversations answered, 0 skipped; without 5 missing (0:5)"
    assert [record["index"] for record in read(file)] == list(range(5, 12))


def test_failed_lines_are_listed_and_skipped_lines_are_no_gaps(parts):
    answers, left = (parts / "a" / "0-5" / name for name in ("answers.jsonl", "left_out.jsonl"))
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:2] + lines[4:]))
    digest = "0123456789abcdef"
    reasons = [{"index": 2, "asked": digest, "id": "c2", "outcome": "failed", "reason": "r", "attempts": 1}]
    reasons += [{"index": 3, "asked": digest, "id": "c3", "outcome": "skipped", "reason": "r", "attempts": 0}]
    left.write_text("".join(json.dumps(reason) + "\n" for reason in reasons))
    with pytest.raises(UserError, match=r"1 failed \(2:3\)"):
        merged(parts, "a", "b")
    result, _ = merged(parts, "a", "b", allow_missing=True)
    assert result == "10 conversations answered, 1 skipped; without 1 failed (2:3)"


def test_parts_of_other_inputs_or_settings_are_refused_by_name(parts, job, tmp_path):
    generate_data(job(range="0:5", temperature=0.5, output=str(tmp_path / "cold")))
    with pytest.raises(UserError, match=r"made with temperature=1.0, and it is 0.5 in"):
        merged(parts, "b", "cold")
    other = write(tmp_path / "other.jsonl", [conversation(f"o{n}", WORDS[n : n + 20]) for n in range(12)])
    generate_data(job(range="0:5", temperature=1.0, path=str(other), output=str(tmp_path / "other")))
    with pytest.raises(UserError, match=r"made with input \(the content of path\)="):
        merged(parts, "b", "other")


def test_invalid_parts_and_an_existing_output_are_refused(parts, tmp_path):
    with pytest.raises(UserError, match="parts is empty"):
        merged(parts)
    with pytest.raises(UserError, match=r"holds no manifest.json"):
        merged(parts, "nowhere")
    shutil.copy(parts / "a" / "0-5" / "answers.jsonl", tmp_path / "there.jsonl")
    with pytest.raises(UserError, match=r"there.jsonl exists"):
        merge(MergeJob(parts=[str(parts / "a")], output=str(tmp_path / "there.jsonl")))
    (parts / "a" / "0-5" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a manifest that generate_data\.py wrote"):
        merged(parts, "a", "b")


def test_a_damaged_line_is_named(parts):
    answers = parts / "a" / "0-5" / "answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join([*lines[:1], "torn\n", *lines[2:]]))
    with pytest.raises(UserError, match=r"answers.jsonl:2: not a line that was written here"):
        merged(parts, "a", "b")
