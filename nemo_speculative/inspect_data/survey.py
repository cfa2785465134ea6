"""One pass over the data of a training: every row counted, none kept but those to be shown."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from nemo_speculative.data.chat_template import chat_template_of
from nemo_speculative.data.conversation import Conversation, TokenRow
from nemo_speculative.data.conversations import Item
from nemo_speculative.data.sources import Split
from nemo_speculative.data.tokenized_dataset import Tokenization
from nemo_speculative.inspect_data.tally import Tally
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.progress import Progress

MOST_SOURCES, MOST_REASONS, MOST_EXAMPLES = 30, 20, 5
OTHERS = "(others)"
SHOWN = 3
NO_LIMIT = 1 << 62


@dataclass
class LeftOut:
    """Rows that are not trained on, for one kind of reason."""

    count: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, example: str, reason: str = "") -> None:
        self.count += 1
        self.reasons[reason if reason in self.reasons or len(self.reasons) < MOST_REASONS else OTHERS] += 1
        if len(self.examples) < MOST_EXAMPLES:
            self.examples.append(example)


class Survey:
    """What was found in the data.

    Args:
        how: items become rows in a training.
        show: ids, or numbers of lines, of the conversations to keep; none: the first three.
    """

    def __init__(self, how: Tokenization, show: Sequence[str] = ()):
        self.max_length, self._show = how.max_length, show
        self._how = replace(how, max_length=NO_LIMIT)
        self.tallies: dict[tuple[bool, str], Tally] = {}
        """By whether it is held out, and source."""
        self.refused, self.unsupervised = LeftOut(), LeftOut()
        self.shown: list[TokenRow] = []
        self.not_shown: list[str] = []
        """Ids that were asked for, of which a training makes no row."""
        self._found: set[str] = set()
        self.hashes, self.places = array("Q"), array("Q")
        """64 bits of each row's ids (one pair among a million is equal by chance once in 37 million times), and which
        of all items, in their order, the row is."""

    def read(self, split: Split, look: Callable[[Item, TokenRow | None], None]) -> None:
        """Every item of ``split``, the held out last; ``look`` sees each with its row (None: refused or unsupervised).

        Raises:
            UserError: the data cannot be read, or lacks what was to be shown.
        """
        total = len(split.training) + len(split.held_out)
        progress = Progress("inspecting", total)
        for place, item in enumerate(chain(split.training, split.held_out)):
            row = self._row(item)
            if row is not None:
                self._count(row, item, place, place >= len(split.training))
            self._keep(item, row)
            look(item, row)
            progress.advance()
        progress.close()
        if missing := [name for name in self._show if name not in self._found]:
            raise UserError(
                f"show: no conversation among {total} has the id {missing[0]!r} or is of that line; expected ids of "
                "the data, or numbers of lines of its file"
            )

    def _row(self, item: Item) -> TokenRow | None:
        if isinstance(item, Conversation):
            chat_template_of(self._how.tokenizer)  # that it has none is not the conversation's fault
        try:
            made = self._how([item])
        except UserError as error:
            reason = str(error).removeprefix(f"{item.origin}: ")
            self.refused.add(f"{item.id}: {error}", reason)
            return None
        if not made.rows:
            self.unsupervised.add(item.id)
        return made.rows[0] if made.rows else None

    def _count(self, row: TokenRow, item: Item, place: int, held_out: bool) -> None:
        roles = [m["role"] for m in item.messages] if isinstance(item, Conversation) else None
        self._tally(held_out, row.source).add(row, roles)
        digest = hashlib.blake2b(np.array(row.input_ids, np.int64).tobytes(), digest_size=8).digest()
        self.hashes.append(int.from_bytes(digest, "little"))
        self.places.append(place)

    def _tally(self, held_out: bool, source: str) -> Tally:
        if source not in self.sources and len(self.sources) >= MOST_SOURCES:
            source = OTHERS
        if (held_out, source) not in self.tallies:
            self.tallies[held_out, source] = self._empty()
        return self.tallies[held_out, source]

    def _empty(self) -> Tally:
        return Tally(self._how.vocab_size, self.max_length)

    def _keep(self, item: Item, row: TokenRow | None) -> None:
        names = {item.id, item.origin.rpartition(":")[2]}.intersection(self._show)
        self._found |= names
        if row is None:
            self.not_shown += [item.id] if names else []
        elif names or (not self._show and len(self.shown) < SHOWN):
            self.shown.append(row)

    @property
    def sources(self) -> list[str]:
        return sorted({source for _, source in self.tallies})

    def total(self, *, held_out: bool | None = None, source: str | None = None) -> Tally:
        """The counts of one side or source, or of everything."""
        return _sum(
            self._empty(),
            (
                tally
                for (side, name), tally in self.tallies.items()
                if held_out in (None, side) and source in (None, name)
            ),
        )


def _sum(start: Tally, tallies: Iterable[Tally]) -> Tally:
    for tally in tallies:
        start.absorb(tally)
    return start
