"""Complete runs, each in its own process."""

import json
import re
import shlex

import pytest

from nemo_speculative.checkpoint.draft_checkpoint import read_servable
from tests.integration.conftest import drive, metrics, run, torchrun, train


def weights(directory):
    return (directory / "checkpoints" / "latest" / "model" / "model.safetensors").read_bytes()


def only_error(process):
    """The single error line of a failed program."""
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode not in (0, None) and len(lines) == 1, process.stderr
    assert "Traceback" not in process.stderr
    return lines[0]


def test_a_run_writes_all_documented_files(finished):
    steps = sorted(p.name for p in (finished / "checkpoints").iterdir() if not p.is_symlink())
    assert "step_9" in steps and "step_10" in steps and len(steps) <= 3
    for name in ("latest", "best", *steps):
        assert read_servable(finished / "checkpoints" / name / "model").provenance.speculative.num_steps == 3
    lines = metrics(finished)
    assert [line["step"] for line in lines] == list(range(1, 11))
    expected = {"train/loss", "train/acc_0", "train/ploss_2", "train/tau", "train/lr", "train/grad_norm", "data/epoch"}
    assert all(expected <= line.keys() for line in lines)
    assert [line["step"] for line in lines if "val/loss" in line] == [4, 8, 10]
    assert [line["step"] for line in lines if "val/tau_decoded" in line] == [3, 6, 9, 10]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["lossless"] is True and summary["tau"] >= 1 and summary["ngram_tau"] >= 1
    assert len(summary["acceptance_per_position"]) == 3
    assert summary["tokens_per_second"] > 0 and summary["baseline_tokens_per_second"] > 0
    assert read_servable(summary["checkpoint"]).algorithm == "EAGLE3"
    assert summary["checkpoint"] in shlex.split(summary["serve_command"])
    assert "draft:" in (finished / "config.yaml").read_text()
    assert list((finished / "tensorboard").glob("**/events*"))


@pytest.mark.parametrize("fault, step", [("kill_in_step", 8), ("kill_in_save", 6), ("kill_after_rename", 6)])
def test_a_killed_run_resumes_bit_for_bit(fault, step, settings, finished, tmp_path):
    killed = drive(fault, step, settings, tmp_path / "run")
    assert killed.returncode == -9, killed.stderr
    resumed = train(settings, tmp_path / "run", "resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"resumed from step [36]", resumed.stdout)
    assert metrics(tmp_path / "run") == metrics(finished)
    assert weights(tmp_path / "run") == weights(finished)


def test_the_same_seed_gives_the_same_weights(settings, finished, tmp_path):
    """Synchronous saving gives the same result."""
    done = train(settings, tmp_path / "run", "trainer.async_save=false")
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run") == metrics(finished)
    assert weights(tmp_path / "run") == weights(finished)


@pytest.mark.parametrize("parallelism", ["fsdp2", "cp"])
def test_two_ranks_give_the_losses_of_one_rank(settings, finished, tmp_path, parallelism):
    done = train(settings, tmp_path / "run", f"parallelism={parallelism}", run=torchrun)
    assert done.returncode == 0, done.stderr
    for one, two in zip(metrics(finished), metrics(tmp_path / "run"), strict=True):
        assert two["data/rows"] == one["data/rows"]
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)
        assert two["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-4)
        if "val/loss" in one:
            assert two["val/loss"] == pytest.approx(one["val/loss"], rel=1e-5)
    alone = train(settings, tmp_path / "run", "resume=auto", "trainer.max_steps=12")
    assert alone.returncode == 0 and "resumed from step 10" in alone.stdout, alone.stderr


def test_ctrl_c_saves_and_the_run_can_resume(settings, finished, tmp_path):
    stopped = drive("interrupt_in_step", 5, settings, tmp_path / "run")
    assert stopped.returncode == 130 and "saved step" in stopped.stdout, stopped.stderr
    assert (tmp_path / "run" / "questions.jsonl").exists(), "nothing to measure the checkpoint by"
    assert (tmp_path / "run" / "checkpoints" / "latest" / "model" / "model.safetensors").exists()
    resumed = train(settings, tmp_path / "run", "resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert [line["train/loss"] for line in metrics(tmp_path / "run")] == [
        line["train/loss"] for line in metrics(finished)
    ]
    assert weights(tmp_path / "run") == weights(finished)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(settings, tmp_path):
    line = only_error(full := drive("fill_disk_at", 6, settings, tmp_path / "run"))
    assert "could not be written" in line and "step_3" in line, full.stderr
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if not p.is_symlink()] == ["step_3"]
    assert read_servable(tmp_path / "run").provenance.step == 3


def test_a_save_that_fails_on_one_rank_ends_the_other(settings, tmp_path):
    """Only rank 0 writes the model; rank 1 must not wait for it forever."""
    full = drive("fill_disk_at", 3, settings, tmp_path / "run", run=torchrun)
    assert full.returncode != 0 and "could not be written" in full.stderr
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_missing_model_is_reported_before_any_loading(tmp_path):
    line = only_error(run("recipes/train_eagle3.py", "model=llama31_8b", "draft=eagle3", f"output_dir={tmp_path}/run"))
    assert "meta-llama/Llama-3.1-8B-Instruct" in line and "model.path=/path/to/model" in line
    assert not (tmp_path / "run").exists()


def test_multirun_gives_each_job_a_directory(settings, tmp_path):
    done = train(["--multirun", *settings], tmp_path / "run", "seed=0,1", "trainer.max_steps=2")
    assert done.returncode == 0, done.stderr
    first, second = (metrics(tmp_path / "run" / str(n)) for n in range(2))
    assert first[0]["train/loss"] != second[0]["train/loss"]


@pytest.mark.parametrize("backend", ["hf_fsdp2", "hf_tp"])
def test_a_distributed_target_gives_the_losses_of_a_whole_one(backend, settings, finished, tmp_path):
    done = train(settings, tmp_path / "run", f"backend={backend}", ranks=2)
    assert done.returncode == 0, done.stderr
    for one, two in zip(metrics(finished), metrics(tmp_path / "run"), strict=True):
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)
        assert two["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-4)
        assert ("val/loss" in two) == ("val/loss" in one) and "val/tau_decoded" not in two
        if "val/loss" in one:
            assert two["val/loss"] == pytest.approx(one["val/loss"], rel=1e-5)
    assert "the draft was not measured, as only backend=hf decodes" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == "step_10"
