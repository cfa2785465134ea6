"""Every file of conf/ composes, is typed, and names things that exist."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from nemo_speculative.config.app import CONF, explain, to_job
from nemo_speculative.config.groups import PACKAGES, SCHEMAS
from nemo_speculative.config.schema import TrainJob


def files_of_groups() -> list[tuple[str, str]]:
    return sorted(
        (file.parent.relative_to(CONF).as_posix(), file.stem) for file in CONF.rglob("*.yaml") if file.parent != CONF
    )


def groups_of_root(root: Path) -> list[str]:
    """The groups that a root's defaults list chooses from, itself or by the options of its groups."""
    entries = yaml.safe_load(root.read_text())["defaults"]
    groups = [group.removeprefix("optional ") for entry in entries if isinstance(entry, dict) for group in entry]
    inner = (f for group in groups if (CONF / group).is_dir() for f in (CONF / group).glob("*.yaml"))
    chosen = (key for f in inner for entry in yaml.safe_load(f.read_text()).get("defaults", []) for key in entry)
    return groups + [key[1:] for key in set(chosen) if key.startswith("/") and not key.startswith("/schema")]


ROOTS = {file.stem: groups_of_root(file) for file in sorted(CONF.glob("*.yaml"))}
GROUPS = files_of_groups()
REFUSED = {
    ("serve_target", "backend", "remote"), ("serve_target", "backend", "features"),
    ("serve_target", "backend", "hf_fsdp2"), ("serve_target", "backend", "hf_tp"),
    ("capture_features", "backend", "features"),
}  # fmt: skip
"""Options of a group that a root with that group has no use for: tests/test_serve_target.py, tests/targets/cached."""
CASES = [
    (root, group, option)
    for group, option in GROUPS
    for root, groups in ROOTS.items()
    if group in groups
    and group != "model_draft"  # chosen by its name: test_builds.py
    and (root, group, option) not in REFUSED
]

SUITED = {(root, "backend"): ["data.answers=given"] for root in ("train_eagle3", "capture_features")}
"""What every option of a root's group goes with, where not every one goes with the defaults."""


def composed(root: str, *overrides: str) -> Any:
    """The configuration, with whatever a user has to give filled in."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(root, overrides=list(overrides))
    if "output_dir" in config:  # its default needs a running Hydra
        config.output_dir = "out"
    for key in OmegaConf.missing_keys(config):
        OmegaConf.update(config, key, "somewhere")
    return config


def named_objects(value: Any) -> Iterator[str]:
    """Every string that ``hydra.utils`` will have to find: ``_target_`` and ``objective``, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("_target_", "objective") and isinstance(inner, str):
                yield inner
            else:
                yield from named_objects(inner)


def test_the_discovery_sees_the_files_that_are_known_to_exist():
    assert {("model", "tiny"), ("data", "jsonl"), ("draft", "eagle3"), ("hydra", "plain")} <= set(GROUPS)
    assert "train_eagle3" in ROOTS


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_every_file_belongs_to_a_root(group, option):
    assert any(group in groups for groups in ROOTS.values()), f"no recipe can choose {group}={option}"


@pytest.mark.parametrize(("root", "group", "option"), CASES)
def test_every_file_becomes_a_typed_job_whose_names_resolve(root, group, option):
    job = to_job(composed(root, f"{group}={option}", *SUITED.get((root, group), [])))
    assert dataclasses.is_dataclass(job)
    if root == "train_eagle3":
        assert isinstance(job, TrainJob)
        for field in dataclasses.fields(TrainJob):
            assert not isinstance(getattr(job, field.name), dict), f"{field.name} is untyped"
    for name in named_objects(dataclasses.asdict(job)):
        assert callable(get_object(name)), name


def schema_groups() -> list[tuple[str, str]]:
    """One option of each group that has a schema, for as many options as exist."""
    typed = {group for group, _ in SCHEMAS}
    return [(group, option) for group, option in GROUPS if group in typed and group in ROOTS["train_eagle3"]]


@pytest.mark.parametrize(("group", "option"), schema_groups())
def test_every_group_refuses_an_unknown_key(group, option):
    override = f"{PACKAGES.get(group, group)}.surely_unknown=1"
    with pytest.raises(Exception, match="surely_unknown") as caught:
        composed("train_eagle3", f"{group}={option}", override)
    message = explain(caught.value, [f"{group}={option}", override])
    assert "\n" not in message
    assert message.startswith(f"{override}: unknown key 'surely_unknown'")


@pytest.mark.parametrize(("group", "option"), schema_groups())
def test_the_schema_of_every_group_is_in_force(group, option):
    """The root types every group; a file whose own schema adds keys needs that one."""
    node = OmegaConf.select(composed("train_eagle3", f"{group}={option}"), PACKAGES.get(group, group))
    assert OmegaConf.get_type(node) in SCHEMAS.values()


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("tiny", {"data.answers": "target", "model._target_": "nemo_speculative.targets.demo.prepare_tiny"}),
        ("llama31_8b", {"data.split": "train_sft", "model.dtype": "bfloat16", "trainer.dtype": "bfloat16"}),
        ("local", {"data.answers": "given", "data._target_": "nemo_speculative.data.sources.load_jsonl"}),
    ],
)
def test_a_model_brings_what_suits_it(option, expected):
    config = composed("train_eagle3", f"model={option}")
    for key, value in expected.items():
        found = OmegaConf.select(config, key)
        assert getattr(found, "value", found) == value, key


def test_the_command_line_wins_over_what_a_model_brings():
    job = to_job(composed("train_eagle3", "model=tiny", "data=jsonl", "data.path=mine.jsonl", "trainer.max_steps=7"))
    assert (job.data.path, job.trainer.max_steps) == ("mine.jsonl", 7)
    assert job.data.answers.value == "given", "data=jsonl replaces the data group that model=tiny chose"


def test_the_output_directory_is_named_after_model_and_draft():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train_eagle3")
    raw = OmegaConf.to_container(config, resolve=False)["output_dir"]
    assert raw == "outputs/${hydra:runtime.choices.model}-${hydra:runtime.choices.draft}"
