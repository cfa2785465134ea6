"""speculators' EAGLE-3 draft and loss.

bfloat16 means autocast with float32 weights, as in its trainer; the draft's head is frozen except in variant "head".
"""

import torch
from speculators.losses import resolve_loss_config
from speculators.models.eagle3.core import Eagle3DraftModel
from speculators.models.eagle3.data import shift_batch
from transformers import LlamaConfig

from benchmarks.training_step.case import STEP_DECAY, Setup
from benchmarks.training_step.implementations.base import Trainer, copy_weights, padded_batches
from benchmarks.training_step.implementations.features import FeatureCapture


class Speculators(Trainer):
    packages = ("speculators", "transformers")

    def __init__(self, setup: Setup, variants: frozenset[str]):
        super().__init__()
        self.setup, size = setup, setup.case.size
        self.batches = padded_batches(setup)
        self.target = FeatureCapture(setup, before_norm=True)
        config = LlamaConfig.from_pretrained(setup.target)
        config.num_hidden_layers = 1
        self.draft = Eagle3DraftModel.from_training_args(
            config, t2d=setup.draft_mask, d2t=setup.draft_ids - torch.arange(len(setup.draft_ids)),
            draft_attn_impl="sdpa", draft_vocab_size=size.draft_vocab_size, norm_before_residual=False,
            target_layer_ids=[layer + 1 for layer in size.aux_layers], ttt_steps=setup.case.num_steps,
            verifier_name_or_path=str(setup.target),
        ).float().train()  # fmt: skip
        copy_weights(self.draft, setup.draft_weights, {"midlayer.": "layers.0."})
        self.draft.lm_head.weight.requires_grad_("head" in variants)
        self.distance = resolve_loss_config("kl_div", "eager")
        self.train(self.draft.parameters())

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        aux, last_hidden_state = self.target(batch["input_ids"], batch["attention_mask"])
        rows = [self._shifted(batch, aux, last_hidden_state, r) for r in range(len(aux))]
        packed = {name: torch.cat([row[name] for row in rows])[None] for name in rows[0] if name != "lengths"}
        documents = torch.cat([torch.full((len(row["input_ids"]),), r) for r, row in enumerate(rows)])[None]
        low = self.setup.dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            _, loss, _ = self.draft(
                **packed, document_ids=documents, ttt_steps=self.setup.case.num_steps, ttt_step_loss_decay=STEP_DECAY,
                loss_config=self.distance,
            )  # fmt: skip
        return loss

    def _shifted(self, batch: dict[str, torch.Tensor], aux: torch.Tensor, last_hidden_state: torch.Tensor, r: int):
        """A row in the form of its data set, which drops the first token."""
        length = aux.shape[1]
        return shift_batch(
            {
                "input_ids": batch["input_ids"][r],
                "loss_mask": batch["loss_mask"][r],
                "hidden_states": aux[r],
                "verifier_last_hidden_states": last_hidden_state[r],
                "lengths": torch.tensor([length]),
                "position_ids": torch.arange(length),
            }
        )
