"""Acceptance on texts longer than the training documents, with a smaller embedded target."""

import pytest

from benchmarks import long_context
from benchmarks.long_context import answered, measured, strung, trained
from nemo_speculative.config.schema import TinyModelConfig
from nemo_speculative.targets.demo import prepare_tiny
from nemo_speculative.targets.hf import HFTarget

LENGTH, STEPS = 64, 120
SMALLER = {"num_layers": 7, "hidden_size": 64, "intermediate_size": 192, "vocab_size": 512, "steps": 200}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    cache = tmp_path_factory.mktemp("embedded")
    return HFTarget(prepare_tiny(TinyModelConfig(cache_dir=str(cache), **SMALLER)), aux_layers=None)


def test_tau_at_four_times_the_training_length_keeps_80_percent_with_position_skips(target, tmp_path, monkeypatch):
    for name, value in {"CONVERSATIONS": 160, "HELD_OUT": 48, "QUESTIONS": 40}.items():
        monkeypatch.setattr(long_context, name, value)
    training, held_out = (answered(target, side, tmp_path) for side in (False, True))
    draft = trained(target, strung(training, LENGTH), 8 * LENGTH, STEPS, seed=0)
    tau = {length: measured(target, draft, held_out, length) for length in (LENGTH, 4 * LENGTH)}
    assert tau[LENGTH] > 1.5, "a draft that accepts nothing keeps all of it"
    assert tau[4 * LENGTH] >= 0.8 * tau[LENGTH]
