"""Positions as the draft is told them in training, so that it has met distances longer than its documents.

A rotary embedding knows differences of positions alone: moving a whole document changes nothing.  So a document is cut
in two at a random place and its second part moved away, as in PoSE (2309.10400): over many documents every distance
up to the longest position occurs between what comes before and after a cut, while near neighbours stay near.  Only the
draft is told so; the target's features are those of the true positions.  Draws belong to the conversation and
the epoch, so they depend on neither packing, nor rank count, nor a restart.
"""

import torch

from nemo_speculative.algorithms.common.noise import document_uniform
from nemo_speculative.data.batch import Batch


def skipped_positions(batch: Batch, longest: int, seed: int) -> torch.Tensor:
    """int64 [B, L]: as ``batch.positions``, but for a skip in every document of less than ``longest`` tokens.

    The cut is uniform within the document, and the skip among those that keep its last position below ``longest``.

    Raises:
        ValueError: the batch does not say which conversations it holds.
    """
    if not batch.spans:
        raise ValueError("position skips are drawn for each conversation: the batch has no spans")
    positions = batch.positions.clone()
    for span in batch.spans:
        length = span.end - span.start
        cut, skip = document_uniform(f"position:{seed}:{span.epoch}:{span.id}", (2,)).tolist()
        first = span.start + 1 + int(cut * (length - 1))
        positions[span.row, first : span.end] += int(skip * (max(longest - length, 0) + 1))
    return positions
