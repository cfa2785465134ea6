"""Checkpoints of all networks of the EAGLE family, small and with random weights."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nemo_speculative.algorithms.common.contract import DraftShape
from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.eagle.contract import EagleShape
from nemo_speculative.algorithms.eagle.network import EagleDraft
from nemo_speculative.algorithms.eagle3.contract import Eagle3Shape
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.checkpoint.draft_checkpoint import Servable, write_servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.data.vocab_mapping import VocabMapping

VOCAB, DRAFT_VOCAB = 120, 72
LENGTH, STEPS = 9, 4
"""Positions processed by the target, and draft steps on the draft's own output after the first."""
LAYER = {
    "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "rms_norm_eps": 1e-5, "max_positions": 64, "vocab_size": VOCAB,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def eagle1(**changed: Any) -> EagleShape:
    return EagleShape(**{**LAYER, **changed})


def eagle3(**changed: Any) -> Eagle3Shape:
    usual = {"draft_vocab_size": DRAFT_VOCAB, "aux_layers": (1, 3, 4), "target_hidden_size": LAYER["hidden_size"]}
    return Eagle3Shape(**{**LAYER, **usual, **changed})


def _switches() -> dict[str, DraftShape]:
    """EAGLE-3 and all variants of EAGLE-3.1, with one and two layers."""
    inputs: dict[str, dict[str, bool]] = {
        "plain": {}, "fc_norm": {"fc_norm": True}, "norm_before_fc": {"norm_before_fc": True},
    }  # fmt: skip
    return {
        f"{name}-{'norm_output' if normed else 'as_is'}-{layers}": eagle3(norm_output=normed, num_layers=layers, **norm)
        for (name, norm), normed, layers in product(inputs.items(), (False, True), (1, 2))
    }


FAMILY: dict[str, DraftShape] = {
    **_switches(),
    "five_aux_layers": eagle3(aux_layers=(0, 1, 2, 4, 6), fc_norm=True),
    "own_embedding": eagle3(hidden_size=48, head_dim=16, num_layers=2, norm_before_fc=True, norm_output=True),
    "target_head": eagle3(draft_vocab_size=None),
    "whole_vocabulary": eagle3(draft_vocab_size=VOCAB),
    "three_layers": eagle3(num_layers=3),
    "llama3_rope": eagle3(rope_parameters=LLAMA3_ROPE),
    "eagle1-1": eagle1(),
    "eagle1-2": eagle1(num_layers=2),
    "eagle1-llama3_rope": eagle1(rope_parameters=LLAMA3_ROPE),
}


@dataclass(frozen=True)
class Ends:
    """A target's embedding and head."""

    embedding: torch.Tensor
    head: torch.Tensor

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embedding[input_ids]

    def logits(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        return last_hidden_state @ self.head.T


@dataclass(frozen=True)
class Given:
    """Inputs of a draft: a target's embedding and head, and its outputs at LENGTH positions."""

    ends: Ends
    tokens: torch.Tensor
    """int64 [LENGTH]: the token after each position."""
    features: torch.Tensor
    """[LENGTH, A * h] or [LENGTH, h]: the target's hidden states for this draft."""

    @classmethod
    def draw(cls, shape: DraftShape) -> "Given":
        hidden = getattr(shape, "target_hidden_size", shape.hidden_size)
        scale = 1 + torch.arange(getattr(shape, "fc_width", hidden)) / hidden  # aux states grow with depth
        return cls(
            Ends(torch.randn(VOCAB, hidden), torch.randn(VOCAB, hidden) / hidden**0.5),
            torch.randint(VOCAB, (LENGTH,)),
            torch.randn(LENGTH, len(scale)) * scale,
        )

    def save(self, file: Path) -> None:
        tensors = {"tokens": self.tokens, "features": self.features}
        save_file({"embedding": self.ends.embedding, "head": self.ends.head, **tensors}, file)

    @classmethod
    def load(cls, file: Path) -> "Given":
        stored = load_file(file)
        return cls(Ends(stored["embedding"], stored["head"]), stored["tokens"], stored["features"])


def write_family(root: Path, target: Path) -> None:
    """Writes a directory ``model`` and a file ``given.safetensors`` for each of :data:`FAMILY`."""
    torch.manual_seed(0)
    for name, shape in FAMILY.items():
        draft = _random_draft(shape)
        provenance = Provenance(str(target), "none", "float32", SpeculativeSettings(STEPS, 1, STEPS + 1), step=1)
        ids = {"bos_token_id": None, "eos_token_id": None}
        model = root / name / "model"
        write_servable(model, type(draft), draft.state_dict(), shape, provenance, torch.float32, ids)
        Given.draw(shape).save(root / name / "given.safetensors")


@torch.no_grad()
def _random_draft(shape: DraftShape) -> Draft:
    """Random weights only: an initial value, such as a norm's 1, would hide a missing tensor."""
    draft: Draft = Eagle3Draft(shape) if isinstance(shape, Eagle3Shape) else EagleDraft(shape)  # type: ignore[arg-type]
    for weight in draft.parameters():
        if weight.ndim == 1:
            weight.uniform_(0.5, 1.5)
        else:
            weight.normal_(std=weight.shape[1] ** -0.5)
    if (entries := getattr(shape, "draft_vocab_size", None)) is not None:
        draft.set_vocab_mapping(VocabMapping(torch.randperm(VOCAB)[:entries].sort().values, VOCAB, coverage=1.0))
    return draft


def never_loaded(servable: Servable) -> set[str]:
    """The parameters of SGLang's class that a checkpoint does not fill, under SGLang's names."""
    shape = servable.shape
    names = set() if getattr(shape, "own_embedding", False) else {"model.embed_tokens.weight"}
    if getattr(shape, "draft_vocab_size", None) is None:
        names.add("lm_head.weight")
    if isinstance(shape, Eagle3Shape):
        # Deeper layers have one, but norm what they read with hidden_norm; it stays NaN while SGLang computes below.
        names |= {f"model.layers.{n}.input_layernorm.weight" for n in range(1, shape.num_layers)}
    return names


def ignored(servable: Servable) -> list[str]:
    """The tensors of a checkpoint that SGLang ignores: t2d is for other tools."""
    return [name for name in servable.tensors if name == "t2d"]


def expected_ids(servable: Servable) -> list[int] | None:
    """The target's ids that SGLang should read from d2t; None: the draft proposes any id."""
    return servable.build().draft_ids.tolist() if "d2t" in servable.tensors else None
