"""The schemas of every group, by the names that conf/ calls them by."""

from hydra.core.config_store import ConfigStore

from nemo_speculative.config import schema

SCHEMAS: dict[tuple[str, str], type] = {
    ("model", "hf"): schema.ModelConfig,
    ("model", "tiny"): schema.TinyModelConfig,
    ("draft", "eagle"): schema.EagleDraftConfig,
    ("draft", "eagle3"): schema.Eagle3DraftConfig,
    ("backend", "hf"): schema.HFBackendConfig,
    ("backend", "hf_fsdp2"): schema.ShardedHFBackendConfig,
    ("backend", "hf_tp"): schema.TensorParallelHFBackendConfig,
    ("backend", "sglang"): schema.SGLangBackendConfig,
    ("backend", "remote"): schema.RemoteBackendConfig,
    ("backend", "features"): schema.FeaturesBackendConfig,
    ("data", "jsonl"): schema.DataConfig,
    ("data", "tiny"): schema.TinyDataConfig,
    ("data", "default"): schema.DefaultDataConfig,
    ("data", "dataset"): schema.DatasetConfig,
    ("data", "mix"): schema.MixDataConfig,
    ("loss", "soft_ce"): schema.LossConfig,
    ("loss", "hard_ce"): schema.HardCrossEntropyConfig,
    ("loss", "kl"): schema.KLDivergenceConfig,
    ("loss", "tv"): schema.TotalVariationConfig,
    ("loss", "lk_alpha"): schema.LKAlphaConfig,
    ("loss", "lk_lambda"): schema.LKLambdaConfig,
    ("optimizer", "adamw"): schema.OptimizerConfig,
    ("optimizer", "muon"): schema.MuonConfig,
    ("parallelism", "default"): schema.ParallelismConfig,
    ("trainer", "default"): schema.TrainerConfig,
    ("exporter", "sglang"): schema.ExporterConfig,
    ("logger", "none"): schema.LoggerConfig,
    ("logger", "tensorboard"): schema.TensorBoardConfig,
    ("logger", "wandb"): schema.WandbConfig,
    ("evaluation", "default"): schema.EvaluationConfig,
    ("suite", "jsonl"): schema.SuiteConfig,
    ("server", "sglang"): schema.ServerConfig,
    ("engine", "hf"): schema.HFEngineConfig,
    ("engine", "endpoint"): schema.EndpointConfig,
    ("reasoning", "tagged"): schema.ReasoningConfig,
    ("form", "sglang"): schema.FormConfig,
    ("form", "speculators"): schema.SpeculatorsFormConfig,
    ("form", "transformers"): schema.TransformersFormConfig,
}
"""Each group's schemas; conf/<group>/*.yaml names one of them as ``/schema/<group>``."""
PACKAGES = {"loss": "draft.loss"}
"""Packages of the groups whose keys are not below the group's own name."""


def register() -> None:
    """Makes the schemas known to Hydra as ``/schema/<group>: <name>``."""
    store = ConfigStore.instance()
    for (group, name), node in SCHEMAS.items():
        store.store(group=f"schema/{group}", name=name, node=node, package=PACKAGES.get(group, group))
    store.store(name="train_job", node=schema.TrainJob)
    store.store(name="capture_job", node=schema.CaptureJob)
    store.store(name="evaluate_job", node=schema.EvaluateJob)
    store.store(name="benchmark_job", node=schema.BenchmarkJob)
    store.store(name="serve_target_job", node=schema.ServeTargetJob)
    store.store(name="prune_job", node=schema.PruneJob)
    store.store(name="prepare_job", node=schema.PrepareJob)
    store.store(name="convert_job", node=schema.ConvertJob)
    store.store(name="inspect_job", node=schema.InspectJob)
    store.store(name="generate_job", node=schema.GenerateJob)
    store.store(name="merge_job", node=schema.MergeJob)
