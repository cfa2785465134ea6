"""A target sharded by FSDP2, ``backend=hf_fsdp2``: a layer is gathered while it computes."""

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from nemo_speculative.distributed.collectives import register_group
from nemo_speculative.targets.placed import PlacedTarget


class ShardedTarget(PlacedTarget):
    """Layers, embedding and head are divided over all ranks; each rank computes its own batches.

    Args:
        options: those of :class:`nemo_speculative.targets.placed.PlacedTarget`.
    """

    def _mesh(self) -> DeviceMesh:
        # Of its own: what the draft's ranks tell each other comes in an order of its own.
        return DeviceMesh.from_group(register_group(dist.new_group()), self.device.type)

    def _divide(self, model: Any, layers: nn.ModuleList, mesh: DeviceMesh) -> None:
        # It goes before the layers are gathered.
        self._embedding_rows.module.register_forward_hook(lambda *_: self._embedding_rows.drop())
        ends = set(model.parameters()) - set(layers.parameters())
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # Around them all, so that the next layer is gathered while one computes.
        fully_shard(model.get_decoder(), mesh=mesh, ignored_params=ends)
