"""The shards of generated answers merged into one file, in the order of the input."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from nemo_speculative.config.schema import MergeJob
from nemo_speculative.generate_data import shard_dir
from nemo_speculative.generate_data.shard_dir import ANSWERS, LEFT_OUT, MANIFEST, lines_at, read_records
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_write

MISSING, SKIPPED, FAILED = -1, -2, -3
"""The state of a line that no file answers."""
MAX_RANGES = 3
"""Number of ranges that a message lists."""


def merge(job: MergeJob) -> str:
    """Writes one file, in one step: byte for byte what a single run over the whole input would hold.

    Returns the counts of merged, skipped, missing and failed lines.

    Raises:
        UserError: the shards do not belong together, answer a line differently, or leave lines out.
    """
    output = Path(job.output)
    if output.exists():
        raise UserError(f"output: {output} exists; give another file, or delete it")
    if not job.parts:
        raise UserError("parts is empty: expected one directory or more, e.g. parts=[outputs/a,outputs/b]")
    shards = _find_shards(job.parts)
    states, offsets = _locate(shards, _common_num_lines(shards))
    gaps = _describe_gaps(states)
    if gaps and not job.allow_missing:
        raise UserError(
            f"parts: of {len(states)} lines there are {gaps}; name the directories that hold these as well, run "
            "recipes/generate_data.py for them, or leave them out with allow_missing=true"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as out:
        out.writelines(_lines(shards, states, offsets))
    counts = f"{(states >= 0).sum()} conversations answered, {(states == SKIPPED).sum()} skipped"
    return counts + (f"; without {gaps}" if gaps else "")


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
    first = shard_dir.load_manifest(shards[0] / MANIFEST)
    for shard in shards:
        manifest = shard_dir.load_manifest(shard / MANIFEST)
        if manifest["input"] == shard_dir.RENUMBERING:
            raise UserError(
                f"parts: {shard} was left while it took over a changed input; start its recipes/generate_data.py "
                "command again, which ends that"
            )
        if differing := shard_dir.difference(first, manifest, ignored=("range",)):
            raise UserError(
                f"parts: {shards[0]} was made with {differing} in {shard}; only parts of one input, answered in one "
                "way, belong together"
            )
    return int(first["input_lines"])


def _locate(shards: Sequence[Path], num_lines: int) -> tuple[np.ndarray, np.ndarray]:
    """For each line the index of the shard that answers it, or its state, and the answer's offset there."""
    states, offsets = np.full(num_lines, MISSING, np.int32), np.zeros(num_lines, np.int64)
    for shard in shards:
        for record in read_records(shard / LEFT_OUT):
            states[record.index] = SKIPPED if record.content()["outcome"] == shard_dir.SKIPPED else FAILED
    for number, shard in enumerate(shards):
        for record in read_records(shard / ANSWERS):
            before = states[record.index]
            if before >= 0 and next(lines_at(shards[before] / ANSWERS, [offsets[record.index]])) != record.line:
                raise UserError(
                    f"parts: line {record.index} has one answer in {shards[before]} and another in {shard}; leave one "
                    "of them out"
                )
            states[record.index], offsets[record.index] = number, record.offset
    return states, offsets


def _lines(shards: Sequence[Path], states: np.ndarray, offsets: np.ndarray) -> Iterator[bytes]:
    """All answers, in the order of the input."""
    for state, run in groupby(zip(states.tolist(), offsets.tolist(), strict=True), itemgetter(0)):
        if state >= 0:
            yield from lines_at(shards[state] / ANSWERS, (offset for _, offset in run))


def _describe_gaps(states: np.ndarray) -> str:
    """The missing and failed lines: ``5 missing (0:3, 7:9) and 1 failed (4:5)``; empty if there are none."""
    gaps = []
    for state, kind in ((MISSING, "missing"), (FAILED, "failed")):
        edges = np.flatnonzero(np.diff(states == state, prepend=False, append=False)).tolist()
        ranges = [f"{start}:{stop}" for start, stop in zip(edges[::2], edges[1::2], strict=True)]
        if ranges:
            shown = ", ".join(ranges[:MAX_RANGES])
            more = f" and {len(ranges) - MAX_RANGES} more ranges" if len(ranges) > MAX_RANGES else ""
            gaps.append(f"{(states == state).sum()} {kind} ({shown}{more})")
    return " and ".join(gaps)
