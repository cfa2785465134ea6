"""On-policy data: the target answers the questions itself, greedily, and its token ids are kept as generated."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from nemo_speculative.data.chat import tokenizer_digest
from nemo_speculative.data.conversations import Conversation, TokenRow
from nemo_speculative.decoding.sampling import Sampling
from nemo_speculative.files import write_whole
from nemo_speculative.generation.concurrency import in_parallel
from nemo_speculative.generation.decoder import Decoder, in_flight
from nemo_speculative.generation.dialogue import Dialogue, Limits, TooLong, converse
from nemo_speculative.generation.reasoning import Keep
from nemo_speculative.progress import Progress
from nemo_speculative.targets.hf import HFTarget

RECIPE_VERSION = 2
"""Raised when the answering changes, so that no stale answers are taken from the cache."""


def answer(
    target: HFTarget, items: Sequence[Conversation | TokenRow], *, max_answer_tokens: int, batch_size: int,
    max_length: int, cache_dir: str, title: str,
) -> list[TokenRow]:  # fmt: skip
    """Every item's questions answered anew; cached by target, questions and length.

    Each turn sees the new answers before it, rendered as a server would render them; a conversation is one row as long
    as that rendering begins with the row so far.  A row of token ids is answered from its first supervised token on.

    Raises:
        UserError: a conversation asks nothing, or the chat template rejects it.
    """
    file = Path(cache_dir) / f"{_fingerprint(target, items, max_answer_tokens, max_length)}.jsonl"
    if not file.exists():
        limits = Limits(max_answer_tokens, max_length)
        rows = asyncio.run(_answer_all(target, items, limits, batch_size, Progress(title, len(items))))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, "".join(_to_line(row) for row in rows))
    return [_from_line(line, f"{file}:{number}") for number, line in enumerate(file.open(), start=1)]


def _fingerprint(target: HFTarget, items: Sequence[Conversation | TokenRow], *limits: int) -> str:
    dtype, stop = str(target.model.dtype), sorted(target.stop_ids)
    shaping = [RECIPE_VERSION, target.fingerprint, tokenizer_digest(target.tokenizer), dtype, stop, limits]
    digest = hashlib.sha256(json.dumps(shaping).encode())
    for item in items:
        content = [item.messages, item.tools] if isinstance(item, Conversation) else [item.input_ids, item.loss_mask]
        digest.update(json.dumps([item.id, content]).encode())
    return digest.hexdigest()[:16]


async def _answer_all(
    target: HFTarget, items: Sequence[Conversation | TokenRow], limits: Limits, batch_size: int, progress: Progress
) -> list[TokenRow]:
    decoder = Decoder(target, batch_size, Sampling())
    dialogues = [Dialogue(item, target.tokenizer, Keep()) for item in items]

    async def have(dialogue: Dialogue) -> None:
        with contextlib.suppress(TooLong):  # unanswered() names it
            await converse(dialogue, decoder.complete, limits)
        progress.advance()

    await in_parallel(dialogues, have, in_flight(batch_size))
    progress.close()
    return [row for dialogue in dialogues for row in dialogue.rows()]


def unanswered(items: Sequence[Conversation | TokenRow], rows: Sequence[TokenRow]) -> list[str]:
    """Ids of the items that got no answer: their question is too long, or they mark none."""
    answered = {row.id for row in rows}
    return [item.id for item in items if not {item.id, f"{item.id}#0"} & answered]


def _to_line(row: TokenRow) -> str:
    record = {"id": row.id, "input_ids": row.input_ids, "loss_mask": [int(m) for m in row.loss_mask]}
    return json.dumps(record | {"origin": row.origin, "source": row.source}) + "\n"


def _from_line(line: str, where: str) -> TokenRow:
    record = json.loads(line)
    mask = [bool(m) for m in record["loss_mask"]]
    return TokenRow(record["id"], record["input_ids"], mask, record.get("origin", where), record.get("source", ""))
