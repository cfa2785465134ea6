"""The preparation of a dataset: rows are read, converted, checked and written, and each is counted."""

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
from nemo_speculative.prepare_data.filters import DigestSet, check, digest
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
from nemo_speculative.prepare_data.shapes import FormattedText, Item
from nemo_speculative.prepare_data.streams import (
    Source,
    Stream,
    StreamRow,
    hub_hashes,
    interleave,
    requested_values,
    sources_of,
)
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import dir_lock
from nemo_speculative.utils.progress import Progress

FORMAT = 2
"""Raised when the same input would give other rows."""
PROGRESS_BYTES = 1000


@dataclass(frozen=True)
class Prepared:
    """A finished preparation."""

    directory: Path
    counts: dict[str, Counts]
    """The counts of each stream."""
    up_to_date: bool = False
    """Whether it existed before."""


def prepare(job: PrepareJob, *, wait: bool = False) -> Prepared:
    """Prepares ``job.directory`` unless it is up to date; resumes an interrupted run of the same job.

    Args:
        wait: wait for another process that writes there, instead of refusing.

    Raises:
        UserError: a source cannot be loaded or read, or has nothing to train on, the disk is full, or another process
            writes there.
    """
    with _sigterm_as_interrupt():
        preparation = _Preparation(job)  # before the directory is made: a source that cannot be loaded leaves nothing
        with dir_lock(job.directory, "output", wait=wait):
            prepared = preparation.run()
    sums = total(prepared.counts)
    if not sums.kept:
        raise UserError(
            f"data: none of {sums.read} rows can be used ({', '.join(sums.reasons) or 'there are none'}); "
            f"{prepared.directory}/left_out.jsonl has the reason for each"
        )
    return prepared


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM acts like Ctrl-C: it closes the files and ends in one line."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Preparation:
    def __init__(self, job: PrepareJob):
        self.job, self.directory = job, job.directory
        self.sources: list[Source] = sources_of(job)
        self.streams: list[Stream] = [stream for source in self.sources for stream in source.streams(job.columns)]
        self.formatted_text = FormattedText.from_tokenizer(job.tokenizer) if job.tokenizer else None
        self.seen = DigestSet()
        """Digests of the contents and the ids of the rows kept so far."""

    def run(self) -> Prepared:
        description = {
            "asked": requested_values(self.sources, self.job.data.held_out_share),
            "fetched": hub_hashes(self.streams),
            "options": self._options(),
        }
        fingerprint = hashlib.sha256(json.dumps(description).encode()).hexdigest()
        if counts := finished(self.directory, fingerprint):
            return Prepared(self.directory, counts, up_to_date=True)
        self._print_changes(description)
        with Output(self.directory, fingerprint, [s.label for s in self.streams]) as output:
            if output.rows_before:
                print(f"{self.directory}: resuming after row {output.rows_before}", flush=True)
            for row in output.rows():
                self._remember(row, row["id"])
            self._write(output)
            output.finish(**description)
        return Prepared(self.directory, output.counts)

    def _print_changes(self, description: dict[str, Any]) -> None:
        before, now = determining_values(self.directory), by_key(description)
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
                "data.sources: the weights determine the order alone, as every row of every source is used; "
                "max_conversations=N makes shares of them",
                flush=True,
            )

    def _options(self) -> dict[str, Any]:
        """The values that determine the rows in addition to the input."""
        job = self.job
        return {
            "format": FORMAT, "columns": job.columns, "keep_unanswered": job.keep_unanswered,
            "deduplicate": job.deduplicate, "max_conversations": job.max_conversations, "filters": asdict(job.filters),
            "tokenizer": self.formatted_text.identity if self.formatted_text else None,
            "labels": [s.label for s in self.streams],
        }  # fmt: skip

    def _write(self, output: Output) -> None:
        size = sum(file.stat().st_size for s in self.streams for part in s.parts for file in part.files)
        progress, read, counts = Progress("prepare, kB", size // PROGRESS_BYTES, quiet=True), 0, output.counts
        for stream, row in interleave(self.streams, lambda s: counts[s.label].read, lambda s: counts[s.label].kept):
            limit = self.job.max_conversations
            if limit is not None and sum(each.train for each in counts.values()) >= limit:
                break
            self._process_row(output, stream, row)
            before, read = read, read + row.size
            progress.advance(by=read // PROGRESS_BYTES - before // PROGRESS_BYTES)
        progress.close()

    def _process_row(self, output: Output, stream: Stream, row: StreamRow) -> None:
        try:
            item = self._item(row)
            check(item, self.job.filters, self.job.keep_unanswered)
            identity = self._identity(item, stream, row.id)
        except LeftOut as left_out:
            output.leave_out(stream.label, row.id or row.origin, row.origin, left_out)
            return
        # By its own id, not its id within a mix: it is on the same side alone and in any mix.
        fraction = hash_fraction(row.id or f"{content_digest(item):016x}")
        side = stream.side or (HELD_OUT if fraction < self.job.data.held_out_share else TRAIN)
        output.keep(stream.label, side, {"id": identity, **item, "source": item.get("source", stream.source)})

    def _item(self, row: StreamRow) -> Item:
        if isinstance(row.item, LeftOut):
            raise row.item
        if "text" not in row.item:
            return row.item
        if self.formatted_text is None:
            raise UserError(
                f"{row.origin}: its `text` is formatted already; give tokenizer=DIR, whose chat template formatted "
                "it, to find the answers in it"
            )
        return self.formatted_text.read(row.item["text"])

    def _identity(self, item: Item, stream: Stream, own_id: str | None) -> str:
        """An id that no other row has, and that does not depend on the row's position."""
        content = content_digest(item)
        if self.job.deduplicate and content in self.seen:
            raise LeftOut(reasons.DUPLICATE)
        mixed = isinstance(self.job.data, MixDataConfig)
        identity = f"{stream.source}/{own_id}" if own_id and mixed else own_id or f"{content:016x}"
        # The last can only be needed where duplicates are kept.
        candidates = (identity, f"{identity}#{content:016x}", f"{identity}#{len(self.seen)}")
        identity = next(each for each in candidates if _id_digest(each) not in self.seen)
        self._remember(item, identity)
        return identity

    def _remember(self, item: Item, identity: str) -> None:
        self.seen.add(content_digest(item))
        self.seen.add(_id_digest(identity))


def content_digest(item: Item) -> int:
    """64-bit hash of messages, tools and tokens; white space counts as one space."""
    messages = [m | {"content": " ".join(m["content"].split())} for m in item.get("conversations", [])]
    content = [messages, item.get("tools"), item.get("input_ids"), item.get("loss_mask")]
    return digest(json.dumps(content, sort_keys=True))


def _id_digest(identity: str) -> int:
    return digest(identity, b"name")
