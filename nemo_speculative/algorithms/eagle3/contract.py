"""The shape of an EAGLE-3 or EAGLE-3.1 draft, and its ``config.json``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_speculative.algorithms.common.contract import Contract, DraftShape, number, numbers_for
from nemo_speculative.utils.errors import UserError

if TYPE_CHECKING:  # a command for SGLang is printed without importing Hydra
    from nemo_speculative.config.schema import DraftConfig


@dataclass(frozen=True, kw_only=True)
class Eagle3Shape(DraftShape):
    """The sizes and switches of the network."""

    draft_vocab_size: int | None
    """Size of the draft vocabulary; None: the draft has no head, and the target's computes the logits."""
    aux_layers: tuple[int, ...]
    target_hidden_size: int
    fc_norm: bool = False
    """EAGLE-3.1: an RMSNorm over each aux state before fc."""
    norm_before_fc: bool = False
    """The other form: one RMSNorm over all aux states together."""
    norm_output: bool = False
    """EAGLE-3.1: the next step reads the state after the final norm."""

    @classmethod
    def like_target(
        cls, target_config: Any, aux_layers: Sequence[int], draft_vocab_size: int | None,
        config: "DraftConfig | None" = None, **changes: Any,
    ) -> "Eagle3Shape":  # fmt: skip
        """The shape of one of the target's layers, unless ``config`` or ``changes`` set another."""
        switches = {name: getattr(config, name, False) for name in Eagle3Contract.SWITCHES}
        return cls(
            **{**numbers_for(config, target_config), **switches, **changes},
            draft_vocab_size=draft_vocab_size,
            aux_layers=tuple(aux_layers),
            target_hidden_size=target_config.hidden_size,
        )

    @property
    def own_embedding(self) -> bool:
        """Whether the draft has an embedding of its own."""
        return self.hidden_size != self.target_hidden_size

    @property
    def fc_width(self) -> int:
        return len(self.aux_layers) * self.target_hidden_size


class Eagle3Contract(Contract):
    """The contract of EAGLE-3 and EAGLE-3.1 drafts."""

    algorithm = "EAGLE3"
    SWITCHES = ("fc_norm", "norm_before_fc", "norm_output")
    network = "nemo_speculative.algorithms.eagle3.network:Eagle3Draft"
    drafting = "nemo_speculative.algorithms.eagle3.drafting:Eagle3Session"

    def own_fields(self, shape: Eagle3Shape) -> dict[str, Any]:
        return {
            "draft_vocab_size": shape.draft_vocab_size,
            "num_aux_hidden_states": len(shape.aux_layers),
            "target_hidden_size": shape.target_hidden_size,
            "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": list(shape.aux_layers)},
            # Left out where off, so that a reader that does not know them meets nothing new.
            **{name: True for name in self.SWITCHES if getattr(shape, name)},
        }

    def shape(self, config: dict[str, Any], numbers: dict[str, Any], where: Path) -> Eagle3Shape:
        switches = {name: config.get(name, False) for name in self.SWITCHES}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise UserError(f"{where}: {name} is {value!r}, expected true or false")
        shape = Eagle3Shape(
            **numbers,
            **switches,
            draft_vocab_size=None if config["draft_vocab_size"] is None else number(config, "draft_vocab_size", where),
            aux_layers=_aux_layers(config["eagle_config"], where),
            target_hidden_size=number(config, "target_hidden_size", where),
        )
        if (shape.draft_vocab_size or 0) > shape.vocab_size:
            raise UserError(f"{where}: draft_vocab_size is {shape.draft_vocab_size}, vocab_size {shape.vocab_size}")
        if shape.fc_norm and shape.norm_before_fc:
            raise UserError(f"{where}: fc_norm and norm_before_fc are both true; expected at most one of them")
        if shape.draft_vocab_size is None and shape.own_embedding:
            raise UserError(
                f"{where}: draft_vocab_size is null, but the target's head reads {shape.target_hidden_size} features, "
                f"and hidden_size is {shape.hidden_size}"
            )
        if shape.fc_width == shape.hidden_size:
            raise UserError(
                f"{where}: {len(shape.aux_layers)} aux states are as wide as hidden_size {shape.hidden_size}; SGLang "
                "applies fc only where the widths differ"
            )
        return shape


def _aux_layers(eagle: Any, where: Path) -> tuple[int, ...]:
    layers: Any = eagle.get("eagle_aux_hidden_state_layer_ids") if isinstance(eagle, dict) else None
    numbers = isinstance(layers, list) and bool(layers) and all(type(v) is int and v >= 0 for v in layers)
    if not numbers or len(set(layers)) != len(layers) or eagle.get("use_aux_hidden_state") is not True:
        raise UserError(
            f"{where}: eagle_config is {eagle!r}, expected use_aux_hidden_state=true and distinct layer ids"
        )
    return tuple(layers)
