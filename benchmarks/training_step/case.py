"""What is compared: shapes, tokens and masks, and the directory from which every implementation reads the same.

Imported in the peers' environment too, which has torch and safetensors but not what this project needs.
"""

import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

SEED = 0
FIRST_WORD = 3
"""Lower ids are the padding and the ends of a text."""
STEP_DECAY = 0.8


@dataclass(frozen=True, kw_only=True)
class Size:
    """A target, the draft of its width, and the rows of a step."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    draft_vocab_size: int
    aux_layers: list[int]
    rows: int
    """Rows in one step."""
    row_tokens: int


SIZES = {
    "S": Size(
        hidden_size=256, num_layers=6, num_heads=4, num_kv_heads=2, intermediate_size=768, vocab_size=8192,
        draft_vocab_size=2048, aux_layers=[1, 2, 3], rows=2, row_tokens=512,
    ),
    "M": Size(
        hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=4, intermediate_size=1536, vocab_size=32000,
        draft_vocab_size=8000, aux_layers=[1, 3, 4], rows=1, row_tokens=1024,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table: what every implementation is asked to do."""

    size: Size
    draft: str
    """eagle3 or eagle1."""
    num_steps: int
    """Of the unroll."""
    dtype: str
    lengths: str
    """A key of ``LENGTHS``."""
    supervised: float
    """Share of the tokens that are the assistant's; not read where the lengths decide it."""
    threads: int


@dataclass(frozen=True)
class Conversation:
    """int64 [n] and bool [n]."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


Turns = list[int]
"""Tokens of a question, an answer, a question, an answer, …"""


def full_rows(case: Case) -> Iterator[Turns]:
    """Conversations of exactly one row: two questions (70 and 30 % of their tokens), two answers (60 and 40 %)."""
    total = case.size.row_tokens
    asked = total - round(case.supervised * total)
    first_question, first_answer = round(0.7 * asked), round(0.6 * (total - asked))
    turns = [first_question, first_answer, asked - first_question, total - asked - first_answer]
    return iter([turns] * case.size.rows)


REAL_ROW_TOKENS = 2048
"""What EAGLE trains on; a row stands for one of them, and lengths shrink with it."""
MEAN_QUESTION, MEAN_ANSWER, MEAN_EXCHANGES = 161, 338, 3.5
"""ShareGPT's tokens of a question and of an answer (2309.06180, figure 11), and its exchanges a conversation."""
LENGTH_SIGMA = 1.0
"""Of the logarithm of a turn's length."""
SHAREGPT_ROWS = 8


def sharegpt_like(case: Case) -> Iterator[Turns]:
    """Eight rows' worth of conversations of ShareGPT's lengths: turns lognormal, exchanges geometric, cut at the row.

    In the long run they fill 59 % of rows of their own, 79 % packed in their order, and 65 % of them is answers.
    """
    row_tokens, drawn = case.size.row_tokens, random.Random(SEED)
    scale, total = row_tokens / REAL_ROW_TOKENS, 0
    while total < SHAREGPT_ROWS * row_tokens:
        turns: Turns = []
        while not turns or drawn.random() > 1 / MEAN_EXCHANGES:
            turns += [_lognormal(drawn, mean * scale) for mean in (MEAN_QUESTION, MEAN_ANSWER)]
        total += min(sum(turns), row_tokens)
        yield turns


def _lognormal(drawn: random.Random, mean: float) -> int:
    return max(1, round(drawn.lognormvariate(math.log(mean) - LENGTH_SIGMA**2 / 2, LENGTH_SIGMA)))


LENGTHS: dict[str, Callable[[Case], Iterator[Turns]]] = {"full": full_rows, "sharegpt": sharegpt_like}


def draw_conversations(case: Case) -> list[Conversation]:
    """The conversations of ``case``: random words, each at most a row long."""
    words = torch.Generator().manual_seed(SEED)
    conversations = []
    for turns in LENGTHS[case.lengths](case):
        mask = torch.cat([torch.full((n,), bool(i % 2)) for i, n in enumerate(turns)])[: case.size.row_tokens]
        ids = torch.randint(FIRST_WORD, case.size.vocab_size, mask.shape, generator=words)
        conversations.append(Conversation(ids, mask))
    return conversations


class Setup:
    """What every implementation reads: a target, the weights that a draft starts from, and conversations.

    Written by :func:`benchmarks.training_step.setup.write_setup`; safetensors and JSON.
    """

    def __init__(self, directory: Path):
        self.target = directory / "target"
        """A Hugging Face directory with a tokenizer."""
        values = json.loads((directory / "case.json").read_text())
        self.case = Case(**{**values, "size": Size(**values["size"])})
        self.dtype: torch.dtype = getattr(torch, self.case.dtype)
        self.draft_weights = load_file(directory / "draft.safetensors")
        """Float32, named as a served checkpoint names them."""
        data = load_file(directory / "data.safetensors")
        self.draft_ids = data["draft_ids"]
        """int64 [V_d], ascending."""
        lengths = data["lengths"].tolist()
        parts = zip(data["input_ids"].split(lengths), data["loss_mask"].split(lengths), strict=True)
        self.conversations = [Conversation(ids, mask) for ids, mask in parts]

    @property
    def draft_mask(self) -> torch.Tensor:
        """bool [V]: whether a target id lies in the draft vocabulary."""
        inside = torch.zeros(self.case.size.vocab_size, dtype=torch.bool)
        inside[self.draft_ids] = True
        return inside

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversations, without any padding."""
        return sum(map(len, self.conversations))


def write_case(directory: Path, case: Case) -> None:
    (directory / "case.json").write_text(json.dumps(dataclasses.asdict(case)))
