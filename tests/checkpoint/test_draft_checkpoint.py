"""The servable directory: written as SGLang's contract requires; anything else is refused."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_speculative.algorithms.eagle3.contract import Eagle3Shape
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.checkpoint.contract import CONTRACTS
from nemo_speculative.checkpoint.draft_checkpoint import read_servable, write_servable
from nemo_speculative.checkpoint.metadata import Provenance, find_model
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.utils.errors import UserError

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPE = Eagle3Shape(
    hidden_size=8,
    intermediate_size=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rms_norm_eps=1e-5,
    max_positions=256,
    rope_parameters=PLAIN_ROPE,
    vocab_size=20,
    draft_vocab_size=6,
    aux_layers=(1, 3, 4),
    target_hidden_size=8,
)
CONTRACT = {
    "fc.weight": [8, 24],  # [h, 3 * h_target]
    "midlayer.input_layernorm.weight": [8],
    "midlayer.hidden_norm.weight": [8],
    "midlayer.post_attention_layernorm.weight": [8],
    "midlayer.self_attn.q_proj.weight": [16, 16],  # [heads * head_dim, 2 * h]
    "midlayer.self_attn.k_proj.weight": [8, 16],  # [kv heads * head_dim, 2 * h]
    "midlayer.self_attn.v_proj.weight": [8, 16],
    "midlayer.self_attn.o_proj.weight": [8, 16],  # [h, heads * head_dim]
    "midlayer.mlp.gate_proj.weight": [12, 8],
    "midlayer.mlp.up_proj.weight": [12, 8],
    "midlayer.mlp.down_proj.weight": [8, 12],
    "norm.weight": [8],
    "lm_head.weight": [6, 8],
    "d2t": [6],
    "t2d": [20],
}
"""Every tensor that SGLang reads, by hand from the serving contract for ``SHAPE``; no bias, no embedding."""
DRAFT_IDS = [0, 2, 3, 7, 11, 19]
SPECIAL = {"bos_token_id": 0, "eos_token_id": [1, 2]}
PROVENANCE = Provenance("/models/target", "f00d", "float32", SpeculativeSettings(5, 1, 6), step=40)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    values = {name: torch.randn(shape) for name, shape in CONTRACT.items()}
    values["d2t"] = torch.tensor([target - j for j, target in enumerate(DRAFT_IDS)])
    values["t2d"] = torch.tensor([target in DRAFT_IDS for target in range(20)])
    return values


def write(directory: Path, values=None, shape: Eagle3Shape = SHAPE, dtype=torch.float32) -> Path:
    write_servable(directory, Eagle3Draft, tensors() if values is None else values, shape, PROVENANCE, dtype, SPECIAL)
    return directory


@pytest.fixture
def model(tmp_path) -> Path:
    return write(tmp_path / "model")


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def refusal(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_file_holds_exactly_the_tensors_of_the_contract(tmp_path, dtype):
    stored = load_file(write(tmp_path / "model", dtype=dtype) / "model.safetensors")
    assert {name: list(value.shape) for name, value in stored.items()} == CONTRACT
    kinds = {"d2t": torch.int64, "t2d": torch.bool}
    assert {name: value.dtype for name, value in stored.items()} == {name: kinds.get(name, dtype) for name in CONTRACT}
    for name, value in tensors().items():
        assert torch.equal(stored[name], value.to(stored[name].dtype)), name


def test_contracts_are_registered_under_the_architecture_of_their_network():
    assert {contract.draft.ARCHITECTURE: contract for contract in CONTRACTS.values()} == CONTRACTS


def test_the_network_has_the_names_and_shapes_of_the_contract():
    state = Eagle3Draft(SHAPE).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == CONTRACT


def test_the_configuration_has_the_fields_of_the_contract(tmp_path):
    config = config_of(write(tmp_path / "model", dtype=torch.bfloat16))
    own = config.pop("nemo_speculative")
    assert config == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "vocab_size": 20,
        "draft_vocab_size": 6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "torch_dtype": "bfloat16",
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 3, 4]},
        "num_aux_hidden_states": 3,
        "target_hidden_size": 8,
    }
    del own["version"]
    assert own == {
        "target": "/models/target",
        "target_fingerprint": "f00d",
        "target_dtype": "float32",
        "speculative": {"num_steps": 5, "topk": 1, "num_draft_tokens": 6},
        "step": 40,
    }


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        (PLAIN_ROPE, 500000.0, None),
        ({"rope_type": "default"}, 10000.0, None),
        (LLAMA3_ROPE, 500000.0, {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}),
    ],
)
def test_rope_is_written_both_ways_and_read_back(tmp_path, rope, theta, scaling):
    shape = dataclasses.replace(SHAPE, rope_parameters=rope)
    directory = write(tmp_path / "model", shape=shape)
    config = config_of(directory)
    assert (config["rope_theta"], config["rope_scaling"], config["rope_parameters"]) == (theta, scaling, rope)
    assert read_servable(directory).shape == shape


def test_a_written_checkpoint_is_read_back(model):
    servable = read_servable(model)
    assert (servable.directory, servable.shape, servable.provenance) == (model, SHAPE, PROVENANCE)
    assert servable.algorithm == "EAGLE3"
    assert servable.tensors.keys() == CONTRACT.keys()
    assert all(torch.equal(servable.tensors[name], value) for name, value in tensors().items())


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_draft_is_built_as_stored(tmp_path, dtype):
    draft = read_servable(write(tmp_path / "model", dtype=torch.bfloat16)).build(dtype=dtype)
    assert draft.fc.weight.dtype == (dtype or torch.bfloat16)
    assert draft.draft_ids.tolist() == DRAFT_IDS
    assert torch.equal(draft.lm_head.weight.float(), tensors()["lm_head.weight"].bfloat16().float())
    assert not draft.training
    assert not any(p.requires_grad for p in draft.parameters())


def absolute(values):
    values["d2t"] = torch.tensor(DRAFT_IDS)


def swapped(values):
    values["d2t"][[1, 2]] = values["d2t"][[2, 1]] + torch.tensor([1, -1])


def change(name, value):
    def apply(values):
        values[name] = value(values[name]) if callable(value) else value

    return apply


def poison(name, value):
    def apply(values):
        values[name].view(-1)[-1] = value

    return apply


BAD_TENSORS = [
    *[(f"no {name}", lambda values, name=name: values.pop(name), f"{name} is missing") for name in CONTRACT],
    ("surplus", change("embed_tokens.weight", torch.zeros(20, 8)), "embed_tokens.weight is unknown"),
    ("bias", change("fc.bias", torch.zeros(8)), "fc.bias is unknown"),
    ("narrow fc", change("fc.weight", torch.zeros(8, 16)), "fc.weight is [8, 16], expected [8, 24]"),
    ("large head", change("lm_head.weight", torch.zeros(20, 8)), "lm_head.weight is [20, 8], expected [6, 8]"),
    ("transposed", change("midlayer.self_attn.o_proj.weight", lambda v: v.T.contiguous()), "is [16, 8], expected"),
    ("long d2t", change("d2t", torch.zeros(7, dtype=torch.long)), "d2t is [7], expected [6]"),
    ("int32 d2t", change("d2t", lambda v: v.int()), "d2t is torch.int32, expected torch.int64"),
    ("float d2t", change("d2t", lambda v: v.float()), "d2t is torch.float32, expected torch.int64"),
    ("uint8 t2d", change("t2d", lambda v: v.byte()), "t2d is torch.uint8, expected torch.bool"),
    ("int norm", change("norm.weight", lambda v: v.int()), "norm.weight is torch.int32, expected torch.float32"),
    ("NaN", poison("norm.weight", float("nan")), "norm.weight holds NaN or infinity"),
    ("infinity", poison("lm_head.weight", float("inf")), "lm_head.weight holds NaN or infinity"),
    ("absolute d2t", absolute, "d2t does not give ascending target ids as offsets"),
    ("descending d2t", swapped, "d2t does not give ascending target ids as offsets"),
    ("repeated id", poison("d2t", DRAFT_IDS[-2] - 5), "d2t does not give ascending target ids as offsets"),
    ("negative id", change("d2t", lambda v: v - 1), "d2t does not give ascending target ids as offsets"),
    ("id too large", poison("d2t", 20 - 5), "d2t does not give ascending target ids as offsets"),
    ("t2d of others", poison("t2d", False), "t2d does not mark the ids of d2t"),
    ("t2d of all", change("t2d", torch.ones(20, dtype=torch.bool)), "t2d does not mark the ids of d2t"),
]
BAD_TENSOR_CASES = pytest.mark.parametrize(
    ("spoil", "expected"), [case[1:] for case in BAD_TENSORS], ids=[case[0] for case in BAD_TENSORS]
)


@BAD_TENSOR_CASES
def test_the_writer_refuses_and_writes_nothing(tmp_path, spoil, expected):
    values = tensors()
    spoil(values)
    message = refusal(lambda: write(tmp_path / "model", values))
    assert message.startswith(f"{tmp_path / 'model'}: ")
    assert expected in message
    assert not list(tmp_path.iterdir())


@BAD_TENSOR_CASES
def test_the_reader_refuses(model, spoil, expected):
    values = tensors()
    spoil(values)
    save_file(values, model / "model.safetensors")
    message = refusal(lambda: read_servable(model))
    assert message.startswith(f"{model / 'model.safetensors'}: ")
    assert expected in message


def test_the_reader_refuses_a_dtype_that_the_writer_would_have_cast(model):
    save_file(tensors() | {"fc.weight": tensors()["fc.weight"].double()}, model / "model.safetensors")
    assert "fc.weight is torch.float64, expected torch.float32" in refusal(lambda: read_servable(model))


def test_absolute_ids_that_ascend_as_offsets_are_refused_by_the_mask(model):
    """[0, 2, 3, 4, 5, 6] as offsets would be 0, 3, 5, 7, 9, 11: ascending, and inside the vocabulary."""
    ids = torch.tensor([0, 2, 3, 4, 5, 6])
    mask = torch.zeros(20, dtype=torch.bool)
    mask[ids] = True
    save_file(tensors() | {"d2t": ids, "t2d": mask}, model / "model.safetensors")
    assert "t2d does not mark the ids of d2t" in refusal(lambda: read_servable(model))


def test_every_problem_is_named_at_once(tmp_path):
    values = tensors()
    del values["fc.weight"]
    values |= {"extra": torch.zeros(1), "norm.weight": torch.full((8,), torch.nan)}
    message = refusal(lambda: write(tmp_path / "model", values))
    assert message.endswith("fc.weight is missing; extra is unknown; norm.weight holds NaN or infinity")


def test_a_weight_that_overflows_in_the_dtype_on_disk_is_refused(tmp_path):
    values = tensors() | {"norm.weight": torch.full((8,), 1e6)}
    assert "norm.weight holds NaN or infinity" in refusal(
        lambda: write(tmp_path / "model", values, dtype=torch.float16)
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"aux_layers": (1, 1, 4)}, "distinct layer ids"),
        ({"aux_layers": ()}, "distinct layer ids"),
        ({"draft_vocab_size": 21}, "draft_vocab_size is 21, vocab_size 20"),
        ({"draft_vocab_size": 0}, "draft_vocab_size is 0, expected a number above 0"),
    ],
)
def test_the_writer_refuses_a_shape_that_cannot_be_served(tmp_path, change, expected):
    message = refusal(lambda: write(tmp_path / "model", shape=dataclasses.replace(SHAPE, **change)))
    assert expected in message
    assert not list(tmp_path.iterdir())


CHANGED = [
    ("architectures", ["LlamaForCausalLM"], "expected one of LlamaForCausalLMEagle, LlamaForCausalLMEagle3"),
    ("architectures", [], "expected one of LlamaForCausalLMEagle, LlamaForCausalLMEagle3"),
    ("architectures", ["LlamaForCausalLMEagle"], "eagle_config belongs to EAGLE-3"),
    ("model_type", "qwen3", "expected 'llama'"),
    ("hidden_act", "gelu", "expected 'silu'"),
    ("tie_word_embeddings", True, "expected False"),
    ("attention_bias", True, "expected False"),
    ("mlp_bias", True, "expected False"),
    ("num_aux_hidden_states", 2, "expected 3"),
    ("rope_theta", 10000.0, "expected 500000.0"),
    ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "expected None"),
    ("rope_parameters", None, "expected an object"),
    ("hidden_size", "8", "expected a number above 0"),
    ("num_attention_heads", 0, "expected a number above 0"),
    ("head_dim", None, "expected a number above 0"),
    ("rms_norm_eps", "small", "expected a number above 0"),
    ("vocab_size", 20.0, "expected a number above 0"),
    ("draft_vocab_size", 21, "draft_vocab_size is 21, vocab_size 20"),
    ("eagle_config", None, "expected use_aux_hidden_state=true and distinct layer ids"),
    ("eagle_config", {"use_aux_hidden_state": True}, "expected use_aux_hidden_state=true"),
    *[
        (
            "eagle_config",
            {"use_aux_hidden_state": used, "eagle_aux_hidden_state_layer_ids": layers},
            "expected use_aux_hidden_state=true and distinct layer ids",
        )
        for used, layers in [(False, [1, 3, 4]), (True, [1, 3, 3]), (True, []), (True, 3), (True, [1, "3"])]
    ],
]


@pytest.mark.parametrize(("key", "value", "expected"), CHANGED)
def test_a_field_that_sglang_would_misread_is_refused(model, key, value, expected):
    (model / "config.json").write_text(json.dumps(config_of(model) | {key: value}))
    message = refusal(lambda: read_servable(model))
    assert message.startswith(f"{model / 'config.json'}: {key} is {value!r}")
    assert expected in message


def test_layers_that_make_another_network_do_not_fit_the_tensors(model):
    eagle = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 3]}
    (model / "config.json").write_text(
        json.dumps(config_of(model) | {"eagle_config": eagle, "num_aux_hidden_states": 2})
    )
    assert "fc.weight is [8, 24], expected [8, 16]" in refusal(lambda: read_servable(model))


OPTIONAL = {"bos_token_id", "eos_token_id", "torch_dtype", "nemo_speculative"}


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("num_hidden_layers", 2, "layers.1.hidden_norm.weight is missing"),
        ("target_hidden_size", 16, "embed_tokens.weight is missing"),
        ("draft_vocab_size", None, "lm_head.weight is unknown"),
        ("fc_norm", True, "fc_norm.2.weight is missing"),
        ("norm_before_fc", True, "input_norm.weight is missing"),
    ],
)
def test_a_field_of_another_network_is_refused(model, field, value, expected):
    config = config_of(model)
    (model / "config.json").write_text(json.dumps(config | {field: value}))
    message = refusal(lambda: read_servable(model))
    assert message.startswith(f"{model}/model.safetensors: ") and expected in message


def test_every_missing_field_is_named(model):
    whole = config_of(model)
    for key in whole.keys() - OPTIONAL:
        (model / "config.json").write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        assert refusal(lambda: read_servable(model)) == f"{model / 'config.json'}: the field {key} is missing"


@pytest.mark.parametrize("key", ["target", "target_fingerprint", "target_dtype", "speculative", "step", None])
@pytest.mark.parametrize("broken", [None, "text"])
def test_a_checkpoint_without_provenance_is_refused(model, key, broken):
    config = config_of(model)
    if key is None:
        config["nemo_speculative"] = broken
    elif broken is None:
        del config["nemo_speculative"][key]
    else:
        config["nemo_speculative"]["speculative"] = broken
    (model / "config.json").write_text(json.dumps(config))
    message = refusal(lambda: read_servable(model))
    assert message.startswith(f"{model}/config.json: no usable 'nemo_speculative' section")
    assert "expected a checkpoint written by this project" in message


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(model, length):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    assert refusal(lambda: read_servable(model)).startswith(f"{file}: cut off or not readable (")


@pytest.mark.parametrize("content", [b"", b'{"hidden_size": 8', b"\xff\xfe", b"not json"])
def test_a_configuration_that_is_not_json_is_refused(model, content):
    (model / "config.json").write_bytes(content)
    assert refusal(lambda: read_servable(model)).startswith(f"{model}/config.json: cannot be read (")


@pytest.mark.parametrize(("content", "kind"), [("[]", "list"), ("3", "int"), ("null", "NoneType")])
def test_a_configuration_that_is_not_an_object_is_refused(model, content, kind):
    (model / "config.json").write_text(content)
    assert refusal(lambda: read_servable(model)) == f"{model}/config.json: found a {kind}, expected a JSON object"


def test_a_target_is_not_a_draft(target_dir):
    message = refusal(lambda: read_servable(target_dir))
    assert message.startswith(f"{target_dir}/config.json: architectures is ['LlamaForCausalLM'], expected")


def test_a_full_disk_is_an_oserror(tmp_path):
    """The trainer catches it and names the last good checkpoint."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").mkdir()  # cannot be written as a file
    with pytest.raises(OSError):
        write(tmp_path / "model")


def run_directory(root: Path, steps: dict[int, torch.dtype], **links: int) -> Path:
    for step, dtype in steps.items():
        write(root / f"checkpoints/step_{step}/model", dtype=dtype)
    for name, step in links.items():
        (root / "checkpoints" / name).symlink_to(f"step_{step}")
    return root


class TestFindModel:
    STEPS = {10: torch.float32, 20: torch.bfloat16}

    @pytest.mark.parametrize(
        ("links", "found"), [({"best": 10, "latest": 20}, 10), ({"latest": 20}, 20), ({"best": 10}, 10)]
    )
    def test_the_best_checkpoint_of_a_run_takes_precedence_over_the_latest(self, tmp_path, links, found):
        root = run_directory(tmp_path / "run", self.STEPS, **links)
        assert find_model(root).resolve() == (root / f"checkpoints/step_{found}/model").resolve()
        assert find_model(root / "checkpoints").resolve() == find_model(root).resolve()

    def test_a_link_into_nothing_is_passed_over(self, tmp_path):
        root = run_directory(tmp_path / "run", self.STEPS, best=99, latest=20)
        assert find_model(root).resolve() == (root / "checkpoints/step_20/model").resolve()

    @pytest.mark.parametrize("given", ["checkpoints/step_20", "checkpoints/step_20/model", "checkpoints/latest"])
    def test_a_step_directory_and_its_model(self, tmp_path, given):
        root = run_directory(tmp_path / "run", self.STEPS, best=10, latest=20)
        for path in (root / given, str(root / given)):
            assert find_model(path).resolve() == (root / "checkpoints/step_20/model").resolve()

    def test_home_is_understood(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        write(tmp_path / "run/model")
        assert find_model("~/run") == tmp_path / "run/model"

    def test_a_path_that_does_not_exist(self, tmp_path):
        message = refusal(lambda: find_model(tmp_path / "nothing"))
        assert message == (
            f"{tmp_path / 'nothing'} does not exist; expected a run directory, a step_<N> directory or its model/"
        )

    @pytest.mark.parametrize("left", [[], ["config.json"], ["model.safetensors"]])
    def test_a_directory_without_a_whole_checkpoint(self, tmp_path, left):
        write(tmp_path / "model")
        for name in {"config.json", "model.safetensors"} - set(left):
            (tmp_path / "model" / name).unlink()
        message = refusal(lambda: find_model(tmp_path))
        assert (
            message == f"{tmp_path} holds no checkpoint; expected a run directory, a step_<N> directory or its model/"
        )

    def test_a_file(self, model):
        assert "holds no checkpoint" in refusal(lambda: find_model(model / "model.safetensors"))


def test_the_unspoiled_tensors_are_accepted(tmp_path):
    """Otherwise the refusals above could have another reason."""
    values = copy.deepcopy(tensors())
    assert read_servable(write(tmp_path / "model", values)).tensors.keys() == values.keys()
