"""A target server with backend=sglang: its clients get what transformers computes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.targets.remote.client import RemoteTarget
from tests.sglang.compute_hidden_states import difference, make_batch
from tests.sglang.conftest import ROOT
from tests.sglang.random_run import make_runs

ROUNDING = 1e-4
"""Rounding of float32 for values up to a few hundred."""
AUX_LAYERS = [1, 3, 4]


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("served")
    make_runs(root, 2, 8)
    return root / "the target"


def test_what_it_serves_equals_what_transformers_computes_and_it_ends_on_sigterm(target_dir, tmp_path):
    command = [sys.executable, "-m", "nemo_speculative.serve_target", "model=local", f"model.path='{target_dir}'",
               "backend=sglang", "port=0", f"aux_layers={AUX_LAYERS}".replace(" ", "")]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = tmp_path / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environment
        ) as process,
    ):
        try:
            assert process.stdout
            line = next((line for line in process.stdout if line.startswith("serving")), None)
            assert line, log.read_text()[-3000:]
            remote = RemoteTarget(target_dir, aux_layers=AUX_LAYERS, urls=[line.split(" on ")[1].split()[0]])
            batch = make_batch(0)
            local = HFTarget(target_dir, aux_layers=AUX_LAYERS)
            differences = difference(remote.compute_hidden_states(batch), local.compute_hidden_states(batch), batch)
            assert set(differences) == {"aux", "last_hidden"} and max(differences.values()) <= ROUNDING
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, log.read_text()[-3000:]
        finally:
            process.kill()
