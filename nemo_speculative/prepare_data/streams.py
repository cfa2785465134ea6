"""Where the rows of a dataset or a mix come from, in which order, and what they hold."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from nemo_speculative.prepare_data.output import HELD_OUT, TRAIN
from nemo_speculative.prepare_data.readers import Part, Row, sha256
from nemo_speculative.prepare_data.reasons import UNKNOWN_SHAPE, UNREADABLE, LeftOut
from nemo_speculative.prepare_data.shapes import Item, known, recognise
from nemo_speculative.prepare_data.sources import Source
from nemo_speculative.utils.errors import UserError

SAMPLE_ROWS = 100
"""So many rows of a file tell whether it is of a known shape."""
ID_KEYS = ("id", "uuid", "conversation_id", "prompt_id")
HELD_OUT_FIRST = math.inf
"""A row of a held-out split that is in the training split, too, is left out of that."""


@dataclass(frozen=True)
class Found:
    """A row in one of our own forms, or why it is not."""

    origin: str
    id: str | None
    """Its own."""
    item: Item | LeftOut
    size: int
    """Bytes of its file, about; with those of the rows before it that were skipped."""


@dataclass(frozen=True)
class Stream:
    """Rows of one source, in the order of its files."""

    label: str
    """Its name in the table."""
    source: str
    """What its rows say that they are of."""
    parts: list[Part]
    weight: float = 1.0
    side: str | None = None
    """``train`` or ``held_out``; None: by the hash of a row's id."""
    columns: dict[str, str] = field(default_factory=dict)
    of_hub: bool = False

    def rows(self, skip: int) -> Iterator[Found]:
        """Every row behind the first ``skip``.

        Raises:
            UserError: a file cannot be read on, or most of one is of no known shape.
        """
        position, skipped = 0, 0
        for part in self.parts:
            tally = _Tally(part.name)
            for row in part.rows():
                position += 1
                if position <= skip:
                    skipped += row.size
                    continue
                found, skipped = self._found(row, row.size + skipped), 0
                tally.count(found)
                yield found
            tally.check()

    def _found(self, row: Row, size: int) -> Found:
        if isinstance(row.record, LeftOut):
            return Found(row.origin, None, row.record, size)
        record = {self.columns.get(key, key): value for key, value in row.record.items()}
        own = next((_clean(str(record[key])) for key in ID_KEYS if record.get(key) not in (None, "")), None)
        try:
            return Found(row.origin, own, recognise(record), size)
        except LeftOut as left_out:
            return Found(row.origin, own, left_out, size)


def _clean(text: str) -> str:
    """JSON can hold half a character, UTF-8 cannot."""
    return text.encode(errors="replace").decode()


class _Tally:
    """How many rows of a file can be read at all."""

    def __init__(self, name: str):
        self.name, self.rows = name, 0
        self.unreadable: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def count(self, found: Found) -> None:
        self.rows += 1
        if isinstance(found.item, LeftOut) and found.item.reason in UNREADABLE:
            self.unreadable[found.item.reason] += 1
            self.examples.setdefault(found.item.reason, found.item.found)
        if self.rows == SAMPLE_ROWS:
            self.check()

    def check(self) -> None:
        """
        Raises:
            UserError: more than half of them cannot.
        """
        if 2 * self.unreadable.total() <= self.rows:
            return
        ((reason, _),) = self.unreadable.most_common(1)
        expected = "expected JSON in UTF-8, one object a line or an array of them, or Parquet"
        if reason == UNKNOWN_SHAPE:
            expected = f"known: {known()}; rename columns with columns={{THEIRS: KNOWN}}"
        raise UserError(
            f"{self.name}: {self.unreadable.total()} of the first {self.rows} rows cannot be read, most often: "
            f"{reason} ({self.examples[reason]}); {expected}"
        )


def streams_of(sources: Sequence[Source], columns: dict[str, str]) -> list[Stream]:
    """Every stream of the sources; that of what a source holds out comes before the rest of it.

    Raises:
        UserError: a source cannot be had.
    """
    return [stream for source in sources for stream in _streams(source, columns)]


def _streams(source: Source, columns: dict[str, str]) -> list[Stream]:
    name, held_out = source.name, source.held_out_parts()
    side = TRAIN if held_out else None
    streams = [Stream(name, name, source.parts(), source.weight, side, columns, source.of_hub)]
    if held_out:
        label, of_hub = f"{name}, held out", not source.data.held_out_path
        streams.insert(0, Stream(label, name, held_out, HELD_OUT_FIRST, HELD_OUT, columns, of_hub))
    return streams


def interleaved(
    streams: Sequence[Stream], read: Callable[[Stream], int], taken: Callable[[Stream], int]
) -> Iterator[tuple[Stream, Found]]:
    """Rows of all streams, of each in its order; the next comes from the one furthest below its weight.

    So the shares of what was taken are those of the weights after every row, until a stream has no more.

    Args:
        read: rows of a stream that were read before.
        taken: rows of a stream that were kept so far.
    """
    open_streams: dict[str, tuple[Stream, Iterator[Found]]] = {s.label: (s, s.rows(read(s))) for s in streams}
    while open_streams:
        stream, rows = min(open_streams.values(), key=lambda each: (taken(each[0]) + 1) / each[0].weight)
        found = next(rows, None)
        if found is None:
            del open_streams[stream.label]
        else:
            yield stream, found


def fetched(streams: Sequence[Stream]) -> dict[str, list[str]]:
    """What the hub gave for each stream of it, as SHA-256: a branch may have gone on."""
    return {s.label: [sha256(part) for part in s.parts] for s in streams if s.of_hub}
