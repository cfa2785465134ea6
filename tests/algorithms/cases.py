"""Drafts, documents and objectives of the tests, small enough for the float64 oracles."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nemo_speculative.algorithms.eagle.contract import EagleShape
from nemo_speculative.algorithms.eagle.network import EagleDraft
from nemo_speculative.algorithms.eagle.training import EagleObjective
from nemo_speculative.algorithms.eagle3.contract import Eagle3Shape
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.algorithms.eagle3.training import Eagle3Objective
from nemo_speculative.config.schema import Eagle3DraftConfig, EagleDraftConfig, FeatureNoise
from nemo_speculative.data.batch import collate
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.data.vocab_mapping import VocabMapping
from nemo_speculative.distributed.context_parallel import NO_CONTEXT_PARALLELISM
from nemo_speculative.targets.base import TargetOutput
from tests.algorithms.oracle import Eagle3Oracle, EagleOracle

STEPS, DECAY, THETA, HIDDEN, VOCAB = 4, 0.8, 10000.0, 16, 23
EXACT = 1e-6
ROUNDED = 2e-6
"""Of a float32 gradient's norm, its rounding: it depends on the CPU, up to 1.004e-6 was observed."""
NUMBERS: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4,
    "rms_norm_eps": 1e-5, "max_positions": 64, "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    "vocab_size": VOCAB,
}  # fmt: skip
PARTS = {"vloss_w": 1.0, "ploss_w": 0.1, "topk_w": 0.0, "topk": 4}


class FrozenStandIn:
    """An embedding and a head; the supervision is made up per document, as if the target were any model."""

    def __init__(self, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(VOCAB, HIDDEN, generator=random)
        self.head = torch.randn(VOCAB, HIDDEN, generator=random)

    def embed(self, ids):
        return self.embedding[ids]

    def logits(self, hidden):
        return hidden @ self.head.T


@dataclass
class Case:
    """An algorithm under test: functions that make its draft, objective and oracle."""

    make_draft: Callable[[], Any]
    make_objective: Callable[..., Any]
    oracle: Callable[..., Any]
    num_steps: int = STEPS


def make_eagle3(draft_vocab=VOCAB, seed=0, **shape):
    """A random EAGLE-3 draft; ``shape`` are its switches."""
    torch.manual_seed(seed)
    aux = {"aux_layers": (1, 2, 3), "target_hidden_size": HIDDEN}
    draft = Eagle3Draft(Eagle3Shape(**(NUMBERS | shape), draft_vocab_size=draft_vocab, **aux))
    ids = torch.randperm(VOCAB)[:draft_vocab].sort().values
    draft.set_vocab_mapping(VocabMapping(ids, VOCAB, 1.0))
    return randomized(draft)


def randomized(draft):
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return draft.attach(FrozenStandIn())


def make_eagle(num_layers=1):
    torch.manual_seed(0)
    return randomized(EagleDraft(EagleShape(**NUMBERS, num_layers=num_layers)))


def eagle3(draft_vocab=VOCAB, **shape):
    def objective(**settings):
        return make_objective(Eagle3Objective, Eagle3DraftConfig, STEPS, settings)

    return Case(lambda: make_eagle3(draft_vocab, **shape), objective, Eagle3Oracle)


def eagle(num_steps=1, num_layers=1, noise=FeatureNoise.none, **parts):
    weights = PARTS | parts

    def objective(**settings):
        return make_objective(EagleObjective, EagleDraftConfig, num_steps, {"noise": noise} | weights | settings)

    return Case(lambda: make_eagle(num_layers), objective, lambda *a: EagleOracle(*a, **weights), num_steps)


def make_objective(objective, config, num_steps, settings):
    """The objective of a configuration; ``settings`` are fields of it, and arguments of the objective."""
    arguments = {"seed": 0, "tau_steps": num_steps, "chunk_slots": None, "context": NO_CONTEXT_PARALLELISM}
    arguments = {name: settings.get(name, value) for name, value in arguments.items()}
    fields = {name: value for name, value in settings.items() if name not in arguments}
    fields = {"ttt_steps": num_steps, "step_decay": DECAY} | fields
    return objective(FrozenStandIn(), config(**fields), **arguments)


def make_documents(lengths, seed=0):
    """(row, aux, last_hidden) each; a prompt, an answer, and in longer ones a second turn."""
    random = torch.Generator().manual_seed(seed)
    documents = []
    for n, length in enumerate(lengths):
        ids = torch.randint(VOCAB, (length,), generator=random).tolist()
        mask = [3 <= t < length - 1 and t % 7 != 6 for t in range(length)]
        aux = torch.randn(length, 3 * HIDDEN, generator=random)
        last = torch.randn(length, HIDDEN, generator=random)
        documents.append((TokenRow(str(n), ids, mask, ""), aux, last))
    return documents


def lay_out(rows, width):
    """A batch of packed ``rows`` of documents, and its supervision (padding gets noise)."""
    batch = collate([[row for row, _, _ in documents] for documents in rows], width, pad_id=0)
    aux, last = torch.randn(len(rows), width, 3 * HIDDEN), torch.randn(len(rows), width, HIDDEN)
    for r, documents in enumerate(rows):
        start = 0
        for row, a, h in documents:
            end = start + len(row.input_ids)
            aux[r, start:end], last[r, start:end] = a, h
            start = end
    return batch, TargetOutput(aux, last)


def run(draft, objective, layouts):
    """Loss, gradients and metrics of a global batch given as several micro-batches."""
    draft.zero_grad()
    made = [(objective.schedule(batch), supervision) for batch, supervision in (lay_out(*layout) for layout in layouts)]
    counts = sum(schedule.counts for schedule, _ in made)
    loss, sums = 0.0, {}
    for schedule, supervision in made:
        out = objective.loss(draft, schedule, supervision, counts)
        out.loss.backward()
        loss += float(out.loss.detach())
        sums = {name: value + sums.get(name, 0) for name, value in out.sums.items()}
    return loss, {n: p.grad.clone() for n, p in draft.named_parameters()}, objective.metrics(sums)


def document(name, length):
    """A conversation that is supervised throughout."""
    return TokenRow(name, [1] * length, [True] * length, "")


def assert_drawn_for_conversations(draw):
    """Checks that ``draw`` depends on conversation, epoch and seed alone; returns its values on padding."""
    a, b = document("a", 40), document("b", 50)
    packed, other = draw([[a, b]], 100), draw([[b], [a]], 64)
    assert torch.equal(packed[0, :40], other[1, :40]) and torch.equal(packed[0, 40:90], other[0, :50])
    assert not torch.equal(packed[0, :40], packed[0, 40:80])
    assert not torch.equal(packed, draw([[a, b]], 100, seed=1))
    assert not torch.equal(packed, draw([[a, b]], 100, epochs=[1]))
    return packed[0, 90:]


def assert_same_gradients(found, expected, tolerance=ROUNDED):
    for name, gradient in expected.items():
        error = (found[name].double() - gradient).norm() / gradient.norm()
        assert error <= tolerance, f"{name}: {error:.2e}"


def oracle_of(case, draft, documents, decay=DECAY, **settings):
    parameters = {n: p.detach().double().requires_grad_() for n, p in draft.named_parameters()}
    parameters |= {name: value for name, value in draft.named_buffers() if name == "d2t"}
    stand_in = FrozenStandIn()
    oracle = case.oracle(parameters, draft.shape, THETA, stand_in.embedding, stand_in.head, case.num_steps, decay)
    plain = [(r.input_ids, r.loss_mask, a.double(), h.double()) for r, a, h in documents]
    loss, counts, hits = oracle.loss(plain, **settings)
    names = [n for n, _ in draft.named_parameters()]
    gradients = torch.autograd.grad(loss, [parameters[n] for n in names])
    return float(loss.detach()), dict(zip(names, gradients, strict=True)), counts, hits
