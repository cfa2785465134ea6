"""Drafts of other projects: read as published with the outputs of their own networks, or refused in one line."""

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_speculative.algorithms.eagle.network import EagleDraft
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.checkpoint.adapters.formats import format_of
from nemo_speculative.checkpoint.adapters.source import open_source
from nemo_speculative.checkpoint.contract import contract_of
from nemo_speculative.checkpoint.convert import read_foreign
from nemo_speculative.checkpoint.draft_checkpoint import write_servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.targets.describe import text_config
from nemo_speculative.utils.errors import UserError
from tests.checkpoint import layouts
from tests.checkpoint.layouts import DRAFT_IDS, HIDDEN, VOCAB


@pytest.fixture
def target(target_dir):
    """The configuration of the tests' target: 8 layers of 32 features, 300 ids, 256 positions."""
    return text_config(target_dir)


def refusal(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """Every weight in a directory, in float64, under the names of the files."""
    tensors = {}
    for file in directory.rglob("*"):
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        elif file.name in ("pytorch_model.bin", "draft_model.pt"):
            tensors |= torch.load(file, weights_only=True)
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def stated_target(directory: Path) -> str | None:
    source = open_source(directory)
    return format_of(source).target(source)


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def outputs(draft, embeddings: torch.Tensor, aux: torch.Tensor, last_hidden_state: torch.Tensor) -> torch.Tensor:
    """Outputs of the built draft over a causal sequence: [n, h]."""
    features = draft.project_hidden_states(aux[None], last_hidden_state[None])
    rotation = draft.rotary(torch.arange(len(embeddings))[None], draft.fc.weight.dtype)
    return contract_of(type(draft)).session(draft).extend(embeddings[None], features, rotation)[0]


def inputs(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return tuple(torch.randn(5, width, dtype=torch.float64) for width in (HIDDEN, 3 * HIDDEN, HIDDEN))


EAGLE3 = [
    ("EAGLE (SafeAILab)", layouts.safeailab_eagle3, "midlayer.", "", 10000.0, (1, 3, 4)),
    ("SpecForge", layouts.specforge, "midlayer.", "", 1000000.0, (0, 3, 5)),
    ("NeMo AutoModel", layouts.automodel, "layers.0.", "model.", 500000.0, (0, 2, 4)),
    ("NeMo AutoModel", layouts.automodel_bare, "layers.0.", "model.", 500000.0, (1, 3, 4)),
    ("speculators (vLLM)", layouts.speculators, "layers.0.", "", 500000.0, (1, 3, 4)),
]
"""Each with what its published network is: the layer's name, the prefix, theta, and the outputs that it reads."""
IDS = ["safeailab", "specforge", "automodel", "automodel-bare", "speculators"]


@pytest.mark.parametrize(("name", "make", "layer", "outer", "theta", "aux_layers"), EAGLE3, ids=IDS)
def test_an_eagle3_draft_has_the_outputs_of_its_own_network(
    tmp_path, target, name, make, layer, outer, theta, aux_layers
):
    source = make(tmp_path / "draft")
    before = snapshot(source)
    result = read_foreign(source, target)
    assert (result.format, result.contract.draft, result.shape.aux_layers) == (name, Eagle3Draft, aux_layers)
    draft = result.build(dtype=torch.float64)
    embeddings, aux, last_hidden_state = inputs()
    logits, output = layouts.naive_eagle3(stored(source), embeddings, aux, theta, layer, outer)
    got = outputs(draft, embeddings, aux, last_hidden_state)
    assert torch.allclose(got, output, atol=1e-6)
    assert torch.allclose(draft.compute_logits(got), logits, atol=1e-6)
    assert draft.draft_ids.tolist() == DRAFT_IDS
    assert snapshot(source) == before


@pytest.mark.parametrize("make", [layouts.specforge, layouts.automodel])
def test_norm_output_is_fed_back_as_in_its_server(tmp_path, target, make):
    source = make(tmp_path / "draft")
    draft = read_foreign(source, target).build(dtype=torch.float64)
    weights = stored(source)
    output = inputs()[0]
    expected = layouts.norm(output, weights.get("norm.weight", weights.get("model.norm.weight")))
    assert torch.allclose(draft.next_feature(output), expected)
    config = json.loads(next(source.rglob("config.json")).read_text()) | {"norm_output": False}
    next(source.rglob("config.json")).write_text(json.dumps(config))
    assert torch.equal(read_foreign(source, target).build(dtype=torch.float64).next_feature(output), output)


@pytest.mark.parametrize("bias", [True, False])
def test_an_eagle1_draft_has_the_outputs_of_its_own_network(tmp_path, target, bias):
    source = layouts.safeailab_eagle(tmp_path / "draft", bias=bias)
    if not bias:
        change_tensors(source, lambda tensors: tensors.pop("fc.bias"))
    result = read_foreign(source, target)
    assert (result.format, result.contract.draft, result.shape.num_layers) == ("EAGLE (SafeAILab)", EagleDraft, 1)
    draft = result.build(dtype=torch.float64)
    embeddings, aux, last_hidden_state = inputs()
    expected = layouts.naive_eagle(stored(source), embeddings, last_hidden_state, 500000.0)
    assert torch.allclose(outputs(draft, embeddings, aux, last_hidden_state), expected, atol=1e-6)
    assert any("no bias" in note for note in result.notes) is not bias


@pytest.mark.parametrize("inner", [".", "model", "model/consolidated"])
def test_automodel_is_read_from_the_outer_and_the_inner_directory(tmp_path, target, inner):
    source = layouts.automodel(tmp_path / "epoch_1_step_70") / inner
    result = read_foreign(source, target)
    assert (result.shape.aux_layers, result.provenance.step) == ((0, 2, 4), 70)
    assert stated_target(source) == "org/target"


@pytest.mark.parametrize(("stated", "expected"), [(None, (0, 2, 4)), ([1, 2, 5], (1, 2, 5))])
def test_automodels_recipe_has_the_aux_layers_that_the_configuration_leaves_out(tmp_path, target, stated, expected):
    source = layouts.automodel(tmp_path / "a", eagle_config={"eagle_aux_hidden_state_layer_ids": stated})
    if stated:
        (source / "config.yaml").write_text("not: [yaml")
    assert read_foreign(source, target).shape.aux_layers == expected


def test_automodel_without_a_recipe_has_the_default_aux_layers(tmp_path, target):
    source = layouts.automodel(tmp_path / "draft")
    (source / "config.yaml").unlink()
    assert read_foreign(source, target).shape.aux_layers == (1, 3, 4)


def test_automodel_layers_are_counted_in_the_weights(tmp_path, target):
    result = read_foreign(layouts.automodel(tmp_path / "draft"), target)
    assert result.shape.num_layers == 1
    assert "num_hidden_layers is 8: the weights hold 1, which counts" in result.notes


def test_speculators_layer_ids_name_inputs(tmp_path, target):
    """vLLM captures the inputs of the listed layers; SGLang, with explicit ids, their outputs."""
    source = layouts.speculators(tmp_path / "draft", eagle_aux_hidden_state_layer_ids=[1, 4, 7])
    assert read_foreign(source, target).shape.aux_layers == (0, 3, 6)
    assert stated_target(source) == "org/target"


def test_every_assumption_is_noted(tmp_path, target):
    assert read_foreign(layouts.safeailab_eagle3(tmp_path / "draft"), target).notes == (
        "rope_theta is not stated: 10000, the default of its own project and of SGLang",
        "aux layers are not stated: [1, 3, 4], EAGLE's [1, N//2 - 1, N - 4] for 8 layers",
        "embed_tokens.weight is left out: a server uses the target's",
    )
    assert any("pull request 879" in note for note in read_foreign(layouts.specforge(tmp_path / "b"), target).notes)


def test_a_shorter_context_than_the_targets_is_raised_where_it_changes_no_rotation(tmp_path, target):
    plain = layouts.safeailab_eagle3(tmp_path / "a", max_position_embeddings=64)
    result = read_foreign(plain, target)
    assert result.shape.max_positions == 256
    assert any(note.startswith("max_position_embeddings is 64: raised to the target's 256") for note in result.notes)
    scaled = {"type": "dynamic", "factor": 2.0}
    dynamic = layouts.safeailab_eagle3(tmp_path / "b", max_position_embeddings=64, rope_scaling=scaled)
    assert read_foreign(dynamic, target).shape.max_positions == 64


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"rope_theta": 500.0}, {"rope_type": "default", "rope_theta": 500.0}),
        (
            {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        ),
        (
            {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            {"rope_type": "default", "rope_theta": 7.0},
        ),
    ],
)  # fmt: skip
def test_old_and_new_forms_of_rope_are_read(tmp_path, target, stated, expected):
    source = layouts.safeailab_eagle3(tmp_path / "draft", **stated)
    assert read_foreign(source, target).shape.rope_parameters == expected


def test_the_users_aux_layers_take_precedence_over_the_file(tmp_path, target):
    result = read_foreign(layouts.specforge(tmp_path / "draft"), target, aux_layers=[1, 2, 6])
    assert result.shape.aux_layers == (1, 2, 6)
    assert "aux layers are [1, 2, 6], as given, in place of its own [0, 3, 5]" in result.notes


def test_an_eagle1_draft_reads_no_aux_layers(tmp_path, target):
    source = layouts.safeailab_eagle(tmp_path / "draft")
    message = refusal(lambda: read_foreign(source, target, aux_layers=[1]))
    assert message == f"aux_layers is [1]; {source} is EAGLE-1, which reads none"


def test_a_vocabulary_out_of_order_is_sorted_with_the_heads_rows(tmp_path, target):
    source = layouts.specforge(tmp_path / "draft")
    order = torch.tensor([5, 0, 3, 1, 2, 4, 11, 6, 7, 10, 9, 8])
    ids = torch.tensor(DRAFT_IDS)[order]

    def shuffle(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"][order]
        tensors["d2t"] = ids - torch.arange(len(ids))

    plain = read_foreign(source, target)
    change_tensors(source, shuffle)
    result = read_foreign(source, target)
    assert {name for name, t in result.tensors.items() if not torch.equal(t, plain.tensors[name])} == set()
    assert any("lm_head's rows were sorted" in note for note in result.notes)


def test_a_draft_of_the_whole_vocabulary_needs_no_maps(tmp_path, target):
    source = layouts.specforge(tmp_path / "draft", draft_vocab_size=VOCAB)

    def whole(tensors):
        tensors["lm_head.weight"] = torch.randn(VOCAB, HIDDEN)
        del tensors["d2t"], tensors["t2d"]

    change_tensors(source, whole)
    draft = read_foreign(source, target).build()
    assert draft.draft_ids.tolist() == list(range(VOCAB))
    assert draft.t2d.all()


def test_t2d_follows_from_d2t(tmp_path, target):
    source = layouts.specforge(tmp_path / "draft")
    change_tensors(source, lambda tensors: tensors.pop("t2d"))
    assert read_foreign(source, target).tensors["t2d"].nonzero().flatten().tolist() == DRAFT_IDS


def test_a_draft_narrower_than_its_target_keeps_its_embedding(tmp_path, target):
    source = layouts.safeailab_eagle3(tmp_path / "draft")
    wide = SimpleNamespace(hidden_size=96, vocab_size=VOCAB, num_hidden_layers=8, max_position_embeddings=256)
    result = read_foreign(source, wide, aux_layers=[3])
    assert torch.equal(result.tensors["embed_tokens.weight"], load_torch(source)["embed_tokens.weight"])
    assert not any("embed_tokens" in note for note in result.notes)


def test_buffers_of_old_versions_are_ignored(tmp_path, target):
    source = layouts.safeailab_eagle(tmp_path / "draft")
    change_tensors(source, lambda t: t.update({"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert "rotary" not in "".join(read_foreign(source, target).tensors)


def test_this_projects_checkpoints_are_read(tmp_path, target):
    plain = read_foreign(layouts.specforge(tmp_path / "draft"), target)
    provenance = Provenance("org/target", "f00d", "float32", SpeculativeSettings(5, 1, 6), step=9)
    write_servable(tmp_path / "own/model", Eagle3Draft, plain.tensors, plain.shape, provenance, torch.float32, {})
    result = read_foreign(tmp_path / "own", target)
    assert (result.format, result.shape, result.provenance) == ("nemo_speculative", plain.shape, provenance)
    assert stated_target(tmp_path / "own") == "org/target"
    assert all(torch.equal(result.tensors[name], t) for name, t in plain.tensors.items())
    assert "[1, 2, 3]" in refusal(lambda: read_foreign(tmp_path / "own", target, [1, 2, 3]))
    target.vocab_size = 301
    assert "made for a target with 300 ids and 32 features" in refusal(lambda: read_foreign(tmp_path / "own", target))


def load_torch(source: Path) -> dict[str, torch.Tensor]:
    return torch.load(source / "pytorch_model.bin", weights_only=True)


def change_tensors(source: Path, change) -> None:
    """Rewrites the weight file of ``source``."""
    file = next(source.rglob("model.safetensors"), None) or next(
        f for name in ("pytorch_model.bin", "draft_model.pt") for f in source.rglob(name)
    )
    plain = file.suffix != ".safetensors"
    tensors = torch.load(file, weights_only=True) if plain else load_file(file)
    change(tensors)
    if plain:
        torch.save(tensors, file)
    else:
        save_file(tensors, file)


SINGLE_FILE = [
    layouts.safeailab_eagle,
    layouts.safeailab_eagle3,
    layouts.specforge,
    layouts.automodel_bare,
    layouts.speculators,
]


@pytest.mark.parametrize("make", SINGLE_FILE)
def test_every_missing_and_surplus_tensor_is_named_in_one_line(tmp_path, target, make):
    source = make(tmp_path / "draft")

    def spoil(tensors):
        gone = [name for name in sorted(tensors) if name.endswith(("o_proj.weight", "up_proj.weight"))]
        for name in gone:
            del tensors[name]
        tensors |= {"extra.weight": torch.ones(2), "mask_hidden": torch.ones(2)}
        expected.extend([*(f"{name} is missing" for name in gone), "extra.weight is unknown", "mask_hidden is unknown"])

    expected: list[str] = []
    change_tensors(source, spoil)
    message = refusal(lambda: read_foreign(source, target))
    assert message.startswith(str(source / "")[:-1])
    assert message.split(": ", 1)[1].split("; ") == expected


@pytest.mark.parametrize("make", SINGLE_FILE)
def test_each_missing_tensor_is_named(tmp_path, target, make):
    source = make(tmp_path / "draft")
    optional = {"t2d", "fc.bias", "embed_tokens.weight", "model.embed_tokens.weight"}
    for name in sorted(stored(source).keys() - optional):
        if not name.startswith("verifier"):
            spoiled = tmp_path / "spoiled"
            shutil.copytree(source, spoiled)
            change_tensors(spoiled, lambda tensors, name=name: tensors.pop(name))
            if (spoiled / "eagle3_meta.pt").exists() and name == "d2t":
                continue
            assert f"{name} is missing" in refusal(lambda spoiled=spoiled: read_foreign(spoiled, target))
            shutil.rmtree(spoiled)


BIASES = {f"layers.0.self_attn.{name}_proj.bias": torch.zeros(2) for name in "qkv"}
EAGLE = layouts.safeailab_eagle
FORGE, VLLM = layouts.specforge, layouts.speculators
REFUSED = [
    (EAGLE, {}, BIASES, "q_proj.bias is unknown; layers.0.self_attn.v_proj.bias is unknown"),
    (EAGLE, {"hidden_act": "gelu"}, {}, "hidden_act is 'gelu', expected silu"),
    (EAGLE, {"vocab_size": 301}, {}, "vocab_size is 301, expected the target's 300"),
    (EAGLE, {"num_attention_heads": 0}, {}, "num_attention_heads is 0, expected a number above 0"),
    (EAGLE, {"hidden_size": "32"}, {}, "hidden_size is '32', expected a number above 0"),
    (EAGLE, {"hidden_size": 64}, {}, "hidden_size is 64, expected the target's hidden size, 32"),
    (EAGLE, {"head_dim": 16}, {}, "q_proj.weight is [32, 32], expected [64, 32]"),
    (EAGLE, {"rms_norm_eps": "x"}, {}, "rms_norm_eps is 'x', expected a number above 0"),
    (EAGLE, {"rope_scaling": {"type": "mrope"}}, {}, "expected a rope_type among"),
    (EAGLE, {"rope_scaling": 3}, {}, "rope_scaling is 3, expected one set of parameters"),
    (EAGLE, {"rope_parameters": {"full": {"rope_theta": 1.0}}}, {}, "expected one set of parameters"),
    (EAGLE, {"rope_scaling": {"type": "linear"}}, {}, "cannot be used by transformers"),
    (EAGLE, {"num_key_value_heads": 3}, {}, "num_key_value_heads is 3, expected a divisor of 4"),
    (EAGLE, {"head_dim": 7}, {}, "head_dim is 7, expected an even number"),
    (EAGLE, {"rope_theta": "big"}, {}, "rope_theta is 'big', expected a number above 0"),
    (FORGE, {"rope_parameters": {"partial_rotary_factor": 0.5}}, {}, "expected a rotation of the whole head"),
    (FORGE, {"eagle_config": {"use_aux_hidden_state": False}}, {}, "use_aux_hidden_state=false"),
    (FORGE, {"target_hidden_size": 64}, {}, "target_hidden_size is 64, expected the target's hidden size, 32"),
    (FORGE, {"draft_vocab_size": 301}, {}, "draft_vocab_size is 301, expected a number from 1 to vocab_size"),
    (FORGE, {"norm_output": "x"}, {}, "norm_output is 'x', expected true or false"),
    (FORGE, {"hidden_size": 10**12}, {}, "hidden_size is 1000000000000, expected a number above 0, at most"),
    (FORGE, {"draft_vocab_size": "12"}, {}, "draft_vocab_size is '12', expected a number"),
    (FORGE, {"draft_vocab_size": 11}, {}, "lm_head.weight is [12, 32], expected [11, 32]"),
    (FORGE, {}, {"fc.bias": torch.zeros(HIDDEN)}, "fc.bias is unknown"),
    (FORGE, {}, {"lm_head.weight": torch.full((12, HIDDEN), torch.nan)}, "lm_head.weight holds NaN"),
    (FORGE, {}, {"d2t": torch.tensor(DRAFT_IDS)}, "d2t does not give ascending target ids as offsets"),
    (FORGE, {}, {"d2t": torch.zeros(12, dtype=torch.long)}, "t2d does not mark the ids of d2t"),
    (FORGE, {}, {"fc.weight": torch.zeros(HIDDEN, 64)}, "fc.weight is [32, 64], which is not what the 3 aux"),
    *[
        (FORGE, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": layers}}, {}, "expected ascending layers from 0")
        for layers in ([5, 3, 0], [1, 1, 2], [-1, 3, 5], [1, 3, 7], ["1", 3, 5], [], "135", 3)
    ],
    (VLLM, {"eagle_aux_hidden_state_layer_ids": [0, 3, 5]}, {}, "expected ascending layers from 0 to 6"),
    (VLLM, {"eagle_aux_hidden_state_layer_ids": []}, {}, "its aux layers are []; expected ascending layers"),
    (VLLM, {"eagle_aux_hidden_state_layer_ids": "all"}, {}, "expected a list of layers"),
    (VLLM, {"speculators_model_type": "peagle"}, {}, "speculators_model_type is 'peagle', expected 'eagle3'"),
    (VLLM, {"norm_before_residual": True}, {}, "norm_before_residual is True, expected False"),
    (VLLM, {"layer": {"model_type": "qwen3"}}, {}, "transformer_layer_config.model_type is 'qwen3'"),
]


@pytest.mark.parametrize(("make", "config", "tensors", "expected"), REFUSED)
def test_a_draft_that_cannot_be_served_is_refused(tmp_path, target, make, config, tensors, expected):
    source = make(tmp_path / "draft", **config)
    change_tensors(source, lambda result: result.update(tensors))
    message = refusal(lambda: read_foreign(source, target))
    assert message.startswith(f"{source}/")
    assert expected in message


def test_automodels_eagle1_norms_are_refused(tmp_path, target):
    source = layouts.automodel_eagle(tmp_path / "draft")
    assert refusal(lambda: read_foreign(source, target)).endswith(
        "layers.0.input_layernorm.weight is unknown; norm.weight is unknown"
    )


def test_a_target_too_shallow_for_the_default_aux_layers_is_refused(tmp_path, target):
    target.num_hidden_layers = 6
    message = refusal(lambda: read_foreign(layouts.safeailab_eagle3(tmp_path / "draft"), target))
    assert "aux layers are not stated, and EAGLE's default is [1, 2, 2]; expected ascending layers" in message
    assert message.endswith("say which they are with aux_layers")


class Touch:
    """An object whose unpickling creates a file."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.mark.parametrize("name", ["draft_model.pt", "eagle3_meta.pt"])
@pytest.mark.parametrize("save", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_pickle_of_more_than_tensors_is_not_run(tmp_path, target, name, save):
    source = layouts.automodel_bare(tmp_path / "draft")
    save({"fc.weight": Touch(tmp_path / "touched")}, source / name)
    message = refusal(lambda: read_foreign(source, target))
    assert message.startswith(f"{source / name}: not read: damaged, or a pickle of more than tensors")
    assert not (tmp_path / "touched").exists()
    torch.load(source / name, weights_only=False) if save is torch.save else pickle.loads((source / name).read_bytes())
    assert (tmp_path / "touched").exists()  # so the file was one that would have


@pytest.mark.parametrize("content", [[torch.ones(2)], {"model": {"fc.weight": torch.ones(2)}}, torch.ones(2)])
def test_a_file_without_named_tensors_is_refused(tmp_path, target, content):
    source = layouts.automodel_bare(tmp_path / "draft")
    torch.save(content, source / "draft_model.pt")
    assert "expected names and their tensors" in refusal(lambda: read_foreign(source, target))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (layouts.safeailab_eagle, "pytorch_model.bin"),
        (layouts.specforge, "model.safetensors"),
        (layouts.automodel_bare, "eagle3_meta.pt"),
        (layouts.automodel, "model/consolidated/model-00002-of-00002.safetensors"),
        (layouts.automodel, "model/consolidated/model.safetensors.index.json"),
        (layouts.speculators, "config.json"),
    ],
)
@pytest.mark.parametrize("length", [0, 9, 100])
def test_a_truncated_file_is_refused(tmp_path, target, make, name, length):
    source = make(tmp_path / "draft")
    (source / name).write_bytes((source / name).read_bytes()[:length])
    assert refusal(lambda: read_foreign(source, target)).startswith(f"{source / name}: ")


@pytest.mark.parametrize("outside", ["../../../secret.safetensors", "/etc/passwd", 3])
def test_an_index_may_only_name_files_in_its_directory(tmp_path, target, outside):
    source = layouts.automodel(tmp_path / "draft")
    index = source / "model/consolidated/model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = outside
    index.write_text(json.dumps(content))
    assert "expected files in the same directory" in refusal(lambda: read_foreign(source, target))


def test_a_recipe_that_is_not_plain_yaml_is_refused(tmp_path, target):
    source = layouts.automodel(tmp_path / "draft")
    (source / "config.yaml").write_text("a: !!python/object/apply:os.mkdir [" + str(tmp_path / "touched") + "]\n")
    assert "config.yaml: not plain YAML" in refusal(lambda: read_foreign(source, target))
    assert not (tmp_path / "touched").exists()
    assert read_foreign(source, target, aux_layers=[1, 3, 4]).shape.aux_layers == (1, 3, 4)


KNOWN = "nemo_speculative, speculators (vLLM), NeMo AutoModel, SpecForge, EAGLE (SafeAILab)"


def test_an_unknown_format_is_refused_with_its_contents_and_the_known_formats(target_dir, target):
    message = refusal(lambda: read_foreign(target_dir, target))
    assert message == (
        f"{target_dir}: no known draft: architectures is ['LlamaForCausalLM'], with lm_head.weight, "
        f"model.embed_tokens.weight, model.layers.0.input_layernorm.weight; expected one of {KNOWN}"
    )


def test_a_directory_without_a_draft_is_refused(tmp_path):
    message = refusal(lambda: open_source(tmp_path))
    assert message.startswith(f"{tmp_path} holds no draft; expected config.json and one of model.safetensors")
    assert (
        refusal(lambda: open_source(tmp_path / "no"))
        == f"{tmp_path / 'no'} does not exist; expected the directory of a draft"
    )


def test_automodels_training_shards_are_refused_by_name(tmp_path):
    (tmp_path / "epoch_0_step_5/model/.hf_metadata").mkdir(parents=True)
    assert "holds NeMo AutoModel's shards only" in refusal(lambda: open_source(tmp_path / "epoch_0_step_5"))
