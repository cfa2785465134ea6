"""The schemas of every group, by the names that conf/ calls them by."""

from hydra.core.config_store import ConfigStore

from nemo_speculative.config.schema.data import DataConfig, HubDataConfig, TinyDataConfig
from nemo_speculative.config.schema.draft import Eagle3DraftConfig, EagleDraftConfig
from nemo_speculative.config.schema.evaluation import EvaluationConfig
from nemo_speculative.config.schema.exporter import (
    ExporterConfig,
    FormConfig,
    SpeculatorsFormConfig,
    TransformersFormConfig,
)
from nemo_speculative.config.schema.jobs import ConvertJob, EvaluateJob, PruneJob, TrainJob
from nemo_speculative.config.schema.loss import (
    HardCrossEntropyConfig,
    KLDivergenceConfig,
    LKAlphaConfig,
    LKLambdaConfig,
    LossConfig,
    TotalVariationConfig,
)
from nemo_speculative.config.schema.model import BackendConfig, ModelConfig, TinyModelConfig
from nemo_speculative.config.schema.optimizer import MuonConfig, OptimizerConfig
from nemo_speculative.config.schema.trainer import (
    LoggerConfig,
    ParallelismConfig,
    TensorBoardConfig,
    TrainerConfig,
    WandbConfig,
)

SCHEMAS: dict[tuple[str, str], type] = {
    ("model", "hf"): ModelConfig,
    ("model", "tiny"): TinyModelConfig,
    ("draft", "eagle"): EagleDraftConfig,
    ("draft", "eagle3"): Eagle3DraftConfig,
    ("backend", "hf"): BackendConfig,
    ("data", "jsonl"): DataConfig,
    ("data", "tiny"): TinyDataConfig,
    ("data", "hub"): HubDataConfig,
    ("loss", "soft_ce"): LossConfig,
    ("loss", "hard_ce"): HardCrossEntropyConfig,
    ("loss", "kl"): KLDivergenceConfig,
    ("loss", "tv"): TotalVariationConfig,
    ("loss", "lk_alpha"): LKAlphaConfig,
    ("loss", "lk_lambda"): LKLambdaConfig,
    ("optimizer", "adamw"): OptimizerConfig,
    ("optimizer", "muon"): MuonConfig,
    ("parallelism", "fsdp2"): ParallelismConfig,
    ("trainer", "default"): TrainerConfig,
    ("exporter", "sglang"): ExporterConfig,
    ("logger", "none"): LoggerConfig,
    ("logger", "tensorboard"): TensorBoardConfig,
    ("logger", "wandb"): WandbConfig,
    ("evaluation", "default"): EvaluationConfig,
    ("form", "sglang"): FormConfig,
    ("form", "speculators"): SpeculatorsFormConfig,
    ("form", "transformers"): TransformersFormConfig,
}
"""Each group's schemas; conf/<group>/*.yaml names one of them as ``/schema/<group>``."""
PACKAGES = {"loss": "draft.loss"}
"""Where a group's keys lie, if not below the group's own name."""


def register() -> None:
    """Makes the schemas known to Hydra as ``/schema/<group>: <name>``."""
    store = ConfigStore.instance()
    for (group, name), node in SCHEMAS.items():
        store.store(group=f"schema/{group}", name=name, node=node, package=PACKAGES.get(group, group))
    store.store(name="train_job", node=TrainJob)
    store.store(name="evaluate_job", node=EvaluateJob)
    store.store(name="prune_job", node=PruneJob)
    store.store(name="convert_job", node=ConvertJob)
