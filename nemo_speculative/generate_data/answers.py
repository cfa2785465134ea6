"""On-policy data for a training: the target's own greedy answers, with its token ids stored as generated."""

import asyncio
import contextlib
import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_speculative.data.chat_template import tokenizer_digest
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data.concurrency import for_each
from nemo_speculative.generate_data.decoder import Decoder, num_in_flight
from nemo_speculative.generate_data.prompt_file import Item, prompt_hash
from nemo_speculative.generate_data.rollout import Keep, Limits, Rollout, TooLong, converse
from nemo_speculative.generate_data.shard_dir import ANSWERS, make_record, read_records
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.append_log import AppendLog
from nemo_speculative.utils.files import dir_lock
from nemo_speculative.utils.progress import Progress

RECIPE_VERSION = 3
"""Raised when the answering changes, so that the cache returns no outdated answers."""


@dataclass(frozen=True)
class _Source:
    """The position of an item in the data, without its content."""

    index: int
    origin: str
    source: str


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
    directory = Path(cache_dir) / _cache_key(target, limits)
    hashes, sources = array("Q"), dict[int, _Source]()
    for index, item in enumerate(items):
        hashes.append(prompt_hash(item))
        sources[hashes[-1]] = _Source(index, item.origin, item.source)
    rows = _cached(directory / ANSWERS, sources)
    if len(rows) < len(sources):
        with dir_lock(directory, "data.cache_dir", wait=True):
            rows |= _cached(directory / ANSWERS, {h: source for h, source in sources.items() if h not in rows})
            # All rollouts are built first: an item that asks nothing ends the run now.
            missing = {h: items[source.index] for h, source in sources.items() if h not in rows}
            rollouts = {h: Rollout(item, target.tokenizer, Keep()) for h, item in missing.items()}
            if rollouts and rows:
                print(f"{title}: {len(rows)} of {len(sources)} were answered before ({directory})", flush=True)
            if rollouts:
                asyncio.run(_answer_all(target, rollouts, directory / ANSWERS, limits, batch_size, title))
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


def _cached(file: Path, sources: Mapping[int, _Source]) -> dict[int, list[TokenRow]]:
    """The rows in ``file`` for the items of ``sources``, by prompt hash."""
    rows: dict[int, list[TokenRow]] = {}
    for record in read_records(file):
        if (source := sources.get(record.prompt_hash)) is None:
            continue
        try:
            rows[record.prompt_hash] = [
                TokenRow(row_id, ids, [bool(m) for m in mask], source.origin, source.source)
                for row_id, ids, mask in record.content()["rows"]
            ]
        except (KeyError, TypeError, ValueError):
            raise record.damaged() from None
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
        await for_each(enumerate(rollouts.items()), answer_one, num_in_flight(batch_size))
    progress.close()
