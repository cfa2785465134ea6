"""How many steps of the unroll each slot runs in training.

Geometric: a slot survives to step i with probability decay^i, and weighs 1 there instead of decay^i.  The expected
gradient is the weighted loss's (E[1{depth > i}] = decay^i), at half the work of seven steps.  Draws belong to the
conversation and the epoch, so they depend on neither packing, nor rank count, nor a restart.
"""

import torch

from nemo_speculative.algorithms.common.noise import document_uniform
from nemo_speculative.data.batch import Batch


def geometric_depths(batch: Batch, decay: float, seed: int) -> torch.Tensor:
    """int64 [B, L]: steps of each slot, at least 1, with P(depth > i) = decay^i.

    Raises:
        ValueError: the batch does not say which conversations it holds.
    """
    if not batch.spans:
        raise ValueError("depth sampling draws for each conversation: the batch has no spans")
    depths = torch.ones_like(batch.positions)
    for span in batch.spans:
        u = document_uniform(f"depth:{seed}:{span.epoch}:{span.id}", (span.end - span.start,))
        # u in [0, 1): u < decay^i holds for i up to log u / log decay.
        steps = torch.log(u.double().clamp(min=1e-300)) / torch.log(torch.tensor(decay, dtype=torch.float64))
        depths[span.row, span.start : span.end] = steps.ceil().clamp(1, 1 << 30).long()
    return depths
