"""A task that needs attention: in every document, what follows a token depends on the document's first token.

    python -m tests.algorithms.recall        (τ without skips and with them, three seeds)

Words are random, and after word x the target is certain of table[first token, x].  Its features encode the first token
at the first position only, so the draft's attention has to read it, however far away it is.
"""

from dataclasses import replace

import torch

from nemo_speculative.algorithms.eagle3.contract import Eagle3Shape
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.algorithms.eagle3.training import Eagle3Objective
from nemo_speculative.config.schema import Eagle3DraftConfig
from nemo_speculative.data.batch import collate
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.targets.base import TargetOutput

KEYS, WORDS, HIDDEN = 4, 12, 32
VOCAB = KEYS + WORDS
LENGTH, ROWS, STEPS, RATE, WARMUP = 32, 16, 300, 6e-3, 20
OFFSET = 8 * LENGTH
UNROLLED, MEASURED, HELD_OUT = 4, 32, 8


class RecallTarget:
    """The target of the module's text."""

    def __init__(self):
        random = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCAB, HIDDEN, generator=random)
        self.head = torch.randn(VOCAB, HIDDEN, generator=random)
        self.table = torch.randint(KEYS, VOCAB, (KEYS, VOCAB), generator=random)
        self.states = (10 * torch.linalg.pinv(self.head)).T
        """[V, h]: whose logits are 10 at one token, and 0 elsewhere."""

    def embed(self, ids):
        return self.embedding[ids]

    def logits(self, hidden):
        return hidden @ self.head.T

    def compute_hidden_states(self, batch):
        """Of rows that are one document each."""
        keys = batch.input_ids[:, :1]
        first = self.embed(batch.input_ids) * (batch.positions == 0)[..., None]
        return TargetOutput(first.repeat(1, 1, 3), self.states[self.table[keys, batch.input_ids]])


def documents(count, length, seed):
    """A key, then random words, as a batch of rows; the words are supervised."""
    random = torch.Generator().manual_seed(seed)
    keys = torch.randint(KEYS, (count, 1), generator=random)
    rows = torch.cat((keys, torch.randint(KEYS, VOCAB, (count, length - 1), generator=random)), 1).tolist()
    mask = [False] + [True] * (length - 1)
    return collate([[TokenRow(f"{seed}:{n}", row, mask, "")] for n, row in enumerate(rows)], length, 0)


def make_draft(seed):
    torch.manual_seed(seed)
    shape = Eagle3Shape(
        hidden_size=HIDDEN, intermediate_size=64, num_heads=4, num_kv_heads=4, head_dim=8, rms_norm_eps=1e-5,
        max_positions=1024, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, vocab_size=VOCAB,
        draft_vocab_size=VOCAB, aux_layers=(1, 2, 3), target_hidden_size=HIDDEN,
    )  # fmt: skip
    return Eagle3Draft(shape)


def train_and_measure(offset, seed):
    """τ of a chain of four at the end of texts of once, twice and four times the length of training, by that length."""
    target, draft = RecallTarget(), make_draft(seed)
    objective = Eagle3Objective(
        target, Eagle3DraftConfig(ttt_steps=UNROLLED, position_offset=offset), seed=seed, tau_steps=UNROLLED
    )
    draft.attach(target)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=RATE)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / WARMUP, (STEPS - n) / STEPS))
    for step in range(STEPS):
        schedule = objective.schedule(documents(ROWS, LENGTH, (seed + 1) * STEPS + step))
        objective.loss(draft, schedule, target.compute_hidden_states(schedule.batch), schedule.counts).loss.backward()
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    return {length: _tau(draft, objective, target, length) for length in (LENGTH, 2 * LENGTH, 4 * LENGTH)}


@torch.no_grad()
def _tau(draft, objective, target, length):
    batch = documents(HELD_OUT, length, seed=0)
    last = batch.loss_mask & (batch.positions >= length - MEASURED)
    schedule = objective.schedule(replace(batch, loss_mask=last), training=False)
    return objective.metrics(
        objective.loss(draft, schedule, target.compute_hidden_states(batch), schedule.counts).sums
    )["tau"]


if __name__ == "__main__":  # the table of docs/long_context.md
    torch.set_num_threads(1)
    for offset in (None, OFFSET):
        for seed in range(3):
            found = train_and_measure(offset, seed)
            print(f"{offset!s:6}{seed:3}" + "".join(f"{tau:8.2f}" for tau in found.values()), flush=True)
