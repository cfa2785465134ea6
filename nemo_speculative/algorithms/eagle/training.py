"""The EAGLE-1 and EAGLE-2 objective (2401.15077): regress the target's next feature, and match its distribution.

At slot t, step i: vloss_w · SmoothL1(f̂_{t+1+i}, f_{t+1+i}), the mean over the h features, + ploss_w · the soft
cross-entropy of the two distributions that the target's frozen head gives.  With more than one step the draft reads its
own features, as it does in decoding (HASS, 2408.15766), and ``topk_w`` adds HASS's cross-entropy over the target's
``topk`` most likely tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import smooth_l1_loss

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.losses import RowLosses, normalize_, upcast
from nemo_speculative.algorithms.common.schedule import LossRows, Schedule, document_uniform
from nemo_speculative.algorithms.common.ttt import Sums, TTTObjective
from nemo_speculative.config.schema import FeatureNoise
from nemo_speculative.data.batch import Batch
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.utils.devices import to_device

NOISE_AMPLITUDE = 0.1
OFFICIAL_NOISE_LENGTH = 512
"""The official code scales the noise by 512 / L, with L the length of the sample."""


@dataclass(frozen=True)
class EagleWeights:
    """The weights of the terms of the loss."""

    vloss_w: float
    ploss_w: float
    topk_w: float
    topk: int


class EagleObjective(TTTObjective):
    """The EAGLE-1 objective; with several steps HASS's.

    Args:
        weights: of the terms of the loss.
        noise: added to the features that the draft reads in training; the labels stay clean.
    """

    def __init__(self, target: Any, *, weights: EagleWeights, noise: FeatureNoise, **unroll: Any):
        super().__init__(target, **unroll)
        self.weights, self.noise = weights, noise

    @classmethod
    def own_arguments(cls, config: Any) -> dict[str, Any]:
        weights = EagleWeights(config.vloss_w, config.ploss_w, config.topk_w, config.topk)
        return {"weights": weights, "noise": config.noise}

    def input_features(self, draft: Draft, schedule: Schedule, target_output: TargetOutput) -> torch.Tensor:
        clean = super().input_features(draft, schedule, target_output)
        if self.noise is FeatureNoise.none or not torch.is_grad_enabled():
            return clean
        return clean + document_noise(schedule.batch, clean, self.noise, self.seed)

    def rows_loss(
        self, draft: Any, outputs: torch.Tensor, target_output: TargetOutput, rows: LossRows, weight: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        features = target_output.last_hidden_state.flatten(0, 1)[rows.label_positions[rows.label]]
        vloss = smooth_l1_loss(upcast(outputs), upcast(features), reduction="none").mean(-1)
        loss, values, correct = super().rows_loss(draft, outputs, target_output, rows, weight)
        total = loss + self.weights.vloss_w * (vloss * weight).sum()
        regression = vloss.detach()
        values["loss"] = values["loss"] + self.weights.vloss_w * regression
        return total, values | {"vloss": regression}, correct

    @torch.no_grad()
    def labels(self, draft: Any, last_hidden_state: torch.Tensor) -> Sequence[torch.Tensor]:
        """The target's distributions p [P, V], the k largest entries [P, k] with their ids, and its argmax."""
        p = upcast(self.target.logits(last_hidden_state)).softmax(-1)
        top, ids = p.topk(min(self.weights.topk, p.shape[-1]) if self.weights.topk_w else 0, dim=-1)
        return p, top, ids, p.argmax(-1)

    def row_losses(
        self, draft: Any, logits: torch.Tensor, labels: Sequence[torch.Tensor], weight: torch.Tensor
    ) -> RowLosses:
        p, top, ids, best = labels
        w, logits, choice = self.weights, upcast(logits), logits.argmax(-1)
        cross, cross_top = (p * logits).sum(-1), (top * logits.gather(-1, ids)).sum(-1)
        q, log_normalizer = normalize_(logits, choice)
        soft, most_likely = log_normalizer - cross, log_normalizer * top.sum(-1) - cross_top
        gradient = q.mul_((w.ploss_w + w.topk_w * top.sum(-1))[:, None]).sub_(p, alpha=w.ploss_w)
        gradient = gradient.scatter_add_(-1, ids, -w.topk_w * top).mul_(weight[:, None])
        return RowLosses({"loss": w.ploss_w * soft + w.topk_w * most_likely, "ploss": soft}, choice == best, gradient)

    def metrics(self, sums: Sums) -> dict[str, float]:
        """The base's metrics; ``ploss_i`` is the cross-entropy alone, ``vloss_i`` the regression."""
        total = sums["weight"].clamp(min=1e-9)
        out = super().metrics(sums)
        for term in ("vloss", "ploss"):
            out |= {f"{term}_{i}": float(x) for i, x in enumerate(sums[term] / total)}
        return out


def document_noise(batch: Batch, features: torch.Tensor, kind: FeatureNoise, seed: int) -> torch.Tensor:
    """Uniform noise in ±0.1 (EAGLE-1, 4.1), or times 512 / L as in the official code: like features, 0 on padding.

    Each conversation's noise is drawn by itself, from its name and the epoch, so it does not depend on the packing.
    """
    noise = torch.zeros(*batch.input_ids.shape, features.shape[-1])
    for span in batch.spans:
        length = span.end - span.start
        drawn = (document_uniform(f"{seed}:{span.epoch}:{span.id}", (length, features.shape[-1])) - 0.5) * 2
        scale = OFFICIAL_NOISE_LENGTH / length if kind is FeatureNoise.official else 1.0
        noise[span.row, span.start : span.end] = drawn * (NOISE_AMPLITUDE * scale)
    return to_device(batch.shard.local(noise).to(features.dtype), features.device)
