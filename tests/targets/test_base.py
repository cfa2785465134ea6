"""Embedding and head loaded without the decoder layers, compared with the whole model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    Qwen2MoeConfig,
    Qwen3Config,
)

from nemo_speculative.targets.base import Target
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.errors import UserError
from tests.conftest import make_target, make_tokenizer

COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=8),
    "tied, soft-capped, scaled embedding": Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=2.0),
    "layers of two kinds": Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=8),
    "scaled logits": CohereConfig(**COMMON, logit_scale=0.3),
    "divided logits": GraniteConfig(**COMMON, logits_scaling=3.0, embedding_multiplier=2.0),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def directory(request, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(request.param).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_embedding_and_head_are_those_of_the_whole_model(directory):
    partial = Target(directory, aux_layers=None)
    whole = HFTarget(directory, aux_layers=None, attn_implementation="eager")
    ids = torch.arange(20)[None]
    hidden = torch.randn(5, partial.config.hidden_size)
    assert torch.equal(partial.embed(ids), whole.embed(ids))
    assert torch.equal(partial.logits(hidden), whole.logits(hidden))
    assert torch.equal(partial.head_weight, whole.head_weight)
    assert torch.equal(partial.final_norm.weight, whole.final_norm.weight)
    assert (partial.aux_layers, partial.stop_ids, partial.fingerprint) == (
        whole.aux_layers,
        whole.stop_ids,
        whole.fingerprint,
    )
    assert partial.config.num_hidden_layers == 7, "the configuration is the whole target's"


def test_a_damaged_generation_config_leaves_the_stop_ids_of_the_configuration(directory):
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 7')
    assert Target(directory, aux_layers=None).stop_ids == {1}


def test_no_layer_is_loaded(directory, caplog):
    loaded = Target(directory, aux_layers=None).model
    assert not any("layers" in name for name, _ in loaded.named_parameters())
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    assert not caplog.records, "transformers' report of missing layers is silenced"


@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_last_layers_are_read_on_request(directory, count):
    result = Target(directory, aux_layers=None).last_layers(count)
    expected = HFTarget(directory, aux_layers=None, attn_implementation="eager").last_layers(count)
    assert len(result) == len(expected) == min(count, 7)
    for one, two in zip(result, expected, strict=True):
        weights = dict(two.named_parameters())
        assert {name: p.shape for name, p in one.named_parameters()} == {n: p.shape for n, p in weights.items()}
        assert all(torch.equal(p, weights[name]) for name, p in one.named_parameters())


def test_the_dtype_is_the_requested_one(directory):
    partial = Target(directory, aux_layers=None, dtype=torch.bfloat16)
    assert partial.embed(torch.tensor([3])).dtype == partial.logits(torch.zeros(1, 32, dtype=torch.bfloat16)).dtype
    assert partial.head_weight.dtype == torch.bfloat16


def test_a_layer_whose_weights_have_other_names_is_rejected(tmp_path):
    make_target(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    renamed = {name.replace("layers.7.mlp.up_proj", "layers.7.mlp.other"): w for name, w in weights.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    partial = Target(tmp_path, aux_layers=None)
    with pytest.raises(UserError, match=r"layers\.7\.mlp\.up_proj\.weight .*init_from_target\.layer"):
        partial.last_layers(1)


@pytest.mark.parametrize("make", [Target, HFTarget])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_files_without_embedding_norm_or_head_are_rejected(tmp_path, make, name):
    """transformers would initialize it randomly, and only warn."""
    make_target(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"its files lack {name}"):
        make(tmp_path, aux_layers=None)


def quantize(directory, method):
    """A target whose layers' matrices are stored as ``method`` stores them; embedding, norms and head are plain."""
    make_target(directory)
    stored = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = weight
        elif method == "fp8":
            stored |= {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
        else:
            stem = name.removesuffix("weight")
            parts = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}
            stored |= {stem + part: torch.zeros(4, 4, dtype=dtype) for part, dtype in parts.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    file = directory / "config.json"
    described = {"fp8": {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "awq": {"bits": 4}}[method]
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": method} | described}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("method", ["fp8", "awq"])
def test_embedding_and_head_of_a_quantized_target_are_plain(tmp_path, target_dir, method):
    quantize(tmp_path, method)
    partial, plain = Target(tmp_path, aux_layers=None), Target(target_dir, aux_layers=None)
    assert torch.equal(partial.head_weight, plain.head_weight)
    assert torch.equal(partial.embed(torch.arange(9)), plain.embed(torch.arange(9)))
    # The scale of float8 numbers is another tensor; copying them as they are would be silently wrong.
    with pytest.raises(UserError, match=r"as it is, which draft\.init_from_target\.layer copies; set it to false"):
        partial.last_layers(1)


def test_experts_that_transformers_fuses_are_rejected_by_name(tmp_path):
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    AutoModelForCausalLM.from_config(Qwen2MoeConfig(**COMMON, **experts)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="init_from_target"):
        Target(tmp_path, aux_layers=None).last_layers(1)
