"""Bad input to a run: one line, a non-zero exit, and nothing lost.  (What the config schema refuses: tests/config.)"""

import json
import re
import shutil

import pytest

from nemo_speculative.checkpoint.draft_checkpoint import read_servable
from tests.conftest import PREFIX_TEMPLATE, make_target
from tests.integration.conftest import drive, run, train
from tests.integration.test_training import only_error


def conversations(tmp_path, *lines):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


GOOD = json.dumps({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
SILENT = json.dumps({"conversations": [{"role": "user", "content": "a"}]})


@pytest.mark.parametrize(
    "lines, message",
    [
        ([GOOD, "{bad"], "bad.jsonl:2"),
        ([GOOD, GOOD, SILENT], "bad.jsonl:3: the conversation has no assistant turn"),
        ([""], "is empty"),
    ],
    ids=["malformed", "no assistant turn", "empty"],
)
def test_bad_data_files(settings, tmp_path, lines, message):
    file = conversations(tmp_path, *lines)
    line = only_error(train(settings, tmp_path / "run", f"data.path={file}", "data.held_out_share=0"))
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.max_length=4096", "data.max_length is 4096, longer than the target's context of 256"),
        ("draft.vocab_size=301", "draft.vocab_size is 301, larger than the target's vocabulary of 300"),
        ("trainer.device=cuda", "trainer.device=cuda"),
        ("optimizer.lr=1e30", "the loss or its gradient is not finite on the batch of"),
        ("parallelism.replicate=0", "parallelism.replicate is 0"),
        ("draft.aux_layers=[4,1,3]", "ascending"),
        ("data.path=/no/such/file.jsonl", "/no/such/file.jsonl does not exist"),
    ],
)
def test_bad_settings(settings, tmp_path, override, message):
    if override == "trainer.device=cuda" and __import__("torch").cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert message in only_error(train(settings, tmp_path / "run", override))


def test_too_few_layers_for_the_formula(settings, tmp_path):
    target = make_target(tmp_path / "shallow", num_layers=6)
    line = only_error(train(settings, tmp_path / "run", f"model.path={target}"))
    assert "6 layers, too few" in line and "draft.aux_layers=" in line


def test_a_template_that_cannot_mask(settings, tmp_path):
    disagreeing = PREFIX_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ messages | length }}")
    target = make_target(tmp_path / "target", template=disagreeing)
    line = only_error(train(settings, tmp_path / "run", f"model.path={target}"))
    assert "conversations.jsonl:" in line and "generation" in line


@pytest.mark.parametrize("log_interval", [1, 4])
def test_a_nan_names_the_step_and_the_batch_and_leaves_the_last_checkpoint(settings, tmp_path, log_interval):
    """The target's features are NaN from step 5 on; the loss is checked on log steps only."""
    line = only_error(
        drive("poison_from", 5, [*settings, f"trainer.log_interval={log_interval}"], tmp_path / "run"),
    )
    assert (
        re.search(r"step 5: the loss or its gradient is not finite on the batch of \d+, \d+", line) and "step_3" in line
    )
    assert read_servable(tmp_path / "run").provenance.step == 3


def test_resuming_as_another_run_is_refused(settings, finished, tmp_path):
    """The keys that are compared are tested in tests/training/test_checkpointer.py."""
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    names = ("metrics.jsonl", "config.yaml")
    before = [(tmp_path / "run" / name).read_text() for name in names]
    line = only_error(train(settings, tmp_path / "run", "resume=auto", "draft.vocab_size=100"))
    assert "draft.vocab_size is 100, the run was started with 200" in line
    assert [(tmp_path / "run" / name).read_text() for name in names] == before


def test_resuming_on_changed_data_is_refused(settings, finished, data_file, tmp_path):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    changed = tmp_path / "changed.jsonl"
    changed.write_text(data_file.read_text().replace("wizards", "witches"))
    line = only_error(train(settings, tmp_path / "run", "resume=auto", f"data.path={changed}"))
    assert "other data" in line


def cut(content):
    return content[: len(content) // 2]


def with_one_other_byte(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


DAMAGES = [("position.json", cut), (".metadata", cut), ("__0_0.distcp", cut), ("__0_0.distcp", with_one_other_byte)]


@pytest.mark.parametrize("name, damaged", DAMAGES)
def test_a_damaged_resume_state_is_refused_before_loading_and_names_the_previous_one(
    settings, finished, target_dir, tmp_path, name, damaged
):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    shutil.copytree(target_dir, tmp_path / "target")
    (tmp_path / "target" / "model.safetensors").unlink()
    file = tmp_path / "run" / "checkpoints" / "step_10" / "state" / name
    file.write_bytes(damaged(file.read_bytes()))
    line = only_error(train(settings, tmp_path / "run", "resume=auto", f"model.path={tmp_path}/target"))
    assert f"step_10: is damaged (state/{name}" in line and "the one before it is step_9: remove this directory" in line
    if name != "position.json":
        return
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_10")
    again = train(settings, tmp_path / "run", "resume=auto")
    assert again.returncode == 0 and "resumed from step 9" in again.stdout


def test_a_fresh_start_renames_an_earlier_run(settings, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    done = train(settings, tmp_path / "run", "trainer.max_steps=1")
    assert done.returncode == 0 and "run.previous-1" in done.stdout
    assert (tmp_path / "run.previous-1" / "checkpoints" / "step_10").is_dir()


def test_plan_shows_the_run_and_loads_no_weights(settings, target_dir, tmp_path):
    shutil.copytree(target_dir, tmp_path / "target")
    (tmp_path / "target" / "model.safetensors").unlink()
    done = train(settings, tmp_path / "run", "plan=true", f"model.path={tmp_path}/target")
    assert done.returncode == 0, done.stderr
    for message in (
        "aux layers [1, 3, 4]",
        "200 of 300",
        "10 steps of 4 rows of 128",
        "memory    about",
        " cached; online: ",
        " a step, ",
        "multiply-adds",
        str(tmp_path / "run"),
        "⟦",
    ):
        assert message in done.stdout
    assert not (tmp_path / "run").exists()
    assert run("recipes/train_eagle3.py", *settings, "plan=true", "draft.vocab_size=400").returncode == 1
