"""A draft outside the package: its own class and YAML file, in hydra.searchpath."""

import json

from tests.integration.conftest import run

MODULE = '''
import torch
from nemo_speculative.algorithms.eagle3.contract import Eagle3Contract
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.checkpoint.contract import register


class GatedDraft(Eagle3Draft):
    """EAGLE-3 with a learned gate on its features, and its own architecture name."""

    ARCHITECTURE = "GatedForCausalLMEagle3"

    def __init__(self, shape):
        super().__init__(shape)
        self.gate = torch.nn.Parameter(torch.ones(shape.hidden_size))

    def project_hidden_states(self, aux_hidden_states, last_hidden_state):
        return self.gate * super().project_hidden_states(aux_hidden_states, last_hidden_state)


class GatedContract(Eagle3Contract):
    draft = GatedDraft


register(GatedContract())
'''
YAML = """
# @package _global_
defaults:
  - /schema/draft: eagle3
  - /loss: tv
  - _self_
draft:
  _target_: my_drafts.GatedDraft
  ttt_steps: 2
"""


def test_the_draft_is_trained_measured_and_exported_under_its_own_architecture(settings, tmp_path):
    (tmp_path / "my_drafts.py").write_text(MODULE)
    (tmp_path / "conf" / "draft").mkdir(parents=True)
    (tmp_path / "conf" / "draft" / "gated.yaml").write_text(YAML.lstrip())
    out, path = tmp_path / "run", str(tmp_path)
    chosen = [f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "draft=gated", f"output_dir={out}", "draft.ttt_steps=2"]
    done = run("recipes/train_eagle3.py", *settings, *chosen, "trainer.max_steps=2", path=path)
    assert done.returncode == 0, done.stderr
    config = json.loads((out / "checkpoints/best/model/config.json").read_text())
    assert config["architectures"] == ["GatedForCausalLMEagle3"]
    assert json.loads((out / "summary.json").read_text())["lossless"] is True
    measured = run("recipes/evaluate.py", f"checkpoint={out}", "draft_class=my_drafts.GatedDraft", path=path)
    assert measured.returncode == 0, measured.stderr
    unknown = run("recipes/evaluate.py", f"checkpoint={out}", path=path)
    assert unknown.returncode == 1 and "GatedForCausalLMEagle3" in unknown.stderr
