"""A draft described by a published config.json, and numbers as expressions over the target's configuration."""

import dataclasses
import json

import pytest

from nemo_speculative.config.app import to_job
from nemo_speculative.config.schema import Eagle3DraftConfig, EagleDraftConfig
from nemo_speculative.utils.errors import UserError
from tests.config.test_groups import composed

OFFICIAL = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 300, "draft_vocab_size": 120, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
}  # fmt: skip
SPECFORGE = OFFICIAL | {
    "architectures": ["LlamaForCausalLMEagle3"],
    "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 2, 3], "fc_norm": True},
    "norm_output": True,
}


@pytest.fixture
def published(tmp_path):
    def write(config):
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return str(tmp_path / "config.json")

    return write


def test_numbers_of_the_file_replace_null(published):
    draft = Eagle3DraftConfig(config=published(SPECFORGE), head_dim=16).with_config_file()
    expected = {
        "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "num_layers": 1, "head_dim": 16,
        "vocab_size": 120, "aux_layers": [1, 2, 3], "fc_norm": True, "norm_output": True, "norm_before_fc": False,
    }  # fmt: skip
    assert {name: getattr(draft, name) for name in expected} == expected


def test_a_file_in_the_official_form(published):
    draft = Eagle3DraftConfig(config=published(OFFICIAL)).with_config_file()
    assert (draft.num_heads, draft.vocab_size, draft.aux_layers, draft.fc_norm) == (4, 120, None, False)


def test_the_numbers_reach_the_job(published):
    job = to_job(composed("train_eagle3", f"draft.config={published(SPECFORGE)}"))
    assert job.draft == Eagle3DraftConfig(config=job.draft.config, ttt_steps=5).with_config_file()


@pytest.mark.parametrize(
    "config, draft, message",
    [
        ("{", Eagle3DraftConfig(), "cannot be read"),
        ("[]", Eagle3DraftConfig(), "not a draft's config.json"),
        ({"a": 1}, Eagle3DraftConfig(), "not a draft's config.json"),
        (OFFICIAL, Eagle3DraftConfig(num_heads=8), "draft.num_heads is 8, and draft.config"),
        (OFFICIAL, EagleDraftConfig(), "sets hidden_size=64, which EagleDraftConfig does not have"),
        (OFFICIAL | {"fc_norm": True, "norm_before_fc": True}, Eagle3DraftConfig(), "are both true"),
    ],
)
def test_refused_in_one_line(published, config, draft, message):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(draft, config=published(config)).with_config_file()
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "expression, value",
    [
        ("${target:intermediate_size}", 384),
        ("${mul:3,${target:hidden_size}}", 384),
        ("${div:${target:intermediate_size},2}", 192),
        ("${mul:2,3,4}", 24),
    ],
)
def test_expressions_over_the_targets_configuration(expression, value):
    job = to_job(composed("train_eagle3", f"draft.intermediate_size='{expression}'"))
    assert job.draft.intermediate_size == value


def test_a_field_inside_another():
    job = to_job(composed("train_eagle3", "draft.step_decay=${target:rope_parameters.rope_theta}"))
    assert job.draft.step_decay == 10000.0


@pytest.mark.parametrize(
    "expression, message",
    [
        ("${target:no_such}", "the target's config.json has no 'no_such'"),
        ("${target:rope_parameters.no_such}", "has no 'no_such'"),
        ("${div:7,2}", "7 cannot be divided evenly by 2"),
        ("${div:7,0}", "7 cannot be divided evenly by 0"),
    ],
)
def test_an_expression_without_a_value(expression, message):
    config = composed("train_eagle3")
    config.draft.intermediate_size = expression
    with pytest.raises(UserError, match=message):
        to_job(config)
