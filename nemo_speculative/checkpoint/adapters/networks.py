"""The EAGLE-1 and EAGLE-3 networks of any format, from its configuration and tensors.

Every tensor must be used and none may be missing.  The vocabulary maps d2t and t2d are completed where a format leaves
them out.  Missing sizes have the defaults of transformers' LlamaConfig, which the projects that write the files use.
"""

import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_speculative.algorithms.common.contract import DEFAULT_THETA
from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.layers import Rotary
from nemo_speculative.algorithms.eagle.contract import EagleShape
from nemo_speculative.algorithms.eagle.network import EagleDraft
from nemo_speculative.algorithms.eagle3.contract import Eagle3Contract, Eagle3Shape
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.checkpoint.adapters.source import Source
from nemo_speculative.checkpoint.contract import SIZES, contract_of
from nemo_speculative.checkpoint.draft_checkpoint import Servable, Tensors, check_tensors
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.utils.errors import UserError, describe_error

UNBOUNDED = ("default", "linear", "llama3")
"""RoPE types whose rotations do not depend on max_position_embeddings."""
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
EMBEDDING = re.compile(r"(?:model\.)?embed_tokens\.weight")
ROTARY = re.compile(r".*rotary_emb\.(?:inv_freq|cos_cached|sin_cached)")
"""Buffers that old versions saved; they follow from rope_theta."""


def read_eagle(source: Source, name: str) -> Servable:
    """The EAGLE-1 or EAGLE-2 draft of the format ``name``; raises as :func:`read_eagle3`."""
    if source.aux_layers is not None:
        raise UserError(f"aux_layers is {list(source.aux_layers)}; {source.directory} is EAGLE-1, which reads none")
    shape, tensors = EagleShape(**_sizes(source, source.config)), source.tensors
    _require_width(source, "hidden_size", shape.hidden_size)
    if "fc.bias" not in tensors and "fc.weight" in tensors:
        tensors["fc.bias"] = torch.zeros(shape.hidden_size, dtype=tensors["fc.weight"].dtype)
        source.notes.append("fc has no bias in the file: zeros, which a server reads")
    return _servable(source, name, EagleDraft, shape, lambda tensor: tensor)


def read_eagle3(
    source: Source, name: str, config: dict[str, Any], rename: Callable[[str], str], aux_layers: Any, *,
    unused: Collection[str] = (), step: int = 0,
) -> Servable:  # fmt: skip
    """The EAGLE-3 draft of the format ``name``; raises UserError if it is incomplete or contradicts the target.

    Args:
        config: sizes under the names of a LlamaConfig; target_hidden_size, draft_vocab_size and the switches of
            EAGLE-3.1 where they are stated.
        rename: maps a tensor's name in the network to its name in the file.
        aux_layers: the layers whose outputs the draft reads, as stated; None: not stated.
        unused: tensors of the file, under its names, that a draft does not need.
        step: optimizer steps it was trained for, where they are stated.
    """
    sizes, width = _sizes(source, config), config.get("target_hidden_size") or source.target.hidden_size
    _require_width(source, "target_hidden_size", width)
    head, most = source.tensors.get(rename("lm_head.weight")), sizes["vocab_size"]
    entries = config.get("draft_vocab_size") or (most if head is None else len(head))
    valid = type(entries) is int and 0 < entries <= most
    source.require(valid, "draft_vocab_size", entries, f"a number from 1 to vocab_size, {most}")
    switches: dict[str, Any] = {switch: config.get(switch) or False for switch in Eagle3Contract.SWITCHES}
    for switch, value in switches.items():
        source.require(value in (True, False), switch, value, "true or false")
    shape = Eagle3Shape(
        **sizes,
        **switches,
        draft_vocab_size=entries,
        aux_layers=_aux_layers(source, aux_layers, rename("fc.weight")),
        target_hidden_size=width,
    )
    return _servable(source, name, Eagle3Draft, shape, rename, unused, step)


def _require_width(source: Source, key: str, width: int) -> None:
    own = source.target.hidden_size
    expected = f"the target's hidden size, {own}; give the target that it was trained for"
    source.require(width == own, key, width, expected)


def _sizes(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a DraftShape from ``config``, where null counts as missing, and from the tensors' names."""
    stated, llama = {key: value for key, value in config.items() if value is not None}, LlamaConfig()
    whole = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
    values = {key: getattr(llama, key) for key in (*whole, "rms_norm_eps", "hidden_act")} | stated
    _require_whole(source, values, whole)
    heads, vocab_size, positions = (values[key] for key in whole[2:])
    values = {"num_key_value_heads": heads, "head_dim": values["hidden_size"] // heads} | values
    _require_whole(source, values, ("num_key_value_heads", "head_dim"))
    for key, holds, expected in (
        ("num_key_value_heads", heads % values["num_key_value_heads"] == 0, f"a divisor of {heads}"),
        ("head_dim", values["head_dim"] % 2 == 0, "an even number"),
        ("hidden_act", values["hidden_act"] == "silu", "silu"),
        ("rms_norm_eps", _is_positive(values["rms_norm_eps"]), "a number above 0"),
        ("vocab_size", vocab_size == source.target.vocab_size, f"the target's {source.target.vocab_size}"),
    ):
        source.require(holds, key, values[key], expected)
    rope = _rope(source, stated)
    try:
        with torch.device("meta"):
            Rotary(rope, values["head_dim"], positions)
    except Exception as error:  # each RoPE type of transformers raises other classes
        reason = describe_error(error, 100)
        raise UserError(f"{source.where}: rope parameters {rope} cannot be used by transformers ({reason})") from None
    values["num_hidden_layers"] = _num_layers(source, config)
    values["max_position_embeddings"] = _max_positions(source, positions, rope)
    sizes = {name: values[key] for name, key in SIZES.items()}
    return {**sizes, "rms_norm_eps": float(values["rms_norm_eps"]), "rope_parameters": rope}


def _require_whole(source: Source, values: dict[str, Any], keys: Collection[str]) -> None:
    for key in keys:
        plausible = type(values[key]) is int and 0 < values[key] <= 1 << 30
        source.require(plausible, key, values[key], f"a number above 0, at most {1 << 30}")


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _rope(source: Source, stated: dict[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` of transformers 5, from that field or from ``rope_theta`` and ``rope_scaling``."""
    key = "rope_parameters" if stated.get("rope_parameters") else "rope_scaling"
    scaling = stated.get(key) or {}
    flat = isinstance(scaling, dict) and not any(isinstance(value, dict) for value in scaling.values())
    source.require(flat, key, scaling, "one set of parameters")
    rope = {"rope_type": scaling.get("type", "default")} | {k: v for k, v in scaling.items() if k != "type"}
    known = ("default", *ROPE_INIT_FUNCTIONS)
    source.require(rope["rope_type"] in known, key, scaling, f"a rope_type among {', '.join(sorted(known))}")
    source.require(rope.get("partial_rotary_factor", 1) == 1, key, scaling, "a rotation of the whole head")
    if "rope_theta" not in rope:
        rope["rope_theta"] = stated.get("rope_theta", DEFAULT_THETA)
        if "rope_theta" not in stated:
            source.notes.append(
                f"rope_theta is not stated: {DEFAULT_THETA:g}, the default of its own project and of SGLang"
            )
    source.require(_is_positive(rope["rope_theta"]), "rope_theta", rope["rope_theta"], "a number above 0")
    return rope


def _max_positions(source: Source, stated: int, rope: dict[str, Any]) -> int:
    """The number of positions, at least the target's: SGLang refuses fewer, and many drafts state their training's."""
    longest = source.target.max_position_embeddings
    if stated >= longest or rope["rope_type"] not in UNBOUNDED:
        return stated
    source.notes.append(
        f"max_position_embeddings is {stated}: raised to the target's {longest}, which changes no rotation "
        f"(rope_type {rope['rope_type']})"
    )
    return longest


def _num_layers(source: Source, config: dict[str, Any]) -> int:
    """The number of layers that have tensors, because some projects state the target's number."""
    stated = config.get("num_hidden_layers")
    number = max(len({match[1] for name in source.tensors if (match := LAYER.search(name))}), 1)
    if stated not in (None, number):
        source.notes.append(f"num_hidden_layers is {stated}: the weights hold {number}, which counts")
    return number


def _aux_layers(source: Source, stated: Any, fc_name: str) -> tuple[int, ...]:
    """The aux layers that the user gives, else the file, else EAGLE's default; checked against the width of fc."""
    num_layers, width = source.target.num_hidden_layers, source.target.hidden_size
    layers, origin = stated, f"{source.where}: its aux layers are"
    if source.aux_layers is not None:
        layers, origin = list(source.aux_layers), "aux_layers is"
        if stated not in (None, layers):
            source.notes.append(f"aux layers are {layers}, as given, in place of its own {stated}")
    elif stated is None:
        layers = [1, num_layers // 2 - 1, num_layers - 4]
        origin = f"{source.where}: aux layers are not stated, and EAGLE's default is"
        source.notes.append(
            f"aux layers are not stated: {layers}, EAGLE's [1, N//2 - 1, N - 4] for {num_layers} layers"
        )
    valid = isinstance(layers, list) and bool(layers) and all(type(layer) is int for layer in layers)
    # A server captures them in ascending order, and cannot capture the last layer's output.
    if not valid or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] > num_layers - 2:
        raise UserError(
            f"{origin} {layers}; expected ascending layers from 0 to {num_layers - 2} of a target of {num_layers}; say "
            "which they are with aux_layers"
        )
    fc = source.tensors.get(fc_name)
    if fc is not None and fc.shape[1:] != (len(layers) * width,):
        raise UserError(
            f"{source.weights}: {fc_name} is {list(fc.shape)}, which is not what the {len(layers)} aux layers {layers} "
            f"of a target of {width} features make; say which with aux_layers"
        )
    return tuple(layers)


def _servable(
    source: Source, name: str, draft: type[Draft], shape: Any, rename: Callable[[str], str],
    unused: Collection[str] = (), step: int = 0,
) -> Servable:  # fmt: skip
    """The draft from the source's tensors; raises UserError naming each that is missing, unknown or malformed."""
    with torch.device("meta"):
        file_names = {tensor: rename(tensor) for tensor in draft(shape).state_dict()}
    tensors = {key: source.tensors[stored] for key, stored in file_names.items() if stored in source.tensors}
    if "d2t" in file_names:
        _complete_vocabulary(tensors, shape, source.notes)
    surplus = source.tensors.keys() - set(file_names.values()) - set(unused)
    for embedding in filter(EMBEDDING.fullmatch, surplus):
        source.notes.append(f"{embedding} is left out: a server uses the target's")
    missing = sorted(stored for key, stored in file_names.items() if key not in tensors)
    unknown = sorted(key for key in surplus if not EMBEDDING.fullmatch(key) and not ROTARY.fullmatch(key))
    if missing or unknown:
        problems = [f"{key} is missing" for key in missing] + [f"{key} is unknown" for key in unknown]
        raise UserError(f"{source.weights}: {'; '.join(problems)}")
    contract = contract_of(draft)
    check_tensors(contract, tensors, shape, source.weights)
    unrecorded = Provenance("", "", "", SpeculativeSettings(1, 1, 2), step)
    return Servable(source.directory, contract, shape, unrecorded, tensors, name, tuple(source.notes))


def _complete_vocabulary(tensors: Tensors, shape: Eagle3Shape, notes: list[str]) -> None:
    """Adds d2t of the whole vocabulary and t2d where a file leaves them out, and sorts the draft vocabulary.

    Other tools count in t2d, so the ids and the head's rows must be in ascending order.
    """
    if shape.draft_vocab_size == shape.vocab_size:
        tensors.setdefault("d2t", torch.zeros(shape.vocab_size, dtype=torch.long))
    d2t, head = tensors.get("d2t"), tensors.get("lm_head.weight")
    if d2t is None or d2t.dtype != torch.long or d2t.dim() != 1:
        return  # refused later
    positions = torch.arange(len(d2t))
    ids, order = (positions + d2t).sort(stable=True)
    if "t2d" not in tensors:
        tensors["t2d"] = torch.isin(torch.arange(shape.vocab_size), ids)
    if head is not None and len(head) == len(ids) and not torch.equal(order, positions):
        tensors["d2t"], tensors["lm_head.weight"] = ids - positions, head[order]
        notes.append("the draft vocabulary was not in ascending order: lm_head's rows were sorted")
