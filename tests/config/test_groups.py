"""Every file of conf/ composes, is typed, and names things that exist."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from nemo_speculative.config.app import explain, to_job
from nemo_speculative.config.groups import CONF, PACKAGES, SCHEMAS
from nemo_speculative.config.schema import TrainJob


def files_of_groups() -> list[tuple[str, str]]:
    return sorted(
        (file.parent.relative_to(CONF).as_posix(), file.stem) for file in CONF.rglob("*.yaml") if file.parent != CONF
    )


def groups_of_root(root: Path) -> list[str]:
    """The groups of a root's defaults list, and those of the options of its groups."""
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
    ("capture_features", "backend", "features"), ("capture_features", "experiment", "llama31_8b_features"),
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
"""Settings that the options of a root's group need where the defaults do not fit all of them."""


def composed(root: str, *overrides: str) -> Any:
    """The configuration, with values for the keys that a user must set."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(root, overrides=list(overrides))
    if "output_dir" in config:  # its default needs a running Hydra
        config.output_dir = "out"
    for key in OmegaConf.missing_keys(config):
        OmegaConf.update(config, key, "somewhere")
    return config


def named_objects(value: Any) -> Iterator[str]:
    """Every string that ``hydra.utils`` imports: ``_target_`` and ``objective``, at any depth."""
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
def test_every_file_becomes_a_typed_job_with_importable_names(root, group, option):
    job = to_job(composed(root, f"{group}={option}", *SUITED.get((root, group), [])))
    assert dataclasses.is_dataclass(job)
    if root == "train_eagle3":
        assert isinstance(job, TrainJob)
        for field in dataclasses.fields(TrainJob):
            assert not isinstance(getattr(job, field.name), dict), f"{field.name} is untyped"
    for name in named_objects(dataclasses.asdict(job)):
        assert callable(get_object(name)), name


def schema_groups() -> list[tuple[str, str]]:
    """Combinations of options, one of each group with a schema, in which every option occurs."""
    return [(group, option) for group, option in GROUPS if group in SCHEMAS and group in ROOTS["train_eagle3"]]


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
    """The root types every group; a file whose schema adds keys names that schema."""
    node = OmegaConf.select(composed("train_eagle3", f"{group}={option}"), PACKAGES.get(group, group))
    assert OmegaConf.get_type(node) in SCHEMAS[group].values()


def plain_values(config: Any) -> dict[str, Any]:
    """Every key of a composed configuration with its value."""
    return dict(leaves(OmegaConf.to_container(config, resolve=True, enum_to_str=True)))


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_the_first_command_trains_on_the_embedded_target():
    values = plain_values(composed("train_eagle3"))
    expected = {
        "model._target_": "nemo_speculative.targets.demo.prepare_tiny", "model.dtype": "float32",
        "data._target_": "nemo_speculative.data.stdlib.load_stdlib", "data.answers": "target", "data.max_length": 512,
        "data.max_conversations": 2000, "draft.ttt_steps": 5, "optimizer.lr": 3e-3, "optimizer.decay_type": "linear",
        "trainer.max_steps": 400, "trainer.dtype": "float32", "trainer.global_batch_size": 4,
        "trainer.save_interval": 200, "evaluation.max_new_tokens": 128, "evaluation.num_threads": 1,
    }  # fmt: skip
    assert {key: values[key] for key in expected} == expected


def test_another_model_changes_only_the_model():
    """Apart from the model's keys, only the defaults of the embedded target change."""
    local, llama = (plain_values(composed("train_eagle3", f"model={name}")) for name in ("local", "llama31_8b"))
    assert {key for key in local if local[key] != llama[key]} == {"model.path", "model.dtype", "trainer.dtype"}
    assert (llama["trainer.dtype"], llama["trainer.max_steps"], llama["draft.ttt_steps"]) == ("bfloat16", None, 7)
    schema = plain_values(OmegaConf.structured(SCHEMAS["trainer"]["default"]))
    assert all(local[f"trainer.{key}"] == value for key, value in schema.items())


def test_a_data_path_is_read_by_its_kind(tmp_path):
    file = tmp_path / "mine.jsonl"
    row = {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file.write_text((json.dumps(row) + "\n") * 9)
    job = to_job(composed("train_eagle3", "model=llama31_8b", f"data.path={file}"))
    split = get_object(job.data._target_)(job.data, 0)
    assert len(split.training) + len(split.held_out) == 9
    assert job.data.repository == "HuggingFaceH4/ultrachat_200k", "without data.path, the hub's"


def test_the_command_line_overrides_the_defaults_of_the_embedded_target():
    job = to_job(composed("train_eagle3", "model=tiny", "data=jsonl", "data.path=mine.jsonl", "trainer.max_steps=7"))
    assert (job.data.path, job.trainer.max_steps) == ("mine.jsonl", 7)
    assert job.data.answers.value == "given", "data=jsonl replaces the data of the embedded target"


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_every_file_shows_its_values(group, option):
    """Every file has keys, or a base that it changes; no file leaves all values to the schema."""
    content = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
    entries = [key for entry in content.get("defaults", []) if isinstance(entry, dict) for key in entry]
    assert content.keys() - {"defaults"} or any(entry.startswith("override ") for entry in entries)


COMPLETE = {
    ("trainer", "default"), ("optimizer", "adamw"), ("optimizer", "muon"), ("parallelism", "single"),
    ("exporter", "sglang"), ("evaluation", "default"), ("logger", "wandb"), ("data", "jsonl"), ("model", "tiny"),
    ("backend", "hf"), ("backend", "hf_fsdp2"), ("backend", "hf_tp"), ("backend", "sglang"), ("backend", "remote"),
    ("backend", "features"), ("server", "sglang"), ("engine", "hf"), ("engine", "endpoint"), ("draft", "eagle1"),
    ("draft", "eagle3"), ("loss", "kl"), ("loss", "lk_lambda"), ("loss", "soft_ce"), ("form", "sglang"),
    ("logger", "tensorboard"),
}  # fmt: skip
"""Options that show every key of their schema, with its default."""
OTHER_DEFAULTS = {"trainer.dtype", "backend.urls", "engine.urls", "backend.mask_convention", "backend.draft"}
"""Keys whose default in conf/ refers to another group, or is an example."""


@pytest.mark.parametrize(("group", "option"), sorted(COMPLETE))
def test_the_yaml_shows_every_key_with_the_default_of_its_schema(group, option):
    content = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
    name = "eagle" if option == "eagle1" else option
    schema = OmegaConf.structured(SCHEMAS[group].get(name) or SCHEMAS[group]["default"])
    shown = content.get(group, {key: value for key, value in content.items() if key != "defaults"})
    values = {k: v for k, v in shown.items() if k != "_target_" and f"{group}.{k}" not in OTHER_DEFAULTS}
    merged = OmegaConf.merge(schema, values)
    assert OmegaConf.to_container(merged) == OmegaConf.to_container(schema)
    hidden = {key for key in schema if str(key).startswith("_") or key in ("objective", "loss")}
    assert set(shown) - {"_target_"} == set(schema) - hidden


@pytest.mark.parametrize("root", sorted(ROOTS))
def test_a_root_shows_its_own_keys_with_the_defaults_of_its_schema(root):
    content = yaml.safe_load((CONF / f"{root}.yaml").read_text())
    if content["defaults"][0] == "train_eagle3":
        return  # another root with another draft
    schema = OmegaConf.structured(OmegaConf.get_type(composed(root)))
    groups = {key for key in schema if key in ROOTS[root]}
    shown = {key: value for key, value in content.items() if key not in ("defaults", "output_dir")}
    assert {*shown, *groups} >= {*schema} - {"output_dir", "backend", "model"}
    merged = OmegaConf.merge(schema, shown)
    assert OmegaConf.to_container(merged) == OmegaConf.to_container(schema)


EXPERIMENTS = [option for group, option in GROUPS if group == "experiment"]
LONGEST_DELTA = 20


@pytest.mark.parametrize("option", EXPERIMENTS)
def test_an_experiment_is_a_short_delta_with_a_header(option):
    lines = (CONF / "experiment" / f"{option}.yaml").read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert lines[: len(header)] == header and header[0] == "# @package _global_"
    assert len(lines) - len(header) <= LONGEST_DELTA
    text = "\n".join(header[1:])
    assert all(f"# {part}:" in text for part in ("Needs", "Command", "Override"))
    assert f"experiment={option}" in text or option == "tiny"


def test_the_output_directory_is_named_after_model_and_draft():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train_eagle3")
    raw = OmegaConf.to_container(config, resolve=False)["output_dir"]
    assert raw == "outputs/${hydra:runtime.choices.model}-${hydra:runtime.choices.draft}"
