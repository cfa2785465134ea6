"""The target answers in this process, through transformers."""

from typing import Any

import torch
from hydra.utils import get_method

from nemo_speculative.config.schema import HFEngineConfig, ModelConfig
from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data.decoder import Decoder, in_flight
from nemo_speculative.generate_data.engine import Engine
from nemo_speculative.generate_data.rollout import Completion, Request
from nemo_speculative.targets.embedding_and_head import target_fingerprint
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.devices import choose_device


class HFEngine(Engine):
    """See :class:`Engine`.  The weights are loaded by :meth:`prepare`: a run that is done needs none."""

    def __init__(self, config: HFEngineConfig, model: ModelConfig, sampling: Sampling):
        super().__init__(get_method(model._target_)(model), model.trust_remote_code)
        self.settings, self.dtype, self.sampling = config, model.dtype.value, sampling
        self._decoder: Decoder | None = None

    @property
    def concurrency(self) -> int:
        return in_flight(self.settings.batch_size)

    async def identity(self) -> dict[str, Any]:
        return {"engine": "hf", "target": target_fingerprint(self.directory), "dtype": self.dtype}

    async def complete(self, request: Request) -> Completion:
        assert self._decoder is not None
        return await self._decoder.complete(request)

    def prepare(self) -> None:
        target = HFTarget(
            self.directory,
            aux_layers=[],
            attn_implementation=self.settings.attn_implementation,
            dtype=getattr(torch, self.dtype),
            device=choose_device(self.settings.device, "engine.device"),
            trust_remote_code=self.trust_remote_code,
        )
        self._decoder = Decoder(target, self.settings.batch_size, self.sampling)
