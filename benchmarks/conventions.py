"""The loss of a draft on a batch, for each convention of mask and normalization.

    python -m benchmarks.conventions RUN ROWS.jsonl

RUN is a run of an EAGLE-3 draft.  ROWS.jsonl contains input_ids and loss_mask per line, as a cache of answers does.
"""

import argparse
from pathlib import Path

import torch

from nemo_speculative.algorithms.eagle3.training import Eagle3Objective
from nemo_speculative.checkpoint.draft_checkpoint import read_servable
from nemo_speculative.config.schema import Eagle3DraftConfig, MaskConvention, Normalization
from nemo_speculative.data.batch import Batch, collate, pack
from nemo_speculative.data.conversations import ConversationFile, TokenRow
from nemo_speculative.targets.hf import HFTarget

STEPS, ROW_TOKENS, ROWS = 5, 512, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("rows")
    options = parser.parse_args()
    servable = read_servable(options.run)
    target = HFTarget(Path(servable.provenance.target), aux_layers=servable.aux_layers)
    draft, batch = servable.build().attach(target), make_batch(options.rows)
    print(f"{batch.num_tokens} tokens, {float(batch.loss_mask.float().mean()):.0%} the assistant's, {STEPS} steps")
    for convention in MaskConvention:
        objective = {n: _objective(target, convention, n) for n in Normalization}
        sums = {n: _sums(goal, target, draft, batch) for n, goal in objective.items()}
        for normalization in Normalization:
            metrics = objective[normalization].metrics(sums[normalization])
            _print(f"{convention.value}, {normalization.value} mean", [metrics[f"ploss_{i}"] for i in range(STEPS)])
        all_gather = sums[Normalization.token]["loss"] / batch.num_tokens
        _print(f"{convention.value}, mean over all positions", all_gather.tolist())


def make_batch(path: str) -> Batch:
    """The first rows of ``path``, packed."""
    rows = [row for row in ConversationFile(path) if isinstance(row, TokenRow)]
    packed = pack([len(row.input_ids) for row in rows], ROW_TOKENS, seed=0)[:ROWS]
    return collate([[rows[d] for d in row] for row in packed], ROW_TOKENS, pad_id=0)


def _objective(target: HFTarget, convention: MaskConvention, normalization: Normalization) -> Eagle3Objective:
    config = Eagle3DraftConfig(ttt_steps=STEPS, mask_convention=convention, normalization=normalization)
    return Eagle3Objective(target, config, seed=0, tau_steps=STEPS)


@torch.no_grad()
def _sums(objective: Eagle3Objective, target: HFTarget, draft, batch: Batch) -> dict[str, torch.Tensor]:
    schedule = objective.schedule(batch, training=False)
    return objective.loss(draft, schedule, target.compute_hidden_states(batch), schedule.counts).sums


def _print(name: str, losses: list[float]) -> None:
    print(f"{name:40}" + " ".join(f"{loss:7.3f}" for loss in losses))


if __name__ == "__main__":
    main()
