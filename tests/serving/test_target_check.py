"""A target directory with another model than the draft was trained for is refused before anything starts."""

import json
from dataclasses import fields

import pytest
import torch
from safetensors.torch import save_file

from nemo_speculative.algorithms.eagle.contract import EagleShape
from nemo_speculative.algorithms.eagle.network import EagleDraft
from nemo_speculative.checkpoint.draft_checkpoint import write_servable
from nemo_speculative.checkpoint.metadata import Provenance
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.serve_sglang import main
from nemo_speculative.targets.fingerprint import target_fingerprint
from tests.serving.conftest import SHAPE


@pytest.fixture
def printed(capsys, run_dir, target):
    """Runs --print-only with ``target``; returns the exit code and the output."""

    def run(*arguments: str) -> tuple[int, str]:
        code = main(["--draft", str(run_dir), "--target", str(target), "--print-only", *arguments])
        out, err = capsys.readouterr()
        assert (out if code else err) == ""
        assert (out + err).count("\n") == 1
        return code, out + err

    return run


@pytest.fixture
def edit_target(target):
    def edit(**changed) -> None:
        file = target / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))

    return edit


def test_the_trained_target_is_accepted(printed):
    assert printed()[0] == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 12}, "hidden_size is 12, expected 8"),
        ({"vocab_size": 24}, "vocab_size is 24, expected 16"),
        # Layer 4 is the last that is read, and SGLang captures it at the entry of the next one.
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5, expected at least 6"),
        ({"hidden_size": 12, "vocab_size": 24}, "hidden_size is 12, expected 8; vocab_size is 24, expected 16"),
    ],
)
def test_a_model_of_another_shape_is_refused(printed, edit_target, target, changed, message):
    edit_target(**changed)
    for arguments in ((), ("--target-variant",)):
        code, output = printed(*arguments)
        assert code == 2 and message in output and f"--target {target}" in output and "recorded as org/target" in output


def test_other_weights_are_refused_without_target_variant(printed, target):
    save_file({"weights": torch.zeros(4)}, target / "model.safetensors")
    code, output = printed()
    assert code == 2 and "fingerprint" in output and "--target-variant" in output
    assert printed("--target-variant")[0] == 0


def test_another_architecture_of_the_same_shape_is_refused(printed, edit_target):
    edit_target(model_type="mistral", architectures=["MistralForCausalLM"])
    code, output = printed()
    assert code == 2 and "fingerprint" in output


def test_an_eagle1_draft_needs_no_aux_layers(printed, edit_target, model_dir, target):
    edit_target(num_hidden_layers=1)
    shape = EagleShape(**{field.name: getattr(SHAPE, field.name) for field in fields(EagleShape)})
    provenance = Provenance("org/target", target_fingerprint(target), "bfloat16", SpeculativeSettings(5, 1, 6), step=3)
    write_servable(model_dir, EagleDraft, EagleDraft(shape).state_dict(), shape, provenance, torch.float32, {})
    code, output = printed()
    assert code == 0 and "--speculative-algorithm EAGLE " in output


def test_a_directory_without_a_model_is_refused(printed, target):
    (target / "config.json").unlink()
    code, output = printed()
    assert code == 2 and f"{target}: not a usable model configuration" in output
