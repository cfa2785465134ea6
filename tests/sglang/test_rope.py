"""The rotary embedding that SGLang's draft class builds from config.json against this project's."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_speculative.algorithms.common.contract import numbers_for
from nemo_speculative.algorithms.common.layers import Rotary, rotate
from nemo_speculative.algorithms.eagle.contract import EagleShape
from nemo_speculative.algorithms.eagle.network import EagleDraft
from nemo_speculative.checkpoint.contract import contract_of, fields_of
from nemo_speculative.utils.sglang import CPU_ENGINE, CPU_ENVIRONMENT
from tests.sglang.conftest import ROOT

ORIGINAL, SHORT, LONGEST, HEAD = 64, 32, 256, 16
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0 + j for j in range(8)]}
SCALED = {"rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {"rope_type": "llama3", **SCALED, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", **SCALED, "factor": 4.0},
    "yarn, no factor": {"rope_type": "yarn", **SCALED, "factor": None},
    "yarn, attention factor": {"rope_type": "yarn", **SCALED, "factor": 4.0, "attention_factor": 1.5},
    "yarn, mscale": {"rope_type": "yarn", **SCALED, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    "longrope": {"rope_type": "longrope", **SCALED, **FACTORS},
    "longrope, attention factor": {"rope_type": "longrope", **SCALED, **FACTORS, "attention_factor": 1.1},
    "part of the head": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "proportional": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.25, "factor": 2.0},
}


class Target:
    """A target's configuration in transformers."""

    hidden_size, num_attention_heads, head_dim, intermediate_size = 4 * HEAD, 4, HEAD, 64
    max_position_embeddings, vocab_size = LONGEST, 300

    def __init__(self, rope):
        self.rope_parameters = dict(rope)


@pytest.fixture(scope="module")
def rotated(tmp_path_factory):
    """SGLang's rotations of short and long texts for every draft, from one SGLang process."""
    root = tmp_path_factory.mktemp("rotations")
    for name, rope in ROPES.items():
        for length in (SHORT, LONGEST):
            _write(root / f"{name} {length}", rope, length)
    environment = {**os.environ, **CPU_ENVIRONMENT, "PYTHONPATH": os.pathsep.join((str(CPU_ENGINE), str(ROOT)))}
    command = [sys.executable, "-m", "tests.sglang.rotations", str(root)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def _write(directory, rope, length):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields_of(contract_of(EagleDraft), _shape(rope), torch.float32)))
    random = torch.Generator().manual_seed(length)
    heads = {name: torch.randn(length, n * HEAD, generator=random) for name, n in (("queries", 4), ("keys", 1))}
    save_file({"positions": torch.arange(length), **heads}, directory / "given.safetensors")


def _shape(rope):
    return EagleShape(**numbers_for(None, Target(rope)))


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("length", [SHORT, LONGEST])
def test_sglang_rotates_a_draft_as_training_does(name, length, rotated):
    shape, directory = _shape(ROPES[name]), rotated / f"{name} {length}"
    given, returned = (load_file(directory / f"{which}.safetensors") for which in ("given", "returned"))
    cos, sin = Rotary(shape.rope_parameters, HEAD, shape.max_positions)(given["positions"][None], torch.float32)
    for which in ("queries", "keys"):
        heads = given[which].unflatten(1, (-1, HEAD)).transpose(0, 1)[None]
        expected = rotate(heads, cos, sin)[0].transpose(0, 1).flatten(1)
        torch.testing.assert_close(returned[which].flatten(1), expected, rtol=1e-4, atol=1e-4)
