"""The EAGLE-1 and EAGLE-2 objective (2401.15077): regress the target's next feature, and match its distribution.

At slot t, step i: vloss_w · SmoothL1(f̂_{t+1+i}, f_{t+1+i}), the mean over the h features, + ploss_w · the soft
cross-entropy of the two distributions that the target's frozen head gives.  With more than one step the draft reads its
own features, as it does in decoding (HASS, 2408.15766), and ``topk_w`` adds HASS's cross-entropy over the target's
``topk`` most likely tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import smooth_l1_loss

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.losses import RowLosses, normalize_, upcast
from nemo_speculative.algorithms.common.schedule import Schedule, SlotChunk, conversation_uniform
from nemo_speculative.algorithms.common.ttt import Sums, TTTObjective
from nemo_speculative.config.schema import FeatureNoise
from nemo_speculative.data.batch import Batch
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.utils.devices import to_device


class EagleObjective(TTTObjective):
    """The EAGLE-1 objective; with several steps HASS's."""

    def input_features(self, draft: Draft, schedule: Schedule, target_output: TargetOutput) -> torch.Tensor:
        """The features of the base class, with noise in training; the labels stay clean."""
        clean = super().input_features(draft, schedule, target_output)
        if self.config.noise is FeatureNoise.none or not torch.is_grad_enabled():
            return clean
        return clean + document_noise(schedule.batch, clean, self.config.noise, self.seed)

    def rows_loss(
        self, draft: Any, outputs: torch.Tensor, target_output: TargetOutput, rows: SlotChunk, weight: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        features = target_output.last_hidden_state.flatten(0, 1)[rows.label_positions[rows.label]]
        vloss = smooth_l1_loss(upcast(outputs), upcast(features), reduction="none").mean(-1)
        loss, values, correct = super().rows_loss(draft, outputs, target_output, rows, weight)
        total = loss + self.config.vloss_w * (vloss * weight).sum()
        regression = vloss.detach()
        values["loss"] = values["loss"] + self.config.vloss_w * regression
        return total, values | {"vloss": regression}, correct

    @torch.no_grad()
    def labels(self, draft: Any, last_hidden_state: torch.Tensor) -> Sequence[torch.Tensor]:
        """The target's distributions p [P, V], the k largest entries [P, k] with their ids, and its argmax."""
        p = upcast(self.target.logits(last_hidden_state)).softmax(-1)
        top, ids = p.topk(min(self.config.topk, p.shape[-1]) if self.config.topk_w else 0, dim=-1)
        return p, top, ids, p.argmax(-1)

    def row_losses(
        self, draft: Any, logits: torch.Tensor, labels: Sequence[torch.Tensor], weight: torch.Tensor
    ) -> RowLosses:
        p, top, ids, best = labels
        ploss_w, topk_w, logits, choice = self.config.ploss_w, self.config.topk_w, upcast(logits), logits.argmax(-1)
        cross, cross_top = (p * logits).sum(-1), (top * logits.gather(-1, ids)).sum(-1)
        q, log_normalizer = normalize_(logits, choice)
        soft, most_likely = log_normalizer - cross, log_normalizer * top.sum(-1) - cross_top
        gradient = q.mul_((ploss_w + topk_w * top.sum(-1))[:, None]).sub_(p, alpha=ploss_w)
        gradient = gradient.scatter_add_(-1, ids, -topk_w * top).mul_(weight[:, None])
        return RowLosses({"loss": ploss_w * soft + topk_w * most_likely, "ploss": soft}, choice == best, gradient)

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
        drawn = (conversation_uniform(f"{seed}", span, length, features.shape[-1]) - 0.5) * 2
        # The official code scales by 512 / L, with L the length of the sample.
        scale = 512 / length if kind is FeatureNoise.official else 1.0
        noise[span.row, span.start : span.end] = drawn * (0.1 * scale)
    return to_device(batch.shard.local(noise).to(features.dtype), features.device)
