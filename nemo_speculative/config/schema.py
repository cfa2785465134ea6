"""The typed schema behind every config group.

A field's documentation is the string below it; ``docs/configuration.md`` is generated from this file.  Contradictions
inside a group are rejected in its ``__post_init__``, those between groups in :meth:`TrainJob.__post_init__`; derived
numbers are methods.
"""

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from nemo_speculative.errors import UserError
from nemo_speculative.shapes import VocabularySize, aux_layers_for, parse_vocab_size
from nemo_speculative.speculative import Speculative, default_draft_tokens, largest_tree, smallest_tree


class Dtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Answers(Enum):
    given = "given"
    target = "target"


class MaskConvention(Enum):
    serving = "serving"
    official = "official"
    automodel = "automodel"


class Normalization(Enum):
    token = "token"
    conversation = "conversation"


class FeatureNoise(Enum):
    none = "none"
    paper = "paper"
    official = "official"


class Resume(Enum):
    never = "never"
    auto = "auto"


class DecayType(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    sqrt = "sqrt"


class WandbMode(Enum):
    online = "online"
    offline = "offline"


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _require_positive(config: Any, group: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or value > 0, f"{group}.{name} is {value}: it must be greater than 0")


@dataclass
class ModelConfig:
    """The target model, whose decoding is to be made faster."""

    _target_: str = "nemo_speculative.targets.resolve.resolve_target"
    path: str = MISSING
    """A Hugging Face directory on this machine, or a repository name on the hub."""
    revision: Optional[str] = None
    """Branch, tag or commit of a hub repository."""
    dtype: Dtype = Dtype.float32
    """The dtype the frozen target runs in."""
    trust_remote_code: bool = False
    """Whether a repository's own modelling code may run."""


@dataclass
class TinyModelConfig(ModelConfig):
    """The embedded target: made on first use from the standard library's documentation, then cached."""

    _target_: str = "nemo_speculative.targets.tiny.prepare_tiny"
    path: str = "embedded"
    cache_dir: str = "cache/targets"
    """Where it is kept."""
    num_layers: int = 10
    """Decoder layers; the default aux layers need at least 7."""
    hidden_size: int = 128
    intermediate_size: int = 384
    head_dim: int = 64
    vocab_size: int = 1024
    """Entries of its byte-level BPE."""
    context: int = 1024
    """Its longest sequence, in tokens."""
    row_tokens: int = 256
    """Tokens in one row of its training."""
    rows_per_step: int = 8
    steps: int = 1000
    """Training steps; by steps, not seconds, so that two machines make the same target."""
    warmup_steps: int = 50
    muon_lr: float = 0.03
    """Learning rate of the matrices."""
    adamw_lr: float = 0.004
    """Learning rate of the embedding and the norms."""
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            self.path == "embedded",
            f"model.path is {self.path}, and model is tiny, the embedded target: add model=local for a model of yours",
        )
        _require(self.num_layers >= 7, f"model.num_layers is {self.num_layers}: the embedded target needs at least 7")
        _require_positive(self, "model", "steps", "rows_per_step", "row_tokens", "warmup_steps", "context")


@dataclass
class InitFromTarget:
    """Which parts of the draft start from the target's weights instead of random ones."""

    head: bool = True
    """lm_head from the target head's rows."""
    layer: bool = True
    """The decoder layer from the target's last one."""
    fc: bool = True
    """fc as the identity on the highest aux state."""


@dataclass
class DraftConfig:
    """The draft network and its training objective; every number that is null is the target's."""

    _target_: str = MISSING
    objective: str = MISSING
    """The class of the loss."""
    config: Optional[str] = None
    """A draft's config.json in the published EAGLE or SpecForge form: its numbers fill what is null here."""
    init_from: Optional[str] = None
    """A draft to start from: a checkpoint of this project, or another project's."""
    num_layers: Optional[int] = None
    """Decoder layers of the draft; null: 1."""
    intermediate_size: Optional[int] = None
    num_heads: Optional[int] = None
    num_kv_heads: Optional[int] = None
    head_dim: Optional[int] = None
    num_steps: int = 7
    """Steps of the unroll in training (T)."""
    step_decay: float = 0.8
    """Step i weighs step_decay ** i in the loss."""
    mask_convention: MaskConvention = MaskConvention.serving
    """Which slots are supervised: serving is what inference asks for; official and automodel as those frameworks do."""
    normalization: Normalization = Normalization.token
    """What weighs the same in the loss: every supervised token, or every conversation."""
    init_from_target: InitFromTarget = field(default_factory=InitFromTarget)

    def __post_init__(self) -> None:
        _require_positive(
            self, "draft", "num_steps", "step_decay", "num_layers", "intermediate_size", "num_heads", "num_kv_heads",
            "head_dim",
        )  # fmt: skip

    def chosen_aux_layers(self, num_layers: int) -> list[int]:
        """The aux layers that it reads of a target of ``num_layers`` layers."""
        return []

    def vocabulary(self, target_vocab_size: int) -> VocabularySize:
        """How many ids of a target of ``target_vocab_size`` it can propose."""
        return VocabularySize(target_vocab_size)


@dataclass
class LossConfig:
    """Between the target's distribution p and the draft's q: soft cross-entropy."""

    _target_: str = "nemo_speculative.objectives.losses.SoftCrossEntropy"


@dataclass
class HardCrossEntropyConfig(LossConfig):
    """Cross-entropy against the target's likeliest token."""

    _target_: str = "nemo_speculative.objectives.losses.HardCrossEntropy"


@dataclass
class KLDivergenceConfig(LossConfig):
    """KL divergence of p from q, both softened by a temperature."""

    _target_: str = "nemo_speculative.objectives.losses.KLDivergence"
    temperature: float = 1.0
    """Above 1, unlikely tokens weigh more."""

    def __post_init__(self) -> None:
        _require(
            0 < self.temperature < math.inf,
            f"draft.loss.temperature is {self.temperature}: expected a number above 0, e.g. 1",
        )


@dataclass
class TotalVariationConfig(LossConfig):
    """Total variation: the probability that a drafted token is rejected."""

    _target_: str = "nemo_speculative.objectives.losses.TotalVariation"


@dataclass
class LKAlphaConfig(LossConfig):
    """LK^alpha: minus the logarithm of the probability that a drafted token is accepted."""

    _target_: str = "nemo_speculative.objectives.losses.LKAlpha"


@dataclass
class LKLambdaConfig(LossConfig):
    """LK^lambda: from KL divergence towards total variation, the more is accepted."""

    _target_: str = "nemo_speculative.objectives.losses.LKLambda"
    eta: float = 3.0
    """How fast: KL weighs exp(-eta * acceptance); 0 is KL alone."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.eta < math.inf,
            f"draft.loss.eta is {self.eta}: expected a number of at least 0, e.g. 3",
        )


@dataclass
class Eagle3DraftConfig(DraftConfig):
    """EAGLE-3, and EAGLE-3.1 by its three switches."""

    _target_: str = "nemo_speculative.drafts.eagle3.Eagle3Draft"
    objective: str = "nemo_speculative.objectives.eagle3.Eagle3Objective"
    hidden_size: Optional[int] = None
    """Where it is not the target's, the draft trains an embedding of its own."""
    aux_layers: Optional[list[int]] = None
    """Decoder layers (0-based) whose outputs are the aux hidden states; null: [1, N//2 - 1, N - 4] for N layers."""
    vocab_size: Any = "auto"
    """Of the draft: a number, a coverage such as 99.5%, full, target_head (no head of its own), or auto: 32000, or the
    whole target vocabulary where that is smaller."""
    fc_norm: bool = False
    """EAGLE-3.1: an RMSNorm over each aux state before fc."""
    norm_before_fc: bool = False
    """The other form: one RMSNorm over all aux states together."""
    norm_output: bool = False
    """EAGLE-3.1: the next step is fed the state after the final norm."""
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "draft", "hidden_size")
        _require(
            not (self.fc_norm and self.norm_before_fc),
            "draft.fc_norm and draft.norm_before_fc are both true: they are two forms of one norm; set one of them",
        )
        if self.aux_layers is not None:
            # A server captures them in this order, whatever the order of the list.
            ascending = self.aux_layers == sorted(set(self.aux_layers))
            _require(
                bool(self.aux_layers) and ascending,
                f"draft.aux_layers is {self.aux_layers}: expected distinct layers in ascending order, e.g. [1, 3, 4]",
            )
        parse_vocab_size(self.vocab_size, 1 << 62)

    def chosen_aux_layers(self, num_layers: int) -> list[int]:
        return aux_layers_for(num_layers, self.aux_layers)

    def vocabulary(self, target_vocab_size: int) -> VocabularySize:
        return parse_vocab_size(self.vocab_size, target_vocab_size)


@dataclass
class EagleDraftConfig(DraftConfig):
    """EAGLE-1 and EAGLE-2: feature autoregression under the target's own head."""

    _target_: str = "nemo_speculative.drafts.eagle.EagleDraft"
    objective: str = "nemo_speculative.objectives.eagle.EagleObjective"
    num_steps: int = 1
    """Aligned passes over the draft's own features (HASS); 1 is EAGLE's."""
    vloss_w: float = 1.0
    """Weight of the regression of the target's next feature (smooth L1)."""
    ploss_w: float = 0.1
    """Weight of the cross-entropy between the two distributions."""
    topk_w: float = 0.0
    """Weight of the cross-entropy over the target's topk likeliest tokens (HASS uses 1)."""
    topk: int = 10
    noise: FeatureNoise = FeatureNoise.paper
    """Uniform noise on the features read in training: ±0.1 (paper), or that times 512 / length (official code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "draft", "topk")
        for name in ("vloss_w", "ploss_w", "topk_w"):
            _require(getattr(self, name) >= 0, f"draft.{name} is {getattr(self, name)}: it must not be negative")


@dataclass
class BackendConfig:
    """What runs the frozen target in training."""

    _target_: str = "nemo_speculative.targets.hf.HFTarget"
    attn_implementation: str = "sdpa"
    """transformers' name of the target's attention."""


@dataclass
class DataConfig:
    """Conversations, and how they become rows of tokens."""

    _target_: str = "nemo_speculative.data.sources.load_jsonl"
    path: Optional[str] = MISSING
    """JSONL: {"conversations": [{"role", "content"}]} a line, or {"input_ids", "loss_mask"}."""
    held_out_path: Optional[str] = None
    """The same, for validation and evaluation; null: held_out_share of path, chosen by id."""
    held_out_share: float = 0.05
    """Share of the conversations kept out of training when held_out_path is null."""
    max_conversations: Optional[int] = None
    """Train on the first so many only (of a seeded order)."""
    answers: Answers = Answers.given
    """given: train on the answers in the data; target: the target answers every question itself first (on-policy)."""
    max_answer_tokens: int = 512
    """Longest answer generated with answers=target, in tokens."""
    generation_batch_size: int = 64
    """Conversations answered at once with answers=target."""
    max_length: Optional[int] = None
    """Longest conversation, in tokens; what is cut off is counted. null: 2048, or the target's context if shorter."""
    row_tokens: Optional[int] = None
    """Tokens in one packed row; null: max_length."""
    cache_dir: str = "cache/answers"
    """Where generated answers are kept."""

    def __post_init__(self) -> None:
        _require_positive(
            self, "data", "max_length", "row_tokens", "max_answer_tokens", "generation_batch_size", "max_conversations"
        )
        _require(
            0 <= self.held_out_share < 1,
            f"data.held_out_share is {self.held_out_share}: expected a share of at least 0 and below 1",
        )

    def lengths(self, context: int) -> tuple[int, int]:
        """max_length and row_tokens for a target whose longest sequence is ``context`` tokens.

        Raises:
            UserError: max_length is longer than that, or than a row.
        """
        longest = self.max_length or min(2048, context)
        row = self.row_tokens or longest
        _require(
            longest <= context,
            f"data.max_length is {longest}, longer than the target's context of {context}: lower data.max_length",
        )
        _require(
            longest <= row,
            f"data.max_length is {longest}, longer than data.row_tokens={row}: a conversation must fit into one row; "
            "raise data.row_tokens or lower data.max_length",
        )
        return longest, row


@dataclass
class TinyDataConfig(DataConfig):
    """Questions on the standard library, answered by the target itself."""

    _target_: str = "nemo_speculative.data.sources.load_stdlib"
    path: Optional[str] = None


@dataclass
class HubDataConfig(DataConfig):
    """A chat dataset that the `datasets` library can load: a hub repository or a directory."""

    _target_: str = "nemo_speculative.data.sources.load_hub"
    path: Optional[str] = None
    repository: str = MISSING
    """Name on the hub, or a directory of JSON, JSONL or Parquet files."""
    split: str = "train"
    held_out_split: Optional[str] = None
    """null: held_out_share of split."""
    messages_key: str = "messages"
    """The column that holds the messages."""


@dataclass
class OptimizerConfig:
    """AdamW with torchtitan's warm-up, stable and decay schedule."""

    _target_: str = "nemo_speculative.training.optimization.adamw"
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_ratio: float = 0.015
    """Share of the steps in which the learning rate rises."""
    decay_ratio: float = 1.0
    """Share of the steps after warm-up in which it falls."""
    decay_type: DecayType = DecayType.cosine
    """constant: it does not fall."""
    min_lr_factor: float = 0.0
    """The learning rate at the end, as a share of lr."""
    clip_norm: float = 0.5
    """Largest norm of the gradient."""
    ema_decay: Optional[float] = None
    """What a step leaves of the average of the weights that is measured and exported; null: no average is kept."""

    def __post_init__(self) -> None:
        _require_positive(self, "optimizer", "lr", "clip_norm", "eps")
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"optimizer.betas is {self.betas}: expected two numbers of at least 0 and below 1",
        )
        _require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}: it must not be negative")
        for name in ("warmup_ratio", "decay_ratio", "min_lr_factor"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"optimizer.{name} is {value}: expected a share between 0 and 1")
        _require(
            self.decay_type is not DecayType.constant or self.min_lr_factor == 0,
            f"optimizer.min_lr_factor is {self.min_lr_factor}, and with optimizer.decay_type=constant nothing falls to "
            "it: leave out one of them",
        )
        _require(
            self.ema_decay is None or 0 <= self.ema_decay < 1,
            f"optimizer.ema_decay is {self.ema_decay}: expected at least 0 and below 1, e.g. 0.999, or null",
        )

    def decay_share(self, warmup_share: float) -> float:
        """Share of all steps in which the learning rate falls, where it rises in ``warmup_share`` of them."""
        return 0.0 if self.decay_type is DecayType.constant else self.decay_ratio * (1 - warmup_share)


@dataclass
class MuonConfig(OptimizerConfig):
    """Muon for the matrices; AdamW for norms, biases, embedding and head."""

    _target_: str = "nemo_speculative.training.optimization.muon"
    muon_lr: Optional[float] = None
    """Learning rate of the matrices, whose updates are scaled to the size of AdamW's; null: lr."""
    momentum: float = 0.95
    """Of Muon."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "optimizer", "muon_lr")
        _require(
            0 <= self.momentum < 1, f"optimizer.momentum is {self.momentum}: expected at least 0 and below 1, e.g. 0.95"
        )


@dataclass
class ParallelismConfig:
    """How the draft is spread over the processes that torchrun starts."""

    replicate: int = 1
    """Groups of ranks that each hold a whole draft (HSDP)."""
    shard: int = -1
    """Ranks that share one draft (FSDP2); -1: all that replicate leaves."""

    def __post_init__(self) -> None:
        _require_positive(self, "parallelism", "replicate")
        _require(self.shard == -1 or self.shard > 0, f"parallelism.shard is {self.shard}: expected -1, or above 0")


@dataclass
class TrainerConfig:
    max_steps: Optional[int] = None
    """Optimizer steps; null: as many as epochs asks for."""
    epochs: float = 1.0
    """Passes over the data, where max_steps is null."""
    global_batch_size: int = 8
    """Rows in one optimizer step, over all ranks and accumulation."""
    micro_batch_size: int = 8
    """At most so many rows in one forward; the rest is accumulated."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    dtype: Dtype = Dtype.float32
    """What the draft computes in; its master weights, reductions and optimizer are float32 always."""
    activation_checkpointing: bool = False
    """Recompute each unroll step in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile the draft layer behind its attention: output projection, norm, MLP."""
    log_interval: int = 10
    """Steps between two lines of metrics."""
    save_interval: int = 500
    """Steps between two checkpoints; each is measured with the decoder, and the best kept."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, beside the best."""
    val_interval: int = 100
    """Steps between two losses on held-out rows."""
    val_rows: int = 16
    """Held-out rows in one validation."""
    profile: bool = False
    """Write a torch profiler trace to <output_dir>/profile."""

    def __post_init__(self) -> None:
        _require_positive(
            self, "trainer", "max_steps", "epochs", "global_batch_size", "micro_batch_size", "log_interval",
            "save_interval", "keep_checkpoints", "val_interval", "val_rows",
        )  # fmt: skip

    def total_steps(self, num_rows: int) -> int:
        """Optimizer steps of the whole run over ``num_rows`` packed rows."""
        return self.max_steps or max(1, round(self.epochs * num_rows / self.global_batch_size))


@dataclass
class ExporterConfig:
    """What is written for serving, and the speculative settings that the checkpoint remembers."""

    dtype: Optional[Dtype] = None
    """Of the draft's weights on disk; null: the target's."""
    num_steps: int = 5
    """Draft tokens in a chain (SGLang's --speculative-num-steps)."""
    topk: int = 1
    """Branches a draft step keeps (--speculative-eagle-topk); 1 is a chain."""
    num_draft_tokens: Any = None
    """Tokens verified at once, the last sampled one included; null: steps * topk + 1; auto (with topk above 1):
    several are measured when training is done, and the cheapest per token is kept."""
    sglang_version: str = "0.5.23"
    """The version that will serve it; what it cannot serve is refused."""

    def __post_init__(self) -> None:
        _require_positive(self, "exporter", "num_steps", "topk")
        if self.num_draft_tokens is None:
            self.num_draft_tokens = default_draft_tokens(self.num_steps, self.topk)
        if self.measure_width:
            return _require(
                self.topk > 1,
                "exporter.num_draft_tokens is auto: a chain (exporter.topk=1) always has exporter.num_steps + 1; set "
                "exporter.topk above 1, or leave it out",
            )
        tokens, least, most = self.num_draft_tokens, smallest_tree(self.topk), largest_tree(self.num_steps, self.topk)
        whole = isinstance(tokens, int) and not isinstance(tokens, bool)
        _require(whole and tokens > 0, f"exporter.num_draft_tokens is {tokens!r}: expected a number above 0, or auto")
        _require(
            self.topk == 1 or least <= tokens <= most,
            f"exporter.num_draft_tokens is {tokens}: a tree of {self.num_steps} steps and top-k {self.topk} has "
            f"{least} to {most} nodes",
        )
        _require(
            self.topk > 1 or tokens == self.num_steps + 1,
            f"exporter.num_draft_tokens is {tokens}: with exporter.topk=1 it must be exporter.num_steps + 1 = "
            f"{self.num_steps + 1}",
        )
        return None

    @property
    def measure_width(self) -> bool:
        """Whether num_draft_tokens is found by measuring."""
        return self.num_draft_tokens == "auto"

    @property
    def speculative(self) -> Speculative:
        """The settings; where they are yet to be measured, a full beam's."""
        tokens = default_draft_tokens(self.num_steps, self.topk) if self.measure_width else self.num_draft_tokens
        return Speculative(self.num_steps, self.topk, tokens)


@dataclass
class LoggerConfig:
    """Where metrics go beside the console and metrics.jsonl."""

    _target_: str = "nemo_speculative.training.loggers.no_logger"


@dataclass
class TensorBoardConfig(LoggerConfig):
    _target_: str = "nemo_speculative.training.loggers.tensorboard"


@dataclass
class WandbConfig(LoggerConfig):
    _target_: str = "nemo_speculative.training.loggers.WandbLogger"
    project: str = "nemo_speculative"
    name: Optional[str] = None
    """The run's name; null: wandb's own choice."""
    mode: WandbMode = WandbMode.offline
    """offline needs no account; upload later with `wandb sync`."""


@dataclass
class EvaluationConfig:
    """The measurement of the draft with the built-in lossless decoder."""

    num_questions: int = 100
    """Held-out questions at the end of a run."""
    selection_questions: int = 16
    """Held-out questions measured at every checkpoint, by which `best` is chosen."""
    max_new_tokens: Optional[int] = None
    """Longest answer; null: 256, or in evaluate.py what the run used."""
    num_threads: Optional[int] = None
    """CPU threads while measuring; null: torch's choice, or in evaluate.py what the run used."""
    ngram: int = 3
    """Longest n-gram that prompt-lookup drafting, the baseline, matches."""
    batch_size: int = 1
    """Questions answered at once; speed is compared at this size."""
    temperature: float = 0.0
    """Of the answers; 0 is greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of the likeliest tokens that holds so much probability; 1: from all."""
    top_k: int = 0
    """Sample from so many of the likeliest tokens; 0: from all."""
    rejection_sampling: bool = False
    """At a temperature above 0, draw the draft tokens and accept each with min(1, p/q): chains only; false: SGLang's
    default rule, which needs no draft probabilities."""
    static_tree: bool = False
    """EAGLE-1's published static tree in place of what the checkpoint is served with."""
    seed: int = 0
    """Of the sampling."""

    def __post_init__(self) -> None:
        _require_positive(
            self, "evaluation", "num_questions", "selection_questions", "max_new_tokens", "ngram", "num_threads",
            "batch_size",
        )  # fmt: skip
        _require(
            0 <= self.temperature < math.inf,
            f"evaluation.temperature is {self.temperature}: expected a number of at least 0 (0 is greedy), e.g. 1",
        )
        _require(
            0 < self.top_p <= 1,
            f"evaluation.top_p is {self.top_p}: expected a share above 0 and at most 1 (1 is off)",
        )
        _require(self.top_k >= 0, f"evaluation.top_k is {self.top_k}: expected a number of tokens, or 0 for all")

    @property
    def answer_tokens(self) -> int:
        """Longest answer."""
        return self.max_new_tokens or 256

    def like(self, run: dict[str, Any]) -> "EvaluationConfig":
        """With what the configuration of a run says where this one says nothing."""
        return replace(
            self,
            max_new_tokens=self.max_new_tokens or run.get("max_new_tokens"),
            num_threads=self.num_threads or run.get("num_threads"),
        )


@dataclass
class TrainJob:
    """A whole training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exporter: ExporterConfig = field(default_factory=ExporterConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output_dir: str = MISSING
    """The run's directory: config.yaml, metrics.jsonl, checkpoints/, summary.json."""
    seed: int = 0
    """Of the draft's initialisation and the order of the data."""
    resume: Resume = Resume.never
    """auto: go on from the newest checkpoint in output_dir, if there is one."""
    plan: bool = False
    """Print what would happen and stop, without loading any weights."""

    def __post_init__(self) -> None:
        _require(
            not self.evaluation.rejection_sampling or self.exporter.topk == 1 or self.evaluation.static_tree,
            f"evaluation.rejection_sampling is true and exporter.topk is {self.exporter.topk}: a dynamic tree keeps "
            "draft tokens for their score, and then rejection sampling is not lossless; set exporter.topk=1, or leave "
            "it off",
        )


@dataclass
class PlacementConfig:
    """Where the target of an evaluation lies."""

    device_map: Optional[str] = None
    """auto, balanced, sequential: transformers spreads it over the GPUs of this machine, and its memory if they are too
    small (needs the accelerate package); null: on one device."""
    max_memory: Optional[dict[str, str]] = None
    """What device_map may use of each: {0: 20GiB, 1: 20GiB, cpu: 60GiB}."""

    def __post_init__(self) -> None:
        _require(
            self.max_memory is None or self.device_map is not None,
            "model.max_memory is set and model.device_map is not: add model.device_map=auto",
        )


@dataclass
class EvaluateJob:
    """The measurement of a checkpoint."""

    checkpoint: str = MISSING
    """A run directory, a step_<N> directory or its model/."""
    target: Optional[str] = None
    """The target's directory or hub name; null: the one that the checkpoint remembers."""
    questions: Optional[str] = None
    """JSONL of questions: conversations (asked up to the first answer) or input_ids; null: those of the run."""
    model: PlacementConfig = field(default_factory=PlacementConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    num_steps: Optional[int] = None
    """Draft tokens along a branch; null: what the checkpoint remembers."""
    topk: Optional[int] = None
    """Branches a draft step keeps; null: what the checkpoint remembers."""
    num_draft_tokens: Optional[int] = None
    """Tokens verified at once, the last sampled one included; null: as remembered, or steps * topk + 1."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    draft_class: Optional[str] = None
    """The class of a draft that lies outside this package; importing it makes its architecture known."""
    trust_remote_code: bool = False
    """Whether the target's own modelling code may run."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "topk", "num_draft_tokens"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} is {value}: it must be above 0")


@dataclass
class FormConfig:
    """The form that a draft is converted into: what SGLang serves and every program of this project reads."""

    _target_: str = "nemo_speculative.checkpoints.exports.sglang.SGLangExport"


@dataclass
class SpeculatorsFormConfig(FormConfig):
    """The format of speculators, which vLLM serves (EAGLE-3)."""

    _target_: str = "nemo_speculative.checkpoints.exports.speculators.SpeculatorsExport"


@dataclass
class TransformersFormConfig(FormConfig):
    """What transformers loads with the code that lies beside it (trust_remote_code)."""

    _target_: str = "nemo_speculative.checkpoints.exports.remote_code.RemoteCodeExport"


@dataclass
class ConvertJob:
    """The conversion of a draft of any known format."""

    checkpoint: str = MISSING
    """Its directory: of this project, EAGLE (SafeAILab), SpecForge, NeMo AutoModel or speculators."""
    target: Optional[str] = None
    """The target's directory or hub name; null: the one that the draft says it was trained for."""
    output: Optional[str] = None
    """A directory that does not exist; null: beside the draft, its name and the form's."""
    aux_layers: Optional[list[int]] = None
    """Layers of the target whose outputs it reads, where it says so wrongly; null: what it says, or EAGLE's default."""
    form: FormConfig = field(default_factory=FormConfig)
    exporter: ExporterConfig = field(default_factory=ExporterConfig)
    """What another project's draft is to be served with; dtype null keeps the file's."""
    trust_remote_code: bool = False
    """Whether the target's own modelling code may run."""


@dataclass
class PruneJob:
    """A smaller draft vocabulary for a trained draft."""

    checkpoint: str = MISSING
    """A run directory, a step_<N> directory or its model/."""
    output: str = MISSING
    """A new directory; the pruned checkpoint is its model/."""
    vocab_size: Any = MISSING
    """Entries to keep: a number, or a coverage such as 99.5%."""
    data: DataConfig = field(default_factory=DataConfig)
    """Conversations whose assistant tokens are counted, best those that it was trained on."""


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
