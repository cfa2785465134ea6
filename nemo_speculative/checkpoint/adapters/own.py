"""Reader and writer of this project's own checkpoints, next to those of the other formats."""

from pathlib import Path
from typing import Any

from nemo_speculative.checkpoint.adapters.base import Export, ForeignDraft, Format, Reading, Source
from nemo_speculative.checkpoint.draft_checkpoint import Servable, read_servable, write_servable
from nemo_speculative.checkpoint.metadata import OWN_KEY
from nemo_speculative.utils.errors import UserError


class Own(Format):
    """The format of :func:`nemo_speculative.checkpoint.draft_checkpoint.write_servable`."""

    name = "nemo_speculative"

    def recognizes(self, source: Source) -> bool:
        return OWN_KEY in source.config

    def target(self, source: Source) -> str | None:
        return read_servable(source.directory).provenance.target

    def read(self, reading: Reading) -> ForeignDraft:
        servable, target = read_servable(reading.source.directory), reading.target
        shape = servable.shape
        sizes = (shape.vocab_size, getattr(shape, "target_hidden_size", shape.hidden_size))
        if sizes != (target.vocab_size, target.hidden_size):
            raise UserError(
                f"{reading.where}: made for a target with {sizes[0]} ids and {sizes[1]} features, found one with "
                f"{target.vocab_size} and {target.hidden_size}; give the target that it was trained for"
            )
        if reading.aux_layers is not None and list(reading.aux_layers) != servable.aux_layers:
            raise UserError(f"aux_layers is {list(reading.aux_layers)}; {reading.where} says {servable.aux_layers}")
        return ForeignDraft(
            self.name, servable.directory, servable.contract.draft, shape, servable.tensors,
            step=servable.provenance.step, provenance=servable.provenance,
        )  # fmt: skip


class SGLangExport(Export):
    """A servable checkpoint, which SGLang and every program of this project read."""

    suffix = "servable"

    def write(self, directory: Path, servable: Servable, target: Any) -> None:
        special_ids = {"bos_token_id": target.bos_token_id, "eos_token_id": target.eos_token_id}
        write_servable(
            directory, servable.contract.draft, servable.tensors, servable.shape, servable.provenance,
            servable.tensors["fc.weight"].dtype, special_ids,
        )  # fmt: skip
