"""The directory conf/: its groups, the schemas that its files name, and the text of ``--help``, which lists them."""

import textwrap
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore

from nemo_speculative.config import schema

_INSTALLED = Path(__file__).parents[1] / "conf"
CONF = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "conf"
"""conf/ inside the package where it was installed from a wheel, else next to it."""
SCHEMAS: dict[str, dict[str, type]] = {
    "model": {"hf": schema.ModelConfig, "tiny": schema.TinyModelConfig},
    "draft": {"eagle": schema.EagleDraftConfig, "eagle3": schema.Eagle3DraftConfig},
    "backend": {
        "hf": schema.HFBackendConfig, "hf_fsdp2": schema.ShardedHFBackendConfig,
        "hf_tp": schema.TensorParallelHFBackendConfig, "sglang": schema.SGLangBackendConfig,
        "remote": schema.RemoteBackendConfig, "features": schema.FeaturesBackendConfig,
    },
    "data": {
        "jsonl": schema.DataConfig, "tiny": schema.TinyDataConfig, "dataset": schema.DatasetConfig,
        "mix": schema.MixDataConfig,
    },
    "loss": {"default": schema.LossConfig, "kl": schema.KLDivergenceConfig, "lk_lambda": schema.LKLambdaConfig},
    "optimizer": {"adamw": schema.OptimizerConfig, "muon": schema.MuonConfig},
    "parallelism": {"default": schema.ParallelismConfig},
    "trainer": {"default": schema.TrainerConfig},
    "exporter": {"sglang": schema.ExporterConfig},
    "logger": {"default": schema.LoggerConfig, "wandb": schema.WandbConfig},
    "evaluation": {"default": schema.EvaluationConfig},
    "suite": {"jsonl": schema.SuiteConfig},
    "server": {"sglang": schema.ServerConfig},
    "engine": {"hf": schema.HFEngineConfig, "endpoint": schema.EndpointConfig},
    "reasoning": {"tagged": schema.ReasoningConfig},
    "form": {"default": schema.FormConfig},
}  # fmt: skip
"""Each group's schemas; conf/<group>/*.yaml names one of them as ``/schema/<group>: <name>``."""
JOBS: dict[str, type] = {
    "train_eagle3": schema.TrainJob, "capture_features": schema.CaptureJob, "inspect_data": schema.InspectJob,
    "prepare_data": schema.PrepareJob, "generate_data": schema.GenerateJob, "merge_data": schema.MergeJob,
    "evaluate": schema.EvaluateJob, "benchmark": schema.BenchmarkJob, "serve_target": schema.ServeTargetJob,
    "convert_draft": schema.ConvertJob, "prune_vocabulary": schema.PruneJob,
}  # fmt: skip
"""The schema of each program, which conf/<program>.yaml names as ``/schema/job: <program>``."""
PACKAGES = {"loss": "draft.loss", "job": "_global_"}
"""Packages of the groups whose keys are not below the group's own name."""
FOOTER = """
Keys      KEY=VALUE overrides any key; --cfg job prints every key with its value, and
          docs/configuration.md explains them.
Sweeps    --multirun KEY=A,B runs every combination.
Your own  hydra.searchpath=[file:///DIR] adds the YAML files of DIR to the groups.
"""


def register_schemas() -> None:
    """Makes the schemas known to Hydra."""
    store = ConfigStore.instance().store
    for group, schemas in {**SCHEMAS, "job": JOBS}.items():
        for name, node in schemas.items():
            store(group=f"schema/{group}", name=name, node=node, package=PACKAGES.get(group, group))


def options(group: str) -> list[str]:
    """The options of a config group."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def help_text(root: str, description: str) -> str:
    """The help of the recipe with the root configuration ``root``; ``description`` is the recipe's docstring.

    Hydra's own help composes the configuration and copies its store once per group, which takes ten seconds here.
    """
    choices = _choices(root)
    width = max(map(len, choices), default=0) + 2
    lines = [description.strip(), "", "Groups    GROUP=OPTION chooses one; * is the default"]
    for group, default in choices.items():
        names = ", ".join(f"{name}*" if name == default else name for name in options(group))
        lines += textwrap.wrap(
            names, 120, initial_indent=f"  {group:{width}}", subsequent_indent=" " * (width + 2), break_on_hyphens=False
        )
    return "\n".join([*lines, FOOTER])


def _choices(root: str) -> dict[str, Any]:
    """Each group that ``root`` composes and a user chooses from, with its default; roots may extend one another."""
    result: dict[str, Any] = {}
    for entry in yaml.safe_load((CONF / f"{root}.yaml").read_text())["defaults"]:
        if isinstance(entry, str) and (CONF / f"{entry}.yaml").is_file():
            result |= _choices(entry)
        for key, option in entry.items() if isinstance(entry, dict) else ():
            group = key.rpartition(" ")[2].lstrip("/")
            if group not in ("hydra", "model_draft") and (CONF / group).is_dir():
                result[group] = option
    return result
