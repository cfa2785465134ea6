"""Where conversations come from: each function is what a data group's ``_target_`` names."""

import hashlib
import random
from dataclasses import dataclass
from typing import Any, TypeVar

from nemo_speculative.config.schema import DataConfig, HubDataConfig
from nemo_speculative.data.conversations import Conversation, TokenRow, check_messages, read_jsonl
from nemo_speculative.data.stdlib import stdlib_conversations
from nemo_speculative.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """What a run trains on, and what it keeps out for validation and evaluation."""

    training: list[Conversation | TokenRow]
    held_out: list[Conversation | TokenRow]


def load_stdlib(config: DataConfig, seed: int) -> Split:
    """The standard library's questions, split by module."""
    training: list[Conversation | TokenRow] = [*stdlib_conversations(held_out=False)]
    held_out: list[Conversation | TokenRow] = [*stdlib_conversations(held_out=True)]
    return Split(shuffled(training, seed)[: config.max_conversations], shuffled(held_out, seed))


def load_jsonl(config: DataConfig, seed: int) -> Split:
    """A JSONL file, and a second one or a share of the first (chosen by id) as held out.

    Raises:
        UserError: a file is missing, empty or malformed, or one side of the split is empty.
    """
    rows = read_jsonl(config.path or "")
    held_out = read_jsonl(config.held_out_path, "data.held_out_path") if config.held_out_path else None
    return _split(rows, held_out, config, seed)


def load_hub(config: HubDataConfig, seed: int) -> Split:
    """A dataset of the hub, or a directory in a form that the `datasets` library reads.

    Raises:
        UserError: it cannot be had, or a row of it is not a conversation.
    """
    rows = _hub_rows(config, config.split)
    held_out = _hub_rows(config, config.held_out_split) if config.held_out_split else None
    return _split(rows, held_out, config, seed)


def _hub_rows(config: HubDataConfig, split: str) -> list[Conversation | TokenRow]:
    import datasets  # slow to import, and needed here only

    try:
        table = datasets.load_dataset(config.repository, split=split)
    except Exception as error:  # one class per way in which a hub can fail
        said = str(error).strip().partition("\n")[0]
        reason = f"{type(error).__name__}: {said:.100}"
        raise UserError(
            f"data.repository: {config.repository} cannot be loaded ({reason}); give a directory of it, or your own "
            "conversations with data=jsonl data.path=FILE"
        ) from None
    if config.messages_key not in table.column_names:
        raise UserError(
            f"data.messages_key: {config.repository} has the columns {table.column_names}, not {config.messages_key!r}"
        )
    return [_hub_row(config, split, number, messages) for number, messages in enumerate(table[config.messages_key])]


def _hub_row(config: HubDataConfig, split: str, number: int, messages: Any) -> Conversation:
    origin = f"{config.repository}:{split}:{number}"
    return Conversation(f"{split}/{number}", check_messages(messages, origin, config.messages_key), origin)


def _split(
    rows: list[Conversation | TokenRow], held_out: list[Conversation | TokenRow] | None, config: DataConfig, seed: int
) -> Split:
    training = rows
    if held_out is None:
        held_out = [r for r in rows if _share(r.id) < config.held_out_share]
        # A small file may have no id below the share; one row is kept out all the same.
        held_out = held_out or ([rows[-1]] if config.held_out_share > 0 and len(rows) > 1 else [])
        kept_out = {id(r) for r in held_out}
        training = [r for r in rows if id(r) not in kept_out]
    if not training:
        raise UserError(f"data: {len(rows)} conversations leave nothing to train on; lower data.held_out_share")
    return Split(shuffled(training, seed)[: config.max_conversations], shuffled(held_out, seed))


def shuffled(items: list[T], seed: int) -> list[T]:
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


def _share(identity: str) -> float:
    """A number in [0, 1) that depends on the id alone, so that the split survives added rows."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4], "big") / 2**32
