"""Writes a small EAGLE-3 draft with random weights for a nonexistent target, to test commands with.

python containers/random_draft.py DIRECTORY
"""

import sys
from pathlib import Path

import torch

from nemo_speculative.algorithms.eagle3.contract import Eagle3Shape
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.checkpoint.draft_checkpoint import write_servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.config.speculative import SpeculativeSettings

SHAPE = Eagle3Shape(
    hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8, rms_norm_eps=1e-5, max_positions=64,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, vocab_size=120, draft_vocab_size=120,
    aux_layers=(1, 3, 4), target_hidden_size=32,
)  # fmt: skip
PROVENANCE = Provenance("org/target", "0" * 16, "float32", SpeculativeSettings(3, 1, 4), step=1)


if __name__ == "__main__":
    weights = Eagle3Draft(SHAPE).state_dict()
    write_servable(Path(sys.argv[1]), Eagle3Draft, weights, SHAPE, PROVENANCE, torch.float32, {})
