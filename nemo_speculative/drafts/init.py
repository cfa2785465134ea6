"""Starting a draft from the target's weights instead of random ones.

Not in the paper; on a small target it trains far faster (see docs/algorithms.md for the ablation).  Each part is a
switch of ``draft.init_from_target``.
"""

import torch
from torch import nn

from nemo_speculative.config.schema import InitFromTarget
from nemo_speculative.drafts.eagle3 import Eagle3Draft
from nemo_speculative.errors import UserError

LOW_AUX_SCALE = 0.2
"""The random weights of fc are shrunk to this share where fc starts as the identity on the highest aux state."""


@torch.no_grad()
def init_from_target(draft: Eagle3Draft, head: torch.Tensor, layer: nn.Module, parts: InitFromTarget) -> None:
    """Copies the chosen parts.

    Args:
        head: [V, h], the target head's rows.
        layer: the target's last decoder layer; its projections must be those of a Llama-like layer.
    """
    if parts.head:
        draft.lm_head.weight.copy_(head[draft.draft_ids.to(head.device)])
    if parts.layer:
        _copy_layer(draft, layer)
    if parts.fc:
        h = draft.shape.hidden_size
        draft.fc.weight.mul_(LOW_AUX_SCALE)
        draft.fc.weight[:, -h:] += torch.eye(h, device=draft.fc.weight.device)


def _copy_layer(draft: Eagle3Draft, layer: nn.Module) -> None:
    h, middle = draft.shape.hidden_size, draft.midlayer
    weights = dict(layer.named_parameters())
    for name, own in middle.named_parameters():
        source = name.replace("hidden_norm", "input_layernorm") if "hidden_norm" in name else name
        if name == "input_layernorm.weight":  # of the embedding, which the target's layer does not read
            continue
        given = weights.get(source)
        # q, k and v read [embedding ; feature]: the target's projection is the feature half.
        part = own[:, h:] if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) else own
        if given is None or given.shape != part.shape:
            raise UserError(
                f"draft.init_from_target.layer: the target's last layer has no {source} of shape {tuple(part.shape)}; "
                "set draft.init_from_target.layer=false to start from random weights"
            )
        part.copy_(given)
        if part is not own:
            own[:, :h].zero_()
