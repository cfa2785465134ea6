"""The commands of the served benchmark; the recipes that they start have tests of their own."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import served
from nemo_speculative.config.app import to_job
from nemo_speculative.utils.errors import UserError
from tests.config.test_groups import composed


@pytest.fixture
def ran(monkeypatch):
    """The overrides of every recipe that the benchmark would start."""
    log = {}

    class Done:
        returncode = 0

    def start(command, **_):
        log[command[1]] = command[2:]
        return Done

    monkeypatch.setattr(served.subprocess, "run", start)
    return log


def test_both_recipes_accept_their_commands(tmp_path, ran):
    served.run(served.parse(["--out", str(tmp_path / "a place"), "--steps", "7", "--conversations", "20"]))
    train = to_job(composed("train_eagle3", *ran["recipes/train_eagle3.py"]))
    measure = to_job(composed("benchmark", *ran["recipes/benchmark.py"]))
    assert train.trainer.max_steps == 7 and measure.checkpoint == str(tmp_path / "a place" / "run")
    assert measure.sweep == [[3, 1], [5, 1], [4, 4, 16]] and measure.server.device == "cpu"
    files = (tmp_path / "a place" / f"{name}.jsonl" for name in ("questions", "train"))
    asked, trained = (file.read_text().splitlines() for file in files)
    assert len(asked) == served.ASKED and len(trained) == 20
    said = {json.loads(line)["prompt"] for line in asked}
    assert not said & {json.loads(line)["conversations"][0]["content"] for line in trained}


def test_a_random_target_answers_every_prompt_with_other_words(tmp_path):
    directory = served.random_target(tmp_path, "tiny", "cpu")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    answers = set()
    for prompt in served.random_prompts(4, 256):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        answers.add(tuple(out.tolist()))
        assert ids.tolist() == [[1, *(int(word[1:]) for word in prompt.split()), 2]]
    assert len(answers) == 4 and all(len(set(answer)) > 3 for answer in answers)


def test_a_failed_recipe_ends_the_benchmark(tmp_path, monkeypatch):
    class Failed:
        returncode = 1

    monkeypatch.setattr(served.subprocess, "run", lambda *_, **__: Failed)
    with pytest.raises(UserError, match=r"recipes/train_eagle3\.py failed"):
        served.run(served.parse(["--out", str(tmp_path)]))


def test_prompts_are_the_first_questions(tmp_path):
    file = tmp_path / "prompts.jsonl"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "user", "content": "r"}]
    file.write_text(json.dumps({"conversations": turns}) + "\n")
    assert served.read_prompts(file) == ["q"]
    file.write_text(json.dumps({"conversations": turns}) + "\n" + json.dumps({"conversations": turns[:1]}) + "\n")
    with pytest.raises(UserError, match=r"prompts\.jsonl:2: expected .*role"):
        served.read_prompts(file)


def test_a_target_needs_prompts_of_its_own(tmp_path, capsys):
    with pytest.raises(SystemExit):
        served.parse(["--out", str(tmp_path), "--target", str(tmp_path)])
    assert "--target and --prompts require each other" in capsys.readouterr().err
