"""SpecForge's EAGLE-3 strategy, draft, target head and optimizer.

Its fused loss is a Triton kernel, which does not run on a CPU, so SpecForge's own reference of that loss replaces it.
"""

from types import SimpleNamespace
from typing import Any

import specforge.algorithms.eagle3.model as specforge_model
import torch
from specforge.core.loss import _compute_loss
from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
from specforge.modeling.target.target_head import TargetHead
from specforge.optimizer import BF16Optimizer
from specforge.training.strategies.base import Eagle3TrainStrategy
from transformers import LlamaConfig

from benchmarks.training_step.case import Setup
from benchmarks.training_step.implementations.base import (
    CLIP_NORM,
    LEARNING_RATE,
    Trainer,
    copy_weights,
    padded_batches,
)
from benchmarks.training_step.implementations.features import FeatureCapture

TOTAL_STEPS = 1000
"""Length of the learning-rate schedule, which SpecForge's optimizer requires."""


class SpecForge(Trainer):
    packages = ("specforge", "transformers")

    def __init__(self, setup: Setup, variants: frozenset[str]):
        super().__init__()
        specforge_model.LogSoftmaxLoss = SimpleNamespace(apply=_compute_loss)
        self.batches = padded_batches(setup)
        self.target = FeatureCapture(setup)
        draft = self._draft(setup)
        head = TargetHead.from_pretrained(str(setup.target)).to(setup.dtype)
        with torch.no_grad():
            head.load_weights(str(setup.target))  # loaded again, as the constructor's are bfloat16
        model = specforge_model.OnlineEagle3Model(draft, length=setup.case.num_steps, attention_backend="sdpa").train()
        self.strategy = Eagle3TrainStrategy(model, target_head=head)
        self.optimizer = BF16Optimizer(
            draft, lr=LEARNING_RATE, max_grad_norm=CLIP_NORM, total_steps=TOTAL_STEPS, warmup_ratio=0.0
        )

    def _draft(self, setup: Setup) -> Any:
        config = LlamaConfig.from_pretrained(setup.target)
        config.num_hidden_layers = config.pretraining_tp = 1
        config.draft_vocab_size = setup.case.size.draft_vocab_size
        draft = LlamaForCausalLMEagle3(config, attention_backend="sdpa").to(setup.dtype)
        copy_weights(draft, setup.draft_weights, {})
        copy_weights(draft, {"embed_tokens.weight": self.target.embedding}, {})
        draft.t2d.copy_(setup.draft_mask)
        draft.d2t.copy_(setup.draft_ids - torch.arange(len(setup.draft_ids)))
        draft.freeze_embedding()
        return draft

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        aux, last_hidden_state = self.target(batch["input_ids"], batch["attention_mask"])
        sample = SimpleNamespace(
            tensors={**batch, "hidden_state": aux, "target": last_hidden_state},
            metadata={"target_repr": "hidden_state"},
        )
        return self.strategy.forward_loss(sample).loss

    def update(self) -> None:
        """Clipping, AdamW on float32 weights, and the copy back."""
        self.optimizer.step()
