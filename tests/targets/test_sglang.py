"""The SGLang target with transformers in place of the ModelRunner; tests/sglang uses the real one."""

import argparse
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nemo_speculative.data.batch import collate
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.distributed.context_parallel import ContextGroup
from nemo_speculative.targets import sglang as sglang_target
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.targets.sglang import SGLangTarget
from nemo_speculative.utils.errors import UserError
from tests.training.ranks import on_ranks

LENGTHS = [11, 7, 19, 4]


@pytest.fixture(scope="module")
def whole(target_dir):
    """The target through transformers."""
    return HFTarget(target_dir, aux_layers=None)


@pytest.fixture
def calls(monkeypatch, whole):
    """Document lengths of each forward pass; ``whole`` computes them, one document after the other."""
    log = []

    def run_documents(runner, texts, has_aux):
        log.append([len(text) for text in texts])
        made = [whole.forward(torch.tensor([text])) for text in texts]
        aux, hidden = (torch.cat([pair[i][0] for pair in made]) for i in range(2))
        return aux, hidden, torch.stack([whole.logits(pair[1][0, -1]) for pair in made])

    monkeypatch.setattr(sglang_target, "load_runner", lambda *_: SimpleNamespace(max_total_num_tokens=10**6))
    monkeypatch.setattr(sglang_target, "run_documents", run_documents)
    return log


@pytest.fixture
def batch():
    """Two rows of 40; the second is mostly padding."""
    random = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 300, (n,), generator=random).tolist() for n in LENGTHS]
    rows = [TokenRow(str(i), x, [True] * len(x), "") for i, x in enumerate(ids)]
    return collate([rows[:3], rows[3:]], 40, pad_id=1)


def equal(result, expected, batch):
    """Compares the tokens of documents, and checks that padding is zeros."""
    at = torch.zeros_like(batch.loss_mask)
    for span in batch.spans:
        at[span.row, span.start : span.end] = True
    for one, two in (
        (result.aux_hidden_states, expected.aux_hidden_states),
        (result.last_hidden_state, expected.last_hidden_state),
    ):
        torch.testing.assert_close(one[at], two[at], rtol=1e-4, atol=1e-4)
        assert one.shape == two.shape and not one[~at].any()


@pytest.mark.parametrize("most", [41, 26, 19], ids=["one forward", "two", "one for each long one"])
def test_documents_are_grouped_and_returned_to_their_rows(calls, whole, target_dir, batch, most):
    target = SGLangTarget(target_dir, aux_layers=None, max_tokens=most)
    calls.clear()
    result = target.compute_hidden_states(batch)
    equal(result, whole.compute_hidden_states(batch), batch)
    assert calls == {41: [[11, 7, 19, 4]], 26: [[11, 7], [19, 4]], 19: [[11, 7], [19], [4]]}[most]
    shard = ContextGroup.planned(2).shard(batch.num_tokens, halo=3)
    assert torch.equal(
        target.compute_hidden_states(replace(batch, shard=shard)).aux_hidden_states,
        result.shard(shard).aux_hidden_states,
    )


def test_ranks_share_every_forward_pass_and_keep_their_own_output(calls, whole, target_dir, batch, monkeypatch):
    target, other = SGLangTarget(target_dir, aux_layers=None), [[5, 6, 7], [8]]
    monkeypatch.setattr(sglang_target, "_documents_of_all_ranks", lambda own: iter([other, own, []]))
    calls.clear()
    equal(target.compute_hidden_states(batch), whole.compute_hidden_states(batch), batch)
    assert calls == [[3, 1], LENGTHS]


def texts_of_all():
    own = [[[5, 6, 7], [8]], [], [[9]]][dist.get_rank()]
    result = list(sglang_target._documents_of_all_ranks(own))
    return {"found": result, "own is kept": result[dist.get_rank()] is own}


def test_every_rank_receives_every_document():
    assert on_ranks(3, texts_of_all) == 3 * [{"found": [[[5, 6, 7], [8]], [], [[9]]], "own is kept": True}]


def test_a_batch_without_documents_gives_zeros(calls, target_dir):
    target = SGLangTarget(target_dir, aux_layers=None, max_tokens=8)
    calls.clear()
    result = target.compute_hidden_states(collate([[]], 12, pad_id=1))
    assert result.aux_hidden_states.shape == (1, 12, 96) and result.last_hidden_state.shape == (1, 12, 32)
    assert not calls and not result.aux_hidden_states.any() and not result.last_hidden_state.any()


def test_ids_are_read_from_the_host(calls, whole, target_dir, batch):
    """The batch is on a device that cannot be read."""
    far = batch.to(torch.device("meta"))
    equal(
        SGLangTarget(target_dir, aux_layers=None).compute_hidden_states(far), whole.compute_hidden_states(batch), batch
    )


def test_a_document_longer_than_the_cache_is_rejected(calls, target_dir, batch):
    with pytest.raises(UserError, match=r"a document has 19 tokens.*room for 18.*backend\.max_tokens"):
        SGLangTarget(target_dir, aux_layers=None, max_tokens=18).compute_hidden_states(batch)


def test_logits_that_are_not_the_heads_are_rejected(calls, target_dir, monkeypatch):
    run_documents = sglang_target.run_documents

    def scaled(*arguments):
        aux, hidden, logits = run_documents(*arguments)
        return aux, hidden, 3 * logits

    monkeypatch.setattr(sglang_target, "run_documents", scaled)
    with pytest.raises(UserError, match=r"are not its head applied .* backend=sglang; try backend=hf"):
        SGLangTarget(target_dir, aux_layers=None)


def load_runner(target_dir, *flags):
    target = SimpleNamespace(
        path=target_dir, aux_layers=[1], dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=False
    )
    return sglang_target.load_runner(target, 8, flags)


@pytest.mark.parametrize("installed", ["0.5.17", "0.5.24", "0.6.0"])
def test_an_untested_version_is_rejected(target_dir, monkeypatch, installed):
    monkeypatch.setattr(sglang_target, "installed_version", lambda: installed)
    with pytest.raises(UserError, match=rf"SGLang {installed} is installed.*works with 0\.5\.23"):
        load_runner(target_dir)


def test_a_missing_sglang_is_one_line(target_dir, monkeypatch):
    monkeypatch.setattr(sglang_target, "installed_version", lambda: None)
    with pytest.raises(UserError, match="SGLang is not installed for"):
        load_runner(target_dir)


@pytest.fixture
def sglang(monkeypatch):
    """An SGLang of a tested version that parses flags and has no other internals."""

    def prepare_server_args(flags):
        parser = argparse.ArgumentParser()
        parser.add_argument("--quantization")
        return parser.parse_args(flags[flags.index("0.3") + 1 :])  # after the last flag that the backend sets

    monkeypatch.setattr(sglang_target, "installed_version", lambda: sglang_target.VERSIONS[-1])
    monkeypatch.setattr(sglang_target, "_make_importable", lambda device: None)
    for name in ("sglang", "sglang.srt", "sglang.srt.server_args"):
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["sglang.srt.server_args"].prepare_server_args = prepare_server_args


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model-path", "x"], "--model-path, which the backend sets itself"),
        (["--tp-size=2"], "--tp-size, which"),
        (["--quantisation", "fp8"], "SGLang refuses backend.flags: .*unrecognized arguments: --quantisation fp8"),
    ],
)
def test_flags_that_the_backend_sets_or_sglang_lacks_are_rejected(target_dir, sglang, flags, message):
    with pytest.raises(UserError, match=message):
        load_runner(target_dir, *flags)


def test_changed_internals_are_one_line_with_the_versions(target_dir, sglang):
    message = r"internals of SGLang 0\.5\.23 are not as expected \(ModuleNotFoundError.*works with 0\.5\.23"
    with pytest.raises(UserError, match=message) as error:
        load_runner(target_dir, "--quantization", "fp8")
    assert "\n" not in str(error.value)
