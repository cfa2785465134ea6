from types import SimpleNamespace

import pytest
import torch

from nemo_speculative.algorithms.common.draft import init_from_target
from nemo_speculative.algorithms.eagle3.contract import Eagle3Shape
from nemo_speculative.algorithms.eagle3.network import LOW_AUX_SCALE, Eagle3Draft
from nemo_speculative.config.schema import InitFromTarget
from nemo_speculative.utils.errors import UserError

PARTS = ("head", "layer", "fc")


def drafts(target, chosen):
    """A random draft, and the same with the chosen parts started from the target."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        draft = Eagle3Draft(Eagle3Shape.like_target(target.config, target.aux_layers, 40))
        draft.d2t.copy_(torch.arange(0, 280, 7)[:40] - torch.arange(40))
        made.append(draft)
    parts = InitFromTarget(**{part: part in chosen for part in PARTS})
    init_from_target(made[1], target, parts)
    return made


def changed(target, *chosen):
    before, after = (dict(draft.named_parameters()) for draft in drafts(target, chosen))
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_each_part_changes_its_own_weights_and_no_others(target):
    assert changed(target) == set()
    assert changed(target, "head") == {"lm_head.weight"}
    assert changed(target, "fc") == {"fc.weight"}
    projections = {f"midlayer.self_attn.{n}_proj.weight" for n in "qkvo"}
    mlp = {f"midlayer.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    # The norms of a random target are ones, as those of a new draft are.
    assert changed(target, "layer") == projections | mlp


def test_the_weights_are_the_targets(target):
    before, after = drafts(target, PARTS)
    hidden, layer = target.config.hidden_size, target.layers[-1]
    assert torch.equal(after.lm_head.weight, target.head_weight[torch.arange(0, 280, 7)[:40]])
    for name in ("q_proj", "k_proj", "v_proj"):
        own = getattr(after.midlayer.self_attn, name).weight
        assert torch.equal(own[:, hidden:], getattr(layer.self_attn, name).weight)
        assert not own[:, :hidden].any()
    assert torch.equal(after.midlayer.self_attn.o_proj.weight, layer.self_attn.o_proj.weight)
    assert torch.equal(after.midlayer.mlp.down_proj.weight, layer.mlp.down_proj.weight)
    expected = LOW_AUX_SCALE * before.fc.weight
    expected[:, -hidden:] += torch.eye(hidden)
    torch.testing.assert_close(after.fc.weight, expected)


def test_a_layer_of_another_shape_is_refused_by_name(target):
    draft = Eagle3Draft(Eagle3Shape.like_target(target.config, target.aux_layers, 40))
    other = SimpleNamespace(
        head_weight=target.head_weight, final_norm=None, last_layers=lambda count: [torch.nn.Linear(2, 2)]
    )
    with pytest.raises(UserError, match=r"no hidden_norm.weight of shape.*init_from_target.layer=false"):
        init_from_target(draft, other, InitFromTarget())
