"""On-policy data: the target answers the questions itself, greedily, and its token ids are kept as generated."""

import asyncio
import contextlib
import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_speculative.data.chat_template import tokenizer_digest
from nemo_speculative.data.conversation import TokenRow
from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data.append_log import AppendLog, Entry, entries
from nemo_speculative.generate_data.concurrency import in_parallel
from nemo_speculative.generate_data.decoder import Decoder, num_in_flight
from nemo_speculative.generate_data.moves import ANSWERS
from nemo_speculative.generate_data.prompt_file import Item, asked_by
from nemo_speculative.generate_data.reasoning import Keep
from nemo_speculative.generate_data.rollout import Limits, Rollout, TooLong, converse
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.locks import dir_lock
from nemo_speculative.utils.progress import Progress

RECIPE_VERSION = 3
"""Raised when the answering changes, so that no stale answers are taken from the cache."""


def answer(
    target: HFTarget, items: Sequence[Item], *, max_answer_tokens: int, batch_size: int, max_length: int,
    cache_dir: str, title: str,
) -> list[TokenRow]:  # fmt: skip
    """Every item's questions answered anew, but for those that were answered before by this target up to these lengths.

    Each turn sees the new answers before it, rendered as a server would render them; a conversation is one row as long
    as that rendering begins with the row so far.  A row of token ids is answered from its first supervised token on.
    What one item became is on the disk when it is answered: whoever asks again after an end of any kind goes on there.

    Raises:
        UserError: a conversation asks nothing, or the chat template rejects it; or a line of the cache is damaged.
        OSError: there is no room for an answer.
    """
    limits = Limits(max_answer_tokens, max_length)
    directory = Path(cache_dir) / _key(target, limits)
    asked, places = array("Q"), dict[int, _Place]()
    for index, item in enumerate(items):
        asked.append(asked_by(item))
        places[asked[-1]] = _Place(index, item.origin, item.source)
    rows = _answered(directory / ANSWERS, places)
    if len(rows) < len(places):
        with dir_lock(directory, "data.cache_dir", wait=True):
            rows |= _answered(directory / ANSWERS, {a: place for a, place in places.items() if a not in rows})
            # Before the first is answered: one that asks nothing ends the run now.
            missing = {a: items[place.index] for a, place in places.items() if a not in rows}
            wanted = {a: Rollout(item, target.tokenizer, Keep()) for a, item in missing.items()}
            if wanted and rows:
                print(f"{title}: {len(rows)} of {len(places)} were answered before ({directory})", flush=True)
            if wanted:
                asyncio.run(_answer_all(target, wanted, directory / ANSWERS, limits, batch_size, title))
        rows |= {a: dialogue.rows() for a, dialogue in wanted.items()}
    return [row for a in asked for row in rows[a]]


@dataclass(frozen=True)
class _Place:
    """Where an item lies, without what it says."""

    index: int
    """Among the items."""
    origin: str
    source: str


def _answered(file: Path, places: Mapping[int, _Place]) -> dict[int, list[TokenRow]]:
    return {entry.asked: _rows(entry, places[entry.asked]) for entry in entries(file) if entry.asked in places}


def _key(target: HFTarget, limits: Limits) -> str:
    """Equal where an item's answers are."""
    dtype, stop = str(target.model.dtype), sorted(target.stop_ids)
    lengths = [limits.max_new_tokens, limits.max_length]
    shaping = [RECIPE_VERSION, target.fingerprint, tokenizer_digest(target.tokenizer), dtype, stop, lengths]
    return hashlib.sha256(json.dumps(shaping).encode()).hexdigest()[:16]


async def _answer_all(
    target: HFTarget, wanted: Mapping[int, Rollout], file: Path, limits: Limits, batch_size: int, title: str
) -> None:
    decoder, progress = Decoder(target, batch_size, Sampling()), Progress(title, len(wanted))

    async def have(question: tuple[int, tuple[int, Rollout]]) -> None:
        number, (asked, dialogue) = question
        with contextlib.suppress(TooLong):  # unanswered() names it
            await converse(dialogue, decoder.complete, limits)
        journal.append(number, asked, _record(dialogue))  # found again by what was asked: the number is this run's
        progress.advance()

    with contextlib.closing(AppendLog(file)) as journal:
        await in_parallel(enumerate(wanted.items()), have, num_in_flight(batch_size))
    progress.close()


def unanswered(items: Sequence[Item], rows: Sequence[TokenRow]) -> list[str]:
    """Ids of the items that got no answer: their question is too long, or they mark none."""
    answered = {row.id for row in rows}
    return [item.id for item in items if not {item.id, f"{item.id}#0"} & answered]


def _record(dialogue: Rollout) -> dict[str, object]:
    rows = [[row.id, row.input_ids, [int(m) for m in row.loss_mask]] for row in dialogue.rows()]
    return {"id": dialogue.item.id, "rows": rows}


def _rows(entry: Entry, place: _Place) -> list[TokenRow]:
    try:
        return [
            TokenRow(identity, ids, [bool(m) for m in mask], place.origin, place.source)
            for identity, ids, mask in entry.record()["rows"]
        ]
    except (KeyError, TypeError, ValueError):
        raise entry.damaged() from None
