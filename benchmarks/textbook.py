"""EAGLE-3's training step as the published code has it: every position, at every step, over concatenated keys.

The reference of ``make bench`` and of a test: plain, dense, and slow on purpose.  It takes the weights of our draft.
"""

import torch
from torch.nn.functional import log_softmax, pad

from nemo_speculative.algorithms.common.layers import rotate
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft


def textbook_loss(draft: Eagle3Draft, target, batch, supervision, num_steps: int, decay: float) -> torch.Tensor:
    """The objective of ``Eagle3Objective`` with the serving mask on a batch [B, L], computed densely."""
    layer = draft.midlayer
    groups = draft.shape.num_heads // draft.shape.num_kv_heads
    length = batch.input_ids.shape[1]
    documents = batch.documents
    causal = torch.ones(length, length, dtype=torch.bool).tril() & (documents[:, :, None] == documents[:, None])
    diagonal = torch.eye(length, dtype=torch.bool).expand(len(documents), -1, -1)
    logits = target.logits(supervision.last_hidden_state).float()
    embeddings = target.embed(batch.input_ids)
    feature, keys, values, visible = (
        draft.project_hidden_states(supervision.aux_hidden_states, supervision.last_hidden_state),
        [],
        [],
        [],
    )
    unbroken = _left(batch.loss_mask, 1)
    loss = feature.new_zeros(())
    for i in range(num_steps):
        x = torch.cat((layer.input_layernorm(_left(embeddings, 1 + i)), layer.hidden_norm(feature)), -1)
        cos, sin = draft.rotary(batch.positions + i, x.dtype)
        q, (k, v) = rotate(layer.queries(x), cos, sin), layer.keys_values(x, cos, sin)
        keys.append(k.repeat_interleave(groups, 1))
        values.append(v.repeat_interleave(groups, 1))
        visible.append(diagonal if i else causal)
        scores = q @ torch.cat(keys, 2).transpose(2, 3) * draft.shape.head_dim**-0.5
        weights = scores.masked_fill(~torch.cat(visible, 2)[:, None], float("-inf")).softmax(-1)
        feature = layer.finish(feature, (weights @ torch.cat(values, 2)).transpose(1, 2).flatten(2))
        unbroken = unbroken & _left(batch.loss_mask, 2 + i) & (_left(documents, 2 + i, -1) == documents)
        label = _left(logits, 1 + i)
        inside = unbroken & draft.t2d[label.argmax(-1)]
        log_q = log_softmax(draft.compute_logits(feature), -1)
        cross_entropy = -(label[..., draft.draft_ids].softmax(-1) * log_q).sum(-1)
        loss = loss + decay**i * (cross_entropy * inside).sum() / unbroken.sum().clamp(min=1)
    return loss


def _left(x: torch.Tensor, n: int, fill: int = 0) -> torch.Tensor:
    """y[:, t] = x[:, t + n]."""
    return pad(x[:, n:], (*([0, 0] * (x.ndim - 2)), 0, min(n, x.shape[1])), value=fill)
