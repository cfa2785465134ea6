"""The definition of the EAGLE-1 and EAGLE-2 loss (2401.15077), with more than one step HASS's (2408.15766).

Dense and slow: every position at every step, over concatenated keys, with the logits of all tokens.  It imports nothing
of the implementation; the tests compare both, loss and gradients, in float64.
"""

from typing import Any

import torch
from torch.nn.functional import linear, log_softmax, smooth_l1_loss

from nemo_speculative.algorithms.reference.llama import Weights, ahead, causal_and_diagonal, decoder_layer, rms_norm


def eagle_loss(
    w: Weights, shape: Any, target: Any, batch: Any, target_output: Any, num_steps: int, decay: float,
    vloss_w: float, ploss_w: float, topk_w: float, topk: int,
) -> torch.Tensor:  # fmt: skip
    """Σ_i decay^i · (Σ_t ℓ_t^i) / n_i of the rows [B, L] of ``batch``, for the draft of weights ``w``."""
    documents = batch.documents
    causal, diagonal = causal_and_diagonal(documents)
    memory: list[list[Any]] = [[] for _ in range(shape.num_layers)]
    embeddings = target.embed(batch.input_ids)
    f = target_output.last_hidden_state

    g = f
    supervised = ahead(batch.loss_mask, 1)
    loss = f.new_zeros(())
    for i in range(num_steps):
        # Step i at slot t reads z = W_fc [E(x_{t+1+i}) ; g] + b, at position t + i, where g is f_t at step 0, f̂_{t+i}
        # after it.  It sees the step-0 keys s <= t of its document, and the keys of steps 1 … i at its own slot.
        g = linear(torch.cat((ahead(embeddings, 1 + i), g), -1), w["fc.weight"], w["fc.bias"])
        for n in range(shape.num_layers):
            layer = f"layers.{n}"
            x = rms_norm(g, w[f"{layer}.input_layernorm.weight"], shape.rms_norm_eps) if n else g
            visible = causal if i == 0 else diagonal
            g = decoder_layer(w, layer, shape, x, g, batch.positions + i, memory[n], visible)

        # The output f̂_{t+1+i} predicts f_{t+1+i}; the target's frozen head makes a distribution of either.
        label = ahead(f, 1 + i)
        p, log_q = target.logits(label).softmax(-1), log_softmax(target.logits(g), -1)
        vloss = smooth_l1_loss(g, label, reduction="none").mean(-1)
        ploss = -(p * log_q).sum(-1)
        top, ids = p.topk(topk, -1)
        topk_loss = -(top * log_q.gather(-1, ids)).sum(-1)
        row_loss = vloss_w * vloss + ploss_w * ploss + topk_w * topk_loss

        # Slot t is supervised while x_{t+1}, …, x_{t+2+i} are the assistant's, in one document.
        supervised = supervised & ahead(batch.loss_mask, 2 + i) & (ahead(documents, 2 + i, -1) == documents)
        loss = loss + decay**i * (row_loss * supervised).sum() / supervised.sum().clamp(min=1)
    return loss
