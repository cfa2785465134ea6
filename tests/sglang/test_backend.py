"""backend=sglang against backend=hf: the same target outputs, alone and tensor-parallel, and the same training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_speculative.targets.cached.store import open_store
from tests.sglang.conftest import ROOT
from tests.sglang.random_run import make_runs
from tests.targets.test_base import quantize

ROUNDING = {"aux": 1e-4, "last_hidden": 1e-4}
"""Rounding of float32 for values up to a few hundred."""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("backend")
    make_runs(root, 2, 8)
    return root / "the target"


def run(*command: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*launcher, *command], capture_output=True, text=True, timeout=240, env=ENVIRONMENT, cwd=ROOT, check=False
    )


@pytest.mark.parametrize(("ranks", "aux_layers"), [(1, [1, 3, 4]), (1, []), (2, [1, 3, 4])])
def test_supervision_equals_that_of_transformers(target_dir, tmp_path, ranks, aux_layers):
    done = run(
        "-m", "tests.sglang.compute_hidden_states", str(target_dir), json.dumps(aux_layers), str(tmp_path), ranks=ranks
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(ranks):
        for results in json.loads((tmp_path / f"{rank}.json").read_text()):
            assert set(results) == ({"aux", "last_hidden"} if aux_layers else {"last_hidden"})
            for name, largest in results.items():
                print(f"{ranks} rank(s), {name}: {largest:g}")
                assert largest <= ROUNDING[name]


READ = """
import json, sys
from types import SimpleNamespace
import torch
from nemo_speculative.targets import sglang
device = torch.device("cpu")
sglang._make_importable(device)
from sglang.srt.configs.model_config import ModelConfig
for path, *given in json.loads(sys.argv[1]):
    target = SimpleNamespace(
        path=path, aux_layers=[1], dtype=torch.bfloat16, device=device, trust_remote_code=False
    )
    flags = sglang._own_flags(target, 64)
    arguments = sglang.parse_flags([*flags, *given], "backend.flags")
    arguments.resolve_once()
    print("read:", ModelConfig.from_server_args(arguments).quantization)
"""
"""Prints SGLang's quantization settings without running it: its quantized kernels need a GPU."""


def test_a_quantized_target_is_passed_on(tmp_path):
    """With and without a flag."""
    methods, commands = ("fp8", "awq"), []
    for method in methods:
        quantize(tmp_path / method, method)
        commands += [[str(tmp_path / method)], [str(tmp_path / method), "--quantization", method]]
    done = run("-c", READ, json.dumps(commands))
    read = [line.removeprefix("read: ") for line in done.stdout.splitlines() if line.startswith("read: ")]
    assert read == [method for method in methods for _ in range(2)], done.stderr[-3000:]


@pytest.fixture(scope="module")
def settings(target_dir, tmp_path_factory) -> list[str]:
    """A few steps on rows of token ids."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = (
        {"input_ids": [(7 * n + i) % 250 for i in range(20 + n)], "loss_mask": [0] * 5 + [1] * (15 + n)}
        for n in range(24)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "recipes/train_eagle3.py", "model=local", f"model.path='{target_dir}'", "data=jsonl", f"data.path={file}",
        "data.packed_length=64", "data.max_length=64", "trainer.max_steps=4", "trainer.global_batch_size=4",
        "trainer.micro_batch_size=2", "trainer.log_interval=1", "trainer.val_interval=2", "draft.ttt_steps=3",
        "draft.vocab_size=100", "data.held_out_share=0.2", "logger=none", "evaluation.selection_questions=1",
        "evaluation.num_questions=2", "evaluation.max_new_tokens=8", "exporter.num_steps=3",
    ]  # fmt: skip


def losses(directory: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if "loss" in name} for line in lines]


def trained(settings: list[str], directory: Path, backend: str, ranks: int) -> tuple[list[dict[str, float]], str]:
    """The losses and the output."""
    micro = f"trainer.micro_batch_size={2 // ranks}"
    done = run(*settings, f"backend={backend}", f"output_dir={directory}", micro, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(directory), done.stdout


@pytest.fixture(scope="module")
def expected(settings, tmp_path_factory) -> list[dict[str, float]]:
    """The losses with transformers."""
    results, _ = trained(settings, tmp_path_factory.mktemp("hf"), "hf", ranks=1)
    assert any(results)
    return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_draft_trains_as_with_transformers(settings, expected, tmp_path, ranks):
    results, output = trained(settings, tmp_path, "sglang", ranks)
    for one, two in zip(expected, results, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert "only backend=hf decodes" in output


@pytest.fixture(scope="module")
def captured(settings, tmp_path_factory) -> Path:
    """The features of transformers."""
    return captured_by("hf", settings, tmp_path_factory.mktemp("features") / "hf", ranks=1)


def captured_by(backend: str, settings: list[str], directory: Path, ranks: int) -> Path:
    how = ["recipes/capture_features.py", *settings[1:], f"backend={backend}", f"output={directory}"]
    done = run(*how, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.mark.parametrize("ranks", [1, 2])
def test_captured_features_are_those_of_transformers(settings, captured, expected, tmp_path, ranks):
    """A draft also trains from them as with transformers in the process."""
    results = captured_by("sglang", settings, tmp_path / "sglang", ranks)
    one, two = (open_store(directory, "output") for directory in (captured, results))
    one.manifest.require_same(two.manifest, captured)
    assert one.content == two.content and len(one) == 20
    for key in (entry["key"] for shard in one.shards for entry in shard.entries):
        theirs, ours = (store.tensors(store.find([key])[0]) for store in (one, two))
        for name, largest in ROUNDING.items():
            assert theirs[name].shape == ours[name].shape
            assert float((theirs[name] - ours[name]).abs().max()) <= largest
    losses_from, _ = trained([*settings, f"backend.directory={results}"], tmp_path / "run", "features", ranks=1)
    for line, online in zip(losses_from, expected, strict=True):
        assert line == pytest.approx(online, rel=1e-4)
