"""SGLang's rotary embeddings of drafts, in an SGLang process; run with the CPU command's environment.

    python -m tests.sglang.rotations ROOT

Every directory below ROOT holds a draft's ``config.json`` and what its rotary embedding is given
(``given.safetensors``: positions int64 [n], queries and keys [n, heads * d]); ``returned.safetensors`` is left there.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sglang.srt.layers.rotary_embedding import get_rope
from transformers import AutoConfig


def rotary_of(config):
    """The rotary embedding as LlamaDecoderLayer and LlamaAttention build it."""
    return get_rope(
        config.head_dim, rotary_dim=int(getattr(config, "partial_rotary_factor", 1) * config.head_dim),
        max_position=config.max_position_embeddings, base=config.rope_parameters.get("rope_theta", 10000),
        rope_scaling=config.rope_parameters, is_neox_style=True, dtype=torch.float32,
    )  # fmt: skip


def main(root: Path) -> None:
    for directory in sorted(root.iterdir()):
        given = load_file(directory / "given.safetensors")
        rotary = rotary_of(AutoConfig.from_pretrained(directory))
        forward = getattr(rotary, "forward_native", rotary.forward)
        queries, keys = forward(given["positions"], given["queries"].clone(), given["keys"].clone())
        save_file({"queries": queries, "keys": keys}, directory / "returned.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
