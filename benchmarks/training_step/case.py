"""The cases of the comparison (shapes, tokens and masks), and the directory from which every implementation reads them.

Also imported in the peers' environment, which has torch and safetensors but lacks other dependencies of this project.
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
"""Lowest token id of a word; lower ids are padding, begin and end of text."""
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
    """One comparison: the settings that every implementation runs with."""

    size: Size
    draft: str
    """eagle3 or eagle1."""
    num_steps: int
    """Steps of the unroll."""
    dtype: str
    lengths: str
    """A key of ``LENGTHS``."""
    supervised: float
    """Share of the tokens that the assistant wrote; ignored where the lengths determine it."""
    threads: int


@dataclass(frozen=True)
class Conversation:
    """Token ids of a conversation, with the mask of the assistant's tokens."""

    input_ids: torch.Tensor
    """int64 [n]."""
    loss_mask: torch.Tensor
    """bool [n]."""

    def __len__(self) -> int:
        return len(self.input_ids)


Turns = list[int]
"""Tokens of a question, an answer, a question, an answer, …"""


def full_rows(case: Case) -> Iterator[Turns]:
    """Conversations of exactly one row: two questions (70 and 30 % of their tokens), two answers (60 and 40 %)."""
    total = case.size.row_tokens
    questions = total - round(case.supervised * total)
    first_question, first_answer = round(0.7 * questions), round(0.6 * (total - questions))
    turns = [first_question, first_answer, questions - first_question, total - questions - first_answer]
    return iter([turns] * case.size.rows)


REAL_ROW_TOKENS = 2048
"""Row length of EAGLE's own training; lengths of turns are scaled by the case's row length divided by it."""
MEAN_QUESTION, MEAN_ANSWER, MEAN_EXCHANGES = 161, 338, 3.5
"""ShareGPT's tokens per question and per answer (arXiv 2309.06180, figure 11), and its exchanges per conversation."""
LENGTH_SIGMA = 1.0
"""Standard deviation of the logarithm of a turn's length."""
SHAREGPT_ROWS = 8


def sharegpt_like(case: Case) -> Iterator[Turns]:
    """Conversations of ShareGPT's lengths for eight rows: lognormal turns, a geometric number of exchanges, truncated.

    On average a conversation fills 59 % of a row, packing in order fills 79 %, and 65 % of the tokens are answers.
    """
    row_tokens, rng = case.size.row_tokens, random.Random(SEED)
    scale, total = row_tokens / REAL_ROW_TOKENS, 0
    while total < SHAREGPT_ROWS * row_tokens:
        turns: Turns = []
        while not turns or rng.random() > 1 / MEAN_EXCHANGES:
            turns += [_lognormal(rng, mean * scale) for mean in (MEAN_QUESTION, MEAN_ANSWER)]
        total += min(sum(turns), row_tokens)
        yield turns


def _lognormal(rng: random.Random, mean: float) -> int:
    return max(1, round(rng.lognormvariate(math.log(mean) - LENGTH_SIGMA**2 / 2, LENGTH_SIGMA)))


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
    """The input of every implementation: a target, the draft's initial weights, and conversations.

    :func:`benchmarks.training_step.setup.write_setup` writes it, as safetensors and JSON.
    """

    def __init__(self, directory: Path):
        self.target = directory / "target"
        """A Hugging Face directory with a tokenizer."""
        values = json.loads((directory / "case.json").read_text())
        self.case = Case(**{**values, "size": Size(**values["size"])})
        self.dtype: torch.dtype = getattr(torch, self.case.dtype)
        self.draft_weights = load_file(directory / "draft.safetensors")
        """Float32, with the names of a servable checkpoint."""
        data = load_file(directory / "data.safetensors")
        self.draft_ids = data["draft_ids"]
        """int64 [V_d], ascending."""
        lengths = data["lengths"].tolist()
        parts = zip(data["input_ids"].split(lengths), data["loss_mask"].split(lengths), strict=True)
        self.conversations = [Conversation(ids, mask) for ids, mask in parts]

    @property
    def draft_mask(self) -> torch.Tensor:
        """bool [V]: whether a target id is in the draft vocabulary."""
        inside = torch.zeros(self.case.size.vocab_size, dtype=torch.bool)
        inside[self.draft_ids] = True
        return inside

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversations, without any padding."""
        return sum(map(len, self.conversations))


def write_case(directory: Path, case: Case) -> None:
    (directory / "case.json").write_text(json.dumps(dataclasses.asdict(case)))
