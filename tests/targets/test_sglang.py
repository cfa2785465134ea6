"""The target through SGLang, with transformers in the place of its ModelRunner; tests/sglang has the real one."""

import argparse
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from nemo_speculative.data.conversation import TokenRow
from nemo_speculative.data.packing import collate
from nemo_speculative.distributed.context_parallel import ContextGroup
from nemo_speculative.targets import sglang as sglang_target
from nemo_speculative.targets import sglang_runner
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.targets.sglang import SGLangTarget
from nemo_speculative.targets.sglang_runner import ForwardOutput
from nemo_speculative.utils.errors import UserError
from tests.training.ranks import on_ranks

LENGTHS = [11, 7, 19, 4]


@pytest.fixture(scope="module")
def whole(target_dir):
    """The target through transformers."""
    return HFTarget(target_dir, aux_layers=None)


@pytest.fixture
def asked(monkeypatch, whole):
    """How many tokens each text had, forward by forward; ``whole`` computes them, one text after the other."""
    log = []

    class Runner:
        def __init__(self, path, *, aux_layers, max_tokens, **_):
            self.max_tokens = max_tokens

        def forward(self, texts):
            log.append([len(text) for text in texts])
            made = [whole.forward(torch.tensor([text])) for text in texts]
            aux, hidden = (torch.cat([pair[i][0] for pair in made]) for i in range(2))
            return ForwardOutput(aux, hidden, torch.stack([whole.logits(pair[1][0, -1]) for pair in made]))

    monkeypatch.setattr(sglang_runner, "Runner", Runner)
    return log


@pytest.fixture
def batch():
    """Two rows of 40; the second is mostly padding."""
    random = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 300, (n,), generator=random).tolist() for n in LENGTHS]
    rows = [TokenRow(str(i), x, [True] * len(x), "") for i, x in enumerate(ids)]
    return collate([rows[:3], rows[3:]], 40, pad_id=1)


def equal(found, expected, batch):
    """At the tokens of documents; and nothing at padding."""
    at = torch.zeros_like(batch.loss_mask)
    for span in batch.spans:
        at[span.row, span.start : span.end] = True
    for one, two in (
        (found.aux_hidden_states, expected.aux_hidden_states),
        (found.last_hidden_state, expected.last_hidden_state),
    ):
        torch.testing.assert_close(one[at], two[at], rtol=1e-4, atol=1e-4)
        assert one.shape == two.shape and not one[~at].any()


@pytest.mark.parametrize("most", [41, 26, 19], ids=["one forward", "two", "one for each long one"])
def test_packed_rows_are_laid_out_as_they_were(asked, whole, target_dir, batch, most):
    ours = SGLangTarget(target_dir, aux_layers=None, max_tokens=most)
    asked.clear()
    found = ours.compute_hidden_states(batch)
    equal(found, whole.compute_hidden_states(batch), batch)
    assert asked == {41: [[11, 7, 19, 4]], 26: [[11, 7], [19, 4]], 19: [[11, 7], [19], [4]]}[most]
    shard = ContextGroup.planned(2).shard(batch.num_tokens, halo=3)
    assert torch.equal(
        ours.compute_hidden_states(replace(batch, shard=shard)).aux_hidden_states, found.shard(shard).aux_hidden_states
    )


def test_the_ranks_share_every_forward_and_keep_their_own(asked, whole, target_dir, batch, monkeypatch):
    ours, other = SGLangTarget(target_dir, aux_layers=None), [[5, 6, 7], [8]]
    monkeypatch.setattr(sglang_target, "_documents_of_all_ranks", lambda own: iter([other, own, []]))
    asked.clear()
    equal(ours.compute_hidden_states(batch), whole.compute_hidden_states(batch), batch)
    assert asked == [[3, 1], LENGTHS]


def texts_of_all():
    own = [[[5, 6, 7], [8]], [], [[9]]][dist.get_rank()]
    found = list(sglang_target._documents_of_all_ranks(own))
    return {"found": found, "own is kept": found[dist.get_rank()] is own}


def test_every_rank_hears_of_every_document():
    assert on_ranks(3, texts_of_all) == 3 * [{"found": [[[5, 6, 7], [8]], [], [[9]]], "own is kept": True}]


def test_a_batch_without_documents_takes_part_and_gives_zeros(asked, target_dir):
    ours = SGLangTarget(target_dir, aux_layers=None, max_tokens=8)
    asked.clear()
    found = ours.compute_hidden_states(collate([[]], 12, pad_id=1))
    assert found.aux_hidden_states.shape == (1, 12, 96) and found.last_hidden_state.shape == (1, 12, 32)
    assert not asked and not found.aux_hidden_states.any() and not found.last_hidden_state.any()


def test_the_ids_are_those_of_the_host(asked, whole, target_dir, batch):
    """From a device that cannot be read at all."""
    far = batch.to(torch.device("meta"))
    equal(
        SGLangTarget(target_dir, aux_layers=None).compute_hidden_states(far), whole.compute_hidden_states(batch), batch
    )


def test_a_document_that_does_not_fit_is_refused(asked, target_dir, batch):
    with pytest.raises(UserError, match=r"a document has 19 tokens.*room for 18.*backend\.max_tokens"):
        SGLangTarget(target_dir, aux_layers=None, max_tokens=18).compute_hidden_states(batch)


def test_logits_that_are_not_the_heads_are_refused(asked, target_dir, monkeypatch):
    forward = sglang_runner.Runner.forward

    def scaled(self, texts):
        found = forward(self, texts)
        return ForwardOutput(found.aux_hidden_states, found.last_hidden_state, 3 * found.last_logits)

    monkeypatch.setattr(sglang_runner.Runner, "forward", scaled)
    with pytest.raises(UserError, match="SGLang's logits are not the head applied"):
        SGLangTarget(target_dir, aux_layers=None)


def make_runner(target_dir, *flags):
    options = {"aux_layers": [1], "dtype": torch.float32, "device": torch.device("cpu"), "max_tokens": 8}
    return sglang_runner.Runner(target_dir, **options, flags=flags)


@pytest.mark.parametrize("installed", ["0.5.17", "0.5.24", "0.6.0"])
def test_a_version_that_was_never_run_is_refused(target_dir, monkeypatch, installed):
    monkeypatch.setattr(sglang_runner, "installed_version", lambda: installed)
    with pytest.raises(UserError, match=rf"SGLang {installed} is installed.*works with 0\.5\.23"):
        make_runner(target_dir)


def test_without_sglang_it_is_one_line(target_dir, monkeypatch):
    monkeypatch.setattr(sglang_runner, "installed_version", lambda: None)
    with pytest.raises(UserError, match="SGLang is not installed for"):
        make_runner(target_dir)


@pytest.fixture
def sglang(monkeypatch):
    """An SGLang of the right version that parses flags, and of which nothing else is where it was."""

    def prepare_server_args(flags):
        parser = argparse.ArgumentParser()
        parser.add_argument("--quantization")
        return parser.parse_args(flags[flags.index("0.3") + 1 :])  # behind the last one that the backend sets

    monkeypatch.setattr(sglang_runner, "installed_version", lambda: sglang_runner.VERSIONS[-1])
    monkeypatch.setattr(sglang_runner, "_make_importable", lambda device: None)
    for name in ("sglang", "sglang.srt", "sglang.srt.server_args"):
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["sglang.srt.server_args"].prepare_server_args = prepare_server_args


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--model-path", "x"], "--model-path, which the backend sets itself"),
        (["--tp-size=2"], "--tp-size, which"),
        (["--quantisation", "fp8"], "SGLang refuses backend.flags: .*unrecognized arguments: --quantisation fp8"),
    ],
)
def test_flags_that_cannot_be_passed_on_are_refused(target_dir, sglang, flags, said):
    with pytest.raises(UserError, match=said):
        make_runner(target_dir, *flags)


def test_a_changed_internal_is_one_line_with_the_versions(target_dir, sglang):
    said = r"internals of SGLang 0\.5\.23 are not as expected \(ModuleNotFoundError.*works with 0\.5\.23"
    with pytest.raises(UserError, match=said) as error:
        make_runner(target_dir, "--quantization", "fp8")
    assert "\n" not in str(error.value)
