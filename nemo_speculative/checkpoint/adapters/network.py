"""The two networks that every format holds, EAGLE-1's and EAGLE-3's, out of a configuration and tensors."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nemo_speculative.algorithms.eagle.network import EagleDraft, EagleShape
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft, Eagle3Shape
from nemo_speculative.checkpoint.adapters.files import Tensors
from nemo_speculative.checkpoint.adapters.format import ForeignDraft, Reading
from nemo_speculative.checkpoint.adapters.numbers import numbers_of
from nemo_speculative.checkpoint.adapters.tensors import derived_maps, names_of, sort_vocabulary, take
from nemo_speculative.checkpoint.contract import contract_of
from nemo_speculative.checkpoint.draft_checkpoint import check_tensors
from nemo_speculative.utils.errors import UserError

SWITCHES = ("fc_norm", "norm_before_fc", "norm_output")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Eagle3Layout:
    """What a format says of an EAGLE-3 draft, in this project's terms."""

    config: dict[str, Any]
    """Its numbers, under the names of a LlamaConfig; target_hidden_size and draft_vocab_size where they are stated."""
    rename: Callable[[str], str]
    """A tensor's name here → its name in the file."""
    aux_layers: Any
    """Outputs of these layers; None: not stated."""
    switches: dict[str, Any] = field(default_factory=dict)
    """fc_norm, norm_before_fc, norm_output."""
    unused: Collection[str] = ()
    """Tensors of the file, under its names, that a draft does not need."""


def switches_of(config: dict[str, Any], where: Path) -> dict[str, bool]:
    """fc_norm, norm_before_fc and norm_output, false where they are not stated.

    Raises:
        UserError: one is neither true nor false.
    """
    found = {name: config.get(name) or False for name in SWITCHES}
    for name, value in found.items():
        if value not in (True, False):
            raise UserError(f"{where}: {name} is {value!r}, expected true or false")
    return found


def read_eagle3(name: str, reading: Reading, layout: Eagle3Layout, found: Tensors, step: int = 0) -> ForeignDraft:
    """An EAGLE-3 draft of the format ``name`` out of the tensors ``found``.

    Raises:
        UserError: it is incomplete, contradicts itself or the target, or is another network.
    """
    shape, file = _eagle3_shape(reading, layout, found), reading.source.file
    names = names_of(Eagle3Draft, shape, layout.rename)
    made = derived_maps(shape, found.get(names["d2t"]), found.get(names["t2d"]))
    stored = {ours: theirs for ours, theirs in names.items() if ours not in made}
    tensors = take(found, stored, layout.unused, file, reading.notes) | made
    sort_vocabulary(tensors, reading.notes)
    check_tensors(contract_of(Eagle3Draft), tensors, shape, file)
    return ForeignDraft(name, reading.source.directory, Eagle3Draft, shape, tensors, tuple(reading.notes), step)


def read_eagle(name: str, reading: Reading) -> ForeignDraft:
    """An EAGLE-1 or EAGLE-2 draft of the format ``name``; every project names its tensors alike.

    Raises:
        UserError: as :func:`read_eagle3`.
    """
    if reading.aux_layers is not None:
        raise UserError(
            f"aux_layers is {list(reading.aux_layers)}; {reading.source.directory} is EAGLE-1, which reads none"
        )
    config, target, found = reading.source.config, reading.target, dict(reading.source.tensors)
    numbers = numbers_of(config, target, reading.where, reading.notes)
    shape = EagleShape(**numbers, num_layers=_num_layers(found, config, reading.notes))
    _check_width(reading, "hidden_size", shape.hidden_size)
    if "fc.bias" not in found and "fc.weight" in found:
        found["fc.bias"] = torch.zeros(shape.hidden_size, dtype=found["fc.weight"].dtype)
        reading.notes.append("fc has no bias in the file: zeros, which a server reads")
    names = names_of(EagleDraft, shape, lambda ours: ours)
    tensors = take(found, names, (), reading.source.file, reading.notes)
    check_tensors(contract_of(EagleDraft), tensors, shape, reading.source.file)
    return ForeignDraft(name, reading.source.directory, EagleDraft, shape, tensors, tuple(reading.notes))


def _eagle3_shape(reading: Reading, layout: Eagle3Layout, found: Tensors) -> Eagle3Shape:
    numbers = numbers_of(layout.config, reading.target, reading.where, reading.notes)
    _check_width(reading, "target_hidden_size", layout.config.get("target_hidden_size") or reading.target.hidden_size)
    head = found.get(layout.rename("lm_head.weight"))
    entries = layout.config.get("draft_vocab_size") or (numbers["vocab_size"] if head is None else len(head))
    if type(entries) is not int or not 0 < entries <= numbers["vocab_size"]:
        raise UserError(
            f"{reading.where}: draft_vocab_size is {entries!r}, expected a number from 1 to vocab_size, "
            f"{numbers['vocab_size']}"
        )
    return Eagle3Shape(
        **numbers,
        num_layers=_num_layers(found, layout.config, reading.notes),
        draft_vocab_size=entries,
        aux_layers=_aux_layers(reading, layout, found.get(layout.rename("fc.weight"))),
        target_hidden_size=reading.target.hidden_size,
        **layout.switches,
    )


def _check_width(reading: Reading, key: str, found: int) -> None:
    if found != reading.target.hidden_size:
        raise UserError(
            f"{reading.where}: {key} is {found}, expected the target's hidden size, {reading.target.hidden_size}; give "
            "the target that it was trained for"
        )


def _num_layers(found: Tensors, config: dict[str, Any], notes: list[str]) -> int:
    """As many as there are tensors for: some projects write the target's number into the configuration."""
    number = max(len({match[1] for name in found if (match := LAYER.search(name))}), 1)
    if config.get("num_hidden_layers") not in (None, number):
        notes.append(f"num_hidden_layers is {config['num_hidden_layers']}: the weights hold {number}, which counts")
    return number


def _aux_layers(reading: Reading, layout: Eagle3Layout, fc: torch.Tensor | None) -> tuple[int, ...]:
    """What the user says, else the file, else EAGLE's default; as many as fc reads."""
    num_layers, width = reading.target.num_hidden_layers, reading.target.hidden_size
    layers, origin = _chosen_aux_layers(reading, layout, num_layers)
    numbers = isinstance(layers, list) and bool(layers) and all(type(layer) is int for layer in layers)
    # A server captures them in ascending order, and cannot capture the last layer's output.
    if not numbers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] > num_layers - 2:
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


def _chosen_aux_layers(reading: Reading, layout: Eagle3Layout, num_layers: int) -> tuple[Any, str]:
    stated = layout.aux_layers
    if reading.aux_layers is not None:
        given = list(reading.aux_layers)
        if stated not in (None, given):
            reading.notes.append(f"aux layers are {given}, as given, in place of its own {stated}")
        return given, "aux_layers is"
    if stated is not None:
        return stated, f"{reading.where}: its aux layers are"
    default = [1, num_layers // 2 - 1, num_layers - 4]
    reading.notes.append(f"aux layers are not stated: {default}, EAGLE's [1, N//2 - 1, N - 4] for {num_layers} layers")
    return default, f"{reading.where}: aux layers are not stated, and EAGLE's default is"
