"""The EAGLE-1 and EAGLE-3 networks of any format, from its configuration and tensors.

Every tensor must be used and none may be missing.  The vocabulary maps d2t and t2d are completed where a format leaves
them out.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.eagle.contract import EagleShape
from nemo_speculative.algorithms.eagle.network import EagleDraft
from nemo_speculative.algorithms.eagle3.contract import Eagle3Shape
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.checkpoint.adapters.base import ForeignDraft, Reading, Tensors
from nemo_speculative.checkpoint.adapters.llama_config import numbers_of
from nemo_speculative.checkpoint.contract import contract_of
from nemo_speculative.checkpoint.draft_checkpoint import check_tensors
from nemo_speculative.utils.errors import UserError

SWITCHES = ("fc_norm", "norm_before_fc", "norm_output")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
EMBEDDING = re.compile(r"(?:model\.)?embed_tokens\.weight")
ROTARY = re.compile(r".*rotary_emb\.(?:inv_freq|cos_cached|sin_cached)")
"""Buffers that old versions saved; they follow from rope_theta."""


@dataclass(frozen=True, kw_only=True)
class Eagle3Layout:
    """The layout of an EAGLE-3 draft in the files of one format."""

    config: dict[str, Any]
    """Sizes under the names of a LlamaConfig; target_hidden_size and draft_vocab_size where they are stated."""
    rename: Callable[[str], str]
    """Maps a tensor's name in the network to its name in the file."""
    aux_layers: Any
    """The layers whose outputs the draft reads; None: not stated."""
    switches: dict[str, Any] = field(default_factory=dict)
    """fc_norm, norm_before_fc, norm_output."""
    unused: Collection[str] = ()
    """Tensors of the file, under its names, that a draft does not need."""


def switches_of(config: dict[str, Any], where: Path) -> dict[str, bool]:
    """fc_norm, norm_before_fc and norm_output; false where they are not stated.

    Raises:
        UserError: one is neither true nor false.
    """
    switches = {name: config.get(name) or False for name in SWITCHES}
    for name, value in switches.items():
        if value not in (True, False):
            raise UserError(f"{where}: {name} is {value!r}, expected true or false")
    return switches


def read_eagle3(name: str, reading: Reading, layout: Eagle3Layout, stored: Tensors, step: int = 0) -> ForeignDraft:
    """The EAGLE-3 draft of the format ``name`` from the tensors ``stored`` in its files.

    Raises:
        UserError: it is incomplete, contradicts itself or the target, or is another network.
    """
    shape, file = _eagle3_shape(reading, layout, stored), reading.source.file
    names = _file_names(Eagle3Draft, shape, layout.rename)
    derived = _derived_maps(shape, stored.get(names["d2t"]), stored.get(names["t2d"]))
    names = {name: file_name for name, file_name in names.items() if name not in derived}
    tensors = _select(stored, names, layout.unused, file, reading.notes) | derived
    _sort_vocabulary(tensors, reading.notes)
    check_tensors(contract_of(Eagle3Draft), tensors, shape, file)
    return ForeignDraft(name, reading.source.directory, Eagle3Draft, shape, tensors, tuple(reading.notes), step)


def read_eagle(name: str, reading: Reading) -> ForeignDraft:
    """The EAGLE-1 or EAGLE-2 draft of the format ``name``; all projects use the same tensor names.

    Raises:
        UserError: as :func:`read_eagle3`.
    """
    if reading.aux_layers is not None:
        raise UserError(
            f"aux_layers is {list(reading.aux_layers)}; {reading.source.directory} is EAGLE-1, which reads none"
        )
    config, stored = reading.source.config, dict(reading.source.tensors)
    numbers = numbers_of(config, reading.target, reading.where, reading.notes)
    shape = EagleShape(**numbers, num_layers=_num_layers(stored, config, reading.notes))
    _check_width(reading, "hidden_size", shape.hidden_size)
    if "fc.bias" not in stored and "fc.weight" in stored:
        stored["fc.bias"] = torch.zeros(shape.hidden_size, dtype=stored["fc.weight"].dtype)
        reading.notes.append("fc has no bias in the file: zeros, which a server reads")
    names = _file_names(EagleDraft, shape, lambda name: name)
    tensors = _select(stored, names, (), reading.source.file, reading.notes)
    check_tensors(contract_of(EagleDraft), tensors, shape, reading.source.file)
    return ForeignDraft(name, reading.source.directory, EagleDraft, shape, tensors, tuple(reading.notes))


def _eagle3_shape(reading: Reading, layout: Eagle3Layout, stored: Tensors) -> Eagle3Shape:
    numbers = numbers_of(layout.config, reading.target, reading.where, reading.notes)
    _check_width(reading, "target_hidden_size", layout.config.get("target_hidden_size") or reading.target.hidden_size)
    head = stored.get(layout.rename("lm_head.weight"))
    entries = layout.config.get("draft_vocab_size") or (numbers["vocab_size"] if head is None else len(head))
    if type(entries) is not int or not 0 < entries <= numbers["vocab_size"]:
        raise UserError(
            f"{reading.where}: draft_vocab_size is {entries!r}, expected a number from 1 to vocab_size, "
            f"{numbers['vocab_size']}"
        )
    return Eagle3Shape(
        **numbers,
        num_layers=_num_layers(stored, layout.config, reading.notes),
        draft_vocab_size=entries,
        aux_layers=_aux_layers(reading, layout, stored.get(layout.rename("fc.weight"))),
        target_hidden_size=reading.target.hidden_size,
        **layout.switches,
    )


def _check_width(reading: Reading, key: str, width: int) -> None:
    if width != reading.target.hidden_size:
        raise UserError(
            f"{reading.where}: {key} is {width}, expected the target's hidden size, {reading.target.hidden_size}; give "
            "the target that it was trained for"
        )


def _num_layers(stored: Tensors, config: dict[str, Any], notes: list[str]) -> int:
    """The number of layers that have tensors, because some projects state the target's number."""
    number = max(len({match[1] for name in stored if (match := LAYER.search(name))}), 1)
    if config.get("num_hidden_layers") not in (None, number):
        notes.append(f"num_hidden_layers is {config['num_hidden_layers']}: the weights hold {number}, which counts")
    return number


def _aux_layers(reading: Reading, layout: Eagle3Layout, fc: torch.Tensor | None) -> tuple[int, ...]:
    """The aux layers that the user gives, else the file, else EAGLE's default; checked against the width of fc."""
    num_layers, width = reading.target.num_hidden_layers, reading.target.hidden_size
    layers: Any = layout.aux_layers
    origin = f"{reading.where}: its aux layers are"
    if reading.aux_layers is not None:
        layers, origin = list(reading.aux_layers), "aux_layers is"
        if layout.aux_layers not in (None, layers):
            reading.notes.append(f"aux layers are {layers}, as given, in place of its own {layout.aux_layers}")
    elif layers is None:
        layers, origin = [1, num_layers // 2 - 1, num_layers - 4], f"{reading.where}: aux layers are not stated, and "
        origin += "EAGLE's default is"
        reading.notes.append(
            f"aux layers are not stated: {layers}, EAGLE's [1, N//2 - 1, N - 4] for {num_layers} layers"
        )
    valid = isinstance(layers, list) and bool(layers) and all(type(layer) is int for layer in layers)
    # A server captures them in ascending order, and cannot capture the last layer's output.
    if not valid or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] > num_layers - 2:
        raise UserError(
            f"{origin} {layers}; expected ascending layers from 0 to {num_layers - 2} of a target of {num_layers}; say "
            "which they are with aux_layers"
        )
    if fc is not None and (fc.dim() != 2 or fc.shape[1] != len(layers) * width):
        raise UserError(
            f"{reading.source.file}: {layout.rename('fc.weight')} is {list(fc.shape)}, which is not what the "
            f"{len(layers)} aux layers {layers} of a target of {width} features make; say which with aux_layers"
        )
    return tuple(layers)


def _file_names(draft: type[Draft], shape: Any, rename: Callable[[str], str]) -> dict[str, str]:
    """Maps each tensor name of the network to its name in the file."""
    with torch.device("meta"):
        return {name: rename(name) for name in draft(shape).state_dict()}


def _select(
    stored: Tensors, names: dict[str, str], unused: Collection[str], where: Path, notes: list[str]
) -> Tensors:  # fmt: skip
    """The tensors that ``names`` (network to file) lists, under the network's names.

    Raises:
        UserError: naming every tensor that is missing and every one that is unknown.
    """
    surplus = stored.keys() - set(names.values()) - set(unused)
    embedding = sorted(filter(EMBEDDING.fullmatch, surplus))
    if embedding:
        notes.append(f"{embedding[0]} is left out: a server uses the target's")
    unknown = sorted(name for name in surplus - set(embedding) if not ROTARY.fullmatch(name))
    problems = [f"{name} is missing" for name in sorted(set(names.values()) - stored.keys())]
    problems += [f"{name} is unknown" for name in unknown]
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")
    return {name: stored[file_name] for name, file_name in names.items()}


def _derived_maps(shape: Eagle3Shape, d2t: torch.Tensor | None, t2d: torch.Tensor | None) -> Tensors:
    """The vocabulary maps that a file may leave out: d2t of the whole vocabulary, and t2d where there is d2t."""
    whole = shape.draft_vocab_size == shape.vocab_size
    derived = {"d2t": torch.zeros(shape.vocab_size, dtype=torch.long)} if d2t is None and whole else {}
    offsets = derived.get("d2t", d2t)
    if t2d is None and offsets is not None and offsets.dtype == torch.long and offsets.dim() == 1:
        ids = torch.arange(len(offsets)) + offsets
        mask = torch.zeros(shape.vocab_size, dtype=torch.bool)
        mask[ids[(ids >= 0) & (ids < len(mask))]] = True
        derived["t2d"] = mask
    return derived


def _sort_vocabulary(tensors: Tensors, notes: list[str]) -> None:
    """Sorts the draft vocabulary, and the head's rows with it: other tools count in t2d, which is ascending."""
    d2t, head = tensors["d2t"], tensors["lm_head.weight"]
    if d2t.dtype != torch.long or d2t.dim() != 1 or len(head) != len(d2t):
        return  # check_tensors refuses them
    ids, order = (torch.arange(len(d2t)) + d2t).sort()
    if not torch.equal(order, torch.arange(len(order))):
        tensors["d2t"], tensors["lm_head.weight"] = ids - torch.arange(len(ids)), head[order]
        notes.append("the draft vocabulary was not in ascending order: lm_head's rows were sorted")
