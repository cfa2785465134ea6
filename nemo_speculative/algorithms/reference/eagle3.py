"""The definition of the EAGLE-3 loss (2503.01840), and of EAGLE-3.1's switches (2605.09992).

Dense and slow: every position at every step, over concatenated keys, with the logits of all tokens.  It imports nothing
of the implementation; the tests compare both, loss and gradients, in float64.
"""

from typing import Any

import torch
from torch.nn.functional import linear, log_softmax

from nemo_speculative.algorithms.reference.llama import Weights, ahead, causal_and_diagonal, decoder_layer, rms_norm


def eagle3_loss(
    w: Weights, shape: Any, target: Any, batch: Any, target_output: Any, num_steps: int, decay: float
) -> torch.Tensor:
    """Σ_i decay^i · (Σ_t ℓ_t^i) / n_i of the rows [B, L] of ``batch``, for the draft of weights ``w``."""
    eps, documents = shape.rms_norm_eps, batch.documents
    causal, diagonal = causal_and_diagonal(documents)
    draft_ids = torch.arange(len(w["d2t"]), device=documents.device) + w["d2t"]
    layers = ["midlayer"] if shape.num_layers == 1 else [f"layers.{n}" for n in range(shape.num_layers)]
    memory: list[list[Any]] = [[] for _ in layers]
    # E(x_t), and the target's logits: row t is its distribution of x_{t+1}.
    embeddings = target.embed(batch.input_ids)
    logits = target.logits(target_output.last_hidden_state)

    # g_t^0 = W_fc a_t, of the aux hidden states a_t; EAGLE-3.1 norms each aux state, or all of them together.
    a = target_output.aux_hidden_states
    if shape.fc_norm:
        parts = enumerate(a.chunk(len(shape.aux_layers), -1))
        a = torch.cat([rms_norm(part, w[f"fc_norm.{n}.weight"], eps) for n, part in parts], -1)
    if shape.norm_before_fc:
        a = rms_norm(a, w["input_norm.weight"], eps)
    g = linear(a, w["fc.weight"])

    supervised = ahead(batch.loss_mask, 1)
    loss = g.new_zeros(())
    for i in range(num_steps):
        # Step i at slot t reads [norm(E(x_{t+1+i})) ; norm(g_t^i)], at position t + i; the residual is g_t^i.
        # It sees the step-0 keys s <= t of its document, and the keys of steps 1 … i at its own slot.
        x = rms_norm(ahead(embeddings, 1 + i), w[f"{layers[0]}.input_layernorm.weight"], eps)
        for n, layer in enumerate(layers):
            normed = rms_norm(g, w[f"{layer}.hidden_norm.weight"], eps)
            x = torch.cat((x, normed), -1) if n == 0 else normed
            visible = causal if i == 0 else diagonal
            g = decoder_layer(w, layer, shape, x, g, batch.positions + i, memory[n], visible)

        # q = softmax(W_lm norm(o_t^i)); p is the target's distribution of x_{t+2+i}, renormalized over V_d.
        normed = rms_norm(g, w["norm.weight"], eps)
        log_q = log_softmax(linear(normed, w["lm_head.weight"]), -1)
        label = ahead(logits, 1 + i)
        p = label[..., draft_ids].softmax(-1)
        # Slot t is supervised while x_{t+1}, …, x_{t+2+i} are the assistant's, in one document.  A slot whose argmax
        # of the target is outside V_d counts in n_i, but carries no loss.
        supervised = supervised & ahead(batch.loss_mask, 2 + i) & (ahead(documents, 2 + i, -1) == documents)
        carries = supervised & torch.isin(label.argmax(-1), draft_ids)
        loss = loss - decay**i * ((p * log_q).sum(-1) * carries).sum() / supervised.sum().clamp(min=1)

        # g_t^{i+1} = o_t^i; with EAGLE-3.1's norm_output it is norm(o_t^i).
        g = normed if shape.norm_output else g
    return loss
