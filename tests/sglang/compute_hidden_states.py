"""Differences of hidden states between SGLang and transformers on each rank: ``… TARGET AUX_LAYERS OUT``."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_speculative.config.app import run_program
from nemo_speculative.data.batch import Batch, collate
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.targets.sglang import SGLangTarget

VOCAB, PAD = 256, 1


def make_batch(seed: int) -> Batch:
    """Packed rows, different ones on each rank."""
    random = torch.Generator().manual_seed(seed)
    lengths = [11 + seed, 7, 30, 1]
    ids = [torch.randint(VOCAB, (n,), generator=random).tolist() for n in lengths]
    rows = [TokenRow(str(i), x, [True] * len(x), "") for i, x in enumerate(ids)]
    return collate([rows[:2], rows[2:]], 40, PAD)


def difference(one: TargetOutput, two: TargetOutput, batch: Batch) -> dict[str, float]:
    """The largest difference at a token of a document, and the largest value there."""
    at = torch.zeros_like(batch.loss_mask)
    for span in batch.spans:
        at[span.row, span.start : span.end] = True
    pairs = {
        "aux": (one.aux_hidden_states[at], two.aux_hidden_states[at]),
        "last_hidden": (one.last_hidden_state[at], two.last_hidden_state[at]),
    }
    return {name: float((a - b).abs().max()) for name, (a, b) in pairs.items() if a.numel()}


def main(target: Path, aux_layers: list[int], out: Path) -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    ours, theirs = (make(target, aux_layers=aux_layers) for make in (SGLangTarget, HFTarget))
    batches = [make_batch(2 * number + rank) for number in range(2)]
    differences = [
        difference(ours.compute_hidden_states(batch), theirs.compute_hidden_states(batch), batch) for batch in batches
    ]
    (out / f"{rank}.json").write_text(json.dumps(differences))


if __name__ == "__main__":
    # As the package's programs end: gloo's threads now and then abort a process that is left to Python.
    run_program(partial(main, Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])))
