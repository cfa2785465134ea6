"""The feature noise of EAGLE-1, drawn for each conversation by itself.

Its seed is the conversation and the epoch, so the noise depends on neither packing, nor rank count, nor a restart.
"""

import hashlib

import torch

from nemo_speculative.config.schema import FeatureNoise
from nemo_speculative.data.batch import Batch
from nemo_speculative.utils.devices import send

AMPLITUDE = 0.1
OFFICIAL_LENGTH = 512
"""The official code scales by 512 / L, with L the length of the sample."""


def document_noise(batch: Batch, features: torch.Tensor, kind: FeatureNoise, seed: int) -> torch.Tensor:
    """Uniform noise in ±0.1 (EAGLE-1, 4.1), or times 512 / L as in the official code: like features, 0 on padding."""
    noise = torch.zeros(*batch.input_ids.shape, features.shape[-1])
    for span in batch.spans:
        length = span.end - span.start
        drawn = (document_uniform(f"{seed}:{span.epoch}:{span.id}", (length, features.shape[-1])) - 0.5) * 2
        scale = OFFICIAL_LENGTH / length if kind is FeatureNoise.official else 1.0
        noise[span.row, span.start : span.end] = drawn * (AMPLITUDE * scale)
    return send(batch.shard.local(noise).to(features.dtype), features.device)


def document_uniform(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Uniform draws in [0, 1) of ``shape``, the same for the same ``key``, on the host."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
