import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from nemo_speculative.config.schema import ModelConfig, aux_layers_for
from nemo_speculative.data.batch import Batch, collate
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.targets.fingerprint import target_fingerprint
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.utils.errors import UserError
from tests.conftest import make_target, make_tokenizer


def rows(lengths, seed=0):
    random = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, 300, (n,), generator=random).tolist() for n in lengths]
    return [TokenRow(str(i), x, [True] * len(x), "") for i, x in enumerate(ids)]


def reference(target, row):
    """The model's own hidden states for one document: entry v + 1 is the output of layer v, the last is normed."""
    out = target.model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True, use_cache=False)
    return (
        torch.cat([out.hidden_states[v + 1] for v in target.aux_layers], -1)[0],
        out.hidden_states[-1][0],
        out.logits[0],
    )


def test_packed_documents_equal_each_document_alone(target):
    documents = rows([11, 7, 19, 4])
    batch = collate([documents[:3], documents[3:]], 40, pad_id=1)
    output = target.compute_hidden_states(batch)
    places = [(0, 0), (0, 11), (0, 18), (1, 0)]
    for row, (r, start) in zip(documents, places, strict=True):
        aux, last, logits = reference(target, row)
        span = slice(start, start + len(row.input_ids))
        torch.testing.assert_close(output.aux_hidden_states[r, span], aux, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.last_hidden_state[r, span], last, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(target.logits(output.last_hidden_state[r, span]), logits, rtol=1e-4, atol=1e-4)


def test_documents_of_a_row_do_not_see_each_other(target):
    first, second, other = rows([11, 9, 9])[0], rows([11, 9], seed=1)[1], rows([11, 9], seed=2)[1]
    one, two = (target.compute_hidden_states(collate([[first, x]], 20, pad_id=1)) for x in (second, other))
    assert torch.equal(one.last_hidden_state[0, :11], two.last_hidden_state[0, :11])
    assert not torch.equal(one.last_hidden_state[0, 11:], two.last_hidden_state[0, 11:])


def test_a_forward_pass_in_cached_parts_equals_the_whole(target):
    ids, cache = torch.tensor([rows([24])[0].input_ids]), DynamicCache()
    whole = target.forward(ids)
    parts = [target.forward(part, cache=cache) for part in ids.split([10, 1, 13], dim=1)]
    for expected, result in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(result, 1), expected, rtol=1e-4, atol=1e-4)


def test_the_target_is_frozen_and_in_eval_mode(target):
    assert not target.model.training
    assert not any(p.requires_grad for p in target.model.parameters())


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied embeddings"])
@pytest.mark.parametrize("shard", ["10GB", "20KB"], ids=["one file", "sharded"])
def test_loads_single_file_sharded_and_tied_weights(tmp_path, tied, shard):
    make_target(tmp_path, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    target = HFTarget(tmp_path, aux_layers=[0, 2, 5])
    expected = model.get_input_embeddings().weight if tied else model.lm_head.weight
    assert torch.equal(target.head_weight, expected)


@pytest.mark.parametrize("num_layers, layers", [(7, [1, 2, 3]), (32, [1, 15, 28]), (36, [1, 17, 32])])
def test_aux_layers_follow_the_published_formula(num_layers, layers):
    assert aux_layers_for(num_layers, None) == layers


@pytest.mark.parametrize(
    "num_layers, chosen, message",
    [(6, None, "too few"), (5, None, "draft.aux_layers=[0, 1, 3]"), (8, [0, 7], "holds 7"), (8, [-1, 2], "holds -1")],
)
def test_aux_layers_that_cannot_be_captured_are_rejected(num_layers, chosen, message):
    with pytest.raises(UserError, match=r"layers") as error:
        aux_layers_for(num_layers, chosen)
    assert message in str(error.value)


def test_logits_that_are_not_the_head_of_the_last_hidden_state_are_rejected(tmp_path, monkeypatch):
    """Such an architecture would otherwise train on wrong logits without an error."""
    make_target(tmp_path)
    forward = LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 3
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(UserError, match="not its head applied"):
        HFTarget(tmp_path, aux_layers=None)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_whose_packed_documents_see_each_other_is_rejected(target_dir, monkeypatch, attention):
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    monkeypatch.setattr(Batch, "document_lengths", lambda self: [self.num_tokens])
    with pytest.raises(UserError, match="packed documents see each other"):
        HFTarget(target_dir, aux_layers=None, attn_implementation=attention)


def test_hidden_states_are_computed_without_the_head(target):
    """The head of a large vocabulary costs more than several layers; the loss applies it to the slots it needs."""
    calls = []
    handle = target._head.register_forward_hook(lambda *_: calls.append(1))
    try:
        output = target.compute_hidden_states(collate([rows([11, 7])], 20, pad_id=1))
        assert not calls
        target.logits(output.last_hidden_state)
        assert calls
    finally:
        handle.remove()


def test_the_fingerprint_differs_between_weights_and_is_equal_for_copies(tmp_path, target_dir):
    same, other = make_target(tmp_path / "same"), make_target(tmp_path / "other", seed=1)
    assert target_fingerprint(same) == target_fingerprint(target_dir)
    assert target_fingerprint(other) != target_fingerprint(target_dir)


@pytest.mark.parametrize(
    "path, message",
    [
        ("/no/such/dir", "does not exist"),
        ("./nowhere", "does not exist"),
        ("nobody/nothing-here", "not on this machine and could not be downloaded"),
    ],
)
def test_a_missing_target_is_one_line_with_the_remedy(path, message):
    with pytest.raises(UserError) as error:
        resolve_target(ModelConfig(path=path))
    assert message in str(error.value) and "model.path" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["no weights", "cut weights", "unknown type", "no tokenizer"])
def test_a_damaged_directory_is_one_line(tmp_path, damage):
    make_target(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "unknown type":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).unlink()
    with pytest.raises(UserError) as error:
        HFTarget(tmp_path, aux_layers=None)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_an_architecture_with_soft_capped_logits_is_reproduced(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    target, ids = HFTarget(tmp_path, aux_layers=None, attn_implementation="eager"), torch.arange(12)[None]
    torch.testing.assert_close(target.logits(target.forward(ids)[1]), model(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_embedded_target_has_enough_layers():
    from nemo_speculative.config.schema import TinyModelConfig
    from nemo_speculative.targets.demo import llama_config

    config = llama_config(TinyModelConfig())
    assert isinstance(config, LlamaConfig) and len(set(aux_layers_for(config.num_hidden_layers, None))) == 3
    with pytest.raises(UserError, match="at least 7"):
        TinyModelConfig(num_layers=6)


def test_a_target_placed_by_device_map_computes_the_same(target, target_dir):
    """On a machine without GPUs the map has one entry, the CPU."""
    placed = HFTarget(target_dir, aux_layers=None, device_map="auto", max_memory={"cpu": "1GiB"})
    assert {parameter.device.type for parameter in placed.model.parameters()} == {"cpu"}
    ids = torch.arange(5, 17)[None]
    for result, expected in zip(placed.forward(ids), target.forward(ids), strict=True):
        torch.testing.assert_close(result, expected)


def test_a_device_map_needs_accelerate(target_dir, monkeypatch):
    monkeypatch.setattr("nemo_speculative.targets.hf.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model\.device_map=auto needs the accelerate package: pip install accelerate"):
        HFTarget(target_dir, aux_layers=None, device_map="auto")


def test_a_compiled_target_computes_the_same(target, target_dir):
    compiled, batch = HFTarget(target_dir, aux_layers=None), collate([rows([11, 7])], 20, pad_id=1)
    compiled.compile()
    assert all(layer.mlp._compiled_call_impl is not None for layer in compiled.layers)
    expected, result = target.compute_hidden_states(batch), compiled.compute_hidden_states(batch)
    torch.testing.assert_close(result.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.aux_hidden_states, expected.aux_hidden_states, rtol=1e-5, atol=1e-5)
