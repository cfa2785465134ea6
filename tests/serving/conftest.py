"""Fixtures: a checkpoint to serve, and a package that stands in for SGLang."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from nemo_speculative.algorithms.eagle3.contract import Eagle3Shape
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.checkpoint.draft_checkpoint import write_servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.data.vocab_mapping import VocabMapping
from nemo_speculative.targets.fingerprint import target_fingerprint
from nemo_speculative.utils import network

FAKE_VERSION = "0.5.23"
FAKE_SERVER = """
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

print("fake SGLang:", *sys.argv[1:], flush=True)
behavior = os.environ.get("FAKE_SGLANG", "serve")
if behavior == "die":
    print("CUDA error: out of memory", flush=True)
    sys.exit(7)
if behavior == "hang":
    time.sleep(600)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)


class Handler(BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self):
        Handler.requests += 1
        self.send_response(200 if self.path == "/health" and Handler.requests > 2 else 503)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        print("request", self.path, self.headers.get("Authorization"), flush=True)
        tokens = body["sampling_params"]["max_new_tokens"]
        info = {
            "serve": {"completion_tokens": tokens, "spec_verify_ct": 3},
            "no_draft": {"completion_tokens": tokens},
            "no_tokens": {"completion_tokens": 0, "spec_verify_ct": 1},
        }
        self.send_response(200 if behavior in info else 500)
        self.end_headers()
        self.wfile.write(json.dumps({"text": "", "meta_info": info.get(behavior)}).encode())


host, port = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--host", "--port"))
HTTPServer((host, int(port)), Handler).serve_forever()
"""
FAKE_ENGINE = """
import os, signal, sys


class Tokenizer:
    chat_template, name_or_path = "{{ messages }}", "fake"

    def apply_chat_template(self, messages, **options):
        assert options["add_generation_prompt"]
        if messages[0]["content"] == "forbidden":
            raise ValueError("rejected by the template")
        return {"input_ids": [len(message["content"]) for message in messages]}


class Manager:
    tokenizer = Tokenizer()


class Engine:
    tokenizer_manager = Manager()

    def __init__(self, server_args):
        print("fake engine:", server_args, flush=True)
        if os.environ.get("FAKE_SGLANG") == "die":  # as SGLang does when a part of it fails
            print("CUDA error: out of memory", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("FAKE_SGLANG") == "hang":
            signal.pause()

    def generate(self, input_ids, sampling_params):
        if os.environ.get("FAKE_SGLANG") == "hang after ready":
            signal.pause()
        if os.environ.get("FAKE_SGLANG") == "die in an answer":
            os.write(int(sys.argv[1]), (99).to_bytes(4, "big") + b'{"text": "half of')
            os.kill(os.getpid(), signal.SIGKILL)
        tokens = sampling_params["max_new_tokens"]
        info = {"completion_tokens": tokens} | ({"spec_verify_ct": 4} if tokens > 1 else {})
        return {"text": f"answer to {input_ids} at {sampling_params['temperature']}", "meta_info": info}

    def shutdown(self):
        print("shut down", flush=True)
"""
FAKE_PARSER = """
import argparse


def prepare_server_args(flags):
    parser = argparse.ArgumentParser(prog="sglang serve")
    for name in ("model-path", "speculative-algorithm", "speculative-draft-model-path", "dtype", "host", "device"):
        parser.add_argument(f"--{name}")
    for name in ("num-steps", "eagle-topk", "num-draft-tokens"):
        parser.add_argument(f"--speculative-{name}", type=int)
    parser.add_argument("--port", type=int)
    parser.add_argument("--tp-size", type=int, default=1)
    for name in ("trust-remote-code", "disable-cuda-graph", "skip-server-warmup"):
        parser.add_argument(f"--{name}", action="store_true")
    for name in ("prefill-attention-backend", "decode-attention-backend", "grammar-backend", "mem-fraction-static"):
        parser.add_argument(f"--{name}")
    for name in ("max-total-tokens", "max-running-requests"):
        parser.add_argument(f"--{name}")
    return parser.parse_args(flags)
"""


SHAPE = Eagle3Shape(hidden_size=8, intermediate_size=8, num_heads=2, num_kv_heads=1, head_dim=4, rms_norm_eps=1e-6,
                    max_positions=64, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                    vocab_size=16, draft_vocab_size=16, aux_layers=(1, 3, 4), target_hidden_size=8)  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory, with a space in its path, whose only checkpoint is the best one."""
    run = tmp_path / "my run"
    _write(run, SHAPE, "0" * 16)
    (run / "checkpoints" / "best").symlink_to("step_3")
    return run


def _write(run: Path, shape: Eagle3Shape, fingerprint: str) -> None:
    provenance = Provenance("org/target", fingerprint, "bfloat16", SpeculativeSettings(5, 1, 6), step=3)
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    draft = Eagle3Draft(shape)
    if shape.draft_vocab_size:
        draft.set_vocab_mapping(VocabMapping(torch.arange(shape.draft_vocab_size), shape.vocab_size, coverage=1.0))
    model = run / "checkpoints" / "step_3" / "model"
    write_servable(model, Eagle3Draft, draft.state_dict(), shape, provenance, torch.float32, ids)


@pytest.fixture
def write_draft(run_dir: Path) -> Callable[..., None]:
    """Returns a function that replaces the run's draft by one with ``changed`` fields of the shape."""

    def write(fingerprint: str = "0" * 16, **changed: Any) -> None:
        _write(run_dir, replace(SHAPE, **changed), fingerprint)

    return write


@pytest.fixture
def target(tmp_path: Path, write_draft: Callable[..., None]) -> Path:
    """A directory, with a space in its path, of the model that the run's draft was trained for."""
    path = tmp_path / "a target"
    LlamaConfig(vocab_size=SHAPE.vocab_size, hidden_size=SHAPE.hidden_size, intermediate_size=8, num_hidden_layers=6,
                num_attention_heads=2, num_key_value_heads=1).save_pretrained(path)  # fmt: skip
    save_file({"weights": torch.ones(4)}, path / "model.safetensors")
    write_draft(target_fingerprint(path))
    return path


@pytest.fixture
def model_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step_3" / "model"


@pytest.fixture
def edit_config(model_dir: Path) -> Callable[[Callable[[dict], None]], None]:
    """Returns a function that changes the checkpoint's ``config.json``."""

    def edit(change: Callable[[dict], None]) -> None:
        file = model_dir / "config.json"
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))

    return edit


@pytest.fixture
def fake_sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package ``sglang`` on the path of this process and of its subprocesses."""
    package = tmp_path / "site" / "sglang"
    (package / "srt").mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_ENGINE)
    (package / "launch_server.py").write_text(FAKE_SERVER)
    (package / "srt" / "server_args.py").write_text(FAKE_PARSER)
    metadata = package.with_name(f"sglang-{FAKE_VERSION}.dist-info") / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Name: sglang\nVersion: {FAKE_VERSION}\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(package.parent))
    path = os.pathsep.join(filter(None, (str(package.parent), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    return package


@pytest.fixture
def free_port() -> int:
    return network.free_port()
