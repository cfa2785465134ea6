import math

import pytest
import torch

from nemo_speculative.drafts.layers import Rotary, rotate

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def test_positions_turn_pairs_by_the_textbook_angle():
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
def test_a_bfloat16_draft_turns_by_the_float32_angles(rope):
    """Frequencies in bfloat16 are off by a radian within some hundred positions."""
    exact, half = Rotary(rope, 64, 4096), Rotary(rope, 64, 4096).to(torch.bfloat16)
    positions = torch.arange(0, 4096, 37)[None]
    for expected, found in zip(exact(positions, torch.float32), half(positions, torch.bfloat16), strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=2**-8)
