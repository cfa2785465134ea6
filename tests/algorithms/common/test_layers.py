import math

import pytest
import torch
from torch.nn.functional import linear, silu

from nemo_speculative.algorithms.common.layers import Rotary, rotate
from tests.algorithms.cases import eagle3

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def test_positions_rotate_pairs_by_the_angle_of_rope():
    x, d, theta = torch.randn(1, 2, 5, 8), 8, 10000.0
    cos, sin = Rotary({"rope_type": "default", "rope_theta": theta}, d, 32)(torch.arange(5)[None], torch.float32)
    turned = rotate(x, cos, sin)
    for t in range(5):
        for j in range(d // 2):
            angle = t * theta ** (-2 * j / d)
            low, high = x[0, :, t, j], x[0, :, t, j + d // 2]
            torch.testing.assert_close(turned[0, :, t, j], low * math.cos(angle) - high * math.sin(angle))
            torch.testing.assert_close(turned[0, :, t, j + d // 2], high * math.cos(angle) + low * math.sin(angle))


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 10000.0}, LLAMA3], ids=["default", "llama3"])
def test_a_bfloat16_draft_rotates_by_float32_angles(rope):
    """Frequencies in bfloat16 are off by a radian within some hundred positions."""
    exact, half = Rotary(rope, 64, 4096), Rotary(rope, 64, 4096).to(torch.bfloat16)
    positions = torch.arange(0, 4096, 37)[None]
    for expected, found in zip(exact(positions, torch.float32), half(positions, torch.bfloat16), strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=2**-8)


def textbook_finish(weights, residual, attended, eps):
    x = residual + linear(attended, weights["self_attn.o_proj.weight"])
    normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weights["post_attention_layernorm.weight"]
    gate, up = linear(normed, weights["mlp.gate_proj.weight"]), linear(normed, weights["mlp.up_proj.weight"])
    return x + linear(silu(gate) * up, weights["mlp.down_proj.weight"])


@pytest.mark.parametrize("compiled", [False, True])
def test_the_second_half_of_a_layer_has_the_gradients_of_its_formula(compiled):
    """Compiled as the trainer does it; torch 2.11 lost gradients there."""
    layer = eagle3(draft_vocab=15).make_draft().decoder_layers[0].double()
    finish = torch.compile(layer.finish, backend="eager") if compiled else layer.finish
    attended = torch.randn(3, 5, layer.self_attn.o_proj.in_features, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(3, 5, layer.self_attn.o_proj.out_features, dtype=torch.float64, requires_grad=True)
    weights = {n: p for n, p in layer.named_parameters() if n.startswith(("self_attn.o", "mlp", "post_attention"))}
    direction, inputs = torch.randn_like(residual), (residual, attended, *weights.values())
    results = [finish(residual, attended), textbook_finish(weights, residual, attended, 1e-5)]
    torch.testing.assert_close(*results)
    for found, expected in zip(*(torch.autograd.grad((y * direction).sum(), inputs) for y in results), strict=True):
        torch.testing.assert_close(found, expected)
