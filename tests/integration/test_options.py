"""Options that must not change a result, or whose effect shows only in a complete run."""

import json
import shutil

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from nemo_speculative.checkpoint.draft_checkpoint import read_servable
from nemo_speculative.data.conversations import ConversationFile
from nemo_speculative.generate_data.answers import answer
from tests.integration.conftest import drive, metrics, run, train


def losses(directory):
    return [line["train/loss"] for line in metrics(directory)]


def test_small_chunks_accumulation_and_compilation_change_no_loss(settings, finished, tmp_path):
    options = ["trainer.ttt_chunk_slots=64", "trainer.micro_batch_size=1", "trainer.compile=true"]
    done = train(settings, tmp_path / "run", *options, "trainer.max_steps=4", "optimizer.decay_ratio=0")
    plain = train(settings, tmp_path / "plain", "trainer.max_steps=4", "optimizer.decay_ratio=0")
    assert done.returncode == 0 and plain.returncode == 0, done.stderr + plain.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_bfloat16_over_two_ranks_keeps_float32_master_weights(settings, finished, tmp_path):
    """FSDP2's mixed precision: the state on disk is float32, and the losses follow float32's."""
    done = train(settings, tmp_path / "run", "trainer.dtype=bfloat16", ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=2e-2)
    state = FileSystemReader(str(tmp_path / "run" / "checkpoints" / "latest" / "state")).read_metadata()
    tensors = {n: t for n, t in state.state_dict_metadata.items() if "fc.weight" in n and hasattr(t, "properties")}
    assert len(tensors) >= 3 and {t.properties.dtype for t in tensors.values()} == {torch.float32}


def test_a_run_on_two_ranks_resumes_on_one(settings, finished, tmp_path):
    stopped = train(settings, tmp_path / "run", "trainer.save_interval=6", ranks=2)
    assert stopped.returncode == 0, stopped.stderr
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_10")
    alone = train(settings, tmp_path / "run", "resume=auto")
    assert alone.returncode == 0 and "resumed from step 6" in alone.stdout, alone.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=1e-5)


def test_wandb_offline_needs_no_account(settings, tmp_path):
    done = train(settings, tmp_path / "run", "logger=wandb", "trainer.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_a_profile_is_written(settings, tmp_path):
    done = train(settings, tmp_path / "run", "logger=none", "trainer.profile=true")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "profile").glob("**/*.json*"))


def test_a_checkpoint_is_evaluated_alone(finished, data_file):
    """On the questions of its run τ is that of the run; a question of a file ends before its first answer."""
    base = ("recipes/evaluate.py", f"checkpoint={finished}", "evaluation.max_new_tokens=12")
    same, other = run(*base), run(*base, f"questions={data_file}", "evaluation.num_questions=3", "num_steps=2")
    assert same.returncode == 0 and other.returncode == 0, same.stderr + other.stderr
    summary = json.loads(same.stdout.splitlines()[-1])
    assert summary["tau"] == json.loads((finished / "summary.json").read_text())["tau"]
    summary = json.loads(other.stdout.splitlines()[-1])
    assert summary["questions"] == 3 and summary["lossless"] and len(summary["acceptance_per_position"]) == 2


def test_answers_of_the_target_are_trained_on_and_survive_a_kill(settings, data_file, target, tmp_path):
    chosen = ["data.answers=target", "data.max_answer_tokens=20", f"data.cache_dir={tmp_path}", "trainer.max_steps=2"]
    assert drive("kill_in_answer", 30, [*settings, *chosen], tmp_path / "run").returncode == -9
    (file,) = (tmp_path / "answers").glob("*/answers.jsonl")
    prefix = file.read_bytes().rpartition(b"\n")[0]
    assert prefix.count(b"\n") == 28 and not (tmp_path / "run").exists()
    done = train(settings, tmp_path / "run", *chosen)
    assert done.returncode == 0 and "answering, training: 29 of" in done.stdout, done.stderr
    assert "covering" in done.stdout and read_servable(tmp_path / "run").provenance.step == 2
    assert file.read_bytes().startswith(prefix)
    limits = {"max_answer_tokens": 20, "max_length": 128}
    at_once = answer(
        target, ConversationFile(data_file), **limits, batch_size=64, cache_dir=str(tmp_path / "other"), title=""
    )
    answered = {row[0]: row for line in file.open() for row in json.loads(line)["rows"]}
    expected = {row.id: [row.id, row.input_ids, [int(m) for m in row.loss_mask]] for row in at_once}
    assert len(answered) > 50 and answered == {identity: expected[identity] for identity in answered}


def test_pretokenized_rows_need_no_template(settings, target_dir, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"input_ids": [0, *range(5 + i, 25 + i)], "loss_mask": [0] * 6 + [1] * 15}) + "\n"
            for i in range(9)
        )
    )
    done = train(settings, tmp_path / "run", f"data.path={rows}", "trainer.max_steps=2")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "algorithm",
    [
        ["draft=eagle1", "draft.num_layers=2", "draft.ttt_steps=2"],
        ["draft=eagle3_1", "draft.vocab_size=200", "draft.num_layers=2", "draft.normalization=conversation"],
    ],
    ids=["eagle1", "eagle3_1"],
)
def test_every_algorithm_resumes_exactly_with_muon_and_averaged_weights(algorithm, settings, tmp_path):
    """A run killed in a save resumes with the same noise, average and momentum."""
    own = [s for s in settings if not s.startswith("draft.")]
    chosen = [*own, *algorithm, "optimizer=muon", "optimizer.ema_decay=0.9", "trainer.max_steps=6"]
    whole = train(chosen, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "run"
    assert drive("kill_in_save", 6, chosen, out).returncode == -9
    done = train(chosen, out, "resume=auto")
    assert done.returncode == 0, done.stderr
    assert metrics(out) == metrics(tmp_path / "whole")
    resumed, whole = (read_servable(d).tensors for d in (out, tmp_path / "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_eagle1_with_noise_has_the_same_losses_on_two_ranks(settings, tmp_path):
    own = [s for s in settings if not s.startswith("draft.")]
    chosen = [*own, "draft=eagle1", "draft.ttt_steps=2", "optimizer.ema_decay=0.9", "trainer.max_steps=4"]
    for name, ranks in (("one", 1), ("two", 2)):
        done = train(chosen, tmp_path / name, ranks=ranks)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
