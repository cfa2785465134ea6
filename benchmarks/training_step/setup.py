"""Writes the deterministic input of a comparison: a random target, random draft weights and conversations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.training_step.case import (
    SEED,
    STEP_DECAY,
    Case,
    Conversation,
    Setup,
    Size,
    draw_conversations,
    write_case,
)
from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.config.schema import DraftConfig, Eagle3DraftConfig, EagleDraftConfig, FeatureNoise

HEAD_SCALE = 6.0
"""Factor of the target's head, without which its distributions would be nearly uniform."""
DRAFT_STD = 0.03


def _eagle3(case: Case) -> DraftConfig:
    return Eagle3DraftConfig(
        ttt_steps=case.num_steps,
        step_decay=STEP_DECAY,
        vocab_size=case.size.draft_vocab_size,
        aux_layers=case.size.aux_layers,
    )


def _eagle1(case: Case) -> DraftConfig:
    # Noise would make the losses of two implementations differ.
    return EagleDraftConfig(ttt_steps=case.num_steps, step_decay=STEP_DECAY, noise=FeatureNoise.none)


DRAFTS: dict[str, Callable[[Case], DraftConfig]] = {"eagle3": _eagle3, "eagle1": _eagle1}


def draft_config(case: Case) -> DraftConfig:
    """The project's configuration of the draft of ``case``."""
    return DRAFTS[case.draft](case)


def new_draft(case: Case, target_config: Any) -> Draft:
    """The project's draft network of ``case``, with the default initialization."""
    config = draft_config(case)
    aux_layers = config.chosen_aux_layers(case.size.num_layers)
    draft: type[Draft] = get_class(config._target_)
    return draft(draft.shape_for(config, target_config, aux_layers, case.size.draft_vocab_size))


def write_setup(directory: Path, case: Case) -> Setup:
    """Writes the input of ``case`` into ``directory``, and reads it back."""
    write_case(directory, case)
    torch.manual_seed(SEED)
    target = _random_target(case.size)
    # Two files with an index, the only form that SpecForge reads.
    size = sum(p.numel() * p.element_size() for p in target.parameters())
    target.save_pretrained(directory / "target", max_shard_size=size // 2)
    _tokenizer().save_pretrained(directory / "target")
    draft = new_draft(case, target.config)
    weights = {name: _random_weight(name, p) for name, p in draft.named_parameters()}
    save_file(weights, directory / "draft.safetensors")
    conversations = draw_conversations(case)
    data = {
        "lengths": torch.tensor([len(c) for c in conversations]),
        "input_ids": torch.cat([c.input_ids for c in conversations]),
        "loss_mask": torch.cat([c.loss_mask for c in conversations]),
        "draft_ids": _likeliest(target, conversations, case.size.draft_vocab_size),
    }
    save_file(data, directory / "data.safetensors")
    return Setup(directory)


@torch.no_grad()
def _random_target(size: Size) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=size.hidden_size, num_hidden_layers=size.num_layers, num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads, intermediate_size=size.intermediate_size, vocab_size=size.vocab_size,
        max_position_embeddings=2 * size.row_tokens, rms_norm_eps=1e-5, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.05,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.mul_(HEAD_SCALE)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(_random_weight(name, parameter))
    return model


def _tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without words, since a target's directory must contain one."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _random_weight(name: str, parameter: nn.Parameter) -> torch.Tensor:
    drawn = torch.randn(parameter.shape)
    return 1 + 0.1 * drawn if "norm" in name else DRAFT_STD * drawn


@torch.no_grad()
def _likeliest(target: LlamaForCausalLM, conversations: list[Conversation], entries: int) -> torch.Tensor:
    """int64 [entries], ascending: the ids that are most often the target's argmax, then the lowest other ids."""
    chosen = torch.cat([target(c.input_ids[None]).logits[0].argmax(-1) for c in conversations])
    counts = torch.bincount(chosen, minlength=target.config.vocab_size)
    return counts.sort(descending=True, stable=True).indices[:entries].sort().values
