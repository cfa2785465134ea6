"""Every option of the groups ``engine`` and ``reasoning``."""

import pytest
from hydra.utils import instantiate

from nemo_speculative.config.app import CONF, to_job
from nemo_speculative.generate_data.engines import Engine
from nemo_speculative.generate_data.rollout import Reasoning
from nemo_speculative.generate_data.run import build_engine
from nemo_speculative.targets.hf import HFTarget
from tests.config.test_groups import composed


def options(group):
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("option", options("engine"))
def test_engine(option, target_dir):
    job = to_job(composed("generate_data", f"engine={option}", "model=local", f"model.path={target_dir}"))
    engine = build_engine(job)
    assert isinstance(engine, Engine) and engine.concurrency > 0
    loaded = HFTarget(target_dir, aux_layers=[])
    assert (engine.stop_ids, engine.context) == (loaded.stop_ids, loaded.config.max_position_embeddings)


@pytest.mark.parametrize("option", options("reasoning"))
def test_reasoning(option):
    job = to_job(composed("generate_data", f"reasoning={option}"))
    reasoning = instantiate(job.reasoning)
    assert isinstance(reasoning, Reasoning) and type(reasoning).__name__.lower() == option
