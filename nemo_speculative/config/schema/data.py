"""Conversations: their source, and how they become packed rows of tokens."""

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from omegaconf import MISSING

from nemo_speculative.config.schema.common import require, require_positive


class Answers(Enum):
    given = "given"
    target = "target"


@dataclass
class DataConfig:
    """Conversations from a JSONL file, and how they become packed rows of tokens."""

    _target_: str = "nemo_speculative.data.conversations.load_jsonl"
    path: Optional[str] = MISSING
    """JSONL file; a line is {"conversations": [{"role", "content"}]} or {"input_ids", "loss_mask"}."""
    held_out_path: Optional[str] = None
    """JSONL file for validation and evaluation; null: held_out_share of path, chosen by id."""
    held_out_share: float = 0.05
    """Share of the conversations kept out of training when held_out_path is null."""
    max_conversations: Optional[int] = None
    """Most conversations to train on, the first of a seeded order; null: all."""
    answers: Answers = Answers.given
    """given: train on the answers in the data; target: the target answers every question itself first (on-policy)."""
    max_answer_tokens: int = 512
    """Longest answer generated with answers=target, in tokens."""
    generation_batch_size: int = 64
    """Conversations answered at once with answers=target."""
    max_length: Optional[int] = None
    """Longest conversation in tokens, longer ones are truncated; null: 2048, or the target's context if shorter."""
    packed_length: Optional[int] = None
    """Tokens in one packed row; null: max_length."""
    cache_dir: str = "cache"
    """Directory of tokenized rows (tokens/) and generated answers (answers/), keyed by their inputs."""
    workers: Optional[int] = None
    """Processes that tokenize a long file; null: the number of cores, at most 8."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "data",
            "max_length",
            "packed_length",
            "max_answer_tokens",
            "generation_batch_size",
            "max_conversations",
            "workers",
        )
        require(
            0 <= self.held_out_share < 1,
            f"data.held_out_share is {self.held_out_share}: expected a share of at least 0 and below 1",
        )

    def lengths(self, context: int) -> tuple[int, int]:
        """max_length and packed_length for a target whose longest sequence is ``context`` tokens.

        Raises:
            UserError: max_length is longer than that, or than a row.
        """
        longest = self.max_length or min(2048, context)
        row = self.packed_length or longest
        require(
            longest <= context,
            f"data.max_length is {longest}, longer than the target's context of {context}: lower data.max_length",
        )
        require(
            longest <= row,
            f"data.max_length is {longest}, longer than data.packed_length={row}: a conversation must fit into one "
            "row; raise data.packed_length or lower data.max_length",
        )
        return longest, row


@dataclass
class TinyDataConfig(DataConfig):
    """Questions about the standard library, answered by the target itself."""

    _target_: str = "nemo_speculative.data.stdlib.load_stdlib"
    path: Optional[str] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.path is None,
            f"data.path is {self.path}, and data=tiny, the default of model=tiny, reads no file: add data=jsonl",
        )
