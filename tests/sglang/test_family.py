"""Train = serve: SGLang's own classes compute the same as this project's, for every network of the family."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.schedule import Layout, Slots
from nemo_speculative.algorithms.common.ttt import compute_step0, unroll
from nemo_speculative.checkpoint.draft_checkpoint import Servable, read_servable
from tests.sglang.family import FAMILY, LENGTH, STEPS, Given, expected_ids, ignored, never_loaded, write_family


@dataclass(frozen=True)
class Replayed:
    """A draft, its inputs, and SGLang's outputs."""

    servable: Servable
    given: Given
    report: dict[str, object]
    logits: torch.Tensor
    states: torch.Tensor
    drafted: torch.Tensor
    """See :func:`tests.sglang.replay.replay`."""

    @property
    def draft(self) -> Draft:
        return self.servable.build().attach(self.given.ends)


@pytest.fixture(scope="module")
def family(tmp_path_factory, inspect, options_for) -> dict[str, Replayed]:
    """All networks, through one SGLang process."""
    root = tmp_path_factory.mktemp("family")
    write_family(root, _target(root / "target"))
    models = {name: root / name / "model" for name in FAMILY}
    report = inspect({"any": options_for(models["plain-as_is-1"])}, models)["drafts"]
    return {name: _replayed(root / name, report[name]) for name in FAMILY}


def _target(path: Path) -> Path:
    """A target of which only the configuration is used."""
    from transformers import LlamaConfig

    shape = next(iter(FAMILY.values()))
    LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=shape.vocab_size, hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size, num_hidden_layers=8, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, max_position_embeddings=shape.max_positions,
    ).save_pretrained(path)  # fmt: skip
    return path


def _replayed(directory: Path, report: dict[str, object]) -> Replayed:
    returned = load_file(directory / "returned.safetensors")
    return Replayed(read_servable(directory / "model"), Given.load(directory / "given.safetensors"), report, **returned)


@pytest.fixture(params=FAMILY)
def replayed(request, family) -> Replayed:
    return family[request.param]


def test_no_tensor_is_lost(replayed):
    servable = replayed.servable
    assert replayed.report["architecture"] == servable.contract.architecture
    assert set(replayed.report["unfilled"]) == never_loaded(servable)
    assert replayed.report["ignored"] == ignored(servable)
    assert replayed.report["ids"] == expected_ids(servable)


@torch.no_grad()
def test_decoding_computes_what_sglang_does(replayed):
    """Logits and fed-back states at the given positions, and for steps on the draft's own output."""
    draft, given = replayed.draft, replayed.given
    session = replayed.servable.contract.session(draft)
    tokens, feature, start = given.tokens[None], draft.project_hidden_states(given.features, given.features)[None], 0
    logits, states, drafted = [], [], []
    for _ in range(1 + STEPS):
        n = tokens.shape[1]
        rotation = draft.rotary(torch.arange(start, start + n)[None], draft.fc.weight.dtype)
        output = session.extend(draft.embed_input_ids(tokens), feature, rotation)
        session.cache.advance(n)
        logits.append(draft.compute_logits(output)[0])
        states.append(draft.next_feature(output)[0])
        tokens, feature, start = draft.draft_ids[logits[-1][-1:].argmax(-1)][None], states[-1][None, -1:], start + n
        drafted.append(tokens[0])
    assert torch.cat(drafted)[:STEPS].tolist() == replayed.drafted.tolist()
    _assert_same(torch.cat(logits), replayed.logits)
    _assert_same(torch.cat(states), replayed.states)


@torch.no_grad()
def test_training_computes_what_sglang_does(replayed):
    """The unroll on the tokens that SGLang drafted: step 0 of every slot, and all steps of the last."""
    draft, given = replayed.draft, replayed.given
    x = torch.cat((torch.zeros(1, dtype=torch.long), given.tokens, replayed.drafted))[None]
    unseen = given.features.new_zeros(1 + STEPS, given.features.shape[1])
    features = draft.project_hidden_states(*[torch.cat((given.features, unseen))[None]] * 2)
    positions = torch.arange(x.shape[1])[None]
    cpu = torch.device("cpu")
    slots = Slots.of(positions, torch.where(positions < LENGTH, 1 + STEPS, 0), cpu)
    state = compute_step0(draft, draft.embed_input_ids(x)[0], features[0], Layout.of(positions, positions))
    outputs = [output[:LENGTH] for output in unroll(draft, state.window(slots), slots)]
    chain = torch.cat([output[-1:] for output in outputs])
    _assert_same(draft.compute_logits(outputs[0]), replayed.logits[:LENGTH])
    _assert_same(draft.compute_logits(chain), replayed.logits[LENGTH - 1 :])
    _assert_same(draft.next_feature(chain), replayed.states[LENGTH - 1 :])


def _assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Compares to 1e-5 of the largest value."""
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
