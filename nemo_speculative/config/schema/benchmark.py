"""The benchmark on a server: its prompts, and how the server is started."""

import math
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from nemo_speculative.config.schema.common import require, require_not_negative, require_positive


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
class BenchmarkJob:
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
    num_steps: Optional[int] = None
    """Draft tokens along a branch; null: as recorded in the checkpoint."""
    topk: Optional[int] = None
    """Branches a draft step keeps; null: as recorded in the checkpoint."""
    num_draft_tokens: Optional[int] = None
    """Tokens verified at once, the last sampled one included; null: as recorded, or steps * topk + 1."""
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
    """One of concurrency: the setting with the most tokens/s there, on this suite at the first temperature, is
    recorded in the checkpoint as its serving settings."""

    def __post_init__(self) -> None:
        require_positive(self, "benchmark", "num_steps", "topk", "num_draft_tokens")
        require_not_negative(self, "benchmark", "warmup")
        for name in ("concurrency", "temperature"):
            values = getattr(self, name)
            require(bool(values), f"{name} is empty: expected one number or more, e.g. {name}=[1]")
        for at_once in self.concurrency:
            require(at_once > 0, f"concurrency is {self.concurrency}: expected numbers above 0")
        for heat in self.temperature:
            require(0 <= heat < math.inf, f"temperature is {self.temperature}: expected numbers of at least 0")
        require(
            self.url is not None or self.server.device != "cpu" or not any(self.temperature),
            f"temperature is {self.temperature} with server.device=cpu, which takes the likeliest token only: give "
            "temperature=[0]",
        )
        for setting in self.sweep:
            require(
                len(setting) in (2, 3) and min(setting) > 0,
                f"sweep holds {setting}: expected [steps, topk] or [steps, topk, draft tokens], as in "
                "sweep=[[3,1],[5,4,16]]",
            )
        require(
            self.write_back is None or self.write_back in self.concurrency,
            f"write_back is {self.write_back}: expected one of concurrency={self.concurrency}",
        )
