from pathlib import Path

import pytest

from nemo_speculative.training.resume_state import Position, root_cause
from nemo_speculative.utils.errors import UserError

CONFIG = {
    "seed": 0,
    "resume": "never",
    "optimizer": {"lr": 0.003, "betas": [0.9, 0.95]},
    "trainer": {"max_steps": 10, "global_batch_size": 4, "micro_batch_size": 2},
    "exporter": {"num_steps": 3, "dtype": None},
}


def position(target="a", data="b", **changed):
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in CONFIG.items()}
    for key, value in changed.items():
        *groups, name = key.split("__")
        node = config
        for group in groups:
            node = node[group]
        node[name] = value
    return Position(5, {}, config, target, data)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"seed": 1}, "seed is 1, the run was started with 0"),
        ({"optimizer__lr": 0.001}, "optimizer.lr is 0.001, the run was started with 0.003"),
        ({"optimizer__betas": [0.9, 0.999]}, "optimizer.betas"),
        ({"trainer__global_batch_size": 8}, "trainer.global_batch_size is 8"),
        ({"exporter__num_steps": 5}, "exporter.num_steps is 5"),
        ({"target": "x"}, "another target"),
        ({"data": "x"}, "other data"),
    ],
)
def test_what_makes_it_another_run_is_refused_by_name(changed, said):
    with pytest.raises(UserError) as error:
        position().check_same_run(position(**changed), Path("step_5"))
    assert said in str(error.value) and "step_5" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changed",
    [{}, {"resume": "auto"}, {"trainer__max_steps": 20}, {"trainer__micro_batch_size": 1}, {"exporter__dtype": "x"}],
)
def test_what_changes_no_result_may_change(changed):
    position().check_same_run(position(**changed), Path("step_5"))


def test_what_torch_says_of_a_full_disk_is_put_in_words():
    """Its words where a tensor does not fit any more on the disk, of torch 2.13."""
    said = root_cause(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"))
    assert "the disk is full" in said and "inline_container" not in said
    assert root_cause(OSError(28, "No space left on device")) == "[Errno 28] No space left on device"
