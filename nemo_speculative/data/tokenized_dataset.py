"""From conversations to documents: token rows that fit, with what was left out counted."""

import hashlib
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from nemo_speculative.data.chat_template import tokenize
from nemo_speculative.data.conversation import Conversation, TokenRow
from nemo_speculative.data.vocab_mapping import count_supervised
from nemo_speculative.utils.errors import UserError


@dataclass
class TokenizedDataset:
    """Tokenised rows, and what became of those that are not among them."""

    vocab_size: int
    """Of the target."""
    rows: Sequence[TokenRow] = field(default_factory=list)
    unsupervised: list[str] = field(default_factory=list)
    """Ids left out because no token of theirs is supervised (within the longest length)."""
    truncated: int = 0
    supervised_tokens_cut: int = 0
    directory: Path | None = None
    """Where they are stored, if they are."""

    @cached_property
    def lengths(self) -> Sequence[int]:
        """Tokens of each row."""
        return array("i", (len(row.input_ids) for row in self.rows))

    @cached_property
    def counts(self) -> dict[str, torch.Tensor]:
        """int64 [V] for each source: how often the assistant wrote each id."""
        by_source: dict[str, list[TokenRow]] = {}
        for row in self.rows:
            by_source.setdefault(row.source, []).append(row)
        return {source: count_supervised(rows, self.vocab_size) for source, rows in sorted(by_source.items())}

    @cached_property
    def fingerprint(self) -> str:
        """Of all rows in their order."""
        return hashlib.sha256(b"".join(map(row_digest, self.rows))).hexdigest()[:16]

    @property
    def all_counts(self) -> torch.Tensor:
        """int64 [V]: those of every source together."""
        return sum(self.counts.values(), torch.zeros(self.vocab_size, dtype=torch.long))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def supervised_tokens(self) -> int:
        return int(self.all_counts.sum())

    def report(self) -> str:
        """One line: rows, tokens, supervised share, and what was left out."""
        line = f"{len(self.rows)} conversations, {self.tokens} tokens, "
        line += f"{self.supervised_tokens / max(self.tokens, 1):.0%} supervised"
        if self.truncated:
            line += f"; {self.truncated} cut to length, losing {self.supervised_tokens_cut} supervised tokens"
        if self.unsupervised:
            named = ", ".join(self.unsupervised[:3]) + (", …" if len(self.unsupervised) > 3 else "")
            line += f"; {len(self.unsupervised)} without a supervised token left out ({named})"
        return line


def row_digest(row: TokenRow) -> bytes:
    """16 bytes that tell a row, with its name, from others."""
    identity = row.id.encode()
    digest = hashlib.sha256(len(identity).to_bytes(4, "little") + identity)
    digest.update(array("i", row.input_ids).tobytes())
    digest.update(bytes(row.loss_mask))
    return digest.digest()[:16]


def to_documents(
    items: Iterable[Conversation | TokenRow], tokenizer, stop_ids: Collection[int], max_length: int, vocab_size: int
) -> TokenizedDataset:
    """Tokenises, checks and cuts.

    Raises:
        UserError: a conversation has no assistant turn or cannot be masked, or an id lies outside the vocabulary.
    """
    rows: list[TokenRow] = []
    out = TokenizedDataset(vocab_size, rows)
    for item in items:
        row = item if isinstance(item, TokenRow) else _tokenize(tokenizer, item, stop_ids)
        _check_ids(row, vocab_size)
        kept = row.cut(max_length)
        if kept is not row:
            out.truncated += 1
            out.supervised_tokens_cut += sum(row.loss_mask) - sum(kept.loss_mask)
        if any(kept.loss_mask):
            rows.append(kept)
        else:
            out.unsupervised.append(row.id)
    return out


def _tokenize(tokenizer, conversation: Conversation, stop_ids: Collection[int]) -> TokenRow:
    if not conversation.has_answer:
        raise UserError(
            f"{conversation.origin}: the conversation has no assistant turn, so there is nothing to train on; add one, "
            "or let the target answer with data.answers=target"
        )
    return tokenize(tokenizer, conversation, stop_ids)


def _check_ids(row: TokenRow, vocab_size: int) -> None:
    largest = max(row.input_ids, default=0)
    if largest >= vocab_size:
        raise UserError(f"{row.origin}: token id {largest} lies outside the target's vocabulary of {vocab_size}")


def preview(row: TokenRow, tokenizer, colour: bool) -> str:
    """The text of a row with the assistant's tokens in green (or in brackets)."""
    before, after = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    pieces = [
        before + tokenizer.decode(ids) + after if supervised else tokenizer.decode(ids)
        for supervised, ids in _runs(row.input_ids, row.loss_mask)
    ]
    return "".join(pieces)


def _runs(ids: Sequence[int], mask: Sequence[bool]) -> Iterator[tuple[bool, list[int]]]:
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or mask[i] != mask[start]:
            yield mask[start], list(ids[start:i])
            start = i
