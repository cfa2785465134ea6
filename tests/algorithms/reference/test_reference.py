"""The objectives and the slot-by-slot oracle against the reference, which defines the losses, in float64."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nemo_speculative.algorithms.reference.eagle as eagle_reference
import nemo_speculative.algorithms.reference.eagle3 as eagle3_reference
from nemo_speculative.algorithms.reference.eagle import eagle_loss
from nemo_speculative.algorithms.reference.eagle3 import eagle3_loss
from nemo_speculative.targets.base import TargetOutput
from tests.algorithms.cases import (
    DECAY,
    PARTS,
    FrozenStandIn,
    eagle,
    eagle3,
    lay_out,
    make_documents,
    oracle_of,
)

ROOT = Path(__file__).parents[3]
EAGLE3 = {
    "eagle3": {},
    "reduced vocabulary": {"draft_vocab": 9},
    "eagle3.1": {"draft_vocab": 9, "fc_norm": True, "norm_output": True},
    "norm before fc, 2 layers": {"norm_before_fc": True, "num_layers": 2},
    "eagle3.1, 3 layers": {"fc_norm": True, "norm_output": True, "num_layers": 3},
}
EAGLE = {
    "eagle1": {},
    "eagle1, 2 layers": {"num_layers": 2},
    "hass": {"num_steps": 3, "num_layers": 2, "ploss_w": 0.3, "topk_w": 1.0},
}
CASES = {
    **{name: (eagle3(**shape), eagle3_loss, {}) for name, shape in EAGLE3.items()},
    **{
        name: (eagle(**settings), eagle_loss, {key: settings.get(key, value) for key, value in PARTS.items()})
        for name, settings in EAGLE.items()
    },
}
LAYOUTS = {"packed": [[13, 9, 21], [6, 30]], "one document": [[40]]}
CHUNKS = {"one chunk": {}, "several chunks": {"chunk_slots": 1}}


class DoubleStandIn(FrozenStandIn):
    """The stand-in target in float64."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = self.embedding.double(), self.head.double()


def make_batch(lengths, width=64):
    torch.manual_seed(0)
    batch, output = lay_out([make_documents(row, seed=n) for n, row in enumerate(lengths)], width)
    return batch, TargetOutput(output.aux_hidden_states.double(), output.last_hidden_state.double())


def reference_of(case, loss, settings, draft, batch, output):
    """The reference's loss and its gradient for every parameter."""
    named = dict(draft.named_parameters())
    weights = {name: p.detach().double().requires_grad_() for name, p in named.items()} | dict(draft.named_buffers())
    value = loss(weights, draft.shape, DoubleStandIn(), batch, output, case.num_steps, DECAY, **settings)
    return value, torch.autograd.grad(value, [weights[name] for name in named])


def assert_close(computed, expected, tolerance):
    assert (computed.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("case", "loss", "settings"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_the_objective_has_the_references_loss_and_gradients(case, loss, settings, layout, chunks):
    batch, output = make_batch(layout)
    draft = case.make_draft().double().attach(DoubleStandIn())
    expected, gradients = reference_of(case, loss, settings, draft, batch, output)
    objective = case.make_objective(**chunks)
    objective.target = DoubleStandIn()
    schedule = objective.schedule(batch)
    computed = objective.loss(draft, schedule, output, schedule.counts).loss
    computed.backward()
    # Row weights are float32.
    assert_close(computed.detach(), expected.detach(), 1e-7)
    for parameter, gradient in zip(draft.parameters(), gradients, strict=True):
        assert_close(parameter.grad, gradient, 1e-6)


@pytest.mark.parametrize(("case", "loss", "settings"), CASES.values(), ids=CASES)
def test_the_slot_by_slot_oracle_has_the_references_loss_and_gradients(case, loss, settings):
    documents = make_documents([13, 9, 21])
    torch.manual_seed(0)
    batch, output = lay_out([documents], 64)
    output = replace(
        output,
        aux_hidden_states=output.aux_hidden_states.double(),
        last_hidden_state=output.last_hidden_state.double(),
    )
    draft = case.make_draft()
    expected, gradients = reference_of(case, loss, settings, draft, batch, output)
    computed, oracle_gradients, _, _ = oracle_of(case, draft, documents)
    assert computed == pytest.approx(float(expected.detach()), rel=1e-12)
    for (name, _), gradient in zip(draft.named_parameters(), gradients, strict=True):
        assert_close(oracle_gradients[name], gradient, 1e-10)


@pytest.mark.parametrize("module", [eagle3_reference, eagle_reference])
def test_a_reference_fits_on_a_screen_and_imports_nothing_of_the_implementation(module):
    source = inspect.getsource(module)
    assert len(source.splitlines()) <= 80
    imported = set(re.findall(r"from (nemo_speculative\S+) import", source))
    assert imported == {"nemo_speculative.algorithms.reference.llama"}
    shared = (Path(module.__file__).parent / "llama.py").read_text()
    assert "nemo_speculative" not in shared


@pytest.mark.parametrize("loss", [eagle3_loss, eagle_loss])
def test_the_page_of_algorithms_quotes_the_reference(loss):
    page = (ROOT / "docs" / "algorithms.md").read_text()
    assert f"```python\n{inspect.getsource(loss)}```\n" in page
