"""NeMo AutoModel's trainer modules, drafts and target wrappers, combined as in its EAGLE recipes.

Its networks are EAGLE's, with two additional norms in the EAGLE-1 draft.  Its recipes pad every conversation to the row
length, or pack conversations in their order ("packed").
"""

from typing import Any

import torch
from nemo_automodel.components.datasets.llm.eagle3 import _pack_collate, build_packed_eagle3_dataset
from nemo_automodel.components.speculative.eagle.core import Eagle3TrainerModule
from nemo_automodel.components.speculative.eagle.core_v12 import EagleTrainerModule
from nemo_automodel.components.speculative.eagle.draft_llama import LlamaEagle3DraftModel
from nemo_automodel.components.speculative.eagle.draft_llama_v12 import LlamaEagleDraftModel
from nemo_automodel.components.speculative.eagle.target import HFEagle3TargetModel
from nemo_automodel.components.speculative.eagle.target_v12 import HFEagleTargetModel
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.training_step.case import Setup
from benchmarks.training_step.implementations.base import Trainer, copy_weights, padded_batches


class AutoModelEagle3(Trainer):
    packages = ("nemo-automodel", "transformers")

    def __init__(self, setup: Setup, variants: frozenset[str]):
        super().__init__()
        self.batches = _packed(setup) if "packed" in variants else padded_batches(setup)
        self.target = HFEagle3TargetModel(_load_target(setup), aux_layer_ids=setup.case.size.aux_layers)
        size = setup.case.size
        config = _draft_config(setup, draft_vocab_size=size.draft_vocab_size, target_hidden_size=size.hidden_size)
        draft = LlamaEagle3DraftModel(config).to(setup.dtype)
        own = {"fc.": "model.fc.", "midlayer.": "model.layers.0.", "norm.": "model.norm."}
        copy_weights(draft, setup.draft_weights, own)
        draft.copy_embeddings_from_target(self.target.get_input_embeddings())
        draft.freeze_embeddings()
        draft.set_vocab_mapping(setup.draft_ids)
        self.trainer = Eagle3TrainerModule(
            draft,
            selected_token_ids=setup.draft_ids,
            selected_token_mask=setup.draft_mask,
            ttt_steps=setup.case.num_steps,
        ).train()
        self.train(self.trainer.parameters())

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.trainer(**self.target.generate_batch(**batch).to_trainer_inputs()).loss


class AutoModelEagle1(Trainer):
    packages = ("nemo-automodel", "transformers")

    def __init__(self, setup: Setup, variants: frozenset[str]):
        super().__init__()
        self.batches = _packed(setup) if "packed" in variants else padded_batches(setup)
        self.target = HFEagleTargetModel(_load_target(setup))
        draft = LlamaEagleDraftModel(_draft_config(setup, draft_num_hidden_layers=1, fc_bias=True)).to(setup.dtype)
        copy_weights(draft, setup.draft_weights, {})
        draft.copy_embeddings_from_target(self.target.get_input_embeddings())
        draft.freeze_embeddings()
        self.trainer = EagleTrainerModule(draft, target_lm_head=self.target.get_lm_head()).train()
        self.train(self.trainer.parameters())

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.trainer(**vars(self.target.generate_batch(**batch))).loss


def _load_target(setup: Setup) -> Any:
    model = LlamaForCausalLM.from_pretrained(setup.target, dtype=setup.dtype, attn_implementation="sdpa")
    return model.requires_grad_(False)


def _draft_config(setup: Setup, **own: Any) -> LlamaConfig:
    """The target's configuration with one layer, as in the recipes."""
    target = LlamaConfig.from_pretrained(setup.target).to_dict()
    return LlamaConfig.from_dict({**target, "num_hidden_layers": 1, "attn_implementation": "eager", **own})


def _packed(setup: Setup) -> list[dict[str, torch.Tensor]]:
    size = setup.case.size
    samples = [{"input_ids": c.input_ids.tolist(), "loss_mask": c.loss_mask.tolist()} for c in setup.conversations]
    packed = build_packed_eagle3_dataset(samples, packed_sequence_size=size.row_tokens, pad_token_id=0)
    return [_pack_collate(packed[i : i + size.rows]) for i in range(0, len(packed), size.rows)]
