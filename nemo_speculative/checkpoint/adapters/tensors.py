"""From the tensors of a file to those of a draft: none missing, none left over, and the vocabulary maps complete."""

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.eagle3.network import Eagle3Shape
from nemo_speculative.checkpoint.adapters.files import Tensors
from nemo_speculative.utils.errors import UserError

EMBEDDING = re.compile(r"(?:model\.)?embed_tokens\.weight")
ROTARY = re.compile(r".*rotary_emb\.(?:inv_freq|cos_cached|sin_cached)")
"""Buffers that old versions saved; they follow from rope_theta."""


def names_of(draft: type[Draft], shape: Any, rename: Callable[[str], str]) -> dict[str, str]:
    """Every tensor of a draft: its name here → its name in the file."""
    with torch.device("meta"):
        return {ours: rename(ours) for ours in draft(shape).state_dict()}


def take(found: Tensors, names: dict[str, str], unused: Collection[str], where: Path, notes: list[str]) -> Tensors:
    """The tensors of ``names``, under its keys.

    Raises:
        UserError: naming every tensor that is missing and every one that has no place.
    """
    left = found.keys() - set(names.values()) - set(unused)
    embedding = sorted(filter(EMBEDDING.fullmatch, left))
    if embedding:
        notes.append(f"{embedding[0]} is left out: a server uses the target's")
    unknown = sorted(name for name in left - set(embedding) if not ROTARY.fullmatch(name))
    problems = [f"{name} is missing" for name in sorted(set(names.values()) - found.keys())]
    problems += [f"{name} is unknown" for name in unknown]
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")
    return {ours: found[theirs] for ours, theirs in names.items()}


def derived_maps(shape: Eagle3Shape, d2t: torch.Tensor | None, t2d: torch.Tensor | None) -> Tensors:
    """The vocabulary maps that a file may leave out: all ids where none are chosen, and t2d where there is d2t."""
    whole = shape.draft_vocab_size == shape.vocab_size
    made = {"d2t": torch.zeros(shape.vocab_size, dtype=torch.long)} if d2t is None and whole else {}
    offsets = made.get("d2t", d2t)
    if t2d is None and offsets is not None and offsets.dtype == torch.long and offsets.dim() == 1:
        ids = torch.arange(len(offsets)) + offsets
        inside = torch.zeros(shape.vocab_size, dtype=torch.bool)
        inside[ids[(ids >= 0) & (ids < len(inside))]] = True
        made["t2d"] = inside
    return made


def sort_vocabulary(tensors: Tensors, notes: list[str]) -> None:
    """Other tools find a draft id by counting in t2d, which takes ascending ids: the head's rows move with them."""
    d2t, head = tensors["d2t"], tensors["lm_head.weight"]
    if d2t.dtype != torch.long or d2t.dim() != 1 or len(head) != len(d2t):
        return  # the check that follows names it
    ids, order = (torch.arange(len(d2t)) + d2t).sort()
    if not torch.equal(order, torch.arange(len(order))):
        tensors["d2t"], tensors["lm_head.weight"] = ids - torch.arange(len(ids)), head[order]
        notes.append("the draft vocabulary was not in ascending order: lm_head's rows were sorted")
