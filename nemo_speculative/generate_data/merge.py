"""The shards of generated answers merged into one file, in the order of the input."""

from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_speculative.config.schema import MergeJob
from nemo_speculative.generate_data import shard_dir
from nemo_speculative.generate_data.shard_dir import (
    ANSWERS,
    LEFT_OUT,
    MANIFEST,
    RENUMBERING,
    difference,
    load_manifest,
    read_records,
)
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_write

MISSING, SKIPPED, FAILED = -1, -2, -3
"""The state of a line that no file answers."""
MAX_RANGES = 3
"""Number of ranges that a message lists."""


@dataclass(frozen=True)
class Merged:
    """The number of merged lines, and the lines without an answer."""

    lines: int
    skipped: int
    failed: list[range]
    """Lines whose requests failed."""
    missing: list[range]
    """Lines that are in no shard."""

    def describe(self) -> str:
        """One line with all counts."""
        counts = f"{self.lines} conversations answered, {self.skipped} skipped"
        return counts + (f"; without {self.describe_gaps()}" if self.failed or self.missing else "")

    def describe_gaps(self) -> str:
        """The missing and failed lines: ``5 missing (0:3, 7:9)``."""
        gaps = []
        for ranges, kind in ((self.missing, "missing"), (self.failed, "failed")):
            if ranges:
                shown = ", ".join(f"{lines.start}:{lines.stop}" for lines in ranges[:MAX_RANGES])
                more = f" and {len(ranges) - MAX_RANGES} more ranges" if len(ranges) > MAX_RANGES else ""
                gaps.append(f"{sum(map(len, ranges))} {kind} ({shown}{more})")
        return " and ".join(gaps)


def merge(job: MergeJob) -> Merged:
    """Writes one file, in one step: byte for byte what a single run over the whole input would hold.

    Raises:
        UserError: the shards do not belong together, answer a line differently, or leave lines out.
    """
    output = Path(job.output)
    if output.exists():
        raise UserError(f"output: {output} exists; give another file, or delete it")
    if not job.parts:
        raise UserError("parts is empty: expected one directory or more, e.g. parts=[outputs/a,outputs/b]")
    shards = _find_shards(job.parts)
    index = _Index(shards, _common_num_lines(shards))
    merged = index.summary()
    if (merged.missing or merged.failed) and not job.allow_missing:
        raise UserError(
            f"parts: of {len(index.file)} lines there are {merged.describe_gaps()}; name the directories that hold "
            "these as well, run recipes/generate_data.py for them, or leave them out with allow_missing=true"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as out:
        out.writelines(index.lines())
    return merged


def _find_shards(names: Sequence[str]) -> list[Path]:
    shards: list[Path] = []
    for name in names:
        inside = sorted(manifest.parent for manifest in [*Path(name).glob(MANIFEST), *Path(name).glob(f"*/{MANIFEST}")])
        if not inside:
            raise UserError(f"parts: {name} holds no {MANIFEST}; expected a directory that generate_data.py wrote")
        shards += inside
    return list(dict.fromkeys(path.resolve() for path in shards))


def _common_num_lines(shards: Sequence[Path]) -> int:
    """The number of lines of the input, which must be the same for all ``shards``."""
    manifests: list[dict[str, Any]] = []
    for shard in shards:
        manifests.append(load_manifest(shard / MANIFEST))
        if manifests[-1]["input"] == RENUMBERING:
            raise UserError(
                f"parts: {shard} was left while it took over a changed input; start its recipes/generate_data.py "
                "command again, which ends that"
            )
    for shard, manifest in zip(shards, manifests, strict=True):
        if differing := difference(manifests[0], manifest, ignored=("range",)):
            raise UserError(
                f"parts: {shards[0]} was made with {differing} in {shard}; only parts of one input, answered in one "
                "way, belong together"
            )
    return int(manifests[0]["input_lines"])


class _Index:
    """The file and offset of each line's answer, in 12 bytes of memory a line.

    Raises:
        UserError: two shards answer a line differently.
    """

    def __init__(self, shards: Sequence[Path], num_lines: int):
        self.files = [shard / ANSWERS for shard in shards]
        self.file, self.offset = array("i", [MISSING]) * num_lines, array("q", [0]) * num_lines
        for shard in shards:
            for record in read_records(shard / LEFT_OUT):
                skipped = f'"outcome": "{shard_dir.SKIPPED}"'.encode() in record.line
                self.file[record.index] = SKIPPED if skipped else FAILED
        for number, file in enumerate(self.files):
            for record in read_records(file):
                before = self.file[record.index]
                if before >= 0 and self._line(record.index) != record.line:
                    raise UserError(
                        f"parts: line {record.index} has one answer in {self.files[before]} and another in {file}; "
                        "leave one of them out"
                    )
                self.file[record.index], self.offset[record.index] = number, record.offset

    def _line(self, index: int) -> bytes:
        with self.files[self.file[index]].open("rb") as answers:
            answers.seek(self.offset[index])
            return answers.readline()

    def lines(self) -> Iterator[bytes]:
        """All answers, in the order of the input."""
        with ExitStack() as stack:
            files = [stack.enter_context(file.open("rb")) for file in self.files]
            for number, offset in zip(self.file, self.offset, strict=True):
                if number >= 0:
                    files[number].seek(offset)
                    yield files[number].readline()

    def summary(self) -> Merged:
        counts = {state: self.file.count(state) for state in (MISSING, SKIPPED, FAILED)}
        answered = len(self.file) - sum(counts.values())
        return Merged(answered, counts[SKIPPED], self._ranges(FAILED), self._ranges(MISSING))

    def _ranges(self, state: int) -> list[range]:
        """The lines in this state, as ascending ranges."""
        ranges: list[range] = []
        for index in (index for index, number in enumerate(self.file) if number == state):
            if ranges and ranges[-1].stop == index:
                ranges[-1] = range(ranges[-1].start, index + 1)
            else:
                ranges.append(range(index, index + 1))
        return ranges
