"""Wire protocol between a trainer and a target server: safetensors frames, nothing that is executed.

A request is a batch; an answer is its hidden states in the target's own dtype, bit for bit: (A + 1) * h numbers per
token.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from math import prod

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from nemo_speculative.data.batch import Batch, Span
from nemo_speculative.targets.base import Target, TargetOutput
from nemo_speculative.utils.errors import UserError, describe_error

SAFETENSORS_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"
}  # fmt: skip
MAX_TOKEN_BYTES = 8 + 1 + 8 + 3 * 8
"""Largest size of a token in a request: id, mask and position, and a span if it is a document of its own."""
MAX_HEADER_BYTES = 1024
"""Largest size of a request without its tokens."""
TOKEN_VARIABLE = "NEMO_TARGET_TOKEN"
"""Environment variable of the bearer token.  Not a configuration key, because a run saves its configuration."""


def bearer_token() -> str | None:
    """The bearer token from the environment, or None; raises UserError for one that no HTTP header can carry."""
    if (token := os.environ.get(TOKEN_VARIABLE)) is None:
        return None
    if not re.fullmatch("[!-~]+", token := token.strip()):  # it is secret, so the error does not show it
        raise UserError(
            f"{TOKEN_VARIABLE} is empty, or has a space, a line break or no ASCII in it: expected letters and digits; "
            "unset it to work without a token"
        )
    return token


class FrameError(ValueError):
    """An answer or request that is not as the protocol says."""


@dataclass(frozen=True)
class TargetIdentity:
    """The properties that two targets share if they compute the same hidden states."""

    fingerprint: str
    dtype: str
    aux_layers: list[int]

    @classmethod
    def of(cls, target: Target) -> "TargetIdentity":
        return cls(target.fingerprint, str(target.dtype).removeprefix("torch."), list(target.aux_layers))

    @property
    def tag(self) -> str:
        """The identity as an HTTP entity tag."""
        return f'"{self.fingerprint}:{self.dtype}:{",".join(map(str, self.aux_layers))}"'

    def difference(self, remote: "TargetIdentity") -> str | None:
        """``name is X there and Y here`` for the first property in which ``remote`` differs, or None."""
        own, other = asdict(self), asdict(remote)
        return next((f"{n} is {other[n]} there and {own[n]} here" for n in own if own[n] != other[n]), None)


def pack_batch(batch: Batch) -> bytes:
    """The request for ``batch``; the ids of its conversations are not sent."""
    tensors = {name: getattr(batch.on_host, name).contiguous() for name in ("input_ids", "loss_mask", "positions")}
    spans = [(span.row, span.start, span.end) for span in batch.spans]
    return save(tensors | {"spans": torch.tensor(spans, dtype=torch.long).reshape(-1, 3)})


def unpack_batch(frame: bytes, vocab_size: int) -> Batch:
    """The batch of a request; raises FrameError if it is not a batch that a target of ``vocab_size`` ids can read."""
    try:
        tensors = load(frame)
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise FrameError(f"not a safetensors frame ({describe_error(error, 100)})") from None
    dtypes = {"input_ids": torch.long, "loss_mask": torch.bool, "positions": torch.long, "spans": torch.long}
    if set(tensors) != set(dtypes):
        raise FrameError(f"it holds {', '.join(sorted(tensors))}: expected {', '.join(dtypes)}")
    ids, mask, positions, spans = (tensors[name] for name in dtypes)
    if ids.dim() != 2 or not ids.numel() or not ids.shape == mask.shape == positions.shape or spans.shape[1:] != (3,):
        shapes = {name: list(tensors[name].shape) for name in dtypes}
        raise FrameError(f"the shapes are {shapes}: expected [B, L], and [S, 3] for spans")
    if differing := [name for name, dtype in dtypes.items() if tensors[name].dtype != dtype]:
        name = differing[0]
        raise FrameError(f"dtypes differ: {name} is {tensors[name].dtype}, expected {dtypes[name]}")
    # An id out of range would abort the CUDA context, and with it the whole server.
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise FrameError(f"input_ids range from {int(ids.min())} to {int(ids.max())}: expected 0 to {vocab_size - 1}")
    starts = positions == 0
    if not starts[:, 0].all() or not (starts[:, 1:] | (positions.diff() == 1)).all():
        raise FrameError("positions do not count from 0 in every document")
    edges = [*starts.flatten().nonzero()[:, 0].tolist(), ids.numel()]
    length = ids.shape[1]
    documents = iter([[*divmod(start, length), (end - 1) % length + 1] for start, end in pairwise(edges)])
    # The search for each span starts after the document of the one before.
    if not all(span in documents for span in spans.tolist()):
        raise FrameError(f"spans name what is no document of rows of {length} tokens, or are not in their order")
    return Batch(ids, mask, positions, starts.cumsum(1) - 1, tuple(Span("", 0, *span) for span in spans.tolist()))


@dataclass(frozen=True)
class OutputLayout:
    """Layout of the answer for B rows of L tokens, a safetensors file: a header, then aux, then last_hidden."""

    dtype: torch.dtype
    aux_shape: tuple[int, ...]
    """(B, L, A * h)"""
    last_hidden_shape: tuple[int, ...]
    """(B, L, h)"""

    @classmethod
    def of(cls, batch: Batch, hidden_size: int, identity: TargetIdentity) -> "OutputLayout":
        """The layout of the answer to ``batch`` from a target with this identity."""
        rows, length = batch.input_ids.shape
        aux = (rows, length, len(identity.aux_layers) * hidden_size)
        return cls(getattr(torch, identity.dtype), aux, (rows, length, hidden_size))

    @cached_property
    def header(self) -> bytes:
        """The first bytes of the frame."""
        shapes = {"aux": self.aux_shape, "last_hidden": self.last_hidden_shape}
        return safetensors_header({name: (self.dtype, shape) for name, shape in shapes.items()})

    def allocate(self, pinned: bool) -> torch.Tensor:
        """A host buffer for a frame, uint8 [bytes]."""
        numbers = prod(self.aux_shape) + prod(self.last_hidden_shape)
        return torch.empty(len(self.header) + numbers * self.dtype.itemsize, dtype=torch.uint8, pin_memory=pinned)

    def read(self, frame: torch.Tensor) -> TargetOutput:
        """The output in ``frame``, which :meth:`allocate` made; views of it.  Raises FrameError for another layout."""
        size = len(self.header)
        if (header := bytes(frame[:size].numpy())) != self.header:
            raise FrameError(f"the answer starts with {header[8:200]!r}: expected {self.header[8:].decode().strip()}")
        aux, hidden = frame[size:].view(self.dtype).split((prod(self.aux_shape), prod(self.last_hidden_shape)))
        return TargetOutput(aux.view(self.aux_shape), hidden.view(self.last_hidden_shape))


def pack_output(output: TargetOutput) -> list[memoryview]:
    """The answer as consecutive pieces: the header, and views of the tensors, which are on the CPU."""
    aux, hidden = output.aux_hidden_states.detach(), output.last_hidden_state.detach()
    layout = OutputLayout(hidden.dtype, tuple(aux.shape), tuple(hidden.shape))
    return [memoryview(layout.header), tensor_bytes(aux), tensor_bytes(hidden)]


def tensor_bytes(x: torch.Tensor) -> memoryview:
    """The numbers of a tensor on the CPU as bytes; a view if it is contiguous."""
    return x.contiguous().view(torch.uint8).flatten().numpy().data


def safetensors_header(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> bytes:
    """The first bytes of a safetensors file of ``tensors``, dtype and shape by name; their numbers follow in order."""
    described, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        described[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    return len(text).to_bytes(8, "little") + text
