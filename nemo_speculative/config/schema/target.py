"""The target: which model, what runs it, and the server that offers it to trainings elsewhere."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

from omegaconf import MISSING
from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from nemo_speculative.config.schema.common import Dtype, require_positive, require_within
from nemo_speculative.config.schema.draft import MaskConvention
from nemo_speculative.utils.errors import UserError


@dataclass
class ModelConfig:
    """The target model, whose decoding the draft accelerates."""

    _target_: str = "nemo_speculative.targets.resolve.resolve_target"
    path: str = MISSING
    """A Hugging Face directory on this machine, or a repository name on the hub."""
    revision: Optional[str] = None
    """Branch, tag or commit of a hub repository."""
    dtype: Dtype = Dtype.float32
    """dtype of the frozen target."""
    trust_remote_code: bool = False
    """Whether a repository's own modeling code may run."""


@dataclass
class TinyModelConfig(ModelConfig):
    """The embedded target, trained on first use on the documentation of the standard library, then cached."""

    _target_: str = "nemo_speculative.targets.demo.prepare_tiny"
    path: str = "embedded"
    cache_dir: str = "cache/targets"
    """Directory of the trained target."""
    num_layers: int = 10
    """Decoder layers; the default aux layers need at least 7."""
    hidden_size: int = 128
    intermediate_size: int = 384
    head_dim: int = 64
    vocab_size: int = 1024
    """Entries of its byte-level BPE vocabulary."""
    context: int = 1024
    """The target's longest sequence, in tokens."""
    row_tokens: int = 256
    """Tokens in one row of its training."""
    rows_per_step: int = 8
    steps: int = 1000
    """Training steps (not seconds, so that two machines train the same target)."""
    warmup_steps: int = 50
    muon_lr: float = 0.03
    """Learning rate of the matrices."""
    adamw_lr: float = 0.004
    """Learning rate of the embedding and the norms."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.path != "embedded":
            raise UserError(f"model.path is {self.path}, and model is tiny, the embedded target: add model=local")
        if self.num_layers < 7:
            raise UserError(f"model.num_layers is {self.num_layers}: the embedded target needs at least 7")
        require_positive(self, "model", "steps", "rows_per_step", "row_tokens", "warmup_steps", "context")


@dataclass
class PlacementConfig:
    """Placement of the target of an evaluation."""

    device_map: Optional[str] = None
    """auto, balanced, sequential: transformers spreads it over GPUs and memory (needs accelerate); null: one device."""
    max_memory: Optional[dict[str, str]] = None
    """Memory that device_map may use per device: {0: 20GiB, 1: 20GiB, cpu: 60GiB}."""

    def __post_init__(self) -> None:
        if self.max_memory is not None and self.device_map is None:
            raise UserError("model.max_memory is set and model.device_map is not: add model.device_map=auto")


@dataclass
class BackendConfig:
    """The backend that runs the frozen target in training."""

    DECODES: ClassVar[bool] = False
    """Whether it generates text: answers questions, and evaluates drafts."""
    GATHERED_LAYERS: ClassVar[int] = 0
    """Whole layers gathered on a device in addition to its shard during a forward."""
    SHARDS_EMBEDDING_AND_HEAD: ClassVar[bool] = False
    """Whether embedding and head are sharded like the layers, and gathered for use."""
    WHOLE_ROWS: ClassVar[bool] = False
    """Whether it returns whole rows to every context-parallel rank, which then keeps its part."""
    _target_: str = MISSING

    @property
    def requests_ahead(self) -> int:
        """Micro-batches requested ahead of time, in threads."""
        return 0

    @property
    def longest_wait(self) -> float:
        """Seconds that a rank may wait for one batch; other ranks must wait at least this long."""
        return 0.0

    def group(self, ranks: int) -> int:
        """Processes that share a copy by tensor parallelism; raises UserError if ``ranks`` cannot be divided so."""
        return 1

    def together(self, ranks: int) -> bool:
        """Whether ``ranks`` processes compute its forward collectively, alternating with the draft."""
        return self.group(ranks) > 1

    def ahead(self, ranks: int, device_type: str) -> int:
        """Micro-batches whose hidden states are computed ahead of the draft."""
        return self.requests_ahead or int(device_type == "cuda" and not self.together(ranks))

    def share_of_layers(self, ranks: int) -> float:
        """The fraction of the target's decoder layers that each of ``ranks`` processes holds."""
        return 1 / self.group(ranks)

    def share_of_width(self, ranks: int) -> float:
        """The fraction of each layer's activations that a process computes, for the rows of one rank at a time."""
        return 1 / self.group(ranks)

    def check_target(self, config: Any, ranks: int) -> None:
        """Raises UserError if a target with the transformers config ``config`` does not run on ``ranks`` processes."""


@dataclass
class HFBackendConfig(BackendConfig):
    """transformers, in this process."""

    DECODES: ClassVar[bool] = True
    _target_: str = "nemo_speculative.targets.hf.HFTarget"
    attn_implementation: str = "sdpa"
    """Attention implementation of transformers."""


@dataclass
class ShardedHFBackendConfig(HFBackendConfig):
    """transformers, the weights sharded over all ranks (FSDP2); each rank computes its own batches."""

    DECODES: ClassVar[bool] = False
    GATHERED_LAYERS: ClassVar[int] = 2  # the one that computes, and the buffer that the next one arrives in
    SHARDS_EMBEDDING_AND_HEAD: ClassVar[bool] = True
    _target_: str = "nemo_speculative.targets.sharded.FSDP2Target"

    def together(self, ranks: int) -> bool:
        return True

    def share_of_layers(self, ranks: int) -> float:
        return 1 / ranks


@dataclass
class TensorParallelHFBackendConfig(HFBackendConfig):
    """transformers with its tensor-parallel plan; the ranks of a group compute their batches one after another."""

    DECODES: ClassVar[bool] = False
    SHARDS_EMBEDDING_AND_HEAD: ClassVar[bool] = True
    WHOLE_ROWS: ClassVar[bool] = True
    _target_: str = "nemo_speculative.targets.sharded.TensorParallelTarget"
    tp_size: int = -1
    """Consecutive ranks that share a copy of the target, preferably within a node; -1: all."""

    def __post_init__(self) -> None:
        if self.tp_size != -1 and self.tp_size < 2:
            raise UserError(f"backend.tp_size is {self.tp_size}: expected -1, or at least 2; backend=hf keeps it whole")

    def group(self, ranks: int) -> int:
        size = ranks if self.tp_size == -1 else self.tp_size
        if size < 2 or ranks % size:
            raise UserError(
                f"backend.tp_size is {self.tp_size}: it must be at least 2 and divide the {ranks} process(es) that "
                "were started; start as many (torchrun --nproc-per-node; for plan=true write WORLD_SIZE=N before the "
                "command), or take backend=hf"
            )
        return size

    def check_target(self, config: Any, ranks: int) -> None:
        size, heads = self.group(ranks), config.num_attention_heads
        for name, count in (("attention", heads), ("key-value", getattr(config, "num_key_value_heads", heads))):
            if count % size:
                raise UserError(
                    f"backend.tp_size is {self.tp_size}: the {count} {name} heads of the target cannot be divided by "
                    f"{size}; take a divisor of them, or backend=hf_fsdp2"
                )


@dataclass
class SGLangBackendConfig(BackendConfig):
    """SGLang's own kernels in this process, tensor-parallel over all ranks (needs SGLang in the same environment)."""

    WHOLE_ROWS: ClassVar[bool] = True
    _target_: str = "nemo_speculative.targets.sglang.SGLangTarget"
    max_tokens: int = 16384
    """Tokens in one forward; no conversation may be longer."""
    flags: list[str] = field(default_factory=list)
    """More flags of SGLang's server, word by word, e.g. [--quantization, fp8, --mem-fraction-static, 0.5]."""

    def __post_init__(self) -> None:
        require_positive(self, "backend", "max_tokens")

    def group(self, ranks: int) -> int:
        return ranks


@dataclass
class RemoteBackendConfig(BackendConfig):
    """Target servers on other GPUs or machines; see docs/target_server.md."""

    WHOLE_ROWS: ClassVar[bool] = True
    _target_: str = "nemo_speculative.targets.remote.client.RemoteTarget"
    urls: list[str] = field(default_factory=list)
    """Addresses of the servers; micro-batches are balanced over them."""
    timeout: float = 300.0
    """Seconds to wait for a response, and for a server with room in its queue."""
    connect_timeout: float = 5.0
    """Seconds to wait for a connection."""
    attempts: int = 4
    """Attempts per server for one micro-batch before the run ends."""
    backoff_seconds: float = 5.0
    """Seconds without requests to a server that failed."""

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


READ_AHEAD = 2
"""Micro-batches of features that threads read ahead."""


@dataclass
class FeaturesBackendConfig(BackendConfig):
    """Hidden states on disk, written by recipes/capture_features.py or by an epoch with fill=true."""

    WHOLE_ROWS: ClassVar[bool] = True
    _target_: str = "nemo_speculative.targets.cached.target.FeaturesTarget"
    directory: str = MISSING
    """Directory of the features."""
    fill: bool = False
    """Compute missing features with transformers in this process, and store them."""
    shard_mb: int = 1024
    """MiB of a file written with fill=true; up to three are held in memory."""
    mask_convention: MaskConvention = MaskConvention.serving
    """The draft's, which decides the positions that are needed."""
    draft: str = MISSING
    """The draft's class, which decides the states that are needed."""

    def __post_init__(self) -> None:
        require_positive(self, "backend", "shard_mb")

    @property
    def longest_wait(self) -> float:
        return 3600.0 if self.fill else 0.0  # the target is loaded when a feature is missing

    @property
    def requests_ahead(self) -> int:
        return READ_AHEAD

    def share_of_layers(self, ranks: int) -> float:
        return float(self.fill)


def require_servers(key: str, urls: list[str]) -> None:
    """Refuses an empty list, an invalid URL and a server named twice; ``key`` names the option in the error."""
    if not urls:
        raise UserError(f"{key} is empty: expected one URL or more, e.g. [http://127.0.0.1:31000]")
    servers = set()
    for url in urls:
        try:
            parsed = parse_url(url)
        except LocationParseError:
            parsed = parse_url("")
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise UserError(f"{key} holds {url!r}: expected http://HOST:PORT")
        port = parsed.port or (443 if parsed.scheme == "https" else 80)
        server = (parsed.scheme, parsed.host, port, (parsed.path or "").rstrip("/"))
        if server in servers:
            raise UserError(f"{key} names the server {url!r} twice: leave it out once")
        servers.add(server)


@dataclass
class ServeTargetJob:
    """A target server. Clients must send the token in the environment variable NEMO_TARGET_TOKEN, if it is set."""

    model: ModelConfig = field(default_factory=ModelConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    aux_layers: Optional[list[int]] = None
    """Layers of the target whose outputs are sent; null: EAGLE-3's default; []: none, for EAGLE-1 and 2."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every network of this machine."""
    port: int = 31000
    """Port to listen on; 0: any free one."""
    device: str = "auto"
    """auto: cuda if available, else cpu."""
    queue: int = 8
    """Requests accepted at once; more are answered with 429."""
    max_tokens: int = 65536
    """Most tokens of one request; its response is held in memory."""
    io_timeout: float = 60.0
    """Seconds to receive a request or send a response."""
    drain: int = 60
    """Seconds after SIGTERM to finish accepted requests."""

    def __post_init__(self) -> None:
        elsewhere = {
            RemoteBackendConfig: "remote", FeaturesBackendConfig: "features", ShardedHFBackendConfig: "hf_fsdp2",
            TensorParallelHFBackendConfig: "hf_tp",
        }  # fmt: skip
        if name := elsewhere.get(type(self.backend)):
            raise UserError(
                f"backend={name}: a target server is one process, which runs the whole target itself; take backend=hf "
                "or backend=sglang"
            )
        require_positive(self, "", "queue", "max_tokens", "io_timeout", "drain")
        require_within("[0, 65535]", self, "", "port")
