"""A checkpoint to serve, and a stand-in for SGLang to start."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemo_speculative.checkpoints.servable import Provenance, Speculative, write_servable
from nemo_speculative.drafts.eagle3 import Eagle3Draft, Eagle3Shape

FAKE_SERVER = """
import os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

print("fake SGLang:", *sys.argv[1:], flush=True)
behaviour = os.environ.get("FAKE_SGLANG", "serve")
if behaviour == "die":
    print("CUDA error: out of memory", flush=True)
    sys.exit(7)
if behaviour == "hang":
    time.sleep(600)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)


class Handler(BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self):
        Handler.asked += 1
        self.send_response(200 if self.path == "/health" and Handler.asked > 2 else 503)
        self.end_headers()


host, port = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--host", "--port"))
HTTPServer((host, int(port)), Handler).serve_forever()
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory, with a space in its path, whose only checkpoint is the best one."""
    shape = Eagle3Shape(hidden_size=8, intermediate_size=8, num_heads=2, num_kv_heads=1, head_dim=4, rms_norm_eps=1e-6,
                        max_positions=64, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                        vocab_size=16, draft_vocab_size=16, aux_layers=(1, 3, 4), target_hidden_size=8)  # fmt: skip
    provenance = Provenance("org/target", "0" * 16, "bfloat16", Speculative(5, 1, 6), step=3)
    run = tmp_path / "my run"
    step = run / "checkpoints" / "step_3"
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    write_servable(step / "model", Eagle3Draft, Eagle3Draft(shape).state_dict(), shape, provenance, torch.float32, ids)
    (step.parent / "best").symlink_to(step.name)
    return run


@pytest.fixture
def model_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step_3" / "model"


@pytest.fixture
def edit_config(model_dir: Path) -> Callable[[Callable[[dict], None]], None]:
    """Changes the checkpoint's ``config.json``."""

    def edit(change: Callable[[dict], None]) -> None:
        file = model_dir / "config.json"
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))

    return edit


@pytest.fixture
def fake_sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package ``sglang`` on the path of this process and of those that it starts."""
    package = tmp_path / "site" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(FAKE_SERVER)
    monkeypatch.syspath_prepend(str(package.parent))
    path = os.pathsep.join(filter(None, (str(package.parent), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    return package
