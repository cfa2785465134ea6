"""Sources of conversations: the functions that the ``_target_`` of a data config names."""

from dataclasses import dataclass

from nemo_speculative.config.schema import DataConfig
from nemo_speculative.data.conversations import (
    ConversationFile,
    ConversationList,
    Conversations,
    shuffled,
    split_by_hash,
)
from nemo_speculative.data.stdlib import stdlib_conversations
from nemo_speculative.utils.errors import UserError


@dataclass(frozen=True)
class Split:
    """The conversations of a run: for training, and held out for validation and evaluation."""

    training: Conversations
    held_out: Conversations


def load_stdlib(config: DataConfig, seed: int) -> Split:
    """Questions about Python's standard library, split by module."""
    training, held_out = (ConversationList(stdlib_conversations(held_out=side)) for side in (False, True))
    return Split(shuffled(training, seed)[: config.max_conversations], shuffled(held_out, seed))


def load_jsonl(config: DataConfig, seed: int) -> Split:
    """A JSONL file, and as held out a second one, or a share of the first chosen by the hash of the id.

    Raises:
        UserError: a file is missing, empty or malformed, or one side of the split is empty.
    """
    training: Conversations = ConversationFile(config.path or "")
    count = len(training)
    if config.held_out_path:
        held_out: Conversations = ConversationFile(config.held_out_path, "data.held_out_path")
    else:
        training, held_out = split_by_hash(training, config.held_out_share)
    if not training:
        raise UserError(f"data: {count} conversations leave nothing to train on; lower data.held_out_share")
    return Split(shuffled(training, seed)[: config.max_conversations], shuffled(held_out, seed))
