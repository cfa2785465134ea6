"""Drafts that a version of SGLang cannot serve are refused, naming the key and the version that can."""

import pytest

from nemo_speculative.algorithms.eagle.contract import EagleShape
from nemo_speculative.algorithms.eagle3.contract import Eagle3Shape
from nemo_speculative.serving.versions import NEWEST, check_servable, parse_version
from nemo_speculative.utils.errors import UserError

NUMBERS = {
    "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "rms_norm_eps": 1e-6,
    "max_positions": 64, "rope_parameters": {}, "vocab_size": 16,
}  # fmt: skip


def eagle3(**values):
    aux = {"draft_vocab_size": 16, "aux_layers": (1, 3, 4), "target_hidden_size": 8}
    return Eagle3Shape(**(NUMBERS | aux | values))


@pytest.mark.parametrize(
    "switches, refused, served",
    [
        ({}, None, "0.5.9"),
        ({"fc_norm": True}, "0.5.9", "0.5.14"),
        ({"norm_output": True}, "0.5.13", "0.5.14"),
        ({"norm_before_fc": True}, "0.5.14", "0.5.17"),
        ({"num_layers": 2}, "0.5.9", "0.5.14"),
        ({"fc_norm": True, "norm_output": True, "num_layers": 3}, "0.5.9", NEWEST),
    ],
)
def test_switches_need_the_first_version_that_has_them(switches, refused, served):
    check_servable(eagle3(**switches), served)
    if refused:
        with pytest.raises(UserError) as caught:
            check_servable(eagle3(**switches), refused)
        key = next(iter(switches))
        assert f"draft.{key}=" in str(caught.value) and f"SGLang {refused}" in str(caught.value)
        assert "0.5.14 and later" in str(caught.value) or served in str(caught.value)


def test_every_version_serves_eagle1_of_any_depth():
    check_servable(EagleShape(**NUMBERS, num_layers=3), "0.5.9")


def test_aux_states_as_wide_as_the_draft_are_refused_for_all_versions():
    """SGLang applies fc only where the widths differ; it would skip fc for one aux state of the draft's size."""
    with pytest.raises(UserError, match=r"draft.aux_layers: 1 of 8 features .* no version of SGLang applies fc"):
        check_servable(eagle3(aux_layers=(3,)), NEWEST)
    check_servable(eagle3(aux_layers=(3,), target_hidden_size=12), NEWEST)
    with pytest.raises(UserError, match=r"no version of SGLang"):
        check_servable(eagle3(aux_layers=(1, 3), hidden_size=16), NEWEST)


def test_the_target_head_needs_a_draft_of_the_target_hidden_size():
    check_servable(eagle3(draft_vocab_size=None), NEWEST)
    with pytest.raises(UserError, match=r"draft\.vocab_size is target_head: .* reads 8 features, and .* is 12"):
        check_servable(eagle3(draft_vocab_size=None, hidden_size=12), NEWEST)


@pytest.mark.parametrize("version", ["", "newest", "0.5.x"])
def test_a_malformed_version_is_refused(version):
    with pytest.raises(UserError, match=r"exporter\.sglang_version"):
        parse_version(version)


def test_versions_are_compared_as_numbers():
    assert parse_version("0.5.9") < parse_version("0.5.14") < parse_version("0.5.23") < parse_version("1.0.0")
