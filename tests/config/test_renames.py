"""Old names: a command line is refused with the new key, a stored configuration is translated."""

import pytest
from hydra.utils import get_object

from nemo_speculative.config.renames import KEYS, PATHS, current_class, translate
from nemo_speculative.training.checkpointer import ResumeMetadata
from tests.config.test_refusals import refused

ROOTS = {"engine": ("generate_data", ["engine=endpoint"]), "backend": ("train_eagle3", ["backend=remote"])}


@pytest.mark.parametrize(("old", "new"), KEYS.items())
def test_an_old_key_is_refused_with_the_new_one(old, new):
    root, overrides = ROOTS.get(old.partition(".")[0], ("train_eagle3", []))
    assert refused(*overrides, f"{old}=3", root=root) == f"{old}=3: this key is now {new}"
    assert refused(*overrides, f"+{old}=3", root=root) == f"{old}: this key is now {new}"


CLASS_OF = {
    "drafts.eagle": "EagleDraft", "drafts.eagle3": "Eagle3Draft", "objectives.eagle": "EagleObjective",
    "objectives.eagle3": "Eagle3Objective", "objectives.losses": "SoftCrossEntropy",
    "features.target": "FeaturesTarget", "preparation.load": "load_prepared", "serving.sglang_target": "SGLangTarget",
    "targets.remote": "RemoteTarget",
    "targets.tensor_parallel": "TensorParallelTarget",
    "targets.tiny": "prepare_tiny", "training.loggers": "WandbLogger", "training.optimization": "adamw",
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_an_old_class_path_is_translated(path):
    """``path`` is a module, of which one class is tried, or a class or function."""
    name = f"{path}.{CLASS_OF[path]}" if path in CLASS_OF else path
    assert callable(get_object(current_class(f"nemo_speculative.{name}")))


@pytest.mark.parametrize("path", ["my_drafts.eagle.Draft", "drafts.eagle.Draft", "some text", ""])
def test_other_strings_are_unchanged(path):
    assert current_class(path) == path


def test_a_run_of_an_earlier_version_resumes(tmp_path):
    old = {
        "draft": {"_target_": "nemo_speculative.drafts.eagle3.Eagle3Draft", "num_steps": 5},
        "data": {"row_tokens": 128, "path": "a.jsonl"}, "exporter": {"num_steps": 3}, "seed": 0,
    }  # fmt: skip
    new = {
        "draft": {"_target_": "nemo_speculative.algorithms.eagle3.network.Eagle3Draft", "ttt_steps": 5},
        "data": {"packed_length": 128, "path": "a.jsonl"}, "exporter": {"num_steps": 3}, "seed": 0,
    }  # fmt: skip
    assert translate(old) == new == translate(new)
    (tmp_path / "state").mkdir()
    ResumeMetadata(5, {}, old, "a", "b").write(tmp_path)
    ResumeMetadata.read(tmp_path).check_same_run(ResumeMetadata(5, {}, new, "a", "b"), tmp_path)
