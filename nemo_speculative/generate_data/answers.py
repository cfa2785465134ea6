"""On-policy data for a training: the target's own greedy answers, with its token ids stored as generated."""

import asyncio
import contextlib
import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_speculative.data.chat_template import tokenizer_digest
from nemo_speculative.data.conversations import Item, TokenRow
from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data.engines import IN_FLIGHT, Decoder
from nemo_speculative.generate_data.rollout import Keep, Limits, Rollout, TooLong, converse, for_each
from nemo_speculative.generate_data.shard_dir import ANSWERS, damage_error, make_record, prompt_hash, read_records
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.append_log import AppendLog
from nemo_speculative.utils.files import dir_lock
from nemo_speculative.utils.progress import Progress

RECIPE_VERSION = 3
"""Raised when the answering changes, so that the cache returns no outdated answers."""


def answer(
    target: HFTarget, items: Sequence[Item], *, max_answer_tokens: int, batch_size: int, max_length: int,
    cache_dir: str, title: str,
) -> list[TokenRow]:  # fmt: skip
    """Answers the questions of every item, except for those that the cache holds for this target and these lengths.

    Each turn sees the new answers before it, rendered as a server would; a conversation is one row as long as that
    rendering starts with the row so far.  A row of token ids is answered from its first supervised token on.  The
    answers to an item are stored as soon as it is complete, so a run that ends in any way is resumed there.

    Raises:
        UserError: a conversation asks nothing, or the chat template rejects it; or a line of the cache is damaged.
        OSError: the disk is full.
    """
    limits = Limits(max_answer_tokens, max_length)
    file = Path(cache_dir) / _cache_key(target, limits) / ANSWERS
    hashes, places = array("Q"), dict[int, tuple[int, str, str]]()
    for index, item in enumerate(items):
        hashes.append(prompt_hash(item))
        places[hashes[-1]] = index, item.origin, item.source
    rows = _cached(file, places)
    if len(rows) < len(places):
        with dir_lock(file.parent, "data.cache_dir", wait=True):
            # Another process may have added some.
            rows |= _cached(file, {h: place for h, place in places.items() if h not in rows})
            missing = {h: items[index] for h, (index, _, _) in places.items() if h not in rows}
            # All rollouts are built first: an item that asks nothing ends the run now.
            rollouts = {h: Rollout(item, target.tokenizer, Keep()) for h, item in missing.items()}
            if rollouts:
                if rows:
                    print(f"{title}: {len(rows)} of {len(places)} were answered before ({file.parent})", flush=True)
                asyncio.run(_answer_all(target, rollouts, file, limits, batch_size, title))
        rows |= {h: rollout.rows() for h, rollout in rollouts.items()}
    return [row for h in hashes for row in rows[h]]


def unanswered(items: Sequence[Item], rows: Sequence[TokenRow]) -> list[str]:
    """Ids of the items without an answer: their question is too long, or they have none."""
    answered = {row.id for row in rows}
    return [item.id for item in items if not {item.id, f"{item.id}#0"} & answered]


def _cache_key(target: HFTarget, limits: Limits) -> str:
    """A hash of everything that an item's answers depend on."""
    dtype, stop = str(target.model.dtype), sorted(target.stop_ids)
    lengths = [limits.max_new_tokens, limits.max_length]
    parts = [RECIPE_VERSION, target.fingerprint, tokenizer_digest(target.tokenizer), dtype, stop, lengths]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _cached(file: Path, places: Mapping[int, tuple[int, str, str]]) -> dict[int, list[TokenRow]]:
    """The rows in ``file`` for the items of ``places`` (index, origin and source by prompt hash), by prompt hash."""
    rows: dict[int, list[TokenRow]] = {}
    for record in read_records(file):
        if record.prompt_hash in places:
            _, *place = places[record.prompt_hash]
            try:
                stored = [(row_id, ids, [bool(m) for m in mask]) for row_id, ids, mask in record.content()["rows"]]
            except (KeyError, TypeError, ValueError):
                raise damage_error(record.where, record.line) from None
            rows[record.prompt_hash] = [TokenRow(*row, *place) for row in stored]
    return rows


async def _answer_all(
    target: HFTarget, rollouts: Mapping[int, Rollout], file: Path, limits: Limits, batch_size: int, title: str
) -> None:
    decoder, progress = Decoder(target, batch_size, Sampling()), Progress(title, len(rollouts))

    async def answer_one(numbered: tuple[int, tuple[int, Rollout]]) -> None:
        number, (hash_, rollout) = numbered
        with contextlib.suppress(TooLong):  # unanswered() names it
            await converse(rollout, decoder.complete, limits)
        rows = [[row.id, row.input_ids, [int(m) for m in row.loss_mask]] for row in rollout.rows()]
        # The cache finds it by its hash; the number is this run's.
        log.append(make_record(number, hash_, {"id": rollout.item.id, "rows": rows}))
        progress.advance()

    with contextlib.closing(AppendLog(file)) as log:
        await for_each(enumerate(rollouts.items()), answer_one, IN_FLIGHT * batch_size)
    progress.close()
