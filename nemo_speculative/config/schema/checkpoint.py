"""A trained draft: its export, evaluation, benchmark on a server, conversion and pruning."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Optional

from omegaconf import MISSING

from nemo_speculative.config.schema.common import Dtype, require_positive, require_within
from nemo_speculative.config.schema.data import DataConfig
from nemo_speculative.config.schema.target import HFBackendConfig, PlacementConfig
from nemo_speculative.config.speculative import SpeculativeSettings, default_draft_tokens, largest_tree, smallest_tree
from nemo_speculative.utils.errors import UserError


@dataclass
class ExporterConfig:
    """The checkpoint for serving, and the speculative settings recorded in it."""

    dtype: Optional[Dtype] = None
    """dtype of the draft's weights on disk; null: the target's."""
    num_steps: int = 5
    """Draft tokens in a chain (SGLang's --speculative-num-steps)."""
    topk: int = 1
    """Branches a draft step keeps (--speculative-eagle-topk); 1 is a chain."""
    num_draft_tokens: Any = None
    """Tokens verified at once, the last sampled one included; null: steps * topk + 1; auto (with topk above 1):
    several are measured after training, and the cheapest per token is recorded."""
    sglang_version: str = "0.5.23"
    """SGLang version for serving; a draft that it cannot serve is refused."""

    def __post_init__(self) -> None:
        require_positive(self, "exporter", "num_steps", "topk")
        if self.num_draft_tokens is None:
            self.num_draft_tokens = default_draft_tokens(self.num_steps, self.topk)
        tokens, chain, most = self.num_draft_tokens, self.topk == 1, largest_tree(self.num_steps, self.topk)
        least = most if chain else smallest_tree(self.topk)
        if not (type(tokens) is int and least <= tokens <= most) and (tokens != "auto" or chain):
            expected = f"num_steps + 1 = {most}, or null" if chain else f"a number from {least} to {most}, or auto"
            raise UserError(
                f"exporter.num_draft_tokens is {tokens}: with exporter.num_steps={self.num_steps} and "
                f"exporter.topk={self.topk}, expected {expected}"
            )

    @property
    def measure_width(self) -> bool:
        """Whether num_draft_tokens is found by measuring."""
        return self.num_draft_tokens == "auto"

    @property
    def speculative(self) -> SpeculativeSettings:
        """The speculative settings; those of a full beam if they are still to be measured."""
        tokens = default_draft_tokens(self.num_steps, self.topk) if self.measure_width else self.num_draft_tokens
        return SpeculativeSettings(self.num_steps, self.topk, tokens)


@dataclass
class EvaluationConfig:
    """The evaluation of the draft with the built-in lossless decoder."""

    num_questions: int = 100
    """Held-out questions at the end of a run."""
    selection_questions: int = 16
    """Held-out questions at every checkpoint, which decide `best`."""
    max_new_tokens: Optional[int] = None
    """Longest answer in tokens; null: 256, or in evaluate.py as in the run."""
    num_threads: Optional[int] = None
    """CPU threads; null: torch's choice, or in evaluate.py as in the run."""
    ngram: int = 3
    """Longest n-gram of prompt-lookup drafting, the baseline."""
    batch_size: int = 1
    """Questions decoded together; speed is compared at this size."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens with this probability; 1: all tokens."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0: all tokens."""
    rejection_sampling: bool = False
    """Above temperature 0, sample draft tokens and accept each with min(1, p/q), chains only; false: SGLang's rule."""
    static_tree: bool = False
    """Decode with EAGLE-1's published static tree instead of the checkpoint's settings."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        require_positive(
            self, "evaluation", "num_questions", "selection_questions", "max_new_tokens", "ngram", "num_threads",
            "batch_size",
        )  # fmt: skip
        require_within("[0, inf)", self, "evaluation", "temperature", "top_k")
        require_within("(0, 1]", self, "evaluation", "top_p")

    @property
    def answer_tokens(self) -> int:
        """Length of the longest answer, in tokens."""
        return self.max_new_tokens or 256

    def like(self, run: dict[str, Any]) -> "EvaluationConfig":
        """A copy with the values of the configuration ``run`` where this one has null."""
        null = [name for name in ("max_new_tokens", "num_threads") if getattr(self, name) is None]
        values: dict[str, Any] = {name: run.get(name) for name in null}
        return replace(self, **values)


@dataclass
class SpeculativeOverrides:
    """Speculative settings other than those recorded in the checkpoint."""

    num_steps: Optional[int] = None
    """Draft tokens along a branch; null: as recorded in the checkpoint."""
    topk: Optional[int] = None
    """Branches a draft step keeps; null: as recorded in the checkpoint."""
    num_draft_tokens: Optional[int] = None
    """Tokens verified at once, the last sampled one included; null: as recorded, or steps * topk + 1."""

    def __post_init__(self) -> None:
        require_positive(self, "", "num_steps", "topk", "num_draft_tokens")


@dataclass
class EvaluateJob(SpeculativeOverrides):
    """The evaluation of a checkpoint."""

    checkpoint: str = MISSING
    """A run directory, a step_<N> directory or its model/."""
    target: Optional[str] = None
    """The target's directory or hub name; null: the one recorded in the checkpoint."""
    questions: Optional[str] = None
    """JSONL of questions: conversations (used up to the first answer) or input_ids; null: those of the run."""
    model: PlacementConfig = field(default_factory=PlacementConfig)
    backend: HFBackendConfig = field(default_factory=HFBackendConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    device: str = "auto"
    """auto: cuda if available, else cpu."""
    draft_class: Optional[str] = None
    """Class of a draft defined outside this package; importing it registers its architecture."""
    trust_remote_code: bool = False
    """Whether the target's own modeling code may run."""


@dataclass
class SuiteConfig:
    """Prompts, and how answers are scored."""

    name: str = MISSING
    """Name of the suite in the results."""
    path: Optional[str] = None
    """A JSONL file; null: the dataset on the hub."""
    repository: Optional[str] = None
    """Name of the dataset on the hub."""
    subset: Optional[str] = None
    """Configuration of the dataset, if it has several."""
    split: str = "test"
    """Split of the dataset."""
    reader: dict[str, Any] = MISSING
    """Class that makes a prompt of a row, by `_target_`; see `evaluation/server_benchmark/suites.py`."""
    scorer: Optional[dict[str, Any]] = None
    """Class that scores an answer, by `_target_`; see `evaluation/server_benchmark/scoring.py`; null: no score."""
    max_new_tokens: int = 1024
    """Longest answer to one turn, in tokens."""
    num_prompts: Optional[int] = None
    """Use only the first num_prompts prompts; null: all."""

    def __post_init__(self) -> None:
        require_positive(self, "suite", "max_new_tokens", "num_prompts")


@dataclass
class ServerConfig:
    """The SGLang server that the benchmark starts; unused with url."""

    python: Optional[str] = None
    """Python of the environment that has SGLang; null: the current one."""
    device: str = "cuda"
    """cuda: the accelerator that SGLang finds; cpu: for acceptance at temperature 0, not for speed."""
    dtype: Optional[str] = None
    """dtype of target and draft; null: as recorded in the checkpoint."""
    tp_size: int = 1
    """GPUs that share the target."""
    port: int = 30000
    """Port on 127.0.0.1."""
    timeout: float = 900.0
    """Seconds until it must be ready."""
    target_variant: bool = False
    """Accept a target of the same shape with other weights than the draft was trained for, such as a quantized copy."""
    trust_remote_code: bool = False
    """Whether the target's own code may run."""
    flags: list[str] = field(default_factory=list)
    """More flags, passed to SGLang unchanged."""

    def __post_init__(self) -> None:
        require_positive(self, "server", "timeout", "tp_size", "port")


@dataclass
class BenchmarkJob(SpeculativeOverrides):
    """The benchmark of a checkpoint on an SGLang server."""

    checkpoint: Optional[str] = None
    """A run directory, a step_<N> directory or its model/; the target is served with and without it."""
    target: Optional[str] = None
    """The target's directory or hub name; null: as recorded in the checkpoint, or reported by the server at url."""
    url: Optional[str] = None
    """A running server to measure instead of a checkpoint."""
    baseline_url: Optional[str] = None
    """With url: a server of the same target without speculation."""
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    sweep: list[list[int]] = field(default_factory=list)
    """Settings to compare, [steps, topk] or [steps, topk, draft tokens] each; empty: one, the keys above."""
    baseline: bool = True
    """Measure the target without speculation as well."""
    concurrency: list[int] = field(default_factory=lambda: [1, 4, 8, 16, 32])
    """Conversations in flight at once; each is measured."""
    temperature: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Sampling temperatures, each is measured; 0 is greedy, the only one with server.device=cpu."""
    warmup: int = 4
    """Prompts that each server answers before the measurement."""
    results: str = "outputs/benchmark"
    """Directory of cells.jsonl, table.md, heatmap.svg and server logs; results in it are not measured again."""
    write_back: Optional[int] = None
    """One of concurrency: record its setting with the most tokens/s (first temperature) in the checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within("[0, inf)", self, "", "warmup")
        for name, least in (("concurrency", 1), ("temperature", 0)):
            values = getattr(self, name)
            if not values:
                raise UserError(f"{name} is empty: expected one number or more, e.g. {name}=[1]")
            if not all(least <= value < math.inf for value in values):
                raise UserError(f"{name} is {values}: expected numbers of at least {least}")
        if self.url is None and self.server.device == "cpu" and any(self.temperature):
            raise UserError(f"temperature is {self.temperature} with server.device=cpu, which is greedy: give [0]")
        for setting in self.sweep:
            if len(setting) not in (2, 3) or min(setting) < 1:
                raise UserError(f"sweep holds {setting}: expected [steps, topk] or [steps, topk, draft tokens]")
        if self.write_back is not None and self.write_back not in self.concurrency:
            raise UserError(f"write_back is {self.write_back}: expected one of concurrency={self.concurrency}")


@dataclass
class FormConfig:
    """The format that a draft is written in: SGLang's, that of speculators (vLLM), or AutoModel's with its code."""

    _target_: str = "nemo_speculative.checkpoint.adapters.exports.SGLangExport"


@dataclass
class ConvertJob:
    """The conversion of a draft from any known format."""

    checkpoint: str = MISSING
    """Directory of the draft: of this project, EAGLE (SafeAILab), SpecForge, NeMo AutoModel or speculators."""
    target: Optional[str] = None
    """The target's directory or hub name; null: the one named in the draft's files."""
    output: Optional[str] = None
    """Directory to create; null: next to the draft, named after it and the form."""
    aux_layers: Optional[list[int]] = None
    """Layers of the target that it reads, if its files are wrong; null: as in its files, or EAGLE's default."""
    form: FormConfig = field(default_factory=FormConfig)
    exporter: ExporterConfig = field(default_factory=ExporterConfig)
    """Speculative settings for a draft of another project; dtype null keeps the file's."""
    trust_remote_code: bool = False
    """Whether the target's own modeling code may run."""


@dataclass
class PruneJob:
    """A smaller draft vocabulary for a trained draft."""

    checkpoint: str = MISSING
    """A run directory, a step_<N> directory or its model/."""
    output: str = MISSING
    """A new directory; the pruned checkpoint is its model/."""
    vocab_size: Any = MISSING
    """Entries that remain: a number, or a coverage such as 99.5%."""
    data: DataConfig = field(default_factory=DataConfig)
    """Conversations whose assistant tokens are counted, preferably the training data."""
