"""Capture and training from features as command lines: killed, interrupted, twice at once, on two ranks."""

import json
import signal

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf.errors import OmegaConfBaseException

from nemo_speculative.config.app import to_job
from nemo_speculative.targets.cached.manifest import Manifest
from nemo_speculative.targets.cached.store import FeatureStore, verify
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import dir_lock
from tests.config.test_groups import composed
from tests.integration.conftest import ENVIRONMENT, data_file, metrics, run, settings, train  # noqa: F401
from tests.programs import Program
from tests.target_servers import until
from tests.targets.cached.cases import eagle1
from tests.targets.cached.test_eagle_files import write_files

CAPTURE = "recipes/capture_features.py"


def capture(settings, output, *more, ranks=1):  # noqa: F811
    return run(CAPTURE, *settings, f"output={output}", *more, ranks=ranks)


def error_of(done):
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    return line


@pytest.fixture(scope="module")
def online(settings, tmp_path_factory):  # noqa: F811
    directory = tmp_path_factory.mktemp("online") / "run"
    assert train(settings, directory).returncode == 0
    return metrics(directory)


def agree(result, expected, tolerance=1e-3):
    """Compares all metrics of training and validation; only online runs measure decoding."""
    assert len(result) == len(expected)
    for ours, theirs in zip(result, expected, strict=True):
        theirs = {k: v for k, v in theirs.items() if k != "val/tau_decoded"}
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


def test_training_from_a_capture_of_two_ranks_equals_online_training(settings, online, tmp_path):  # noqa: F811
    features = tmp_path / "features"
    done = capture(settings, features, ranks=2)
    assert done.returncode == 0 and "bytes a token" in done.stdout, done.stderr
    assert len(list(features.glob("*.safetensors"))) == 2
    backend = ["backend=features", f"backend.directory={features}"]
    trained = train(settings, tmp_path / "run", *backend)
    assert trained.returncode == 0, trained.stderr
    agree(metrics(tmp_path / "run"), online)
    # The captured documents are a dataset themselves.
    data = [*settings, f"data.path={features}/training.jsonl", f"data.held_out_path={features}/held_out.jsonl"]
    rows = train(data, tmp_path / "rows", *backend, "trainer.max_steps=1")
    assert rows.returncode == 0, rows.stderr
    other = train(data, tmp_path / "x", *backend, "draft.aux_layers=[0,2,4]")
    assert f"aux_layers is [1, 3, 4] in {features} and [0, 2, 4] here" in error_of(other)


def test_fill_equals_online_training(settings, online, tmp_path):  # noqa: F811
    backend = ["backend=features", f"backend.directory={tmp_path / 'features'}", "backend.fill=true"]
    done = train(settings, tmp_path / "run", *backend)
    assert done.returncode == 0 and "captured during training" in done.stdout, done.stderr
    agree(metrics(tmp_path / "run"), online)
    verify(str(tmp_path / "features"))


WATCHED = """
import os, runpy, sys
from nemo_speculative.targets.cached import shards
from nemo_speculative.targets.hf import HFTarget
log, compute_hidden_states = sys.argv.pop(1), HFTarget.compute_hidden_states
load, keep = HFTarget.__init__, shards.write_shard
def note(message):
    with open(log, "a") as file:
        file.write(f"{os.environ['RANK']} {message}\\n")
def watched(self, batch):
    note(max((span.epoch for span in batch.on_host.spans), default=0))
    return compute_hidden_states(self, batch)
HFTarget.compute_hidden_states = watched
HFTarget.__init__ = lambda self, *given, **settings: (note("loads"), load(self, *given, **settings))[1]
shards.write_shard = lambda at, documents: (note(f"writes {len(documents)}"), keep(at, documents))[1]
runpy.run_path("recipes/train_eagle3.py", run_name="__main__")
"""
"""A training that logs when the target is loaded, the epochs of the batches it computes, and the shards written."""


def test_two_ranks_fill_in_the_first_epoch_and_read_afterwards(settings, online, tmp_path):  # noqa: F811
    features, program, log = tmp_path / "features", tmp_path / "watched.py", tmp_path / "log"
    program.write_text(WATCHED)
    backend = ["backend=features", f"backend.directory={features}"]

    def trained(name, *more):
        log.unlink(missing_ok=True)
        given = [*settings, *backend, *more, f"output_dir={tmp_path / name}"]
        done = run(str(program), str(log), *given, ranks=2)
        assert done.returncode == 0, done.stderr
        agree(metrics(tmp_path / name), online, 1e-5)
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    message = trained("first", "backend.fill=true")
    for rank in "01":
        computed = [what for who, what, *_ in message if who == rank and what.isdigit()]
        # A prefetched batch may come before the other rank has written its unfinished shard.
        assert (
            computed.count("0") >= 4
            and computed.count("1") <= 3
            and computed.count("0") + computed.count("1") == len(computed)
        )
    store = FeatureStore(features, Manifest.read(features))
    held = sum(len(shard.entries) for shard in store.shards)
    assert len(store) == 54 == Manifest.read(features).documents and 54 <= held < 2 * 54
    verify(str(features))
    assert trained("again") == []


def test_context_parallel_ranks_store_each_document_once(settings, online, tmp_path):  # noqa: F811
    features, program, log = tmp_path / "features", tmp_path / "watched.py", tmp_path / "log"
    program.write_text(WATCHED)
    shared = [*settings, "parallelism=cp", "parallelism.context=2", "backend=features", f"backend.directory={features}"]

    def trained(name, *more):
        done = run(str(program), str(log), *shared, *more, f"output_dir={tmp_path / name}", ranks=2)
        assert done.returncode == 0, done.stderr
        agree(metrics(tmp_path / name), online, 1e-5)

    trained("first", "backend.fill=true")
    message = [line.split() for line in log.read_text().splitlines()]
    assert {rank for rank, what, *_ in message if what == "loads"} == {"0", "1"}, "both compute"
    # Not the files: shards of the same documents in the same order have the same name.
    written = [(rank, int(count)) for rank, what, *more in message if what == "writes" for count in more]
    assert {rank for rank, _ in written} == {"0"} and sum(count for _, count in written) == 54
    assert Manifest.read(features).documents == 54
    verify(str(features))
    log.unlink()
    trained("again")
    assert not log.exists(), "the target computed nothing"


@pytest.fixture(scope="module")
def many(settings, tmp_path_factory):  # noqa: F811
    """Enough for a dozen shards."""
    file = tmp_path_factory.mktemp("many") / "many.jsonl"
    with file.open("w") as out:
        for i in range(400):
            ids = [5 + i % 290, 5 + i // 290, *range(20, 78)]
            out.write(json.dumps({"id": str(i), "input_ids": ids, "loss_mask": [0] * 5 + [1] * 55}) + "\n")
    return [*settings, f"data.path={file}", "shard_mb=1", "trainer.micro_batch_size=1"]


def shards(directory):
    return [f for f in directory.glob("*.json") if f.name != "manifest.json"]


SLOW = """
import runpy, time
from nemo_speculative.targets.hf import HFTarget
batches, compute_hidden_states = [], HFTarget.compute_hidden_states
def slowly(self, batch):
    batches.append(batch)
    time.sleep(0.2 * (len(batches) > 45))
    return compute_hidden_states(self, batch)
HFTarget.compute_hidden_states = slowly
runpy.run_path("recipes/capture_features.py", run_name="__main__")
"""
"""A capture slow enough to be interrupted."""


def interrupted(program, many, features, number, already):
    """Exit code and output after a signal that is sent once there are ``already + 2`` shards."""
    with Program(str(program), *many, f"output={features}", environment=ENVIRONMENT) as process:
        until(lambda: len(shards(features)) >= already + 2 or process.returncode is not None, seconds=100)
        assert process.returncode is None, "it was done before it could be interrupted"
        with (
            pytest.raises(UserError, match=f"output: another process writes into {features}"),
            dir_lock(features, "output"),
        ):
            pass
        process.send_signal(number)
        return process.wait(60), "".join(process.stdout)


def test_an_interrupted_capture_is_resumed_by_the_same_command(many, tmp_path):
    features, program = tmp_path / "features", tmp_path / "slow.py"
    program.write_text(SLOW)
    code, _ = interrupted(program, many, features, signal.SIGKILL, already=0)
    assert code == -signal.SIGKILL
    first = FeatureStore(features, Manifest.read(features))
    verify(str(features))
    code, message = interrupted(program, many, features, signal.SIGTERM, already=len(first.shards))
    assert code == 130 and f"({len(first)} more are present)" in message and "the same command resumes" in message
    second = FeatureStore(features, Manifest.read(features))
    done = capture(many, features)
    assert done.returncode == 0, done.stderr
    whole = len(FeatureStore(features, Manifest.read(features)))
    captured = sum(len((features / name).read_text().splitlines()) for name in ("training.jsonl", "held_out.jsonl"))
    assert len(first) < len(second) < whole == captured
    assert f"({len(second)} more are present)" in done.stdout and f"{whole} documents in" in done.stdout
    assert not list(features.glob("*.partial")) and f"{whole} documents" in verify(str(features))


def test_eagle_files_train_eagle1(settings, online_of, documents, tmp_path):  # noqa: F811
    files = write_files(tmp_path / "ckpt", online_of(eagle1()), documents)
    features = tmp_path / "features"
    plain = [s for s in settings if not s.startswith(("draft.vocab_size", "draft.ttt_steps"))]
    done = capture(plain, features, "draft=eagle1", f"eagle={files}")
    assert done.returncode == 0 and "of the supervised tokens first there" in done.stdout, done.stderr
    data = [*plain, f"data.path={features}/training.jsonl", "trainer.max_steps=3"]
    backend = ["backend=features", f"backend.directory={features}"]
    done = run("recipes/train_eagle1.py", *data, f"output_dir={tmp_path / 'run'}", *backend)
    assert done.returncode == 0, done.stderr
    assert all(line["train/loss"] > 0 for line in metrics(tmp_path / "run"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["backend=features", "backend.directory=x"], "capture with backend=hf"),
        (["shard_mb=0"], "shard_mb is 0"),
        (["merge=[a]", "verify=true"], r"merge is \['a'\] and verify is true"),
        (["dtype=fp4"], "dtype"),
    ],
)
def test_invalid_settings_are_rejected(more, message):
    with pytest.raises((UserError, OmegaConfBaseException, ConfigCompositionException), match=message):
        to_job(composed("capture_features", "model=local", *more))


def test_a_plan_prints_the_budget_and_writes_nothing(settings, tmp_path):  # noqa: F811
    planned = capture(settings, tmp_path / "features", "plan=true")
    assert planned.returncode == 0 and "bytes a token" in planned.stdout, planned.stderr
    assert not (tmp_path / "features").exists()
