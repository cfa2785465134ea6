"""The preparation: rows read, recognised, checked and written, each of them counted."""

import hashlib
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_speculative.config.schema import MixDataConfig, PrepareJob
from nemo_speculative.data.conversations import hash_fraction
from nemo_speculative.prepare_data import reasons
from nemo_speculative.prepare_data.digests import Digests, digest
from nemo_speculative.prepare_data.filters import check
from nemo_speculative.prepare_data.formatted_text import FormattedText
from nemo_speculative.prepare_data.output import (
    HELD_OUT,
    TRAIN,
    Counts,
    Output,
    by_key,
    determining_values,
    finished,
    total,
)
from nemo_speculative.prepare_data.reasons import LeftOut
from nemo_speculative.prepare_data.shapes import Item
from nemo_speculative.prepare_data.sources import asked_for, sources_of
from nemo_speculative.prepare_data.streams import Found, Stream, fetched, interleaved, streams_of
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.locks import dir_lock
from nemo_speculative.utils.progress import Progress

FORMAT = 2
"""Raised when the same input would give other rows."""
PROGRESS_BYTES = 1000


@dataclass(frozen=True)
class Prepared:
    """A finished preparation."""

    directory: Path
    counts: dict[str, Counts]
    """By the name of a stream."""
    up_to_date: bool = False
    """It was there already."""


def prepare(job: PrepareJob, *, wait: bool = False) -> Prepared:
    """Makes ``job.directory`` unless it holds just that; goes on where a run of the same job was interrupted.

    Args:
        wait: for another process that writes it, instead of refusing.

    Raises:
        UserError: a source cannot be had or read, or holds nothing to train on, the disk is full, or another process
            writes there.
    """
    with _ended_as_by_ctrl_c():
        preparation = _Preparation(job)  # before the directory is made: what cannot be had leaves nothing behind
        with dir_lock(job.directory, "output", wait=wait):
            prepared = preparation.run()
    every = total(prepared.counts)
    if not every.kept:
        raise UserError(
            f"data: none of {every.read} rows can be used ({', '.join(every.reasons) or 'there are none'}); "
            f"{prepared.directory}/left_out.jsonl says why of each"
        )
    return prepared


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM closes the files, too, and is told in one line."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Preparation:
    def __init__(self, job: PrepareJob):
        self.job, self.directory = job, job.directory
        self.sources = sources_of(job)
        self.streams = streams_of(self.sources, job.columns)
        self.text = FormattedText.of(job.tokenizer) if job.tokenizer else None
        self.seen = Digests()

    def run(self) -> Prepared:
        described = {
            "asked": asked_for(self.sources, self.job.data.held_out_share),
            "fetched": fetched(self.streams),
            "options": self._options(),
        }
        fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()
        if counts := finished(self.directory, fingerprint):
            return Prepared(self.directory, counts, up_to_date=True)
        self._say_what_changes(described)
        with Output(self.directory, fingerprint, [s.label for s in self.streams]) as output:
            if output.rows_before:
                print(f"{self.directory}: resuming after row {output.rows_before}", flush=True)
            for row in output.rows():
                self._remember(row, row["id"])
            self._write(output)
            output.finish(**described)
        return Prepared(self.directory, output.counts)

    def _say_what_changes(self, described: dict[str, Any]) -> None:
        before, now = determining_values(self.directory), by_key(described)
        if changed := [key for key in {**before, **now} if before and before.get(key) != now.get(key)]:
            values = [json.dumps(side.get(changed[0])) for side in (before, now)]
            more = f", nor with the same {', '.join(changed[1:])}" if changed[1:] else ""
            print(
                f"{self.directory}: the rows there were prepared with {changed[0]}={values[0]}, not {values[1]}{more}; "
                "they are replaced",
                flush=True,
            )
        if self.job.max_conversations is None and len({source.weight for source in self.sources}) > 1:
            print(
                "data.sources: the weights decide about the order alone, as every row of every source is used; "
                "max_conversations=N makes shares of them",
                flush=True,
            )

    def _options(self) -> dict[str, Any]:
        """What else than the input decides about the rows."""
        job = self.job
        return {
            "format": FORMAT, "columns": job.columns, "keep_unanswered": job.keep_unanswered,
            "deduplicate": job.deduplicate, "max_conversations": job.max_conversations, "filters": asdict(job.filters),
            "tokenizer": self.text.identity if self.text else None, "labels": [s.label for s in self.streams],
        }  # fmt: skip

    def _write(self, output: Output) -> None:
        progress = Progress("prepare, kB", self._bytes() // PROGRESS_BYTES, quiet=True)
        read = 0
        rows = interleaved(self.streams, lambda s: output.counts[s.label].read, lambda s: output.counts[s.label].kept)
        for stream, found in rows:
            if self._enough(output):
                break
            self._put(output, stream, found)
            before, read = read, read + found.size
            progress.advance(by=read // PROGRESS_BYTES - before // PROGRESS_BYTES)
        progress.close()

    def _bytes(self) -> int:
        return sum(file.stat().st_size for s in self.streams for part in s.parts for file in part.files)

    def _enough(self, output: Output) -> bool:
        most = self.job.max_conversations
        return most is not None and sum(counts.train for counts in output.counts.values()) >= most

    def _put(self, output: Output, stream: Stream, found: Found) -> None:
        try:
            item = self._item(found)
            check(item, self.job.filters, self.job.keep_unanswered)
            identity = self._identity(item, stream, found.id)
        except LeftOut as left_out:
            output.leave_out(stream.label, found.id or found.origin, found.origin, left_out)
            return
        share = self.job.data.held_out_share
        # Not of its name in a mix: alone and in any mix it lies on the same side.
        drawn = hash_fraction(found.id or f"{content_of(item):016x}")
        side = stream.side or (HELD_OUT if drawn < share else TRAIN)
        output.keep(stream.label, side, {"id": identity, **item, "source": item.get("source", stream.source)})

    def _item(self, found: Found) -> Item:
        if isinstance(found.item, LeftOut):
            raise found.item
        if "text" not in found.item:
            return found.item
        if self.text is None:
            raise UserError(
                f"{found.origin}: its `text` is formatted already; give tokenizer=DIR, whose chat template formatted "
                "it, to tell the answers in it"
            )
        return self.text.read(found.item["text"])

    def _identity(self, item: Item, stream: Stream, own: str | None) -> str:
        """A name that no other row has, and that does not depend on where the row lies."""
        content = content_of(item)
        if self.job.deduplicate and content in self.seen:
            raise LeftOut(reasons.DUPLICATE)
        mixed = isinstance(self.job.data, MixDataConfig)
        name = f"{stream.source}/{own}" if own and mixed else own or f"{content:016x}"
        # The last can only be needed where duplicates are kept.
        names = (name, f"{name}#{content:016x}", f"{name}#{len(self.seen)}")
        name = next(name for name in names if _name_key(name) not in self.seen)
        self._remember(item, name)
        return name

    def _remember(self, item: Item, name: str) -> None:
        self.seen.add(content_of(item))
        self.seen.add(_name_key(name))


def content_of(item: Item) -> int:
    """64 bits that differ where messages, tools or tokens do; white space counts as one space."""
    messages = [m | {"content": " ".join(m["content"].split())} for m in item.get("conversations", [])]
    told = [messages, item.get("tools"), item.get("input_ids"), item.get("loss_mask")]
    return digest(json.dumps(told, sort_keys=True))


def _name_key(name: str) -> int:
    return digest(name, b"name")
