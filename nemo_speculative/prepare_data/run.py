"""The preparation of a dataset: rows are read, converted, checked and written, and each is counted."""

import hashlib
import json
import re
import signal
import zlib
from array import array
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_speculative.config.schema import FilterConfig, MixDataConfig, PrepareJob
from nemo_speculative.data.conversations import hash_fraction
from nemo_speculative.prepare_data.output import HELD_OUT, LEFT_OUT, TRAIN, Counts, Output, read_complete, read_counts
from nemo_speculative.prepare_data.readers import LeftOut, Row
from nemo_speculative.prepare_data.shapes import FormattedText, Item, Message
from nemo_speculative.prepare_data.streams import Stream, interleave, requested_values, sources_of
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import differing_keys, dir_lock, disk_full_error
from nemo_speculative.utils.progress import Progress

FORMAT = 2
"""Raised when the same input would give other rows."""
PROGRESS_BYTES = 1000
NEXT_ROLES = {
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
MIN_BYTES_FOR_VARIETY = 2000
"""From this length on, the compression ratio of a text depends on its content only."""
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd\ud800-\udfff]")


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

    ``wait`` for another process that writes there, instead of refusing.  Raises UserError if a source cannot be read or
    has nothing to train on, or if the disk is full.
    """
    # SIGTERM acts like Ctrl-C: it closes the files and ends in one line.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        preparation = _Preparation(job)  # before the directory is made: a source that cannot be loaded leaves nothing
        with dir_lock(job.directory, "output", wait=wait):
            prepared = preparation.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    sums = sum(prepared.counts.values(), Counts())
    if not sums.kept:
        raise UserError(
            f"data: none of {sums.read} rows can be used ({', '.join(sums.reasons) or 'there are none'}); "
            f"{prepared.directory}/left_out.jsonl has the reason for each"
        )
    return prepared


class _Preparation:
    def __init__(self, job: PrepareJob):
        self.job, self.directory = job, job.directory
        self.sources = sources_of(job)
        self.streams = [stream for source in self.sources for stream in source.streams()]
        self.formatted_text = FormattedText.from_tokenizer(job.tokenizer) if job.tokenizer else None
        self.seen = DigestSet()
        """Hashes of the contents and the ids of the rows kept so far."""

    def run(self) -> Prepared:
        job = self.job
        description: dict[str, dict[str, Any]] = {
            "asked": requested_values(job, self.sources),
            # The content of a branch on the hub changes.
            "fetched": {s.label: [part.sha256() for part in s.parts] for s in self.streams if s.from_hub},
            "options": {
                "format": FORMAT, "columns": job.columns, "keep_unanswered": job.keep_unanswered,
                "deduplicate": job.deduplicate, "max_conversations": job.max_conversations,
                "filters": asdict(job.filters),
                "tokenizer": self.formatted_text.identity if self.formatted_text else None,
                "labels": [s.label for s in self.streams],
            },
        }  # fmt: skip
        fingerprint = hashlib.sha256(json.dumps(description).encode()).hexdigest()
        if before := read_complete(self.directory):
            if before["fingerprint"] == fingerprint:
                return Prepared(self.directory, read_counts(before), up_to_date=True)
            self._print_changes(before, description)
        if job.max_conversations is None and len({source.weight for source in self.sources}) > 1:
            print(
                "data.sources: the weights determine the order alone, as every row of every source is used; "
                "max_conversations=N makes shares of them",
                flush=True,
            )
        disk_full = f"output: {self.directory}: the disk is full; make room and run again: it resumes where it stopped"
        labels = [s.label for s in self.streams]
        with disk_full_error(disk_full), closing(Output(self.directory, fingerprint, labels)) as output:
            if output.rows_before:
                print(f"{self.directory}: resuming after row {output.rows_before}", flush=True)
            for row in output.rows():
                self.seen.add(content_hash(row))
                self.seen.add(_hash(row["id"], b"name"))
            self._write(output)
            output.finish(description)
        return Prepared(self.directory, output.counts)

    def _print_changes(self, before: Mapping[str, Any], description: Mapping[str, Any]) -> None:
        old, new = _by_key(before), _by_key(description)
        if changed := differing_keys(old, new):
            values = (f"{key}={json.dumps(old.get(key))}, not {json.dumps(new.get(key))}" for key in changed)
            print(
                f"{self.directory}: the rows there were prepared with {'; '.join(values)}; they are replaced",
                flush=True,
            )

    def _write(self, output: Output) -> None:
        size = sum(file.stat().st_size for s in self.streams for part in s.parts for file in part.files)
        progress, read = Progress("prepare, kB", size // PROGRESS_BYTES, quiet=True), 0
        for stream, row in interleave(self.streams, output.counts, self.job.columns):
            limit = self.job.max_conversations
            if limit is not None and sum(counts.train for counts in output.counts.values()) >= limit:
                break
            self._process_row(output, stream, row)
            before, read = read, read + row.size
            progress.advance(by=read // PROGRESS_BYTES - before // PROGRESS_BYTES)
        progress.close()

    def _process_row(self, output: Output, stream: Stream, row: Row) -> None:
        try:
            item = self._item(row)
            check(item, self.job.filters, self.job.keep_unanswered)
            content = content_hash(item)
            if self.job.deduplicate and content in self.seen:
                raise LeftOut("duplicate")
        except LeftOut as left_out:
            values = {"id": row.id or row.origin, "source": stream.label, "origin": row.origin}
            output.write(stream.label, LEFT_OUT, values | {"reason": left_out.reason, "found": left_out.found})
            return
        # By its own id, not its id within a mix: it is on the same side alone and in any mix.
        fraction = hash_fraction(row.id or f"{content:016x}")
        side = stream.side or (HELD_OUT if fraction < self.job.data.held_out_share else TRAIN)
        identity = self._identity(content, stream, row.id)
        self.seen.add(content)
        self.seen.add(_hash(identity, b"name"))
        output.write(stream.label, side, {"id": identity, **item, "source": item.get("source", stream.source)})

    def _item(self, row: Row) -> Item:
        if isinstance(row.record, LeftOut):
            raise row.record
        if "text" not in row.record:
            return row.record
        if self.formatted_text is None:
            raise UserError(
                f"{row.origin}: its `text` is formatted already; give tokenizer=DIR, whose chat template formatted "
                "it, to find the answers in it"
            )
        return self.formatted_text.read(row.record["text"])

    def _identity(self, content: int, stream: Stream, own_id: str | None) -> str:
        """An id that no other row has, and that does not depend on the row's position."""
        mixed = isinstance(self.job.data, MixDataConfig)
        identity = f"{stream.source}/{own_id}" if own_id and mixed else own_id or f"{content:016x}"
        # The last can only be needed where duplicates are kept.
        candidates = (identity, f"{identity}#{content:016x}", f"{identity}#{len(self.seen)}")
        return next(each for each in candidates if _hash(each, b"name") not in self.seen)


def _by_key(description: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a manifest that determine the rows, by configuration key."""
    values = {
        key: value for part in ("asked", "fetched", "options") for key, value in description.get(part, {}).items()
    }
    filters = values.pop("filters", {})
    return values | {f"filters.{key}": value for key, value in filters.items()}


class DigestSet:
    """A set of 64-bit hashes, none of them 0, in 16 to 32 bytes each, where Python's set takes a hundred.

    Open addressing with linear probing, at most half full; 0 marks a free slot.
    """

    def __init__(self) -> None:
        self._slots, self._count = array("Q", bytes(8 << 10)), 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, value: int) -> bool:
        return self._slots[self._slot(value)] == value

    def add(self, value: int) -> None:
        slot = self._slot(value)
        self._count += self._slots[slot] != value
        self._slots[slot] = value
        if 2 * self._count > len(self._slots):
            before, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
            for each in filter(None, before):
                self._slots[self._slot(each)] = each

    def _slot(self, value: int) -> int:
        """The slot that holds ``value``, or that it would take."""
        slots, mask = self._slots, len(self._slots) - 1
        slot = value & mask
        while slots[slot] and slots[slot] != value:
            slot = (slot + 1) & mask
        return slot


def content_hash(item: Item) -> int:
    """64-bit hash of messages, tools and tokens; white space counts as one space."""
    messages = [m | {"content": " ".join(m["content"].split())} for m in item.get("conversations", [])]
    content = [messages, item.get("tools"), item.get("input_ids"), item.get("loss_mask")]
    return _hash(json.dumps(content, sort_keys=True))


def _hash(text: str, person: bytes = b"") -> int:
    """64-bit hash; ``person`` keeps kinds of text apart.  Of 10 million texts, two collide with a chance of 3e-6."""
    hashed = hashlib.blake2b(text.encode(errors="replace"), digest_size=8, person=person)
    return int.from_bytes(hashed.digest(), "big") or 1


def check(item: dict[str, Any], filters: FilterConfig, keep_unanswered: bool) -> None:
    """Raises LeftOut if a row cannot be trained on."""
    if "input_ids" in item or "rows" in item:
        rows = item.get("rows", [item])
        length = max(len(row["input_ids"]) for row in rows)
        if not any(any(row["loss_mask"]) for row in rows):
            raise LeftOut("nothing supervised", f"{length} tokens")
        if filters.max_tokens and length > filters.max_tokens:
            raise LeftOut("too long", f"{length} tokens")
    if "conversations" in item:
        messages = item["conversations"]
        _check_order(messages)
        for index, message in enumerate(messages):
            if not message["content"].strip() and not message.get("tool_calls"):
                raise LeftOut("empty content", f"message {index} ({message['role']})")
        if not keep_unanswered and all(message["role"] != "assistant" for message in messages):
            raise LeftOut("no answer", f"{len(messages)} messages")
        texts = [text for m in messages for text in (m["content"], m.get("reasoning_content")) if text]
        _check_text("\n".join(texts), filters)


def _check_order(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if not roles:
        raise LeftOut("empty content", "no messages")
    shown = f"{', '.join(roles[:8])}{', …' if len(roles) > 8 else ''}"
    first = roles[1:2] if roles[0] == "system" else roles[:1]
    if first == ["assistant"]:
        raise LeftOut("starts with the assistant", shown)
    if first != ["user"] or any(after not in NEXT_ROLES[role] for role, after in pairwise(roles)):
        raise LeftOut("roles out of order", shown)


def _check_text(text: str, filters: FilterConfig) -> None:
    length = len(text)
    if length < filters.min_characters:
        raise LeftOut("too short", f"{length} characters")
    if filters.max_characters and length > filters.max_characters:
        raise LeftOut("too long", f"{length} characters")
    control = len(CONTROL.findall(text))
    plain = text.encode(errors="ignore")
    if control > filters.max_control_share * length or plain != text.encode(errors="replace"):
        raise LeftOut("control characters", f"{control} of {length} characters")
    if len(plain) >= MIN_BYTES_FOR_VARIETY:
        compressed = len(zlib.compress(plain, 1))
        if compressed < filters.min_variety * len(plain):
            raise LeftOut("repetitive", f"{len(plain)} bytes compress to {compressed}")
