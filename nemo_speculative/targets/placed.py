"""A target that several ranks hold together: parts of the decoder layers, of the embedding and of the head on each.

The head is whole from the end of a forward pass to the start of the next one: the draft's loss reads it in chunks of
its own slots, and how many of those a rank has is no other rank's business.
"""

from abc import abstractmethod
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from nemo_speculative.data.batch import Batch
from nemo_speculative.distributed.collectives import on_first_rank
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.describe import stop_ids_of
from nemo_speculative.targets.embedding_and_head import (
    UNSCALED,
    EmbeddingAndHead,
    decoder_layers,
    load_config,
    load_model,
)
from nemo_speculative.targets.hf import TransformersTarget
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.progress import quiet_transformers


class PlacedTarget(TransformersTarget):
    """A frozen Hugging Face model divided over ranks of the process group, which run its forwards together.

    They embed tokens together, too; and where :meth:`compute_hidden_states` has not just made the head whole, they
    read it together.  One process of the job reads the files, into the host's memory, and sends every tensor to the
    others, which keep their parts of it: no device ever holds more than its parts and one whole tensor.

    Args:
        options: those of :class:`nemo_speculative.targets.hf.TransformersTarget`.

    Raises:
        UserError: it cannot be divided.
    """

    collective = True

    def __init__(self, path: Path, **options: Any):
        super().__init__(path, **options)
        self.release()
        self.stop_ids = stop_ids_of(self.path, self.config, self.tokenizer)

    @torch.no_grad()
    def _load(self, **options: Any) -> Any:
        quiet_transformers()
        config = load_config(self.path, self.trust_remote_code)
        if getattr(config, "quantization_config", None):
            raise UserError(
                f"{self.path}: its weights are quantised, which backend=hf_fsdp2 and hf_tp cannot divide; take "
                "backend=sglang or backend=remote"
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options).eval().requires_grad_(False)
        layers = decoder_layers(model.get_decoder(), self.config.num_hidden_layers)
        self._check(model, layers)
        read = on_first_rank(lambda: _read(self.path, model, options))
        _take_dtypes(model, read)
        mesh = self._mesh()
        self._embedding_rows = DividedRows(model.get_input_embeddings(), mesh)
        self._head_rows = DividedRows(model.get_output_embeddings(), mesh)
        self._divide(model, layers, mesh)
        model.to_empty(device=self.device)
        model.tie_weights()
        _fill(model, read, self.device)
        return model

    def _check(self, model: Any, layers: nn.ModuleList) -> None:
        """
        Raises:
            UserError: ``model`` cannot be divided.
        """

    @abstractmethod
    def _mesh(self) -> DeviceMesh:
        """The ranks that share a copy, in one dimension."""

    @abstractmethod
    def _divide(self, model: Any, layers: nn.ModuleList, mesh: DeviceMesh) -> None:
        """Makes the parameters of ``layers``, which have no storage yet, this rank's parts of them."""

    def compute_hidden_states(self, batch: Batch) -> TargetOutput:
        self.release()
        supervision = self._compute(batch)
        self._embedding_rows.drop()
        self._head_rows.gather()
        return supervision

    def release(self) -> None:
        """Frees what was gathered; it is gathered again when it is used."""
        self._embedding_rows.drop()
        self._head_rows.drop()

    def _compute(self, batch: Batch) -> TargetOutput:
        """With all ranks that share a copy."""
        return super().compute_hidden_states(batch)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded = super().embed(input_ids)
        self._embedding_rows.drop()
        return embedded

    @property
    def head_weight(self) -> torch.Tensor:
        return self._head_rows.gather()

    def last_layers(self, count: int) -> list[nn.Module]:
        return list(EmbeddingAndHead.last_layers(self, count))


class DividedRows:
    """The weight of an embedding or a head: on each rank some of its rows; from a use to :meth:`drop` all of them.

    Args:
        module: its weight has no storage yet.
        mesh: over which its rows are divided.
    """

    def __init__(self, module: Any, mesh: DeviceMesh):
        self.module = module
        self._part: Any = None
        module.weight = _frozen(distribute_tensor(module.weight, mesh, [Shard(0)], src_data_rank=None))
        module.register_forward_pre_hook(self._before_use)

    def _before_use(self, *_: Any) -> None:
        self.gather()

    def gather(self) -> torch.Tensor:
        """Makes it whole, together with the other ranks, unless it is."""
        if self._part is None:
            self._part = self.module.weight
            self.module.weight = _frozen(self._part.full_tensor())
        return self.module.weight

    def drop(self) -> None:
        """Leaves this rank's rows of it."""
        if self._part is not None:
            self.module.weight, self._part = self._part, None


def _frozen(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that are not saved, too; tied ones once."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


def _read(path: Path, model: nn.Module, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the files hold for every tensor of ``model``.

    Raises:
        UserError: they are not the files of such a model.
    """
    read = _tensors(load_model(path, None, **options))
    if odd := sorted(read.keys() ^ _tensors(model).keys()):
        raise UserError(f"{path}: {type(model).__name__} has another {odd[0]} when it is loaded; take backend=hf")
    return read


def _take_dtypes(model: nn.Module, read: dict[str, torch.Tensor] | None) -> None:
    """transformers keeps some weights in float32 whatever the model's dtype is."""
    tensors = _tensors(model)
    kinds = torch.empty(len(tensors), dtype=torch.int64)
    if read is not None:
        found = [read[name].dtype for name in tensors]
        kinds.copy_(torch.tensor([UNSCALED.index(dtype) if dtype in UNSCALED else -1 for dtype in found]))
    dist.broadcast(kinds, src=0)
    for tensor, kind in zip(tensors.values(), kinds.tolist(), strict=True):
        if kind >= 0:
            tensor.data = tensor.data.to(UNSCALED[kind])


def _fill(model: nn.Module, read: dict[str, torch.Tensor] | None, device: torch.device) -> None:
    """Sends what the first rank has ``read``, tensor by tensor; every rank keeps its part."""
    for name, held in _tensors(model).items():
        given = torch.empty(held.shape, dtype=held.dtype, device=device) if read is None else read.pop(name)
        whole = given.to(device).contiguous()
        dist.broadcast(whole, src=0)
        if isinstance(held, DTensor):
            part = distribute_tensor(whole, held.device_mesh, held.placements, src_data_rank=None)
            held.to_local().copy_(part.to_local())
        else:
            held.copy_(whole)
