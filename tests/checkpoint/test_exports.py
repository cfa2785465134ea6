"""Drafts exported for other programs, which must read the network that was trained."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from nemo_speculative.algorithms.eagle.contract import EagleShape
from nemo_speculative.algorithms.eagle.network import EagleDraft
from nemo_speculative.algorithms.eagle3.contract import Eagle3Contract, Eagle3Shape
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.checkpoint.adapters.exports import MODELING_FILE, Export, RemoteCodeExport, SpeculatorsExport
from nemo_speculative.checkpoint.adapters.modeling_eagle_draft import Eagle3DraftModel, EagleDraftConfig
from nemo_speculative.checkpoint.contract import contract_of
from nemo_speculative.checkpoint.convert import convert_draft, read_foreign
from nemo_speculative.checkpoint.draft_checkpoint import Servable, read_servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.config.schema import ConvertJob, Dtype, ExporterConfig, FormConfig
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.targets.describe import text_config
from nemo_speculative.targets.fingerprint import target_fingerprint
from nemo_speculative.utils.errors import UserError
from tests.checkpoint import layouts
from tests.checkpoint.layouts import DRAFT_IDS, HIDDEN, VOCAB

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
NUMBERS = {
    "hidden_size": HIDDEN, "intermediate_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "rms_norm_eps": 1e-5, "max_positions": 2048, "vocab_size": VOCAB,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
EAGLE3 = {"draft_vocab_size": len(DRAFT_IDS), "aux_layers": (1, 3, 4), "target_hidden_size": HIDDEN}
SHAPES = {
    "eagle3": Eagle3Shape(**NUMBERS, **EAGLE3),
    "eagle3.1": Eagle3Shape(**NUMBERS, **EAGLE3, fc_norm=True, norm_output=True),
    "norm before fc": Eagle3Shape(**NUMBERS, **EAGLE3, norm_before_fc=True),
    "two layers": Eagle3Shape(**NUMBERS, **EAGLE3, num_layers=2),
    "llama3 rope": Eagle3Shape(**NUMBERS | {"rope_parameters": LLAMA3_ROPE}, **EAGLE3),
    "whole vocabulary": Eagle3Shape(**NUMBERS, **EAGLE3 | {"draft_vocab_size": VOCAB}),
    "target head": Eagle3Shape(**NUMBERS, **EAGLE3 | {"draft_vocab_size": None}),
    "narrow": Eagle3Shape(**NUMBERS, **EAGLE3 | {"target_hidden_size": 48}),
    "eagle1": EagleShape(**NUMBERS),
    "eagle1, two layers": EagleShape(**NUMBERS, num_layers=2),
}
DRAFTS = {EagleShape: EagleDraft, Eagle3Shape: Eagle3Draft}
PROVENANCE = Provenance("org/target", "f00d", "float32", SpeculativeSettings(4, 1, 5), step=40)
TARGET = SimpleNamespace(architectures=["LlamaForCausalLM"], bos_token_id=0, eos_token_id=1)


def servable(name: str, dtype: torch.dtype = torch.float32) -> Servable:
    """A random draft of ``SHAPES`` as a checkpoint in memory."""
    torch.manual_seed(0)
    shape = SHAPES[name]
    draft = DRAFTS[type(shape)]
    tensors = {
        key: torch.randn(value.shape).mul(0.3).to(dtype) if value.is_floating_point() else value
        for key, value in draft(shape).state_dict().items()
    }
    if getattr(shape, "draft_vocab_size", None) == len(DRAFT_IDS):
        tensors |= layouts.vocabulary_maps()
    return Servable(Path("somewhere"), contract_of(draft), shape, PROVENANCE, tensors)


def refusal(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


class TestSpeculators:
    NAIVE = ["eagle3", "eagle3.1", "norm before fc", "two layers", "whole vocabulary"]

    @pytest.mark.parametrize("name", NAIVE)
    def test_the_network_under_their_names_computes_what_ours_does(self, tmp_path, name):
        exported = servable(name)
        SpeculatorsExport().write(tmp_path / "out", exported, TARGET)
        theirs = {key: t.double() for key, t in load_file(tmp_path / "out/model.safetensors").items()}
        torch.manual_seed(1)
        embeddings, aux = (torch.randn(5, width, dtype=torch.float64) for width in (HIDDEN, 3 * HIDDEN))
        expected, _ = layouts.naive_eagle3(theirs, embeddings, aux, 500000.0, "layers.0.")
        draft = exported.build(dtype=torch.float64)
        rotation = draft.rotary(torch.arange(5)[None], draft.fc.weight.dtype)
        feature = draft.project_hidden_states(aux[None], aux[None])
        output = exported.contract.session(draft).extend(embeddings[None], feature, rotation)[0]
        assert torch.allclose(draft.compute_logits(output), expected, atol=1e-6)

    def test_the_tensors_are_exactly_those_of_the_format(self, tmp_path):
        SpeculatorsExport().write(tmp_path / "out", servable("two layers"), TARGET)
        expected = layouts.eagle3_tensors("layers.0.")
        del expected["embed_tokens.weight"]
        deeper = layouts.layer_shapes("layers.1.", HIDDEN, ["input_layernorm"])
        stored = load_file(tmp_path / "out/model.safetensors")
        shapes = {name: list(t.shape) for name, t in stored.items()}
        assert shapes == {name: list(t.shape) for name, t in expected.items()} | deeper

    def test_the_whole_vocabulary_has_no_maps_there(self, tmp_path):
        SpeculatorsExport().write(tmp_path / "out", servable("whole vocabulary"), TARGET)
        assert not {"d2t", "t2d"} & load_file(tmp_path / "out/model.safetensors").keys()

    def test_the_configuration_says_what_vllm_asks_for(self, tmp_path):
        SpeculatorsExport().write(tmp_path / "out", servable("eagle3.1"), TARGET)
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["speculators_model_type"] == "eagle3"
        assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]  # inputs of layers
        assert config["norm_before_residual"] is False  # vLLM takes true where it is missing
        assert (config["fc_norm"], config["norm_before_fc"], config["norm_output"]) == (True, False, True)
        assert (config["draft_vocab_size"], config["target_hidden_size"]) == (12, HIDDEN)
        speculators = config["speculators_config"]
        assert speculators["verifier"] == {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]}
        assert speculators["proposal_methods"][0]["speculative_tokens"] == 4
        methods = [method["proposal_type"] for method in speculators["proposal_methods"]]
        assert speculators["default_proposal_method"] in methods

    @pytest.mark.parametrize("name", ["eagle3", "llama3 rope"])
    def test_transformers_reads_the_layers_numbers_from_either_form_of_rope(self, tmp_path, name):
        SpeculatorsExport().write(tmp_path / "out", servable(name), TARGET)
        layer = json.loads((tmp_path / "out/config.json").read_text())["transformer_layer_config"]
        old = {key: value for key, value in layer.items() if key != "rope_parameters"}
        for fields in (layer, old):
            config = LlamaConfig(**fields)
            assert config.rope_parameters == dict(SHAPES[name].rope_parameters)
            assert (config.head_dim, config.num_key_value_heads, config.num_hidden_layers) == (8, 2, 1)

    @pytest.mark.parametrize("name", [*NAIVE, "llama3 rope", "narrow"])
    def test_it_is_read_back_as_it_was(self, tmp_path, name):
        exported = servable(name, torch.bfloat16)
        SpeculatorsExport().write(tmp_path / "out", exported, TARGET)
        width = exported.shape.target_hidden_size
        target = SimpleNamespace(vocab_size=VOCAB, hidden_size=width, num_hidden_layers=8, max_position_embeddings=256)
        result = read_foreign(tmp_path / "out", target)
        assert (result.format, result.shape) == ("speculators (vLLM)", exported.shape)
        assert result.tensors.keys() == exported.tensors.keys()
        assert all(torch.equal(result.tensors[key], t) for key, t in exported.tensors.items())

    @pytest.mark.parametrize(
        ("name", "message"), [("eagle1", "is EAGLE;"), ("target head", "without a head of its own")]
    )
    def test_a_draft_that_the_format_cannot_hold_is_refused(self, tmp_path, name, message):
        assert message in refusal(lambda: SpeculatorsExport().write(tmp_path / "out", servable(name), TARGET))
        assert not (tmp_path / "out").exists()


SCRIPT = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModel
torch.set_num_threads(1)
for directory in sorted(Path(sys.argv[1]).iterdir()):
    inputs = load_file(directory / "inputs")
    draft, info = AutoModel.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    draft.eval()
    with torch.no_grad():
        feature = draft.read(inputs["seen"])
        output = draft(inputs["embeddings"][:, :-1], feature, inputs["positions"][:, :-1]).last_hidden_state
        feature = torch.cat((feature, draft.feed_back(output[:, -1:])), dim=1)
        output = draft(inputs["embeddings"], feature, inputs["positions"]).last_hidden_state
        logits = draft.compute_logits(output, inputs["head"])
        blind = torch.eye(output.shape[1], dtype=torch.bool)[None]
        alone = draft(inputs["embeddings"], feature, inputs["positions"], attention_mask=blind).last_hidden_state
    result = {"output": output, "logits": logits, "alone": alone, "draft_ids": draft.draft_ids}
    save_file({name: t.contiguous() for name, t in result.items()}, directory / "outputs")
assert "nemo_speculative" not in sys.modules
"""
REMOTE = [(name, dtype) for name in SHAPES for dtype in (torch.float32, torch.bfloat16)]


class TestRemoteCode:
    @pytest.fixture(scope="class")
    def root(self, tmp_path_factory) -> Path:
        """Directory of all exports, after a Python without this project has loaded and run them."""
        root = tmp_path_factory.mktemp("remote")
        for name, dtype in REMOTE:
            directory = root / directory_of(name, dtype)
            RemoteCodeExport().write(directory, servable(name, dtype), TARGET)
            save_file(inputs_for(name, dtype), directory / "inputs")
        environment = {"HF_MODULES_CACHE": str(root.parent / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(root)],
            cwd=root.parent, env=plain | environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return root

    @pytest.mark.parametrize(("name", "dtype"), REMOTE)
    def test_it_computes_what_the_draft_does(self, root, name, dtype):
        draft, inputs = servable(name, dtype).build(), inputs_for(name, dtype)
        session = contract_of(type(draft)).session(draft)
        result = load_file(root / directory_of(name, dtype) / "outputs")
        embeddings, seen, positions = inputs["embeddings"], inputs["seen"], inputs["positions"]
        draft.attach(SimpleNamespace(logits=lambda hidden: hidden @ inputs["head"].T))
        rotation = draft.rotary(positions, dtype)
        rotations = [tuple(part[:, :, at] for part in rotation) for at in (slice(None, -1), slice(-1, None))]
        with torch.no_grad():
            first = session.extend(embeddings[:, :-1], draft.project_hidden_states(seen, seen), rotations[0])
            session.cache.advance(first.shape[1])
            second = session.extend(embeddings[:, -1:], draft.next_feature(first[:, -1:]), rotations[1])
            output = torch.cat((first, second), dim=1)
            logits = draft.compute_logits(output)
        for key, expected in (("output", output), ("logits", logits)):
            allowed = (1e-5 if dtype is torch.float32 else 0.03) * float(expected.abs().max())
            assert torch.allclose(result[key], expected, atol=allowed, rtol=0), key
        assert torch.equal(result["draft_ids"], draft.draft_ids)

    def test_the_mask_says_what_a_position_sees(self, root):
        name, dtype = "eagle3", torch.float32
        draft, inputs = servable(name, dtype).build(), inputs_for(name, dtype)
        result = load_file(root / directory_of(name, dtype) / "outputs")
        rotation = tuple(part[:, :, :1] for part in draft.rotary(inputs["positions"], dtype))
        feature = draft.project_hidden_states(inputs["seen"][:, :1], None)
        alone = contract_of(type(draft)).session(draft).extend(inputs["embeddings"][:, :1], feature, rotation)
        assert torch.allclose(result["alone"][:, :1], alone, atol=1e-5)
        assert torch.allclose(result["alone"][:, 0], result["output"][:, 0], atol=1e-5)
        assert not torch.allclose(result["alone"][:, 1], result["output"][:, 1], atol=1e-2)

    def test_a_bfloat16_draft_turns_by_frequencies_in_float32(self):
        """In bfloat16 they would be wrong by radians within a few thousand positions."""
        exported = servable("llama3 rope", torch.bfloat16)
        network = Eagle3DraftModel(EagleDraftConfig(**RemoteCodeExport().config(exported))).to(torch.bfloat16)
        like, positions = torch.zeros(1, dtype=torch.bfloat16), torch.arange(0, 2000, 13)[None]
        expected = exported.build().rotary(positions, like.dtype)
        assert all(torch.equal(*pair) for pair in zip(network.rotation(like, positions), expected, strict=True))

    def test_the_draft_of_an_architecture_of_its_own_is_refused(self, tmp_path):
        class Gated(Eagle3Draft):
            ARCHITECTURE = "GatedForCausalLMEagle3"

        class GatedContract(Eagle3Contract):
            draft = Gated

        exported = replace(servable("eagle3"), contract=GatedContract())
        message = refusal(lambda: RemoteCodeExport().write(tmp_path / "out", exported, TARGET))
        assert "is GatedForCausalLMEagle3; this form holds LlamaForCausalLMEagle" in message
        assert not (tmp_path / "out").exists()

    def test_the_modelling_file_needs_torch_and_transformers_only(self):
        tree = ast.parse(MODELING_FILE.read_text())
        named = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
        named += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert {module.split(".")[0] for module in named} == {"torch", "transformers"}


def directory_of(name: str, dtype: torch.dtype) -> str:
    return f"{name}-{dtype}".replace(" ", "_").replace("torch.", "")


def inputs_for(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Two sequences of six positions, one with large gaps; the target has processed all but the last position."""
    torch.manual_seed(2)
    shape = SHAPES[name]
    width = shape.fc_width if isinstance(shape, Eagle3Shape) else HIDDEN
    floats = {
        "embeddings": torch.randn(2, 6, HIDDEN), "seen": torch.randn(2, 5, width), "head": torch.randn(VOCAB, HIDDEN),
    }  # fmt: skip
    positions = torch.arange(6) * torch.tensor([[1], [400]])
    return {key: value.to(dtype) for key, value in floats.items()} | {"positions": positions}


FOREIGN = [
    layouts.safeailab_eagle,
    layouts.safeailab_eagle3,
    layouts.specforge,
    layouts.automodel,
    layouts.automodel_bare,
    layouts.speculators,
]


class TestConvert:
    @pytest.mark.parametrize("make", FOREIGN)
    def test_a_foreign_draft_becomes_a_servable_one_beside_it(self, tmp_path, target_dir, make):
        source = make(tmp_path / "epoch_1_step_70")
        before = snapshot(source)
        done = convert_draft(ConvertJob(checkpoint=str(source), target=str(target_dir)))
        result, plain = read_servable(done.directory), read_foreign(source, text_config(target_dir))
        assert done.directory == tmp_path / "epoch_1_step_70-servable"
        assert (done.format, done.notes) == (plain.format, plain.notes)
        assert (result.shape, result.contract) == (plain.shape, plain.contract)
        assert all(torch.equal(result.tensors[name], t) for name, t in plain.tensors.items())
        assert result.provenance == Provenance(
            str(target_dir.resolve()),
            target_fingerprint(target_dir),
            "float32",
            SpeculativeSettings(5, 1, 6),
            plain.provenance.step,
        )
        assert snapshot(source) == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_1_step_70", "epoch_1_step_70-servable"]

    def test_a_directory_is_named_from_inside_it(self, tmp_path, target_dir, monkeypatch):
        monkeypatch.chdir(layouts.specforge(tmp_path / "draft"))
        done = convert_draft(ConvertJob(checkpoint=".", target=str(target_dir)))
        assert done.directory == tmp_path / "draft-servable"

    def test_the_numbers_of_layers_and_ids_are_the_drafts_own(self, tmp_path, target_dir):
        source = layouts.automodel(tmp_path / "draft")
        done = convert_draft(ConvertJob(checkpoint=str(source), target=str(target_dir)))
        config = json.loads((done.directory / "config.json").read_text())
        assert (config["num_hidden_layers"], config["bos_token_id"], config["eos_token_id"]) == (1, 0, 1)

    @pytest.mark.parametrize("content", [None, "precious"])
    def test_nothing_is_overwritten(self, tmp_path, target_dir, content):
        source = layouts.specforge(tmp_path / "draft")
        (tmp_path / "taken").mkdir()
        if content:
            (tmp_path / "taken/file").write_text(content)
        before = snapshot(tmp_path)
        job = ConvertJob(checkpoint=str(source), target=str(target_dir), output=str(tmp_path / "taken"))
        assert refusal(lambda: convert_draft(job)) == (
            f"output: {tmp_path / 'taken'} exists; remove it, or name another with output=DIR"
        )
        assert snapshot(tmp_path) == before

    def test_a_failed_conversion_leaves_no_files(self, tmp_path, target_dir):
        source = layouts.safeailab_eagle(tmp_path / "draft")
        form = FormConfig(_target_="nemo_speculative.checkpoint.adapters.exports.SpeculatorsExport")
        job = ConvertJob(checkpoint=str(source), target=str(target_dir), form=form)
        assert "speculators' format holds EAGLE-3 drafts" in refusal(lambda: convert_draft(job))
        form = FormConfig(_target_=f"{__name__}.Interrupted")
        with pytest.raises(OSError, match="disk full"):
            convert_draft(ConvertJob(checkpoint=str(source), target=str(target_dir), form=form))
        assert [p.name for p in tmp_path.iterdir()] == ["draft"]

    def test_a_checkpoint_survives_the_round_trip_through_speculators(self, tmp_path, target_dir):
        first = convert_draft(ConvertJob(checkpoint=str(layouts.specforge(tmp_path / "a")), target=str(target_dir)))
        form = FormConfig(_target_="nemo_speculative.checkpoint.adapters.exports.SpeculatorsExport")
        second = convert_draft(ConvertJob(checkpoint=str(first.directory), form=form))  # its target is recorded
        third = convert_draft(ConvertJob(checkpoint=str(second.directory), output=str(tmp_path / "back")))
        assert (second.format, third.format) == ("nemo_speculative", "speculators (vLLM)")
        original, back = read_servable(first.directory), read_servable(third.directory)
        assert original.shape == back.shape
        assert all(torch.equal(back.tensors[name], t) for name, t in original.tensors.items())

    def test_settings_and_dtype_are_configurable(self, tmp_path, target_dir):
        exporter = ExporterConfig(dtype=Dtype.bfloat16, num_steps=3, topk=2, num_draft_tokens=5)
        source = layouts.specforge(tmp_path / "draft")
        done = convert_draft(
            ConvertJob(checkpoint=str(source), target=str(target_dir), exporter=exporter, aux_layers=[0, 1, 2])
        )
        result = read_servable(done.directory)
        assert result.tensors["fc.weight"].dtype == torch.bfloat16
        assert result.provenance.speculative == SpeculativeSettings(3, 2, 5)
        assert result.aux_layers == [0, 1, 2]

    def test_a_draft_that_names_no_target(self, tmp_path):
        source = layouts.specforge(tmp_path / "draft")
        message = refusal(lambda: convert_draft(ConvertJob(checkpoint=str(source))))
        assert message == f"target is not set, and {source} does not say which it was trained for: give target=DIR"


class Interrupted(Export):
    """An export that fails after its first file."""

    suffix = "servable"

    def write(self, directory, servable, target):
        (directory / "config.json").write_text("{")
        raise OSError("disk full")
