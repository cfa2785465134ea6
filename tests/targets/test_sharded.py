"""Distributed targets compute what a replicated target computes."""

import json

import pytest
import torch
import torch.distributed as dist
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, OPTConfig, OPTForCausalLM

from nemo_speculative.config.schema import ModelConfig, TensorParallelHFBackendConfig, TrainJob
from nemo_speculative.data.batch import collate
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.targets import sharded
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.targets.sharded import FSDP2Target, TensorParallelTarget
from nemo_speculative.training.checks import check_target
from nemo_speculative.utils.errors import UserError
from tests.conftest import make_target, make_tokenizer
from tests.training.ranks import on_ranks

LLAMAS = {
    "own head": {},
    "tied": {"tie_word_embeddings": True},
    "odd vocabulary": {"vocab_size": 301},
    "biases": {"attention_bias": True, "mlp_bias": True},
}
PLACEMENTS = {
    "FSDP2 on 2": (2, FSDP2Target, {}),
    "TP on 2": (2, TensorParallelTarget, {}),
    "TP of 2 on 4": (4, TensorParallelTarget, {"tp_size": 2}),
}
"""Number of ranks, class and options; two ranks share each copy."""
LENGTHS = [[[11, 7], [19, 4]], [[30], [5, 6, 7]], [[3]], [[1, 1], [2], [40]]]
"""Lengths of the documents in the rows of each rank."""
IDS = torch.arange(10)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Directories of the Llamas, with random biases instead of zeros."""
    paths = {}
    for name, config in LLAMAS.items():
        paths[name] = make_target(tmp_path_factory.mktemp("placed"), **config)
        model = HFTarget(paths[name], aux_layers=None).model
        for parameter in (p for n, p in model.named_parameters() if n.endswith("bias")):
            parameter.data.normal_()
        model.save_pretrained(paths[name])
    return paths


def batch_of(rank):
    random = torch.Generator().manual_seed(rank)
    rows = [
        [TokenRow("x", torch.randint(5, 300, (n,), generator=random).tolist(), [True] * n, "") for n in row]
        for row in LENGTHS[rank]
    ]
    return collate(rows, 40, pad_id=1)


def numbers_of(target):
    """All numbers that a draft reads from a target, for a rank's rows."""
    output = target.compute_hidden_states(batch_of(dist.get_rank() if dist.is_initialized() else 0))
    norms = torch.cat([p.float().flatten() for layer in target.last_layers(2) for p in layer.parameters()])
    return {
        "aux": output.aux_hidden_states, "last hidden": output.last_hidden_state,
        "logits": target.logits(output.last_hidden_state),
        "embedded": target.embed(IDS), "head": target.head_weight, "norm": target.final_norm.weight, "layers": norms,
    }  # fmt: skip


def bytes_of(module):
    return sum(getattr(p, "_local_tensor", p).untyped_storage().nbytes() for p in set(module.parameters()))


def bytes_of_embedding_and_head(target):
    """Size of the embedding and the head on this rank."""
    embedding_and_head = {target.model.get_input_embeddings().weight, target.model.get_output_embeddings().weight}
    return sum(getattr(p, "_local_tensor", p).untyped_storage().nbytes() for p in embedding_and_head)


def embedding_and_head_bytes_over_time(target):
    """Size of embedding and head while a layer computes, after the forward pass, and after tokens were embedded."""
    result = []
    hook = target.layers[1].register_forward_hook(lambda *_: result.append(bytes_of_embedding_and_head(target)))
    target.compute_hidden_states(batch_of(dist.get_rank()))
    hook.remove()
    after_forward = bytes_of_embedding_and_head(target)
    target.embed(IDS)
    return [result[0], after_forward, bytes_of_embedding_and_head(target)]


def all_results(placement, options, directories):
    """For every model: its numbers, its stop ids, and this rank's bytes of layers, embedding and head, and the rest."""
    load, reads = sharded.load_model, []
    sharded.load_model = lambda *args, **more: reads.append(1) or load(*args, **more)
    result = {}
    for name, directory in directories.items():
        target = placement(directory, aux_layers=None, **options)
        numbers_of(target)  # checks that a second forward pass works
        embedding_and_head = embedding_and_head_bytes_over_time(target)
        layers = bytes_of(target.layers)
        sizes = layers, embedding_and_head, bytes_of(target.model) - layers - embedding_and_head[-1]
        result[name] = (numbers_of(target), sorted(target.stop_ids), sizes)
    assert len(reads) == (0 if dist.get_rank() else len(directories)), "one process of the job reads the files"
    return result


@pytest.fixture(scope="module", params=list(PLACEMENTS))
def result(request, directories):
    ranks, placement, options = PLACEMENTS[request.param]
    return placement, on_ranks(ranks, all_results, placement, options, directories)


@pytest.mark.parametrize("model", LLAMAS)
def test_every_rank_gets_the_numbers_of_a_replicated_target(result, directories, model, monkeypatch):
    whole = HFTarget(directories[model], aux_layers=None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for rank, of_rank in enumerate(result[1]):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        expected, (numbers, stop_ids, _) = numbers_of(whole), of_rank[model]
        assert stop_ids == sorted(whole.stop_ids)
        for name, value in expected.items():
            torch.testing.assert_close(
                numbers[name], value.detach(), rtol=1e-4, atol=1e-4, msg=f"{name} of rank {rank}"
            )


@pytest.mark.parametrize("model", LLAMAS)
def test_a_rank_holds_its_part_and_the_gathered_head(result, directories, model):
    whole = HFTarget(directories[model], aux_layers=None)
    layers, embedding_and_head, one = (
        bytes_of(whole.layers),
        bytes_of_embedding_and_head(whole),
        whole.head_weight.untyped_storage().nbytes(),
    )
    for of_rank in result[1]:
        held_layers, held_embedding_and_head, rest = of_rank[model][2]
        # Norms, and biases of row-parallel layers, are replicated.
        assert layers / 2 <= held_layers <= 0.53 * layers
        row = one // whole.config.vocab_size
        assert rest == bytes_of(whole.model) - layers - embedding_and_head
        # FSDP2 frees the embedding for the layers that it gathers.
        computing = embedding_and_head / 2 if result[0] is FSDP2Target else 1.5 * one
        for measured, expected in zip(held_embedding_and_head, [computing, 1.5 * one, 1.5 * one], strict=True):
            assert abs(measured - expected) <= 2 * row  # an odd number of rows is padded when gathered


def outcome(placement, directory, options=None):
    """The error message of the constructor."""
    try:
        placement(directory, aux_layers=None, **(options or {}))
    except UserError as error:
        return str(error)
    return "none"


def write_model(directory, kind):
    """Writes a model that cannot be divided into ``directory``."""
    if kind == "no plan":
        config = OPTConfig(
            vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=8, num_attention_heads=4,
            word_embed_proj_dim=32, max_position_embeddings=256,
        )  # fmt: skip
        OPTForCausalLM(config).save_pretrained(directory)
        make_tokenizer().save_pretrained(directory)
        return directory
    make_target(directory)
    if kind == "quantized":
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    elif kind == "cut":
        weights = directory / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    return directory


REFUSED = [
    ("no plan", TensorParallelTarget, "no tensor-parallel plan for OPTForCausalLM; use backend=hf_fsdp2"),
    ("quantized", TensorParallelTarget, "its weights are quantized"),
    ("quantized", FSDP2Target, "its weights are quantized"),
    ("cut", FSDP2Target, "the target cannot be loaded"),
]


def outcomes(refused):
    return [outcome(placement, directory) for placement, directory in refused]


def test_a_model_that_cannot_be_divided_ends_every_rank_with_one_line(tmp_path):
    directories = [write_model(tmp_path / str(n), kind) for n, (kind, *_) in enumerate(REFUSED)]
    message = on_ranks(2, outcomes, [(placement, d) for (_, placement, _), d in zip(REFUSED, directories, strict=True)])
    for n, (kind, _, expected) in enumerate(REFUSED):
        assert expected in message[0][n] and "\n" not in message[0][n]
        assert message[1][n] == ("rank 0 failed; its message says why" if kind == "cut" else message[0][n])


@pytest.mark.parametrize("size, ranks", [(3, 4), (4, 2), (-1, 1)])
def test_group_sizes_that_do_not_divide_the_ranks_are_rejected(target_dir, monkeypatch, size, ranks):
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    message = outcome(TensorParallelTarget, target_dir, {"tp_size": size})
    assert message.startswith(f"backend.tp_size is {size}: it must be at least 2 and divide the {ranks} process(es)")


def test_group_sizes_are_checked_before_the_target_is_resolved(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    job = TrainJob(model=ModelConfig(path="/no/model"), backend=TensorParallelHFBackendConfig(tp_size=3))
    with pytest.raises(UserError, match=r"backend\.tp_size is 3: .* the 4 process"):
        check_target(job)


def dtypes(directory):
    target = FSDP2Target(directory, aux_layers=None, dtype=torch.bfloat16)
    return {name: str(tensor.dtype) for name, tensor in sharded._tensors(target.model).items()}


def test_weights_that_transformers_keeps_in_float32_stay_float32(tmp_path):
    """For example a router's bias: in bfloat16 it would select other experts."""
    config = DeepseekV3Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        max_position_embeddings=256,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = HFTarget(tmp_path, aux_layers=None, dtype=torch.bfloat16).model
    expected = {name: str(tensor.dtype) for name, tensor in sharded._tensors(model).items()}
    assert len(set(expected.values())) == 2
    assert on_ranks(2, dtypes, tmp_path) == [expected, expected]
