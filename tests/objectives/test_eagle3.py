import pytest
import torch

from nemo_speculative.config.schema import MaskConvention
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.data.packing import collate
from nemo_speculative.data.vocabulary import DraftVocabulary
from nemo_speculative.drafts.eagle3 import Eagle3Draft, Eagle3Shape
from nemo_speculative.objectives.eagle3 import Eagle3Objective
from nemo_speculative.targets.base import Supervision
from tests.objectives.oracle import Oracle

STEPS, DECAY, THETA, HIDDEN, VOCAB = 4, 0.8, 10000.0, 16, 23
EXACT = 1e-6


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


def make_shape(draft_vocab):
    return Eagle3Shape(
        hidden_size=HIDDEN, intermediate_size=24, num_heads=4, num_kv_heads=2, head_dim=4, rms_norm_eps=1e-5,
        max_positions=64, rope_parameters={"rope_type": "default", "rope_theta": THETA}, vocab_size=VOCAB,
        draft_vocab_size=draft_vocab, aux_layers=(1, 2, 3),
    )  # fmt: skip


def make_draft(draft_vocab=VOCAB, seed=0):
    torch.manual_seed(seed)
    draft = Eagle3Draft(make_shape(draft_vocab))
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randperm(VOCAB)[:draft_vocab].sort().values
    vocabulary = DraftVocabulary(ids, VOCAB, 1.0)
    draft.d2t.copy_(vocabulary.d2t)
    draft.t2d.copy_(vocabulary.t2d)
    return draft


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
    return batch, Supervision(aux, last)


def objective(recompute=False):
    return Eagle3Objective(
        FrozenStandIn(), num_steps=STEPS, step_decay=DECAY, convention=MaskConvention.serving, tau_steps=STEPS,
        recompute=recompute,
    )  # fmt: skip


def run(draft, layouts, recompute=False):
    """Loss, gradients and metrics of a global batch given as several micro-batches."""
    draft.zero_grad()
    goal, made = objective(recompute), [lay_out(*layout) for layout in layouts]
    counts = sum(goal.counts(batch) for batch, _ in made)
    loss, sums = 0.0, {}
    for batch, supervision in made:
        out = goal.loss(draft, batch, supervision, counts)
        out.loss.backward()
        loss += float(out.loss.detach())
        sums = {name: value + sums.get(name, 0) for name, value in out.sums.items()}
    return loss, {n: p.grad.clone() for n, p in draft.named_parameters()}, goal.metrics(sums)


def assert_same_gradients(found, expected, tolerance=EXACT):
    for name, gradient in expected.items():
        error = (found[name].double() - gradient).norm() / gradient.norm()
        assert error <= tolerance, f"{name}: {error:.2e}"


def oracle_of(draft, documents):
    parameters = {n: p.detach().double().requires_grad_() for n, p in draft.named_parameters()} | {"d2t": draft.d2t}
    stand_in = FrozenStandIn()
    oracle = Oracle(parameters, draft.shape, THETA, stand_in.embedding, stand_in.head, STEPS, DECAY)
    loss, counts, hits = oracle.loss([(r.input_ids, r.loss_mask, a.double(), h.double()) for r, a, h in documents])
    names = [n for n, _ in draft.named_parameters()]
    gradients = torch.autograd.grad(loss, [parameters[n] for n in names])
    return float(loss.detach()), dict(zip(names, gradients, strict=True)), counts, hits


@pytest.mark.parametrize("draft_vocab", [VOCAB, 9], ids=["full vocabulary", "reduced vocabulary"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_loss_and_every_gradient_equal_the_float64_oracle(draft_vocab, recompute):
    draft, documents = make_draft(draft_vocab), make_documents([13, 9, 21, 6])
    loss, gradients, metrics = run(draft, [([documents[:3], documents[3:]], 48)], recompute)
    expected, expected_gradients, counts, hits = oracle_of(draft, documents)
    assert loss == pytest.approx(expected, rel=EXACT)
    assert_same_gradients(gradients, expected_gradients)
    for i, (count, hit) in enumerate(zip(counts, hits, strict=True)):
        assert metrics[f"acc_{i}"] == pytest.approx(hit / count)


def test_every_trainable_parameter_gets_a_gradient():
    _, gradients, _ = run(make_draft(), [([make_documents([15])], 16)])
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize(
    "layouts",
    [
        lambda d: [([[x] for x in d], 21)],
        lambda d: [([[x] for x in d], 64)],
        lambda d: [([d], 60)],
        lambda d: [([d[::-1]], 60)],
        lambda d: [([[x]], 30) for x in d],
        lambda d: [([d[2:], [d[0]]], 40), ([[d[1]]], 9)],
    ],
    ids=["unpacked", "padded", "one row", "other order", "accumulated", "uneven split"],
)
def test_loss_and_gradients_do_not_depend_on_padding_packing_or_split(layouts):
    draft, documents = make_draft(9), make_documents([13, 9, 21, 6])
    expected, expected_gradients, expected_metrics = run(draft, [([documents[:2], documents[2:]], 32)])
    loss, gradients, metrics = run(draft, layouts(documents))
    assert loss == pytest.approx(expected, rel=EXACT)
    assert_same_gradients(gradients, expected_gradients)
    assert metrics == pytest.approx(expected_metrics, rel=EXACT)


def test_a_document_does_not_leak_into_its_neighbour():
    """Changing one document of a row changes nothing that the others contribute."""
    draft, goal = make_draft(), objective()
    documents, others = make_documents([13, 9, 12]), make_documents([13, 9, 12], seed=1)
    changed = [documents[0], others[1], documents[2]]
    counts = torch.ones(STEPS, dtype=torch.float64)

    def contribution(row):
        batch, supervision = lay_out([row], 40)
        muted = batch.loss_mask.clone()
        muted[0, 13:22] = False
        batch = type(batch)(batch.input_ids, muted, batch.positions, batch.documents)
        return float(goal.loss(draft, batch, supervision, counts).loss.detach())

    assert contribution(documents) == pytest.approx(contribution(changed), rel=EXACT)


def test_tau_is_one_plus_the_chances_that_a_chain_holds():
    """Hits by slot and step, counted by hand: the chain of a slot ends at its first miss."""
    goal = objective()
    hits = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)[:, None]
    supervised = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)[:, None]
    from nemo_speculative.objectives.eagle3 import _chain_sums
    from nemo_speculative.objectives.slots import Slots

    slots = Slots(torch.zeros(1, 3, dtype=torch.long), supervised)
    sums = {"loss": torch.zeros(STEPS), "count": slots.counts, **_chain_sums(hits, slots)}
    held = [
        sum(all(hits[j, 0, s] for j in range(i + 1)) and bool(supervised[i, 0, s]) for s in range(3)) for i in range(4)
    ]
    expected = 1 + sum(h / int(supervised[i].sum()) for i, h in enumerate(held))
    assert goal.metrics(sums)["tau"] == pytest.approx(expected)


def test_a_slot_outside_the_draft_vocabulary_is_counted_but_costs_nothing():
    """Every label's argmax is moved outside: no loss and no gradient, but the slots are there, and all are misses."""
    draft, documents = make_draft(9), make_documents([13])
    outside = next(i for i in range(VOCAB) if i not in set(draft.draft_ids.tolist()))
    (row, aux, last), favourite = documents[0], FrozenStandIn().head[outside]
    moved = [(row, aux, last + 40 * favourite)]
    loss, gradients, metrics = run(draft, [([moved], 13)])
    assert loss == 0 and all(not gradient.any() for gradient in gradients.values())
    assert metrics["acc_0"] == 0 and metrics["tau"] == 1
    again, _, counts, _ = oracle_of(draft, documents)
    assert again > 0 and objective().counts(lay_out([moved], 13)[0]).tolist() == counts
