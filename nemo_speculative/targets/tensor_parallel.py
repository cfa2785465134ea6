"""A tensor-parallel target, ``backend=hf_tp``: each rank computes a part of every layer."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.integrations import tensor_parallel as transformers_tp

from nemo_speculative.config.schema import TensorParallelHFBackendConfig
from nemo_speculative.data.batch import Batch
from nemo_speculative.distributed.collectives import all_gather_ragged, register_group
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.placed import PlacedTarget
from nemo_speculative.utils.errors import UserError


class TensorParallelTarget(PlacedTarget):
    """Divided over ``tp_size`` neighbouring ranks: the decoder layers by the plan that transformers has for the model.

    Every rank trains on rows of its own: those of a group compute the batch of its first rank together, then that of
    its second, and so on, and each keeps what belongs to its own.

    Args:
        tp_size: -1: all ranks.
        options: those of :class:`nemo_speculative.targets.placed.PlacedTarget`.

    Raises:
        UserError: there is no such plan, or ``tp_size`` does not divide the ranks.
    """

    def __init__(self, path: Path, *, tp_size: int = -1, **options: Any):
        group, _ = dist.new_subgroups(TensorParallelHFBackendConfig(tp_size=tp_size).group(dist.get_world_size()))
        self.group = register_group(group)
        super().__init__(path, **options)

    def _check(self, model: Any, layers: nn.ModuleList) -> None:
        if not hasattr(transformers_tp, "apply_tensor_parallelism"):
            raise UserError("backend=hf_tp needs transformers 5.23 or newer; update it, or take backend=hf_fsdp2")
        if not _plan(model, layers):
            raise UserError(
                f"{self.path}: transformers has no tensor-parallel plan for {type(model).__name__}; take "
                "backend=hf_fsdp2"
            )

    def _mesh(self) -> DeviceMesh:
        return DeviceMesh.from_group(self.group, self.device.type, mesh_dim_names=("tp",))

    def _divide(self, model: Any, layers: nn.ModuleList, mesh: DeviceMesh) -> None:
        transformers_tp.apply_tensor_parallelism(model, mesh, _plan(model, layers))

    def _compute(self, batch: Batch) -> TargetOutput:
        host, own = batch.on_host, dist.get_rank(self.group)
        asked = all_gather_ragged(torch.stack([host.input_ids, host.positions]), self.group)
        found = [
            self._kept(batch.whole if rank == own else _batch_of(*tokens).to(self.device), keep=rank == own)
            for rank, tokens in enumerate(asked)
        ]
        supervision = found[own]
        assert supervision is not None
        return supervision.of(batch.shard)

    def _kept(self, batch: Batch, keep: bool) -> TargetOutput | None:
        """None, and no memory, for what another rank asked for."""
        supervision = super()._compute(batch)
        return supervision if keep else None


def _plan(model: Any, layers: nn.ModuleList) -> dict[str, str]:
    """How each module and parameter of ``layers`` is divided, by name; a module behind the parameters that it owns."""
    of_any_layer = transformers_tp.replace_layer_number_by_wildcard
    prefix = next(name for name, module in model.named_modules() if module is layers)
    plan = {name: style for name, style in (model.tp_plan or {}).items() if name.startswith(f"{prefix}.")}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        style = plan.get(of_any_layer(name))
        for parameter, _ in module.named_parameters(name, recurse=False):
            if chosen := plan.get(of_any_layer(parameter), style):
                found[parameter] = chosen
        if style:
            found[name] = style
    return found


def _batch_of(input_ids: torch.Tensor, positions: torch.Tensor) -> Batch:
    """Another rank's rows: what a target reads of them."""
    documents = (positions == 0).cumsum(-1)
    return Batch(input_ids, torch.zeros_like(input_ids, dtype=torch.bool), positions, documents)
