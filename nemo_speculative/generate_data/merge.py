"""Parts of generated answers put together, in the order of the input."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_speculative.config.schema import MergeJob
from nemo_speculative.generate_data.append_log import entries
from nemo_speculative.generate_data.moves import ANSWERS, LEFT_OUT
from nemo_speculative.generate_data.shard_dir import IN_BETWEEN, MANIFEST, difference, read_manifest
from nemo_speculative.generate_data.shard_dir import SKIPPED as SKIPPED_OUTCOME
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_write

MISSING, SKIPPED, FAILED = -1, -2, -3
"""What is known of a line that is in no file."""
SHOWN = 3


@dataclass(frozen=True)
class Merged:
    """What was put together."""

    lines: int
    skipped: int
    failed: list[range]
    """Lines whose requests failed."""
    missing: list[range]
    """Lines that no part answers."""

    def describe(self) -> str:
        """One line."""
        said = f"{self.lines} conversations answered, {self.skipped} skipped"
        return said + (f"; without {self.gaps()}" if self.failed or self.missing else "")

    def gaps(self) -> str:
        """The lines that are not there."""
        kinds = (("missing", self.missing), ("failed", self.failed))
        return " and ".join(f"{sum(map(len, spans))} {kind} ({_named(spans)})" for kind, spans in kinds if spans)


def merge(job: MergeJob) -> Merged:
    """Writes what the parts hold as one file, at once; byte for byte what a single run of the whole would hold.

    Raises:
        UserError: the parts do not belong together, say different things of a line, or leave lines out.
    """
    output = Path(job.output)
    if output.exists():
        raise UserError(f"output: {output} exists; give another file, or delete it")
    if not job.parts:
        raise UserError("parts is empty: expected one directory or more, e.g. parts=[outputs/a,outputs/b]")
    parts = _parts(job.parts)
    total = _agreeing(parts)
    places = _Places(parts, total)
    merged = places.summary()
    if (merged.missing or merged.failed) and not job.allow_missing:
        raise UserError(
            f"parts: of {total} lines there are {merged.gaps()}; name the directories that hold these as well, run "
            "recipes/generate_data.py for them, or leave them out with allow_missing=true"
        )
    _write(output, places.lines())
    return merged


def _parts(given: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for name in given:
        inside = sorted(manifest.parent for manifest in [*Path(name).glob(MANIFEST), *Path(name).glob(f"*/{MANIFEST}")])
        if not inside:
            raise UserError(f"parts: {name} holds no {MANIFEST}; expected a directory that generate_data.py wrote")
        found += inside
    return list(dict.fromkeys(path.resolve() for path in found))


def _agreeing(parts: Sequence[Path]) -> int:
    """The number of lines of the input that all ``parts`` are of."""
    manifests = [_comparable(part) for part in parts]
    for part, manifest in zip(parts, manifests, strict=True):
        if differing := difference(manifests[0], manifest):
            raise UserError(
                f"parts: {parts[0]} was made with {differing} in {part}; only parts of one input, answered in one way, "
                "belong together"
            )
    return int(manifests[0]["input_lines"])


def _comparable(part: Path) -> dict[str, Any]:
    manifest = read_manifest(part / MANIFEST)
    if manifest["input"] == IN_BETWEEN:
        raise UserError(
            f"parts: {part} was left while it took over a changed input; start its recipes/generate_data.py command "
            "again, which ends that"
        )
    return {key: value for key, value in manifest.items() if key != "range"}


class _Places:
    """Where each line of the input is answered; 12 bytes of memory a line.

    Raises:
        UserError: two parts answer a line differently.
    """

    def __init__(self, parts: Sequence[Path], total: int):
        self.files = [part / ANSWERS for part in parts]
        self.file, self.offset = array("i", [MISSING]) * total, array("q", [0]) * total
        for part in parts:
            self._left_out(part / LEFT_OUT)
        for number, file in enumerate(self.files):
            self._answered(number, file)

    def _left_out(self, file: Path) -> None:
        for entry in entries(file):
            skipped = f'"outcome": "{SKIPPED_OUTCOME}"'.encode() in entry.line
            self.file[entry.index] = SKIPPED if skipped else FAILED

    def _answered(self, number: int, file: Path) -> None:
        for entry in entries(file):
            index = entry.index
            before = self.file[index]
            if before >= 0 and self.line(index) != entry.line:
                raise UserError(
                    f"parts: line {index} has one answer in {self.files[before]} and another in {file}; leave one of "
                    "them out"
                )
            self.file[index], self.offset[index] = number, entry.offset

    def line(self, index: int) -> bytes:
        with self.files[self.file[index]].open("rb") as answers:
            answers.seek(self.offset[index])
            return answers.readline()

    def lines(self) -> Iterator[bytes]:
        """All that are answered, in the order of the input."""
        opened = [file.open("rb") for file in self.files]
        try:
            for number, offset in zip(self.file, self.offset, strict=True):
                if number >= 0:
                    opened[number].seek(offset)
                    yield opened[number].readline()
        finally:
            for file in opened:
                file.close()

    def summary(self) -> Merged:
        missing, failed = self._which(MISSING), self._which(FAILED)
        skipped = self.file.count(SKIPPED)
        answered = len(self.file) - len(missing) - len(failed) - skipped
        return Merged(answered, skipped, _spans(failed), _spans(missing))

    def _which(self, kind: int) -> list[int]:
        return [index for index, number in enumerate(self.file) if number == kind]


def _spans(indices: Sequence[int]) -> list[range]:
    """Ascending numbers as ranges."""
    spans: list[range] = []
    for index in indices:
        if spans and spans[-1].stop == index:
            spans[-1] = range(spans[-1].start, index + 1)
        else:
            spans.append(range(index, index + 1))
    return spans


def _named(spans: Sequence[range]) -> str:
    shown = ", ".join(f"{span.start}:{span.stop}" for span in spans[:SHOWN])
    return shown + (f" and {len(spans) - SHOWN} more ranges" if len(spans) > SHOWN else "")


def _write(output: Path, lines: Iterator[bytes]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as out:
        out.writelines(lines)
