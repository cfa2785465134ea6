"""A checkpoint to measure, and a fake SGLang server."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nemo_speculative.algorithms.eagle3.contract import Eagle3Shape
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.checkpoint.draft_checkpoint import write_servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.targets.fingerprint import target_fingerprint
from nemo_speculative.utils import network
from tests.evaluation.server_benchmark import fake_sglang

PROMPTS = [{"turns": ["the quick fox", "again"]}, {"prompt": "seven wizards"}, {"turns": ["a lazy dog"]}]


@pytest.fixture
def run_dir(tmp_path, target_dir) -> Path:
    """A run directory whose only checkpoint is the best one."""
    shape = Eagle3Shape(hidden_size=32, intermediate_size=8, num_heads=2, num_kv_heads=1, head_dim=4, rms_norm_eps=1e-6,
                        max_positions=64, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                        vocab_size=300, draft_vocab_size=300, aux_layers=(1, 3, 4), target_hidden_size=32)  # fmt: skip
    draft = Eagle3Draft(shape)
    provenance = Provenance(
        str(target_dir), target_fingerprint(target_dir), "float32", SpeculativeSettings(5, 1, 6), step=3
    )
    step = tmp_path / "run" / "checkpoints" / "step_3"
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    write_servable(step / "model", Eagle3Draft, draft.state_dict(), shape, provenance, torch.float32, ids)
    (step.parent / "best").symlink_to(step.name)
    return step.parents[1]


@pytest.fixture
def suite_file(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return file


@pytest.fixture
def free_port() -> int:
    return network.free_port()


@pytest.fixture
def fake_site(tmp_path, monkeypatch) -> Path:
    """A directory on the path of every started Python, with a package and a distribution named sglang."""
    site = tmp_path / "site"
    (site / "sglang").mkdir(parents=True)
    (site / "sglang" / "__init__.py").touch()
    shutil.copy(fake_sglang.__file__, site / "sglang" / "launch_server.py")
    metadata = site / "sglang-0.5.23.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.23\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH")))))
    return site


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """A function that starts a fake server with the given flags and returns its URL."""
    started = []

    def start(*flags: str, **environment: str) -> str:
        port = network.free_port()
        command = [sys.executable, fake_sglang.__file__, "--host", "127.0.0.1", "--port", str(port), *flags]
        started.append(subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL))
        url = f"http://127.0.0.1:{port}"
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{url}/health").close()
                return url
            except OSError:
                time.sleep(0.05)
        raise AssertionError("the fake server did not come up")

    yield start
    for process in started:
        process.kill()
        process.wait()
