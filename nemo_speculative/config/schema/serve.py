"""The target server and its limits."""

from dataclasses import dataclass, field
from typing import Optional

from nemo_speculative.config.schema.common import require
from nemo_speculative.config.schema.model import (
    BackendConfig,
    FeaturesBackendConfig,
    ModelConfig,
    RemoteBackendConfig,
    ShardedHFBackendConfig,
    TensorParallelHFBackendConfig,
)


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
        for name, elsewhere in (("remote", RemoteBackendConfig), ("features", FeaturesBackendConfig)):
            require(
                not isinstance(self.backend, elsewhere),
                f"backend={name}: a target server runs the target itself; take backend=hf or backend=sglang",
            )
        for name, placed in (("hf_fsdp2", ShardedHFBackendConfig), ("hf_tp", TensorParallelHFBackendConfig)):
            require(
                not isinstance(self.backend, placed),
                f"backend={name}: a target server is one process, which holds the target whole; take "
                "backend=hf or backend=sglang",
            )
        for name in ("queue", "max_tokens", "io_timeout", "drain"):
            value = getattr(self, name)
            require(value > 0, f"{name} is {value}: it must be greater than 0")
        require(0 <= self.port < 1 << 16, f"port is {self.port}: expected 0 to {(1 << 16) - 1}")
