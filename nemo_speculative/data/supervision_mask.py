"""The slots at which a draft is trained, from the assistant mask of packed rows."""

import torch
from torch.nn.functional import pad

from nemo_speculative.config.schema import MaskConvention


def supervision_mask(
    loss_mask: torch.Tensor, documents: torch.Tensor, num_steps: int, convention: MaskConvention
) -> torch.Tensor:
    """The supervised slots of each step: bool [T, B, L] from ``loss_mask`` bool [B, L] and ``documents`` int64 [B, L].

    By default ("serving") slot t is supervised at step i when x_{t+1}, …, x_{t+2+i} are all the assistant's, in one
    document.  The other conventions reproduce published frameworks, for comparison:

    - official (SafeAILab/EAGLE, SpecForge): the mask is not shifted with label and token, m[t+i].  The first drafted
      token of an answer is never trained, two labels past its end are.
    - automodel (NeMo AutoModel): shifted by one, m[t+1+i].  One label past the end is trained.
    """
    same = [_ahead(documents, 2 + i, -1) == documents for i in range(num_steps)]
    if convention is MaskConvention.official:
        return torch.stack([_ahead(loss_mask, i, False) & same[i] for i in range(num_steps)])
    if convention is MaskConvention.automodel:
        return torch.stack([_ahead(loss_mask, 1 + i, False) & same[i] for i in range(num_steps)])
    unbroken, steps = _ahead(loss_mask, 1, False), []
    for i in range(num_steps):
        unbroken = unbroken & _ahead(loss_mask, 2 + i, False) & same[i]
        steps.append(unbroken)
    return torch.stack(steps)


def _ahead(x: torch.Tensor, n: int, fill: int | bool) -> torch.Tensor:
    """y[:, t] = x[:, t + n], and ``fill`` past the end."""
    return pad(x[:, n:], (0, min(n, x.shape[1])), value=fill)
