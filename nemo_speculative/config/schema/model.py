"""The target: which model, what runs it, and where it lies."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

from omegaconf import MISSING
from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from nemo_speculative.config.schema.common import Dtype, require, require_positive
from nemo_speculative.config.schema.draft import MaskConvention


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

    _target_: str = "nemo_speculative.targets.demo.prepare_tiny"
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
        require(
            self.path == "embedded",
            f"model.path is {self.path}, and model is tiny, the embedded target: add model=local for a model of yours",
        )
        require(self.num_layers >= 7, f"model.num_layers is {self.num_layers}: the embedded target needs at least 7")
        require_positive(self, "model", "steps", "rows_per_step", "row_tokens", "warmup_steps", "context")


READ_AHEAD = 2
"""Micro-batches of features that are read in threads while the draft works on one."""
LOADING_SECONDS = 3600.0
"""For a target that is loaded when the first of its features is missing."""


@dataclass
class BackendConfig:
    """What runs the frozen target in training."""

    DECODES: ClassVar[bool] = False
    """Whether it continues texts: answers questions, and measures drafts."""
    GATHERED_LAYERS: ClassVar[int] = 0
    """Whole layers that lie on a device, beside its share, while it computes."""
    SHARDS_EMBEDDING_AND_HEAD: ClassVar[bool] = False
    """Whether embedding and head are divided as the layers are, and gathered where they are used."""
    WHOLE_ROWS: ClassVar[bool] = False
    """Whether it gives each of the ranks that share rows all of them, to keep its part."""
    _target_: str = MISSING

    @property
    def requests_ahead(self) -> int:
        """Micro-batches that it is asked for beforehand, in threads."""
        return 0

    def together(self, ranks: int) -> bool:
        """Whether ``ranks`` processes compute it together, in turn with the draft's work."""
        return False

    def ahead(self, ranks: int, device_type: str) -> int:
        """Micro-batches whose states are there, or on their way, while the draft works on one."""
        return self.requests_ahead or int(device_type == "cuda" and not self.together(ranks))

    @property
    def longest_wait(self) -> float:
        """Seconds that a rank may spend on one batch by this configuration: for so long the others have to wait."""
        return 0.0

    def share_of_layers(self, ranks: int) -> float:
        """How much of the target's decoder layers each of ``ranks`` processes holds.

        Raises:
            UserError: it does not run on so many.
        """
        return 1.0

    def share_of_width(self, ranks: int) -> float:
        """How much of each layer's activations a process computes, for the rows of one rank after the other."""
        return 1.0

    def check_target(self, config: Any, ranks: int) -> None:
        """Raises UserError if a target of ``config``, as transformers describes it, does not run so on ``ranks``."""


@dataclass
class HFBackendConfig(BackendConfig):
    """transformers, in this process."""

    DECODES: ClassVar[bool] = True
    _target_: str = "nemo_speculative.targets.hf.HFTarget"
    attn_implementation: str = "sdpa"
    """transformers' name of the target's attention."""


@dataclass
class ShardedHFBackendConfig(BackendConfig):
    """transformers, the weights sharded over all ranks (FSDP2); each rank computes its own batches."""

    GATHERED_LAYERS: ClassVar[int] = 2  # the one that computes, and the buffer that the next one arrives in
    SHARDS_EMBEDDING_AND_HEAD: ClassVar[bool] = True
    _target_: str = "nemo_speculative.targets.sharded.FSDP2Target"
    attn_implementation: str = "sdpa"
    """transformers' name of the target's attention."""

    def together(self, ranks: int) -> bool:
        return True

    def share_of_layers(self, ranks: int) -> float:
        return 1 / ranks


@dataclass
class TensorParallelHFBackendConfig(BackendConfig):
    """transformers, tensor-parallel by its own plan; the ranks of a group compute their batches one after the other."""

    SHARDS_EMBEDDING_AND_HEAD: ClassVar[bool] = True
    WHOLE_ROWS: ClassVar[bool] = True
    _target_: str = "nemo_speculative.targets.sharded.TensorParallelTarget"
    attn_implementation: str = "sdpa"
    """transformers' name of the target's attention."""
    tp_size: int = -1
    """Neighbouring ranks that share a copy of the target, best within a node; -1: all."""

    def __post_init__(self) -> None:
        require(
            self.tp_size == -1 or self.tp_size > 1,
            f"backend.tp_size is {self.tp_size}: expected -1, or at least 2; backend=hf keeps the target whole",
        )

    def group(self, ranks: int) -> int:
        """How many of ``ranks`` processes share a copy.

        Raises:
            UserError: they cannot be divided so.
        """
        size = ranks if self.tp_size == -1 else self.tp_size
        require(
            size > 1 and ranks % size == 0,
            f"backend.tp_size is {self.tp_size}: it must be at least 2 and divide the {ranks} process(es) that were "
            "started; start as many (torchrun --nproc-per-node; for plan=true write WORLD_SIZE=N before the command), "
            "or take backend=hf",
        )
        return size

    def together(self, ranks: int) -> bool:
        return True

    def share_of_layers(self, ranks: int) -> float:
        return 1 / self.group(ranks)

    def share_of_width(self, ranks: int) -> float:
        return 1 / self.group(ranks)

    def check_target(self, config: Any, ranks: int) -> None:
        size, heads = self.group(ranks), config.num_attention_heads
        for name, count in (("attention", heads), ("key-value", getattr(config, "num_key_value_heads", heads))):
            require(
                count % size == 0,
                f"backend.tp_size is {self.tp_size}: the {count} {name} heads of the target cannot be divided by "
                f"{size}; take a divisor of them, or backend=hf_fsdp2",
            )


@dataclass
class SGLangBackendConfig(BackendConfig):
    """SGLang's own kernels in this process, tensor-parallel over all ranks (needs SGLang beside the trainer)."""

    WHOLE_ROWS: ClassVar[bool] = True
    _target_: str = "nemo_speculative.targets.sglang.SGLangTarget"
    max_tokens: int = 16384
    """Tokens in one forward; no document may be longer."""
    flags: list[str] = field(default_factory=list)
    """Further flags of SGLang's server, word by word, e.g. [--quantization, fp8, --mem-fraction-static, 0.5]."""

    def __post_init__(self) -> None:
        require_positive(self, "backend", "max_tokens")

    def together(self, ranks: int) -> bool:
        return ranks > 1

    def share_of_layers(self, ranks: int) -> float:
        return 1 / ranks

    def share_of_width(self, ranks: int) -> float:
        return 1 / ranks


@dataclass
class RemoteBackendConfig(BackendConfig):
    """Target servers on other GPUs or machines; see docs/target_server.md."""

    WHOLE_ROWS: ClassVar[bool] = True
    _target_: str = "nemo_speculative.targets.remote.client.RemoteTarget"
    urls: list[str] = field(default_factory=list)
    """Where they listen; micro-batches are spread over them."""
    timeout: float = 300.0
    """Seconds to wait for an answer, and for a place in the queues of servers that are all busy."""
    connect_timeout: float = 5.0
    """Seconds to wait for a connection."""
    attempts: int = 4
    """How often a micro-batch is tried for each server before the run ends."""
    backoff_seconds: float = 5.0
    """Seconds for which a server that failed is left alone."""

    def __post_init__(self) -> None:
        require_servers("backend.urls", self.urls)
        require_positive(self, "backend", "timeout", "connect_timeout", "attempts", "backoff_seconds")

    @property
    def longest_wait(self) -> float:
        return self.timeout * self.attempts * len(self.urls)

    @property
    def requests_ahead(self) -> int:
        return len(self.urls)

    def share_of_layers(self, ranks: int) -> float:
        return 0.0


@dataclass
class FeaturesBackendConfig(BackendConfig):
    """Hidden states on disk, that recipes/capture_features.py or an epoch with fill=true left there."""

    WHOLE_ROWS: ClassVar[bool] = True
    _target_: str = "nemo_speculative.targets.cached.target.FeaturesTarget"
    directory: str = MISSING
    """Where they are."""
    fill: bool = False
    """What is missing is computed by transformers in this process when it is first needed, and kept (mixed mode)."""
    shard_mb: int = 1024
    """MiB of a shard that is written then; up to three are held in memory."""
    mask_convention: MaskConvention = MaskConvention.serving
    """Of the draft: says which positions are needed; its YAML takes it from there."""
    draft: str = MISSING
    """The draft's class: says which states are needed; the YAML takes it from there."""

    def __post_init__(self) -> None:
        require_positive(self, "backend", "shard_mb")

    @property
    def longest_wait(self) -> float:
        return LOADING_SECONDS if self.fill else 0.0

    @property
    def requests_ahead(self) -> int:
        return READ_AHEAD

    def share_of_layers(self, ranks: int) -> float:
        return float(self.fill)


def require_servers(key: str, urls: list[str]) -> None:
    """Refuses none, what is no URL of a server, and one that is named twice; ``key`` is where they were given."""
    require(bool(urls), f"{key} is empty: expected one URL or more, e.g. [http://127.0.0.1:31000]")
    servers = [_server_named(key, url) for url in urls]
    again = next((url for n, url in enumerate(urls) if servers[n] in servers[:n]), None)
    require(again is None, f"{key} names the server {again!r} twice: leave it out once")


def _server_named(key: str, url: str) -> str:
    """``url`` as any other spelling of it is written, too."""
    try:
        parsed = parse_url(url)
    except LocationParseError:
        parsed = parse_url("")
    require(
        parsed.scheme in ("http", "https") and bool(parsed.host),
        f"{key} holds {url!r}: expected http://HOST:PORT",
    )
    port = parsed.port or {"http": 80, "https": 443}[str(parsed.scheme)]
    return f"{parsed.scheme}://{parsed.host}:{port}{(parsed.path or '').rstrip('/')}"


@dataclass
class PlacementConfig:
    """Where the target of an evaluation lies."""

    device_map: Optional[str] = None
    """auto, balanced, sequential: transformers spreads it over the GPUs of this machine, and its memory if they are too
    small (needs the accelerate package); null: on one device."""
    max_memory: Optional[dict[str, str]] = None
    """What device_map may use of each: {0: 20GiB, 1: 20GiB, cpu: 60GiB}."""

    def __post_init__(self) -> None:
        require(
            self.max_memory is None or self.device_map is not None,
            "model.max_memory is set and model.device_map is not: add model.device_map=auto",
        )
