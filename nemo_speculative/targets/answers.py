"""On-policy data: the target answers the questions itself, greedily, and its token ids are kept as generated."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig

from nemo_speculative.data.chat import prompt_ids
from nemo_speculative.data.conversations import Conversation, TokenRow
from nemo_speculative.errors import UserError
from nemo_speculative.progress import Progress
from nemo_speculative.targets.hf import HFTarget

ROUND_TOKENS = 48
RECIPE_VERSION = 1
"""Raised when the answering changes, so that no stale answers are taken from the cache."""


def answer(
    target: HFTarget, items: Sequence[Conversation | TokenRow], *, max_answer_tokens: int, batch_size: int,
    max_length: int, cache_dir: str, title: str,
) -> list[TokenRow]:  # fmt: skip
    """Every item's questions answered anew; cached by target, questions and length.

    A conversation gives a row for each of its turns, each turn seeing the new answers before it, rendered as a server
    would render them.  A row of token ids is answered from its first supervised token on.

    Raises:
        UserError: a conversation asks nothing.
    """
    file = Path(cache_dir) / f"{_fingerprint(target, items, max_answer_tokens, max_length)}.jsonl"
    if not file.exists():
        rows = _answer_all(target, items, max_answer_tokens, batch_size, max_length, title)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text("".join(_to_line(row) for row in rows))
        partial.rename(file)
    return [_from_line(line, f"{file}:{number}") for number, line in enumerate(file.open(), start=1)]


def _fingerprint(target: HFTarget, items: Sequence[Conversation | TokenRow], *limits: int) -> str:
    dtype, stop = str(target.model.dtype), sorted(target.stop_ids)
    shaping = [RECIPE_VERSION, target.fingerprint, str(target.tokenizer.chat_template), dtype, stop, limits]
    digest = hashlib.sha256(json.dumps(shaping).encode())
    for item in items:
        content = item.messages if isinstance(item, Conversation) else [item.input_ids, item.loss_mask]
        digest.update(json.dumps([item.id, content]).encode())
    return digest.hexdigest()[:16]


def _answer_all(target, items, max_answer_tokens: int, batch_size: int, max_length: int, title: str) -> list[TokenRow]:
    dialogues = [_Dialogue(target, item) for item in items]
    rows: dict[tuple[int, int], TokenRow] = {}
    progress = Progress(title, sum(d.num_turns for d in dialogues))
    for turn in range(max(d.num_turns for d in dialogues)):
        asked = [(i, d.prompt(turn)) for i, d in enumerate(dialogues) if turn < d.num_turns]
        too_long = sum(len(prompt) >= max_length for _, prompt in asked)
        progress.advance(by=too_long)
        asked = [(i, prompt) for i, prompt in asked if len(prompt) < max_length]
        limits = [min(max_answer_tokens, max_length - len(prompt)) for _, prompt in asked]
        answers = _generate(target, [prompt for _, prompt in asked], limits, batch_size, progress)
        for (i, prompt), ids in zip(asked, answers, strict=True):
            rows[i, turn] = dialogues[i].answered(turn, prompt, ids)
    progress.close()
    return [rows[key] for key in sorted(rows)]


def unanswered(items: Sequence[Conversation | TokenRow], rows: Sequence[TokenRow]) -> list[str]:
    """Ids of the items that got no answer: their question is too long, or they mark none."""
    answered = {row.id for row in rows}
    return [item.id for item in items if not {item.id, f"{item.id}#0"} & answered]


class _Dialogue:
    """The questions of one item, and the answers given to them so far."""

    def __init__(self, target: HFTarget, item: Conversation | TokenRow):
        self.target, self.item = target, item
        self.messages = list(item.messages) if isinstance(item, Conversation) else []
        self.turns = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        if self.messages and self.messages[-1]["role"] != "assistant":
            self.turns.append(len(self.messages))
        if isinstance(item, Conversation) and self.turns == [0]:
            raise UserError(
                f"{item.origin}: the conversation asks nothing; expected a user's message before the answer"
            )
        self.num_turns = len(self.turns) if isinstance(item, Conversation) else int(any(item.loss_mask))

    def prompt(self, turn: int) -> list[int]:
        if isinstance(self.item, TokenRow):
            return self.item.input_ids[: max(self.item.loss_mask.index(True), 1)]
        return prompt_ids(self.target.tokenizer, self.messages[: self.turns[turn]], self.item.origin)

    def answered(self, turn: int, prompt: list[int], ids: list[int]) -> TokenRow:
        if self.messages:
            text = self.target.tokenizer.decode(ids, skip_special_tokens=True)
            self.messages[self.turns[turn] : self.turns[turn] + 1] = [{"role": "assistant", "content": text}]
        identity = self.item.id if self.num_turns == 1 else f"{self.item.id}#{turn}"
        return TokenRow(identity, prompt + ids, [False] * len(prompt) + [True] * len(ids), self.item.origin)


def _generate(
    target: HFTarget, prompts: list[list[int]], limits: list[int], batch_size: int, progress: Progress
) -> list[list[int]]:
    """Greedy answers, each up to and including its stop token or its limit.

    In rounds of a few tokens: what is finished leaves, and the rest is batched anew by length.  A batch would
    otherwise run until its longest answer ends.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    pending = list(range(len(prompts)))
    while pending:
        pending.sort(key=lambda i: len(prompts[i]) + len(answers[i]))
        unfinished: list[int] = []
        for start in range(0, len(pending), batch_size):
            batch, before = pending[start : start + batch_size], len(unfinished)
            for i, ids in zip(batch, _continue(target, [prompts[i] + answers[i] for i in batch]), strict=True):
                answers[i] = (answers[i] + ids)[: limits[i]]
                if len(answers[i]) < limits[i] and answers[i][-1] not in target.stop_ids:
                    unfinished.append(i)
            progress.advance(by=len(batch) - (len(unfinished) - before))
        pending = unfinished
    return answers


@torch.inference_mode()
def _continue(target: HFTarget, texts: list[list[int]]) -> list[list[int]]:
    """Up to ``ROUND_TOKENS`` more greedy tokens of each text, up to and including a stop token."""
    width, stop = max(map(len, texts)), target.stop_ids
    pad = next(iter(stop), 0)
    ids = torch.tensor([[pad] * (width - len(t)) + t for t in texts], device=target.device)
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts], device=target.device)
    out = target.model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            max_new_tokens=ROUND_TOKENS, do_sample=False, eos_token_id=sorted(stop) or None, pad_token_id=pad
        ),
    )
    return [_until_stop(row, stop) for row in out[:, width:].tolist()]


def _until_stop(ids: list[int], stop: frozenset[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop), len(ids) - 1)
    return ids[: end + 1]


def _to_line(row: TokenRow) -> str:
    record = {"id": row.id, "input_ids": row.input_ids, "loss_mask": [int(m) for m in row.loss_mask]}
    return json.dumps(record | {"origin": row.origin}) + "\n"


def _from_line(line: str, where: str) -> TokenRow:
    record = json.loads(line)
    return TokenRow(
        record["id"], record["input_ids"], [bool(m) for m in record["loss_mask"]], record.get("origin", where)
    )
