"""Losses over the draft vocabulary."""

import torch
from torch.nn.functional import log_softmax


def soft_cross_entropy(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """-Σ_j p_j log softmax(z)_j of each row, in float32: [N, V_d], [N, V_d] → [N]."""
    return -(probabilities * log_softmax(logits.float(), dim=-1)).sum(-1)
