"""Where conversations come from: each function is what a data group's ``_target_`` names."""

from dataclasses import dataclass

from nemo_speculative.config.schema import DataConfig
from nemo_speculative.data.conversations import Items, JsonLines, Listed, shuffled, split_by_share
from nemo_speculative.data.stdlib import stdlib_conversations
from nemo_speculative.utils.errors import UserError


@dataclass(frozen=True)
class Split:
    """What a run trains on, and what it keeps out for validation and evaluation."""

    training: Items
    held_out: Items


def load_stdlib(config: DataConfig, seed: int) -> Split:
    """The standard library's questions, split by module."""
    training, held_out = (Listed(stdlib_conversations(held_out=side)) for side in (False, True))
    return Split(shuffled(training, seed)[: config.max_conversations], shuffled(held_out, seed))


def load_jsonl(config: DataConfig, seed: int) -> Split:
    """A JSONL file, and a second one or a share of the first (chosen by id) as held out.

    Raises:
        UserError: a file is missing, empty or malformed, or one side of the split is empty.
    """
    rows = JsonLines(config.path or "")
    held_out = JsonLines(config.held_out_path, "data.held_out_path") if config.held_out_path else None
    return _split(rows, held_out, config, seed)


def _split(rows: Items, held_out: Items | None, config: DataConfig, seed: int) -> Split:
    training = rows
    if held_out is None:
        training, held_out = split_by_share(rows, config.held_out_share)
    if not training:
        raise UserError(f"data: {len(rows)} conversations leave nothing to train on; lower data.held_out_share")
    return Split(shuffled(training, seed)[: config.max_conversations], shuffled(held_out, seed))
