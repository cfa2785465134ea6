"""``backend=hf_fsdp2`` and ``backend=hf_tp``: a transformers model divided over the ranks of the job.

Embedding and head are divided by rows.  The head stays gathered from the end of a forward pass to the start of the next
one: the draft's loss reads it in chunks of its own slots, whose number differs between ranks.
"""

from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.integrations import tensor_parallel as transformers_tp

from nemo_speculative.config.schema import TensorParallelHFBackendConfig
from nemo_speculative.data.batch import Batch
from nemo_speculative.distributed.parallelism import all_gather_ragged, on_first_rank, register_group
from nemo_speculative.targets.base import PLAIN_DTYPES, Target, TargetOutput, decoder_layers, load_model
from nemo_speculative.targets.describe import load_config
from nemo_speculative.targets.hf import TransformersTarget
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.progress import quiet_transformers


class DistributedTarget(TransformersTarget):
    """A frozen Hugging Face model divided over ranks, which run its forward passes together.

    Ranks also embed tokens together, and gather the head together, except right after :meth:`compute_hidden_states`,
    which leaves it gathered.  One process of the job reads the files into host memory and broadcasts tensor by tensor;
    every rank keeps its part, so no device ever holds more than its parts and one whole tensor.  ``group``: the ranks
    that share one copy.

    Raises:
        UserError: the model cannot be divided.
    """

    collective = True

    def __init__(self, path: Path, group: dist.ProcessGroup, **options: Any):
        # A group of its own: the draft's collectives run in an order of their own.
        self.group = register_group(group)
        super().__init__(path, **options)
        self.release()

    @torch.no_grad()
    def _load(self, **options: Any) -> Any:
        quiet_transformers()
        config = load_config(self.path, self.trust_remote_code)
        if getattr(config, "quantization_config", None):
            raise UserError(
                f"{self.path}: its weights are quantized, which backend=hf_fsdp2 and hf_tp cannot divide; use "
                "backend=sglang or backend=remote"
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options).eval().requires_grad_(False)
        layers = decoder_layers(model.get_decoder(), self.config.num_hidden_layers)
        self._check(model, layers)
        weights = on_first_rank(lambda: _read_weights(self.path, model, options))
        _broadcast_dtypes(model, weights)
        mesh = DeviceMesh.from_group(self.group, self.device.type, mesh_dim_names=("tp",))  # the name is transformers'
        self._embedding_rows = ShardedRows(model.get_input_embeddings(), mesh)
        self._head_rows = ShardedRows(model.get_output_embeddings(), mesh)
        self._divide(model, layers, mesh)
        model.to_empty(device=self.device)
        model.tie_weights()
        _broadcast_weights(model, weights, self.device)
        return model

    def _check(self, model: Any, layers: nn.ModuleList) -> None:
        """Raises UserError if ``model`` cannot be divided."""

    def _divide(self, model: Any, layers: nn.ModuleList, mesh: DeviceMesh) -> None:
        """Replaces the parameters of ``layers``, which have no storage yet, by this rank's parts of them."""
        raise NotImplementedError

    def compute_hidden_states(self, batch: Batch) -> TargetOutput:
        self.release()
        output = self._compute(batch)
        self._embedding_rows.release()
        self._head_rows.gather()
        return output

    def release(self) -> None:
        """Frees the gathered embedding and head; their next use gathers them again."""
        self._embedding_rows.release()
        self._head_rows.release()

    def _compute(self, batch: Batch) -> TargetOutput:
        """The hidden states of this rank's tokens; called by all ranks that share a copy."""
        return super().compute_hidden_states(batch)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded = super().embed(input_ids)
        self._embedding_rows.release()
        return embedded

    @property
    def head_weight(self) -> torch.Tensor:
        self._head_rows.gather()
        return self._head.weight

    last_layers = Target.last_layers  # from the files: this rank has parts of them


class FSDP2Target(DistributedTarget):
    """A target sharded over all ranks by FSDP2; each rank computes its own batches, and gathers layer by layer."""

    def __init__(self, path: Path, **options: Any):
        super().__init__(path, dist.new_group(), **options)

    def _divide(self, model: Any, layers: nn.ModuleList, mesh: DeviceMesh) -> None:
        # Frees the embedding before the layers are gathered.
        self._embedding_rows.module.register_forward_hook(lambda *_: self._embedding_rows.release())
        embedding_and_head = set(model.parameters()) - set(layers.parameters())
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # The root wraps all layers, so that the next one is gathered while one computes.
        fully_shard(model.get_decoder(), mesh=mesh, ignored_params=embedding_and_head)


class TensorParallelTarget(DistributedTarget):
    """A target whose layers are divided over ``tp_size`` neighboring ranks, by transformers' own plan for the model.

    Every rank trains on rows of its own: the ranks of a group compute the batch of the first rank together, then that
    of the second, and so on, and each keeps the output for its own batch.

    Raises:
        UserError: there is no such plan, or ``tp_size`` does not divide the number of ranks.
    """

    def __init__(self, path: Path, *, tp_size: int = -1, **options: Any):
        group, _ = dist.new_subgroups(TensorParallelHFBackendConfig(tp_size=tp_size).group(dist.get_world_size()))
        super().__init__(path, group, **options)

    def _check(self, model: Any, layers: nn.ModuleList) -> None:
        if not hasattr(transformers_tp, "apply_tensor_parallelism"):
            raise UserError("backend=hf_tp needs transformers 5.23 or newer; update it, or use backend=hf_fsdp2")
        if not _tensor_parallel_plan(model, layers):
            raise UserError(
                f"{self.path}: transformers has no tensor-parallel plan for {type(model).__name__}; use "
                "backend=hf_fsdp2"
            )

    def _divide(self, model: Any, layers: nn.ModuleList, mesh: DeviceMesh) -> None:
        transformers_tp.apply_tensor_parallelism(model, mesh, _tensor_parallel_plan(model, layers))

    def _compute(self, batch: Batch) -> TargetOutput:
        host, own, outputs = batch.on_host, dist.get_rank(self.group), []
        gathered = all_gather_ragged(torch.stack([host.input_ids, host.positions]), self.group)
        for rank, (ids, positions) in enumerate(gathered):
            if rank == own:
                outputs.append(super()._compute(batch.whole))
            else:  # freed at once: the output belongs to another rank
                documents = (positions == 0).cumsum(-1)
                rows = Batch(ids, torch.zeros_like(ids, dtype=torch.bool), positions, documents)
                super()._compute(rows.to(self.device))
        return outputs[0].shard(batch.shard)


def _tensor_parallel_plan(model: Any, layers: nn.ModuleList) -> dict[str, str]:
    """The division of each parameter and module of ``layers``, by name; parameters come before their module."""
    to_pattern = transformers_tp.replace_layer_number_by_wildcard
    prefix = next(name for name, module in model.named_modules() if module is layers)
    styles = {name: style for name, style in (model.tp_plan or {}).items() if name.startswith(f"{prefix}.")}
    plan: dict[str, str] = {}
    for name, module in model.named_modules():
        module_style = styles.get(to_pattern(name))
        for parameter, _ in module.named_parameters(name, recurse=False):
            if style := styles.get(to_pattern(parameter), module_style):
                plan[parameter] = style
        if module_style:
            plan[name] = module_style
    return plan


class ShardedRows:
    """The weight of an embedding or a head: each rank holds some rows; between its use and :meth:`release`, all.

    The weight of ``module`` has no storage yet.
    """

    def __init__(self, module: Any, mesh: DeviceMesh):
        self.module = module
        self._shard: Any = None
        """The sharded weight while the module holds the gathered one."""
        rows = distribute_tensor(module.weight, mesh, [Shard(0)], src_data_rank=None)
        module.weight = nn.Parameter(rows, requires_grad=False)
        module.register_forward_pre_hook(self.gather)

    def gather(self, *_: Any) -> None:
        """Gathers the weight, together with the other ranks, unless it is gathered already; runs before the module."""
        if self._shard is None:
            self._shard = self.module.weight
            self.module.weight = nn.Parameter(self._shard.full_tensor(), requires_grad=False)

    def release(self) -> None:
        """Frees the gathered weight and keeps this rank's rows."""
        if self._shard is not None:
            self.module.weight, self._shard = self._shard, None


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, including those that are not saved; tied ones once."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


def _read_weights(path: Path, model: nn.Module, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The values of every tensor of ``model``, from its files; raises UserError if they hold another model."""
    weights = _tensors(load_model(path, None, **options))
    if differing := sorted(weights.keys() ^ _tensors(model).keys()):
        raise UserError(f"{path}: {type(model).__name__} has another {differing[0]} when it is loaded; use backend=hf")
    return weights


def _broadcast_dtypes(model: nn.Module, weights: dict[str, torch.Tensor] | None) -> None:
    """Gives ``model`` the dtypes of the loaded weights: transformers keeps some in float32 in a model of any dtype."""
    tensors = _tensors(model)
    codes = torch.full((len(tensors),), -1)
    for number, name in enumerate(tensors):
        if weights is not None and weights[name].dtype in PLAIN_DTYPES:
            codes[number] = PLAIN_DTYPES.index(weights[name].dtype)
    dist.broadcast(codes, src=0)
    for tensor, code in zip(tensors.values(), codes.tolist(), strict=True):
        if code >= 0:
            tensor.data = tensor.data.to(PLAIN_DTYPES[code])


def _broadcast_weights(model: nn.Module, weights: dict[str, torch.Tensor] | None, device: torch.device) -> None:
    """Broadcasts the first rank's ``weights`` tensor by tensor; every rank keeps its part."""
    for name, own in _tensors(model).items():
        source = torch.empty(own.shape, dtype=own.dtype, device=device) if weights is None else weights.pop(name)
        whole = source.to(device).contiguous()
        dist.broadcast(whole, src=0)
        if isinstance(own, DTensor):
            part = distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
            own.to_local().copy_(part.to_local())
        else:
            own.copy_(whole)
