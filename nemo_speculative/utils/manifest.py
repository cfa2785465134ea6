"""The manifest of a directory that a later run resumes or reuses: a JSON file with what its content was made from.

It is written last and replaced in one step, so a directory that has one was complete when it was written; the sizes of
files that it may list tell whether it still is.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_speculative.utils.files import atomic_write_text


def write_manifest(file: Path, values: Mapping[str, Any], indent: int | None = 1) -> None:
    """Replaces ``file`` by ``values`` in one step.

    Raises:
        OSError: the disk is full; the old file stays.
    """
    atomic_write_text(file, json.dumps(values, indent=indent, ensure_ascii=False) + "\n")


def read_manifest(file: Path) -> dict[str, Any] | None:
    """The values in ``file``; None if it does not exist.

    Raises:
        ValueError: it does not hold a JSON object.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"found a {type(values).__name__}, expected a JSON object")
    return values


def differing_keys(stored: Mapping[str, Any], expected: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """The keys whose values differ or that only one side has, in the order of ``stored``, then of ``expected``."""
    keys = dict.fromkeys([*stored, *expected])
    return [key for key in keys if key not in ignored and stored.get(key) != expected.get(key)]


def file_sizes(directory: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes of the files ``names`` of ``directory``, of those that exist.

    ``file_sizes(directory, sizes) == sizes`` tells whether the files that a manifest lists are still complete.
    """
    files = {name: directory / name for name in names}
    return {name: file.stat().st_size for name, file in files.items() if file.is_file()}
