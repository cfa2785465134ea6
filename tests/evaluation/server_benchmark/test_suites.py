"""Small examples of the published shapes: each suite of conf/ reads its own rows and refuses others."""

import json
from pathlib import Path

import datasets
import pytest

from nemo_speculative.config.app import to_job
from nemo_speculative.config.schema import SuiteConfig
from nemo_speculative.evaluation.server_benchmark.suites import Template, Turns, load_suite
from nemo_speculative.utils.errors import UserError
from tests.config.test_groups import GROUPS, composed

SHAPES = {
    "mt_bench": {"question_id": 81, "category": "writing", "turns": ["Compose a post.", "Rewrite it."]},
    "gsm8k": {"question": "How much is 2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    "humaneval": {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "canonical_solution": "    return x\n",
                  "test": "def check(candidate):\n    assert candidate(1) == 1\n", "entry_point": "f"},
    "math500": {"problem": "What is $1+1$?", "solution": "It is \\boxed{2}.", "answer": "2", "subject": "Algebra"},
    "mbpp": {"task_id": 1, "text": "Write f.", "code": "def f(): ...", "test_list": ["assert f() == 1", "assert f()"],
             "test_setup_code": "", "challenge_test_list": []},
    "alpaca": {"instruction": "Name three colors.", "input": "", "output": "Red, green, blue."},
    "qa": {"question": "who wrote hamlet", "answer": ["William Shakespeare"]},
    "summarization": {"article": "Much happened.", "highlights": "Much.", "id": "1"},
    "jsonl": {"prompt": "Anything."},
}  # fmt: skip
RIGHT = {"gsm8k": "#### 4", "math500": r"\boxed{2}", "humaneval": "    return x", "mbpp": "def f(): return 1"}


def suite_config(option: str, *overrides: str) -> SuiteConfig:
    return to_job(composed("benchmark", f"suite={option}", *overrides)).suite


def jsonl_file(tmp_path: Path, *rows: object) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("option", [option for group, option in GROUPS if group == "suite"])
def test_every_suite_reads_its_published_shape(option, tmp_path):
    row = SHAPES[option]
    suite = load_suite(suite_config(option, f"suite.path={jsonl_file(tmp_path, row, row)}"))
    assert suite.name == option and len(suite.prompts) == 2
    prompt = suite.prompts[0]
    shown = row.get("turns") or [
        row.get(name) for name in ("question", "prompt", "problem", "text", "article") if name in row
    ]
    for turn, message in zip(prompt.turns, shown or [row["instruction"]], strict=True):
        assert message.strip() in turn and "{" not in turn.replace("\\boxed{}", "")
    assert (suite.scorer is not None) == (option in RIGHT)
    if suite.scorer:
        assert suite.scorer.right(RIGHT[option], row) and not suite.scorer.right("I do not know.", row)


@pytest.mark.parametrize("option", ["gsm8k", "mt_bench"])
def test_every_suite_reads_the_hub(option, monkeypatch):
    """Rows as the hub's library returns them, without the hub."""
    sent = []

    def load_dataset(*where, split):
        sent.append((*where, split))
        return datasets.Dataset.from_list([SHAPES[option]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = suite_config(option)
    assert load_suite(config).prompts[0].turns[0]
    assert sent == [(config.repository, config.subset, config.split)]


def test_an_unreachable_hub_is_refused():
    with pytest.raises(
        UserError, match=r"suite\.repository: openai/gsm8k cannot be loaded .* suite\.path=FILE"
    ) as caught:
        load_suite(suite_config("gsm8k"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (
            [SHAPES["gsm8k"], {"turns": ["a"]}],
            r"rows\.jsonl:2: found the keys \['turns'\], expected question; .*suite=jsonl",
        ),
        ([{"question": "a"}], r"rows\.jsonl:1: found the keys \['question'\], expected answer"),
        ([["a"]], r"rows\.jsonl:1: found a list, expected a JSON object"),
        ([], "is empty"),
    ],
)
def test_a_file_of_another_shape_is_refused(rows, match, tmp_path):
    with pytest.raises(UserError, match=match):
        load_suite(suite_config("gsm8k", f"suite.path={jsonl_file(tmp_path, *rows)}"))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"PAR1"])
def test_a_file_that_is_not_jsonl_is_refused(content, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: cannot be read"):
        load_suite(suite_config("gsm8k", f"suite.path={file}"))
    with pytest.raises(UserError, match="does not exist or is not a file"):
        load_suite(suite_config("gsm8k", f"suite.path={tmp_path}"))


def test_turns():
    reader = Turns(["turns", "prompt", "messages"])
    assert reader.turns({"prompt": "a", "turns": ["b", "c"]}, "x") == ["b", "c"]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert reader.turns({"messages": messages}, "x") == ["a", "c"]
    for wrong in (
        {"turns": []},
        {"turns": [3]},
        {"prompt": " "},
        {"messages": messages[1:2]},
        {"messages": [{"role": "user"}]},
    ):
        with pytest.raises(UserError, match=r"x: .* expected a text, a list of texts, or messages"):
            reader.turns(wrong, "x")


def test_a_template_inserts_values_unchanged():
    assert Template("{a}: {b} {{}}").turns({"a": "{b}", "b": [1, "{0}"]}, "x") == ["{b}: 1\n{0} {}"]


def test_the_digest_depends_on_questions_and_right_answers(tmp_path):
    def digest(row, option="gsm8k", *overrides):
        return load_suite(suite_config(option, f"suite.path={jsonl_file(tmp_path, row)}", *overrides)).digest

    row = SHAPES["gsm8k"]
    one = digest(row)
    assert one == digest(row)
    assert one != digest({**row, "question": "another"}) and one != digest({**row, "answer": "#### 5"})
    alone = digest({"prompt": "a", "id": 1}, "jsonl")
    assert alone == digest({"prompt": "a", "id": 2}, "jsonl") != digest({"prompt": "b"}, "jsonl")
    limits = digest(SHAPES["mbpp"], "mbpp"), digest(SHAPES["mbpp"], "mbpp", "suite.scorer.seconds=99")
    assert limits[0] != limits[1]


def test_num_prompts_limits_the_suite(tmp_path):
    file = jsonl_file(tmp_path, *({"prompt": str(n)} for n in range(5)), ["never read"])
    suite = load_suite(suite_config("jsonl", f"suite.path={file}", "suite.num_prompts=3"))
    assert [prompt.turns for prompt in suite.prompts] == [("0",), ("1",), ("2",)]
