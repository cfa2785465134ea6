"""Attention by document: packed documents get the states they have alone, in memory linear in L."""

import math
import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AttentionMaskInterface,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nemo_speculative.data.batch import collate
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.targets.document_attention import (
    BY_DOCUMENT,
    MIN_LENGTH_RATIO,
    DocumentMask,
    attention_by_document,
    document_mask,
    packed_documents,
)
from nemo_speculative.targets.hf import HFTarget
from tests.conftest import make_tokenizer
from tests.observing import LargestTensor

COMMON = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "initializer_range": 0.3,
    "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
LLAMA_LIKE = COMMON | {"intermediate_size": 64, "num_key_value_heads": 2}
WINDOW = 6
SOME_WINDOWS = LLAMA_LIKE | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
EXPERTS = {
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 2, "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA_LIKE)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SOME_WINDOWS)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**LLAMA_LIKE, head_dim=16)),
    "mistral": (MistralForCausalLM, MistralConfig(**LLAMA_LIKE, sliding_window=WINDOW)),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **LLAMA_LIKE, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=20,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ),
    "layers that do not name their window": (Qwen2MoeForCausalLM, Qwen2MoeConfig(**SOME_WINDOWS, **EXPERTS)),
    "learned positions": (GPT2LMHeadModel, GPT2Config(**COMMON, n_inner=64)),
}  # fmt: skip
PACKED = [[11, 7, 19], [40], [5, 3]]
"""Document lengths of three rows of 40: shorter and longer than the window, a row of one document, much padding."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The target of a family, made once."""
    targets: dict[str, HFTarget] = {}

    def make(name: str) -> HFTarget:
        if name not in targets:
            where = tmp_path_factory.mktemp("family")
            torch.manual_seed(0)
            model_type, config = FAMILIES[name]
            model_type(config).save_pretrained(where)
            make_tokenizer().save_pretrained(where)
            targets[name] = HFTarget(where, aux_layers=[0, 1, 2])
        return targets[name]

    return make


def draw(lengths: list[list[int]], seed: int = 0) -> list[list[TokenRow]]:
    rng = random.Random(seed)
    ids = [[[rng.randrange(5, 300) for _ in range(n)] for n in row] for row in lengths]
    return [[TokenRow("", x, [True] * len(x), "") for x in row] for row in ids]


def places(lengths: list[list[int]]) -> list[tuple[int, slice]]:
    return [(r, slice(sum(row[:d]), sum(row[: d + 1]))) for r, row in enumerate(lengths) for d in range(len(row))]


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_have_the_states_that_each_has_alone(made, name):
    """The reference is the model's own forward pass of one document, without packing."""
    target, rows = made(name), draw(PACKED)
    assert target._by_document
    result = target.compute_hidden_states(collate(rows, 40, pad_id=1))
    for document, (r, span) in zip([d for row in rows for d in row], places(PACKED), strict=True):
        ids = torch.tensor([document.input_ids])
        with torch.no_grad():
            alone = target.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        for actual, reference in (
            (result.aux_hidden_states, torch.cat(alone[1:4], -1)),
            (result.last_hidden_state, alone[-1]),
        ):
            torch.testing.assert_close(
                actual[r, span], reference[0], rtol=1e-5, atol=1e-5 * float(reference.abs().max())
            )


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("changed", range(6))
def test_a_changed_document_changes_no_bit_of_its_neighbors(made, name, changed):
    rows, others = draw(PACKED), draw(PACKED, seed=1)
    row, span = places(PACKED)[changed]
    number = places(PACKED[row : row + 1]).index((0, span))
    before = made(name).compute_hidden_states(collate(rows, 40, pad_id=1))
    rows[row][number] = others[row][number]
    after = made(name).compute_hidden_states(collate(rows, 40, pad_id=1))
    for one, two in (
        (before.aux_hidden_states, after.aux_hidden_states),
        (before.last_hidden_state, after.last_hidden_state),
    ):
        same = (one == two).all(-1)
        assert not same[row, span].any()
        same[row, span] = True
        assert same.all()


def seen(target: HFTarget, lengths: list[list[int]], row_tokens: int) -> LargestTensor:
    batch = collate(draw(lengths), row_tokens, pad_id=1)
    with LargestTensor() as mode:
        target.compute_hidden_states(batch)
    return mode


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_no_tensor_grows_with_the_square_of_the_row(made, name):
    """At 4096 tokens a mask would have 16.8 million elements; the aux hidden states have 96 for each token."""
    target = made(name)
    for lengths in ([3000, 700, 300], [4096], [80] * 51):
        assert seen(target, [lengths], 4096).elements == 4096 * 96
    assert seen(target, [[1024]], 1024).elements * 4 == seen(target, [[4096]], 4096).elements
    target._by_document = False
    try:
        assert seen(target, [[3000, 700, 300]], 4096).elements >= 4096**2
    finally:
        target._by_document = True


def test_no_layer_reads_a_tensor_on_the_host(made):
    """A read waits for the device; transformers' forward pass has a few, independent of the number of layers."""
    target, looks = made("llama"), []
    layers = target._decoder.layers
    try:
        for kept in (4, 3):
            target._decoder.layers = layers[:kept]
            looks.append(seen(target, PACKED, 40).looks)
    finally:
        target._decoder.layers = layers
    assert looks[0] == looks[1]


def naive(query, key, value, lengths, window, scaling):
    """Softmax over a mask [B * L, B * L] of all rows, in float64."""
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    at = torch.arange(len(document))
    sees = (document[:, None] == document) & (at[:, None] >= at) & (at[:, None] - at < (window or len(at)))
    q, k, v = (x.double().transpose(0, 1).flatten(1, 2) for x in (query, key, value))
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = (q @ k.mT * scaling).masked_fill(~sees, -math.inf)
    return (scores.softmax(-1) @ v).unflatten(1, (query.shape[0], -1)).permute(1, 2, 0, 3)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 16, 64])
@pytest.mark.parametrize("seed", range(4))
def test_attention_against_a_naive_version(window, seed):
    """All kinds of lengths, grouped heads, values of another width, another scaling."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = [[1] * 64, [64], [16] * 4, [5, 16, 17, 1, 25], *[cut(rng, 64) for _ in range(3)]]
    lengths = [n for row in rows for n in row]
    shapes = ((len(rows), 4, 64, 8), (len(rows), 2, 64, 8), (len(rows), 2, 64, 6))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    result, weights = attention_by_document(
        torch.nn.Identity(), query, key, value, DocumentMask(lengths, window), scaling=0.7
    )
    assert weights is None and result.shape == (len(rows), 64, 4, 6)
    expected = naive(query, key, value, lengths, window, 0.7)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


def cut(rng: random.Random, total: int) -> list[int]:
    """``total`` in parts of random lengths."""
    cuts = sorted({0, total, *(rng.randrange(1, total) for _ in range(6))})
    return [end - start for start, end in pairwise(cuts)]


def test_not_even_a_nan_passes_from_one_document_to_another():
    query, key, value = torch.randn(3, 1, 2, 32, 8).unbind()
    value[:, :, 10:20] = math.nan
    result, _ = attention_by_document(torch.nn.Identity(), query, key, value, DocumentMask([10, 10, 12], None))
    assert result[0, 10:20].isnan().all()
    assert result[0, :10].isfinite().all() and result[0, 20:].isfinite().all()


def test_many_short_documents_take_few_calls():
    lengths = random.Random(0).choices(range(40, 160), k=200)
    plan = DocumentMask(lengths, None).plan(torch.device("cpu"))
    assert len(plan.calls) <= 6
    assert len(plan.queries) <= sum(lengths) / MIN_LENGTH_RATIO


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias", "dropout"])
def test_options_that_torchs_attention_lacks_are_rejected(option):
    qkv = torch.randn(3, 1, 2, 8, 4).unbind()
    with pytest.raises(NotImplementedError, match="attention by document"):
        attention_by_document(torch.nn.Identity(), *qkv, DocumentMask([8], None), **{option: 0.5})


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 8, 8, dtype=torch.bool)])
def test_a_mask_made_by_the_model_is_rejected(mask):
    with pytest.raises(NotImplementedError, match="attention by document"):
        attention_by_document(torch.nn.Identity(), *torch.randn(3, 1, 2, 8, 4).unbind(), mask)


@pytest.mark.parametrize(
    "option",
    [{"use_vmap": True}, {"local_size": 4, "config": SimpleNamespace(attention_chunk_size=4)}],
    ids=["another mask function", "chunks"],
)
def test_masks_other_than_causal_and_windows_are_rejected(option):
    with packed_documents([8]), pytest.raises(NotImplementedError, match="causality and sliding windows alone"):
        document_mask(**({"config": SimpleNamespace(sliding_window=8)} | option))


@pytest.mark.parametrize("error", [NotImplementedError, TypeError, AttributeError])
def test_a_model_without_support_keeps_the_dense_mask(target_dir, error):
    def refuse(**_):
        raise error

    AttentionMaskInterface.register(BY_DOCUMENT, refuse)
    try:
        target = HFTarget(target_dir, aux_layers=None)
    finally:
        AttentionMaskInterface.register(BY_DOCUMENT, document_mask)
    assert not target._by_document
    batch = collate(draw(PACKED), 40, pad_id=1)
    dense, by_document = (each.compute_hidden_states(batch) for each in (target, HFTarget(target_dir, aux_layers=None)))
    torch.testing.assert_close(dense.last_hidden_state, by_document.last_hidden_state, rtol=1e-4, atol=1e-4)


def test_other_attention_implementations_are_left_to_transformers(target_dir):
    target = HFTarget(target_dir, aux_layers=None, attn_implementation="eager")
    assert not target._by_document


def test_the_attention_of_decoding_stays_as_configured(made):
    """``compute_hidden_states`` sets another one for its own forward pass, and restores it, also after an error."""
    target = made("llama")
    batch = collate(draw(PACKED), 40, pad_id=1)
    target.compute_hidden_states(batch)
    assert target._decoder.config._attn_implementation == "sdpa"
    with pytest.raises(IndexError):
        target.compute_hidden_states(
            type(batch)(batch.input_ids + 1000, batch.loss_mask, batch.positions, batch.documents)
        )
    assert target._decoder.config._attn_implementation == "sdpa"
