"""This project's own checkpoints, read beside the others'."""

from nemo_speculative.checkpoint.adapters.files import Source
from nemo_speculative.checkpoint.adapters.format import ForeignDraft, Format, Reading
from nemo_speculative.checkpoint.draft_checkpoint import Servable, read_servable
from nemo_speculative.checkpoint.metadata import OWN_KEY
from nemo_speculative.utils.errors import UserError


class Own(Format):
    """What :func:`nemo_speculative.checkpoint.draft_checkpoint.write_servable` wrote."""

    name = "nemo_speculative"

    def recognises(self, source: Source) -> bool:
        return OWN_KEY in source.config

    def target(self, source: Source) -> str | None:
        return read_servable(source.directory).provenance.target

    def read(self, reading: Reading) -> ForeignDraft:
        servable = read_servable(reading.source.directory)
        _check_target(servable, reading)
        if reading.aux_layers is not None and list(reading.aux_layers) != servable.aux_layers:
            raise UserError(f"aux_layers is {list(reading.aux_layers)}; {reading.where} says {servable.aux_layers}")
        return ForeignDraft(
            self.name, servable.directory, servable.contract.draft, servable.shape, servable.tensors,
            step=servable.provenance.step, provenance=servable.provenance,
        )  # fmt: skip


def _check_target(servable: Servable, reading: Reading) -> None:
    shape, target = servable.shape, reading.target
    found = (shape.vocab_size, getattr(shape, "target_hidden_size", shape.hidden_size))
    expected = (target.vocab_size, target.hidden_size)
    if found != expected:
        raise UserError(
            f"{reading.where}: made for a target with {found[0]} ids and {found[1]} features, found one with "
            f"{expected[0]} and {expected[1]}; give the target that it was trained for"
        )
