"""The EAGLE-1 and EAGLE-2 objective (2401.15077): regress the target's next feature, and match its distribution.

At slot t, step i: vloss_w · SmoothL1(f̂_{t+1+i}, f_{t+1+i}), the mean over the h features, + ploss_w · the soft
cross-entropy of the two distributions that the target's frozen head gives.  With more than one step the draft
is fed its own features, as it will be when it drafts (HASS, 2408.15766), and ``topk_w`` adds HASS's cross-entropy over
the target's ``topk`` likeliest tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import smooth_l1_loss

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.linear_loss import Judge, Judged
from nemo_speculative.algorithms.common.losses import normalised_
from nemo_speculative.algorithms.common.noise import document_noise
from nemo_speculative.algorithms.common.schedule import Rows
from nemo_speculative.algorithms.common.unroll_objective import UnrollObjective
from nemo_speculative.config.schema import FeatureNoise
from nemo_speculative.data.batch import Batch
from nemo_speculative.targets.base import TargetOutput


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
    """

    def __init__(self, target: Any, *, weights: EagleWeights, noise: FeatureNoise, **unroll: Any):
        super().__init__(target, **unroll)
        self.parts, self.noise = weights, noise

    @classmethod
    def own_settings(cls, config: Any) -> dict[str, Any]:
        weights = EagleWeights(config.vloss_w, config.ploss_w, config.topk_w, config.topk)
        return {"weights": weights, "noise": config.noise}

    def features(self, draft: Draft, batch: Batch, supervision: TargetOutput) -> torch.Tensor:
        clean = super().features(draft, batch, supervision)
        if self.noise is FeatureNoise.none or not torch.is_grad_enabled():
            return clean
        return clean + document_noise(batch, clean, self.noise, self.seed)

    def judged(
        self, draft: Any, predicted: torch.Tensor, supervision: TargetOutput, rows: Rows, weight: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        features = supervision.last_hidden_state.flatten(0, 1)[rows.labels[rows.label]]
        vloss = smooth_l1_loss(predicted.float(), features.float(), reduction="none").mean(-1)
        loss, values, hit = super().judged(draft, predicted, supervision, rows, weight)
        total = loss + self.parts.vloss_w * (vloss * weight).sum()
        regression = vloss.detach()
        values["loss"] = values["loss"] + self.parts.vloss_w * regression
        return total, values | {"vloss": regression}, hit

    def judge(self, draft: Any, last_hidden_state: torch.Tensor, rows: Rows, weight: torch.Tensor) -> Judge:
        return _EagleJudge(self.target, self.parts, last_hidden_state, rows, weight)

    def metrics(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """As the base's; ``ploss_i`` is the cross-entropy alone, ``vloss_i`` the regression."""
        total = sums["weight"].clamp(min=1e-9)
        out = super().metrics(sums)
        for part in ("vloss", "ploss"):
            out |= {f"{part}_{i}": float(x) for i, x in enumerate(sums[part] / total)}
        return out


@dataclass(frozen=True)
class _Labels:
    """The target's distributions p [P, V], its likeliest tokens ``top`` with their ``ids`` [P, k], and its choice."""

    p: torch.Tensor
    top: torch.Tensor
    ids: torch.Tensor
    best: torch.Tensor
    start: int

    def of(self, label: torch.Tensor) -> list[torch.Tensor]:
        return [x.index_select(0, label - self.start) for x in (self.p, self.top, self.ids, self.best)]


@dataclass
class _EagleJudge:
    target: Any
    parts: EagleWeights
    last_hidden_state: torch.Tensor
    rows: Rows
    weight: torch.Tensor

    @torch.no_grad()
    def labels(self, span: slice) -> _Labels:
        p = self.target.logits(self.last_hidden_state.index_select(0, self.rows.labels[span])).float().softmax(-1)
        top, ids = p.topk(min(self.parts.topk, p.shape[-1]) if self.parts.topk_w else 0, dim=-1)
        return _Labels(p, top, ids, p.argmax(-1), span.start)

    def judge(self, logits: torch.Tensor, labels: _Labels, part: slice) -> Judged:
        p, top, ids, best = labels.of(self.rows.label[part])
        w, logits, choice = self.parts, logits.float(), logits.argmax(-1)
        cross, cross_top = (p * logits).sum(-1), (top * logits.gather(-1, ids)).sum(-1)
        q, normaliser = normalised_(logits, choice)
        soft, likeliest = normaliser - cross, normaliser * top.sum(-1) - cross_top
        gradient = q.mul_((w.ploss_w + w.topk_w * top.sum(-1))[:, None]).sub_(p, alpha=w.ploss_w)
        gradient = gradient.scatter_add_(-1, ids, -w.topk_w * top).mul_(self.weight[part][:, None])
        return Judged({"loss": w.ploss_w * soft + w.topk_w * likeliest, "ploss": soft}, choice == best, gradient)
