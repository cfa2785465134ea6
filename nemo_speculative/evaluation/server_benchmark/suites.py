"""Suites of prompts: published files and datasets in their own shape, each read by a reader for that shape."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from hydra.utils import instantiate

from nemo_speculative.config.schema import SuiteConfig
from nemo_speculative.evaluation.server_benchmark.scoring import Scorer
from nemo_speculative.utils.errors import UserError, describe_error

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A conversation of one or more user turns; each is sent after the previous one is answered."""

    turns: tuple[str, ...]
    row: Row
    """The row it was read from, which holds the scorer's reference answer."""


@dataclass(frozen=True)
class Suite:
    """Prompts, and the scorer of their answers."""

    name: str
    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    scorer: Scorer | None

    @property
    def digest(self) -> str:
        """Digest of everything that determines the questions and the right answers."""
        turns = [prompt.turns for prompt in self.prompts]
        references = [prompt.row if self.scorer else prompt.turns for prompt in self.prompts]
        values = [turns, references, repr(self.scorer)]
        return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]


class Turns:
    """Reads the turns from a column: a list of texts, a single text, or chat messages, of which the user's are taken.

    Args:
        columns: Possible names of the column; the first one that a row has is read.
    """

    def __init__(self, columns: Sequence[str]):
        self._columns = list(columns)

    def turns(self, row: Row, origin: str) -> list[str]:
        """The user's messages, one per turn; raises UserError, which names ``origin``, for a row of another shape."""
        name = next((name for name in self._columns if name in row), None)
        if name is None:
            raise _other_shape(origin, row, " or ".join(self._columns))
        values = row[name] if isinstance(row[name], list) else [row[name]]
        messages = [value if isinstance(value, dict) else {"role": "user", "content": value} for value in values]
        turns: list[Any] = [message.get("content") for message in messages if message.get("role") == "user"]
        if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
            raise UserError(f"{origin}: {name!r} is {row[name]!r:.60}, expected a text, a list of texts, or messages")
        return turns


class Template:
    """Reads one turn, formatted from a row's columns; the items of a list are put on lines of their own.

    Args:
        template: Text with column names in braces; literal braces are doubled.
    """

    def __init__(self, template: str):
        self._template = template
        self._columns = [name for _, name, _, _ in Formatter().parse(template) if name]

    def turns(self, row: Row, origin: str) -> list[str]:
        """The only turn; raises UserError, which names ``origin``, if a column is missing."""
        _require_columns(origin, row, self._columns)
        values = {name: row[name] for name in self._columns}
        for name, value in values.items():
            values[name] = "\n".join(map(str, value)) if isinstance(value, list) else value
        return [self._template.format(**values).strip()]


def _require_columns(origin: str, row: Row, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in row]
    if missing:
        raise _other_shape(origin, row, ", ".join(missing))


def _other_shape(origin: str, row: Row, expected: str) -> UserError:
    return UserError(
        f"{origin}: found the keys {sorted(row)}, expected {expected}; prompts of your own go with suite=jsonl"
    )


def load_suite(config: SuiteConfig) -> Suite:
    """The suite's prompts, from its file or from the hub; raises UserError for a row of another shape."""
    reader: Turns | Template = instantiate(config.reader)
    scorer: Scorer | None = instantiate(config.scorer) if config.scorer else None
    prompts: list[Prompt] = []
    rows = _hub_rows(config) if config.path is None else _file_rows(Path(config.path).expanduser())
    for row, origin in rows:
        if len(prompts) == config.num_prompts:
            break
        prompts.append(Prompt(tuple(reader.turns(row, origin)), row))
        _require_columns(origin, row, scorer.columns if scorer else ())
    if not prompts:
        raise UserError(f"suite.path: {config.path or config.repository} is empty; expected one JSON object a line")
    return Suite(config.name, tuple(prompts), config.max_new_tokens, scorer)


def _file_rows(file: Path) -> Iterator[tuple[Row, str]]:
    if not file.is_file():
        raise UserError(f"suite.path: {file} does not exist or is not a file; expected a JSONL file")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            origin = f"{file}:{number}"
            try:
                row = json.loads(line.decode())
            except ValueError as error:  # not UTF-8, or not JSON
                raise UserError(f"{origin}: cannot be read ({error}); expected one JSON object a line") from None
            if not isinstance(row, dict):
                raise UserError(f"{origin}: found a {type(row).__name__}, expected a JSON object")
            yield row, origin


def _hub_rows(config: SuiteConfig) -> Iterator[tuple[Row, str]]:
    try:
        import datasets  # slow to import, and not installed in SGLang's environment

        table = datasets.load_dataset(config.repository, config.subset, split=config.split)
    except Exception as error:  # the hub raises many unrelated classes
        raise UserError(
            f"suite.repository: {config.repository} cannot be loaded ({describe_error(error, 100)}); give a file of it "
            "with suite.path=FILE"
        ) from None
    return ((row, f"{config.repository}:{config.split}:{number}") for number, row in enumerate(table))
