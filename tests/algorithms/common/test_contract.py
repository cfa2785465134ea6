"""A draft's cosines and sines against the rotary modules that transformers' own models use."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.glm4.modeling_glm4 import Glm4RotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding
from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from nemo_speculative.algorithms.common.contract import numbers_for, plain_rope
from nemo_speculative.algorithms.common.layers import Rotary
from nemo_speculative.config.schema import Eagle3DraftConfig
from nemo_speculative.utils.errors import UserError

ORIGINAL, LONGEST, HEAD = 64, 256, 16
FACTORS = {"short_factor": [1.0 + j / 8 for j in range(8)], "long_factor": [2.0 + j for j in range(8)]}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL, "factor": 4.0, **FACTORS,
}  # fmt: skip
TARGETS = {
    "default": ("llama", {"rope_type": "default", "rope_theta": 5e5}, LlamaRotaryEmbedding),
    "linear": ("llama", {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, LlamaRotaryEmbedding),
    "llama3": ("llama", LLAMA3, LlamaRotaryEmbedding),
    "dynamic": ("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, LlamaRotaryEmbedding),
    "yarn": ("llama", YARN | {"factor": 4.0}, LlamaRotaryEmbedding),
    "yarn, attention factor": ("llama", YARN | {"factor": 4.0, "attention_factor": 1.5}, LlamaRotaryEmbedding),
    "yarn, mscale": ("llama", YARN | {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}, LlamaRotaryEmbedding),
    "yarn, not truncated": ("gpt_oss", YARN | {"factor": 4.0, "truncate": False}, GptOssRotaryEmbedding),
    "longrope": ("phi3", LONGROPE, Phi3RotaryEmbedding),
    "longrope, attention factor": ("phi3", LONGROPE | {"attention_factor": 1.1}, Phi3RotaryEmbedding),
    "alpha": ("hunyuan_v1_dense", {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0},
              HunYuanDenseV1RotaryEmbedding),
}  # fmt: skip


def target_config(kind, rope):
    values = {
        "hidden_size": 4 * HEAD, "num_attention_heads": 4, "head_dim": HEAD, "max_position_embeddings": LONGEST,
        "pad_token_id": 0,
    }  # fmt: skip
    # Phi3's configuration has a length of its own, which wins over that of its rope_parameters.
    own = {"original_max_position_embeddings": ORIGINAL} if kind == "phi3" else {}
    return AutoConfig.for_model(kind, **values, **own, rope_parameters=rope)


def of_draft(config, positions, **settings):
    numbers = numbers_for(Eagle3DraftConfig(**settings), config)
    rotary = Rotary(numbers["rope_parameters"], numbers["head_dim"], numbers["max_positions"])
    cos, sin = rotary(positions[None], torch.float32)
    return cos[:, 0], sin[:, 0]


def of_target(rotary, positions):
    """[1, n, d], the half that some modules leave out doubled."""
    found = rotary(torch.empty(0), positions[None])
    return [x if x.shape[-1] == HEAD else torch.cat((x, x), -1) for x in found]


@pytest.mark.parametrize("name", TARGETS)
def test_a_draft_rotates_as_its_target_does_up_to_the_longest_sequence(name):
    kind, rope, rotary = TARGETS[name]
    config, positions = target_config(kind, rope), torch.arange(LONGEST)
    for found, expected in zip(of_draft(config, positions), of_target(rotary(config), positions), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", TARGETS)
def test_a_position_is_rotated_alike_whatever_else_is_in_the_batch(name):
    """A packed row that is short, and a decoder's table that is longer than the context."""
    kind, rope, _ = TARGETS[name]
    config, few, many = target_config(kind, rope), torch.arange(ORIGINAL // 2), torch.arange(4 * LONGEST)
    for short, long in zip(of_draft(config, few), of_draft(config, many), strict=True):
        torch.testing.assert_close(short, long[:, : len(few)], rtol=0, atol=0)


def test_of_several_rope_sets_a_draft_uses_that_of_full_attention():
    sets = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }
    config, positions = target_config("gemma3_text", sets), torch.arange(LONGEST)
    expected = Gemma3RotaryEmbedding(config)(torch.empty(0), positions[None], layer_type="full_attention")
    for found, wanted in zip(of_draft(config, positions), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_draft_rotates_the_whole_head_of_a_target_that_rotates_a_part():
    config = target_config("glm4", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    assert Glm4RotaryEmbedding(config)(torch.empty(0), torch.arange(3)[None])[0].shape[-1] == HEAD // 2
    assert numbers_for(None, config)["rope_parameters"] == plain_rope(1e4)
    mrope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25, "mrope_section": [1, 1]}
    assert numbers_for(None, target_config("glm4", mrope))["rope_parameters"] == plain_rope(1e4)


@pytest.mark.parametrize(
    ("rope", "same"),
    [
        ({"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}, "default"),
        ({"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25, "factor": 2.0}, "linear"),
    ],
)
def test_proportional_becomes_a_kind_that_every_server_knows(rope, same):
    config, positions = target_config("llama", rope), torch.arange(LONGEST)
    whole = LlamaRotaryEmbedding(target_config("llama", rope | {"partial_rotary_factor": 1.0}))
    assert numbers_for(None, config)["rope_parameters"]["rope_type"] == same
    for found, expected in zip(of_draft(config, positions), of_target(whole, positions), strict=True):
        torch.testing.assert_close(found, expected)


def test_draft_rope_theta_is_a_plain_rotation_of_its_own():
    config, positions = target_config("llama", LLAMA3), torch.arange(LONGEST)
    plain = LlamaRotaryEmbedding(LlamaConfig(hidden_size=HEAD, num_attention_heads=1, rope_theta=2e4))
    for found, expected in zip(of_draft(config, positions, rope_theta=2e4), of_target(plain, positions), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "spiral", "rope_theta": 1e4}, r"the target has rope_type 'spiral', and a draft can follow"),
        ({"main": {"rope_type": "default"}, "compress": {"rope_type": "yarn"}},
         r"the target has rope_parameters for main, compress, and a draft can follow one set"),
        (LONGROPE | {"partial_rotary_factor": 0.5, "long_factor": [2.0] * 4},
         r"the target has longrope with 4 factors, and a draft can follow 8, for heads of 16 features"),
    ],
)  # fmt: skip
def test_an_unsupported_rope_is_refused_with_the_remedy(rope, message):
    config = SimpleNamespace(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=LONGEST, vocab_size=300, rope_parameters=rope
    )
    with pytest.raises(UserError, match=message + r".*: set draft\.rope_theta, e\.g\. 10000") as refused:
        numbers_for(Eagle3DraftConfig(), config)
    assert "\n" not in str(refused.value)
    assert numbers_for(Eagle3DraftConfig(rope_theta=1e4), config)["rope_parameters"]["rope_type"] == "default"


def test_a_draft_that_was_trained_before_keeps_its_rotation():
    with pytest.raises(UserError, match=r"draft\.rope_theta is 10000\.0 and draft\.init_from=there.*leave out"):
        Eagle3DraftConfig(rope_theta=1e4, init_from="there")
