"""Acceptance length on texts longer than the draft's training documents, with the embedded target and EAGLE-3.

python -m benchmarks.long_context [--length 64] [--offset 512] [--steps 300] [--seeds 0,1,2] [--target-cache DIR]

Compares three trainings on equal numbers of tokens: documents of ``--length`` tokens; the same with
``draft.position_offset``; and documents four times as long.  A document is a sequence of conversations with the
target's answers, like the target's own training data.  The result is the decoder's τ (greedy, chains of 5) on the last
32 tokens of texts of one, two and four times the length: the same held-out questions after other conversations.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path

import torch

from nemo_speculative.algorithms.common.draft import init_from_target
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.algorithms.eagle3.training import Eagle3Objective
from nemo_speculative.config.schema import Eagle3DraftConfig, InitFromTarget, TinyModelConfig
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.data.batch import PackedLoader
from nemo_speculative.data.conversations import ConversationList, TokenRow, shuffled
from nemo_speculative.data.stdlib import stdlib_conversations
from nemo_speculative.data.tokenized_dataset import TokenizedDataset
from nemo_speculative.decoding.drafters import EagleDrafter
from nemo_speculative.decoding.engine import generate
from nemo_speculative.decoding.tree_builder import tree_builder_for
from nemo_speculative.evaluation.acceptance import Measured
from nemo_speculative.generate_data.answers import answer
from nemo_speculative.targets.demo import prepare_tiny
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.progress import Progress

MODULE = "benchmarks.long_context"
TIMES = (1, 2, 4)
QUESTIONS, ANSWER, AT_ONCE = 100, 32, 25
CONVERSATIONS, HELD_OUT = 2000, 200
ROW_TOKENS, ROWS, UNROLLED = 256, 4, 4
RATE, WARMUP = 3e-3, 0.03


def answered(target: HFTarget, held_out: bool, cache: Path) -> list[TokenRow]:
    """The standard library's questions with the target's answers."""
    items = shuffled(ConversationList(stdlib_conversations(held_out=held_out)), 0)[
        : HELD_OUT if held_out else CONVERSATIONS
    ]
    return answer(
        target, items, max_answer_tokens=128, batch_size=128, max_length=512, cache_dir=str(cache / "answers"),
        title="answering",
    )  # fmt: skip


def strung(rows: Sequence[TokenRow], length: int) -> list[TokenRow]:
    """Documents of ``length`` tokens, cut from the concatenation of ``rows``."""
    order = list(rows)
    random.Random(0).shuffle(order)
    ids = list(chain.from_iterable(row.input_ids for row in order))
    mask = list(chain.from_iterable(row.loss_mask for row in order))
    starts = range(0, len(ids) - length, length)
    return [TokenRow(str(at), ids[at : at + length], mask[at : at + length], "") for at in starts]


def trained(target: HFTarget, documents: list[TokenRow], offset: int | None, steps: int, seed: int) -> Eagle3Draft:
    """A draft trained for ``steps`` steps."""
    config = Eagle3DraftConfig(ttt_steps=UNROLLED, position_offset=offset)
    torch.manual_seed(seed)
    shape = Eagle3Draft.shape_for(config, target.config, target.aux_layers, target.config.vocab_size)
    draft = Eagle3Draft(shape).attach(target)
    init_from_target(draft, target, InitFromTarget())
    objective = Eagle3Objective(target, config, seed=seed, tau_steps=UNROLLED)
    stream = PackedLoader(
        TokenizedDataset(target.config.vocab_size, documents), packed_length=ROW_TOKENS, global_batch_size=ROWS,
        micro_batch_size=ROWS, pad_id=1, seed=seed,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(draft.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = max(int(WARMUP * steps), 1)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / warmup, (steps - n) / steps))
    progress = Progress("training", steps)
    for _ in range(steps):
        schedule = objective.schedule(stream.next_global_batch()[0])
        objective.loss(draft, schedule, target.compute_hidden_states(schedule.batch), schedule.counts).loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 0.5)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        progress.advance()
    progress.close()
    return draft.eval()


def prompts(held_out: Sequence[TokenRow], length: int) -> list[list[int]]:
    """The first questions, each after the end of other conversations, ``length`` tokens in total."""
    out = []
    for n in range(QUESTIONS):
        question = held_out[n].input_ids[: held_out[n].loss_mask.index(True)]
        before: list[int] = []
        for other in count(n + 1, 7):
            if len(before) + len(question) >= length:
                break
            before = held_out[other % len(held_out)].input_ids + before
        out.append((before + question)[-length:])
    return out


def measured(target: HFTarget, draft: Eagle3Draft, held_out: Sequence[TokenRow], length: int) -> float:
    """τ on the last ``ANSWER`` tokens of texts of ``length``."""
    drafter, result = EagleDrafter(draft, target, tree_builder_for(SpeculativeSettings(5, 1, 6))), Measured()
    questions = prompts(held_out, length - ANSWER)
    for start in range(0, QUESTIONS, AT_ONCE):
        result.generations += generate(target, drafter, questions[start : start + AT_ONCE], max_new_tokens=ANSWER)
    return result.tau


def lines(options: argparse.Namespace) -> Iterator[str]:
    target = HFTarget(prepare_tiny(TinyModelConfig(cache_dir=str(options.target_cache))), aux_layers=None)
    training, held_out = (answered(target, side, options.target_cache) for side in (False, True))
    short, long = strung(training, options.length), strung(training, 4 * options.length)
    ways = {
        f"documents of {options.length}": (short, None),
        f"position_offset={options.offset}": (short, options.offset),
        f"documents of {4 * options.length}": (long, None),
    }
    lengths = [n * options.length for n in TIMES]
    yield f"{'':24}{'seed':>6}" + "".join(f"{n:>8}" for n in lengths) + f"{'4x / 1x':>10}"
    for seed in map(int, options.seeds.split(",")):
        for name, (documents, offset) in ways.items():
            draft = trained(target, documents, offset, options.steps, seed)
            tau = [measured(target, draft, held_out, length) for length in lengths]
            yield f"{name:24}{seed:6}" + "".join(f"{x:8.2f}" for x in tau) + f"{tau[-1] / tau[0]:10.2f}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=64, help="tokens of a document in training (default: 64)")
    parser.add_argument("--offset", type=int, default=512, help="draft.position_offset (default: 512)")
    parser.add_argument("--steps", type=int, default=300, help="(default: 300)")
    parser.add_argument("--seeds", default="0,1,2", help="(default: 0,1,2)")
    parser.add_argument("--target-cache", type=Path, default=Path("cache/targets"), help="(default: cache/targets)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for line in lines(options):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
