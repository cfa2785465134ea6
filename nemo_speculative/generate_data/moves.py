"""What a part holds, under the numbers that its questions have in an input that changed."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from nemo_speculative.generate_data.append_log import AppendLog, Entry, entries, put_in_order, replace
from nemo_speculative.generate_data.prompt_file import PromptFile
from nemo_speculative.utils.errors import UserError

ANSWERS, LEFT_OUT, SET_ASIDE = "answers.jsonl", "left_out.jsonl", "set_aside.jsonl"
FILES = (ANSWERS, SET_ASIDE, LEFT_OUT)
GONE = -1


@dataclass(frozen=True)
class Moves:
    """Where each line of a part's files belongs, found by its question alone.

    An answer whose question the input no longer has, or has with other words, leaves ``answers.jsonl`` for
    ``set_aside.jsonl``, and is found there should the question come back.  Ended at any moment, it is carried out by
    who comes next.
    """

    directory: Path
    answers: np.ndarray
    """int64, for each line of answers.jsonl its number in the input now; or GONE."""
    set_aside: np.ndarray
    """The same of set_aside.jsonl."""
    left_out: np.ndarray
    """The same of left_out.jsonl."""

    @classmethod
    def of(cls, directory: Path, questions: PromptFile) -> "Moves":
        """
        Raises:
            UserError: none of the answers there is to any of the questions.
        """
        for name in (ANSWERS, LEFT_OUT):
            put_in_order(directory / name)
        asked = {name: array("Q", (e.asked for e in entries(directory / name))) for name in FILES}
        # Those that are in the file already come first: of equal questions they keep theirs.
        found = _places(asked[ANSWERS] + asked[SET_ASIDE], questions)
        count = len(asked[ANSWERS])
        if count and (found == GONE).all():
            raise UserError(
                f"output: {directory} holds answers to none of the lines of {questions.file}; give another output, or "
                "the file that it was begun with"
            )
        return cls(directory, found[:count], found[count:], _places(asked[LEFT_OUT], questions))

    def carry_out(self) -> None:
        """
        Raises:
            OSError: there is no room; nothing is lost.
        """
        self._set_aside()
        answers = chain(self._lines(ANSWERS, self.answers), self._lines(SET_ASIDE, self.set_aside))
        replace(self.directory / ANSWERS, answers)
        replace(self.directory / LEFT_OUT, self._lines(LEFT_OUT, self.left_out))

    def _set_aside(self) -> None:
        if not (self.answers == GONE).any():
            return
        there = {entry.asked for entry in entries(self.directory / SET_ASIDE)}
        kept = AppendLog(self.directory / SET_ASIDE)
        for entry, number in self._entries(ANSWERS, self.answers):
            if number == GONE and entry.asked not in there:
                kept.append_line(entry.line)
        kept.close()

    def _entries(self, name: str, numbers: np.ndarray) -> Iterator[tuple[Entry, int]]:
        # What was set aside just now lies behind what was there, and has no number.
        return zip(entries(self.directory / name), numbers.tolist(), strict=False)

    def _lines(self, name: str, numbers: np.ndarray) -> Iterator[bytes]:
        return (entry.at(number) for entry, number in self._entries(name, numbers) if number != GONE)

    def describe(self) -> str:
        """One line."""
        kept, back = (int((numbers != GONE).sum()) for numbers in (self.answers, self.set_aside))
        gone = len(self.answers) - kept
        return f"{self.directory}: the input changed: {kept + back} answers are to questions that it still has" + (
            f", {gone} to others ({SET_ASIDE})" if gone else ""
        )


def _places(held: array, questions: PromptFile) -> np.ndarray:
    """int64: for each of ``held``, the number of the question that it is; or GONE.

    Of several equal ones each takes a question of its own.
    """
    one, other = np.array(held, np.uint64), np.array(questions.asked, np.uint64)
    by_one, by_other = (np.argsort(values, kind="stable") for values in (one, other))
    one, other = one[by_one], other[by_other]
    nth_of_equals = np.arange(len(one)) - np.searchsorted(one, one)
    at = np.searchsorted(other, one) + nth_of_equals
    inside = np.minimum(at, len(other) - 1)
    places = np.full(len(one), GONE)
    places[by_one] = np.where((at < len(other)) & (other[inside] == one), by_other[inside] + questions.start, GONE)
    return places
