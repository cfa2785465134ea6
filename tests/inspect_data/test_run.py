"""Reports from a command line."""

import json
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from nemo_speculative.config.app import CONF, to_job
from nemo_speculative.data import stdlib
from nemo_speculative.data.chat_template import tokenize
from nemo_speculative.inspect_data.run import inspect
from nemo_speculative.targets import demo
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import dir_lock
from tests.conftest import make_tokenizer
from tests.inspect_data.conftest import END, dialogue

TALKS = [dialogue(f"u:question {n}", f"a:the answer {n % 7}", identity=f"id{n}") for n in range(40)]


def job_of(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_job(compose("inspect_data", overrides=list(overrides)))


@pytest.fixture
def data(tmp_path) -> Path:
    file = tmp_path / "talks.jsonl"
    lines = [{"id": talk.id, "conversations": talk.messages, "source": "made"} for talk in TALKS]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def settings(target_dir, data, tmp_path) -> list[str]:
    return ["model=local", f"model.path={target_dir}", f"data.path={data}", f"output={tmp_path / 'report'}"]


def test_a_report_on_a_file(settings, tmp_path):
    text = inspect(job_of(*settings, "show=[id7,3]", "data.packed_length=512"))
    figures = json.loads((tmp_path / "report" / "figures.json").read_text())
    rows = [tokenize(make_tokenizer(), talk, {END}) for talk in TALKS]
    assert figures["tokens"] == sum(len(row.input_ids) for row in rows)
    assert figures["supervised_tokens"] == sum(sum(row.loss_mask) for row in rows)
    assert (figures["conversations"], figures["training"] + figures["held_out"]) == (40, 40)
    assert figures["comparison"]["equal"] == figures["comparison"]["turns"] == 40
    assert (figures["max_length"], figures["packing"]["row_tokens"]) == (256, 512)
    assert list(figures["sources"]) == ["made"] and figures["notes"] == []
    assert "⟦the answer 0<|end|>⟧" in text and "question 2" in text, "id7, and the third line"
    page = (tmp_path / "report" / "report.html").read_text()
    assert "question 7" in page and page.endswith("</html>\n")
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [".lock", "figures.json", "report.html"]


def test_a_second_report_is_equal(settings, tmp_path):
    report, pages = tmp_path / "report", []
    for _ in range(2):
        inspect(job_of(*settings))
        pages.append([(report / name).read_bytes() for name in ("report.html", "figures.json")])
    assert pages[0] == pages[1]


def test_conversations_that_a_training_refuses_are_reported(settings, data):
    with data.open("a") as lines:
        lines.write(json.dumps({"id": "silent", "conversations": [{"role": "user", "content": "?"}]}) + "\n")
    text = inspect(job_of(*settings, "show=[silent]"))
    assert "a training refuses 1 conversations, and ends at the first: silent: " in text
    assert "silent is not shown: a training makes no row of it" in text


def test_answers_that_the_template_does_not_render_are_counted(settings, data, tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with data.open("a") as file:
        file.write(json.dumps({"id": "called", "conversations": messages}) + "\n")
    assert "1 answers are trained on as their end alone" in inspect(job_of(*settings))


def test_the_embedded_target_need_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in (demo, stdlib):  # the real one takes seconds
        monkeypatch.setattr(module, "stdlib_conversations", lambda held_out: TALKS[:9] if held_out else TALKS[9:])
    text = inspect(job_of("data.max_conversations=20", f"model.cache_dir={tmp_path}/none", "compare=5"))
    assert "20 for training" in text and "data.answers=target: these are the answers of the data" in text
    assert "5 of 5 turns equal the tokenizer's template" in text
    assert not (tmp_path / "none").exists()
    assert (tmp_path / "outputs" / "inspect-stdlib" / "report.html").is_file()


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["show=[nowhere]"], "show: no conversation among 40 has the id 'nowhere'"),
        (["url=http://127.0.0.1:1"], "url: http://127.0.0.1:1: cannot be reached"),
        (["data.path=/no/such.jsonl"], "data.path: /no/such.jsonl does not exist"),
        (["data.max_length=1000"], "data.max_length is 1000, longer than the target's context of 256"),
        (["model.path=/no/model"], "model.path: /no/model does not exist"),
        (["compare=-1"], "compare is -1: expected a number in [0, inf)"),
    ],
)
def test_errors_of_one_line(settings, tmp_path, overrides, text):
    with pytest.raises(UserError) as caught:
        inspect(job_of(*settings, *overrides))
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report" / "report.html").exists()


def test_a_data_path_that_would_not_be_read():
    with pytest.raises(UserError, match=r"data\.path is talks\.jsonl, and data=tiny reads no file: add data=jsonl"):
        job_of("data.path=talks.jsonl")


def test_a_tokenizer_without_a_template(settings, target_dir, tmp_path):
    bare = shutil.copytree(target_dir, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="the tokenizer has no chat template; add one to it"):
        inspect(job_of(*settings, f"model.path={bare}"))


def test_all_stop_tokens_of_the_target_end_an_answer(settings, target_dir, tmp_path):
    """The stop tokens include those of the generation configuration, as in a training."""
    several = shutil.copytree(target_dir, tmp_path / "several")
    comma = make_tokenizer().encode(" ", add_special_tokens=False)[0]
    path = several / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [END, comma]}))
    supervised = []
    for model in (target_dir, several):
        inspect(job_of(*settings, f"model.path={model}"))
        supervised.append(json.loads((tmp_path / "report" / "figures.json").read_text())["supervised_tokens"])
    rows = [tokenize(make_tokenizer(), talk, {END, comma}) for talk in TALKS]
    assert supervised[1] == sum(sum(row.loss_mask) for row in rows) < supervised[0]


def test_a_second_process_is_refused(settings, tmp_path):
    with dir_lock(tmp_path / "report", "output"), pytest.raises(UserError, match="output: another process writes"):
        inspect(job_of(*settings))


@pytest.mark.parametrize(
    ("overrides", "directory"),
    [
        (["model=local", "model.path=x", "data.path=a/talks.jsonl"], "outputs/inspect-talks"),
        (["model=llama31_8b"], "outputs/inspect-ultrachat_200k"),
        ([], "outputs/inspect-stdlib"),
        (["output=here"], "here"),
    ],
)
def test_the_directory_of_the_report(overrides, directory):
    assert job_of(*overrides).directory == Path(directory)
