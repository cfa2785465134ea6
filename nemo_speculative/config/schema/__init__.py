"""The typed schema of every config group.

A field's documentation is the string below it; ``docs/configuration.md`` is generated from these files.  Contradictions
inside a group are rejected in its ``__post_init__``, those between groups in :meth:`TrainJob.__post_init__`; derived
numbers are methods.
"""

from nemo_speculative.config.schema.benchmark import BenchmarkJob, ServerConfig, SuiteConfig
from nemo_speculative.config.schema.capture import CaptureJob, FeatureDtype
from nemo_speculative.config.schema.common import Dtype
from nemo_speculative.config.schema.data import Answers, DataConfig, TinyDataConfig
from nemo_speculative.config.schema.draft import (
    DepthSampling,
    DraftConfig,
    Eagle3DraftConfig,
    EagleDraftConfig,
    FeatureNoise,
    InitFromTarget,
    MaskConvention,
    Normalization,
    VocabularySize,
    aux_layers_for,
    parse_vocab_size,
)
from nemo_speculative.config.schema.evaluation import EvaluationConfig
from nemo_speculative.config.schema.exporter import (
    ExporterConfig,
    FormConfig,
    SpeculatorsFormConfig,
    TransformersFormConfig,
)
from nemo_speculative.config.schema.generate import (
    EndpointConfig,
    EngineConfig,
    GenerateJob,
    HFEngineConfig,
    MergeJob,
    ReasoningConfig,
)
from nemo_speculative.config.schema.inspect import InspectJob
from nemo_speculative.config.schema.jobs import ConvertJob, EvaluateJob, PruneJob, Resume, TrainJob
from nemo_speculative.config.schema.loss import (
    HardCrossEntropyConfig,
    KLDivergenceConfig,
    LKAlphaConfig,
    LKLambdaConfig,
    LossConfig,
    TotalVariationConfig,
)
from nemo_speculative.config.schema.model import (
    READ_AHEAD,
    BackendConfig,
    FeaturesBackendConfig,
    HFBackendConfig,
    ModelConfig,
    PlacementConfig,
    RemoteBackendConfig,
    SGLangBackendConfig,
    ShardedHFBackendConfig,
    TensorParallelHFBackendConfig,
    TinyModelConfig,
)
from nemo_speculative.config.schema.optimizer import DecayType, MuonConfig, OptimizerConfig
from nemo_speculative.config.schema.prepare import (
    DatasetConfig,
    DefaultDataConfig,
    FilterConfig,
    MixDataConfig,
    PrepareJob,
    SourceConfig,
)
from nemo_speculative.config.schema.serve import ServeTargetJob
from nemo_speculative.config.schema.trainer import (
    LoggerConfig,
    ParallelismConfig,
    TensorBoardConfig,
    TrainerConfig,
    WandbConfig,
    WandbMode,
)

__all__ = [
    "READ_AHEAD",
    "Answers",
    "BackendConfig",
    "BenchmarkJob",
    "CaptureJob",
    "ConvertJob",
    "DataConfig",
    "DatasetConfig",
    "DecayType",
    "DefaultDataConfig",
    "DepthSampling",
    "DraftConfig",
    "Dtype",
    "Eagle3DraftConfig",
    "EagleDraftConfig",
    "EndpointConfig",
    "EngineConfig",
    "EvaluateJob",
    "EvaluationConfig",
    "ExporterConfig",
    "FeatureDtype",
    "FeatureNoise",
    "FeaturesBackendConfig",
    "FilterConfig",
    "FormConfig",
    "GenerateJob",
    "HFBackendConfig",
    "HFEngineConfig",
    "HardCrossEntropyConfig",
    "InitFromTarget",
    "InspectJob",
    "KLDivergenceConfig",
    "LKAlphaConfig",
    "LKLambdaConfig",
    "LoggerConfig",
    "LossConfig",
    "MaskConvention",
    "MergeJob",
    "MixDataConfig",
    "ModelConfig",
    "MuonConfig",
    "Normalization",
    "OptimizerConfig",
    "ParallelismConfig",
    "PlacementConfig",
    "PrepareJob",
    "PruneJob",
    "ReasoningConfig",
    "RemoteBackendConfig",
    "Resume",
    "SGLangBackendConfig",
    "ServeTargetJob",
    "ServerConfig",
    "ShardedHFBackendConfig",
    "SourceConfig",
    "SpeculatorsFormConfig",
    "SuiteConfig",
    "TensorBoardConfig",
    "TensorParallelHFBackendConfig",
    "TinyDataConfig",
    "TinyModelConfig",
    "TotalVariationConfig",
    "TrainJob",
    "TrainerConfig",
    "TransformersFormConfig",
    "VocabularySize",
    "WandbConfig",
    "WandbMode",
    "aux_layers_for",
    "parse_vocab_size",
]
