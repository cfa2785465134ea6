"""The EAGLE-1 and EAGLE-2 objective (2401.15077): regress the target's next feature, and match its distribution.

At slot t, step i: vloss_w · SmoothL1(f̂_{t+1+i}, f_{t+1+i}), the mean over the h features, + ploss_w · the soft
cross-entropy of the two distributions that the target's frozen head gives.  With more than one step the draft
is fed its own features, as it will be when it drafts (HASS, 2408.15766), and ``topk_w`` adds HASS's cross-entropy over
the target's ``topk`` likeliest tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import log_softmax, smooth_l1_loss
from torch.utils.checkpoint import checkpoint

from nemo_speculative.config.schema import FeatureNoise
from nemo_speculative.data.batch import Batch
from nemo_speculative.drafts.base import Draft
from nemo_speculative.objectives.noise import document_noise
from nemo_speculative.objectives.slots import Slots
from nemo_speculative.objectives.unroll import Rows, StepLoss, UnrollObjective
from nemo_speculative.targets.base import Supervision

HEAD_CHUNK = 512
"""Rows whose logits [rows, V] are alive at once; they are computed anew in the backward pass."""


@dataclass(frozen=True)
class EagleWeights:
    """The weights of the parts of the loss."""

    vloss_w: float
    ploss_w: float
    topk_w: float
    topk: int


class EagleObjective(UnrollObjective):
    """See the module's text.

    Args:
        weights: of the parts of the loss.
        noise: what is added to the features that the draft reads in training; the labels stay clean.
        seed: of the noise.
    """

    def __init__(self, target: Any, *, weights: EagleWeights, noise: FeatureNoise, seed: int, **unroll: Any):
        super().__init__(target, **unroll)
        self.parts, self.noise, self.seed = weights, noise, seed

    @classmethod
    def own_settings(cls, config: Any, seed: int) -> dict[str, Any]:
        weights = EagleWeights(config.vloss_w, config.ploss_w, config.topk_w, config.topk)
        return {"weights": weights, "noise": config.noise, "seed": seed}

    def features(self, draft: Draft, batch: Batch, supervision: Supervision) -> torch.Tensor:
        clean = super().features(draft, batch, supervision)
        if self.noise is FeatureNoise.none or not torch.is_grad_enabled():
            return clean
        return clean + document_noise(batch, clean, self.noise, self.seed)

    def labels(self, draft: Draft, supervision: Supervision, slots: Slots) -> torch.Tensor:
        """[B * L, h]: the target's features; distributions are made of them where they are needed."""
        return supervision.last_hidden.flatten(0, 1)

    def step(self, draft: Draft, outputs: torch.Tensor, labels: torch.Tensor, rows: Rows) -> StepLoss:
        features = labels[rows.positions]
        vloss = smooth_l1_loss(outputs.float(), features.float(), reduction="none").mean(-1)
        vsum = (vloss * rows.weight).sum()
        psum, topk_sum, hits = torch.zeros_like(vsum), torch.zeros_like(vsum), []
        for start in range(0, len(outputs), HEAD_CHUNK):
            chunk = slice(start, start + HEAD_CHUNK)
            p, k, hit = checkpoint(
                self._distributions, draft, outputs[chunk], features[chunk], rows.weight[chunk], use_reentrant=False
            )
            psum, topk_sum = psum + p, topk_sum + k
            hits.append(hit)
        w = self.parts
        loss = w.vloss_w * vsum + w.ploss_w * psum + w.topk_w * topk_sum
        return StepLoss({"loss": loss, "vloss": vsum, "ploss": psum}, torch.cat(hits))

    def _distributions(self, draft: Draft, outputs, features, weight):
        """The weighed sums of both cross-entropies, and which rows agree in their argmax."""
        with torch.no_grad():
            p = self.target.logits(features).float().softmax(-1)
        logits = draft.logits(outputs)
        log_q = log_softmax(logits.float(), dim=-1)
        soft = -(p * log_q).sum(-1)
        top, ids = p.topk(min(self.parts.topk, p.shape[-1]), dim=-1)
        likeliest = -(top * log_q.gather(-1, ids)).sum(-1)
        hit = logits.argmax(-1) == p.argmax(-1)
        return (soft * weight).sum(), (likeliest * weight).sum(), hit

    def metrics(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """As the base's; ``ploss_i`` is the cross-entropy alone, ``vloss_i`` the regression."""
        total = sums["weight"].clamp(min=1e-9)
        out = super().metrics(sums)
        for part in ("vloss", "ploss"):
            out |= {f"{part}_{i}": float(x) for i, x in enumerate(sums[part] / total)}
        return out
