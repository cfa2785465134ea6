"""Wire protocol between a trainer and a target server: safetensors frames, nothing that is executed.

A request is a batch; an answer is its hidden states in the target's own dtype, bit for bit: (A + 1) * h numbers per
token.
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from nemo_speculative.data.batch import Batch, Span
from nemo_speculative.targets.base import Target, TargetOutput
from nemo_speculative.utils.errors import UserError

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
MAX_TOKEN_BYTES = 8 + 1 + 8 + 3 * 8
"""Largest size of a token in a request: id, mask and position, and a span if it is a document of its own."""
MAX_HEADER_BYTES = 1024
"""Largest size of a request without its tokens."""
TOKEN_VARIABLE = "NEMO_TARGET_TOKEN"
"""Environment variable of the bearer token.  Not a configuration key, because a run saves its configuration."""


def bearer_token() -> str | None:
    """The bearer token from the environment, or None without one.

    Raises:
        UserError: it is empty, which would admit everyone, or holds characters that no HTTP header can carry.
    """
    if (token := os.environ.get(TOKEN_VARIABLE)) is None:
        return None
    if not (token := token.strip()):
        raise UserError(f"{TOKEN_VARIABLE} is empty: give it a value, or unset it to work without a token")
    if not re.fullmatch("[!-~]+", token):  # the token itself is secret, so the error does not show it
        raise UserError(f"{TOKEN_VARIABLE} has a space, a line break or no ASCII in it: expected letters and digits")
    return token


class FrameError(ValueError):
    """Bytes that are not a valid frame."""


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
    batch = batch.on_host
    spans = [(span.row, span.start, span.end) for span in batch.spans]
    return save(
        {
            "input_ids": batch.input_ids.cpu().contiguous(),
            "loss_mask": batch.loss_mask.cpu().contiguous(),
            "positions": batch.positions.cpu().contiguous(),
            "spans": torch.tensor(spans, dtype=torch.long).reshape(-1, 3),
        }
    )


def unpack_batch(frame: bytes, vocab_size: int) -> Batch:
    """The batch of a request.

    Raises:
        FrameError: it is not a batch that a target of ``vocab_size`` ids can read.
    """
    try:
        tensors = load(frame)
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise FrameError(f"not a safetensors frame ({' '.join(str(error).split())[:100]})") from None
    names = ("input_ids", "loss_mask", "positions", "spans")
    if set(tensors) != set(names):
        raise FrameError(f"it holds {', '.join(sorted(tensors))}: expected {', '.join(names)}")
    ids, mask, positions, spans = (tensors[name] for name in names)
    if ids.dim() != 2 or not ids.numel() or not ids.shape == mask.shape == positions.shape:
        raise FrameError(f"input_ids have shape {list(ids.shape)}: expected [B, L], as loss_mask and positions")
    if (ids.dtype, mask.dtype, positions.dtype) != (torch.long, torch.bool, torch.long):
        raise FrameError(f"dtypes {ids.dtype}, {mask.dtype}, {positions.dtype}: expected int64, bool, int64")
    # An id out of range would abort the CUDA context, and with it the whole server.
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise FrameError(f"input_ids range from {int(ids.min())} to {int(ids.max())}: expected 0 to {vocab_size - 1}")
    starts = positions == 0
    if not starts[:, 0].all() or not (starts[:, 1:] | (positions.diff() == 1)).all():
        raise FrameError("positions do not count from 0 in every document")
    return Batch(ids, mask, positions, starts.cumsum(1) - 1, _unpack_spans(spans, starts))


def _unpack_spans(spans: torch.Tensor, document_starts: torch.Tensor) -> tuple[Span, ...]:
    """The spans, each of which must be one document; ``document_starts``: bool [B, L]."""
    rows, length = document_starts.shape
    if spans.dtype != torch.long or spans.dim() != 2 or spans.shape[1] != 3:
        raise FrameError(f"spans are {spans.dtype} of shape {list(spans.shape)}: expected int64 of [S, 3]")
    row, start, end = spans.unbind(1)
    inside = (row >= 0) & (row < rows) & (start >= 0) & (start < end) & (end <= length)
    if not inside.all() or not document_starts[row, start].all():
        raise FrameError(f"spans name what is no document of {rows} rows of {length} tokens")
    edges = torch.cat([document_starts.flatten().nonzero()[:, 0], torch.tensor([document_starts.numel()])])
    starts, ends = row * length + start, row * length + end
    if not (edges[torch.searchsorted(edges, starts, right=True)] == ends).all() or not (starts.diff() > 0).all():
        raise FrameError("spans name more or less than one document each, or are not in the order of the rows")
    return tuple(Span("", 0, *bounds) for bounds in spans.tolist())


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
        """The first bytes of the frame, padded so that the tensors are aligned."""
        dtype, between, end = SAFETENSORS_DTYPES[self.dtype], prod(self.aux_shape) * self.dtype.itemsize, self.nbytes
        described = {
            "aux": {"dtype": dtype, "shape": self.aux_shape, "data_offsets": [0, between]},
            "last_hidden": {"dtype": dtype, "shape": self.last_hidden_shape, "data_offsets": [between, end]},
        }
        text = json.dumps(described).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Size of the tensors, without the header."""
        return (prod(self.aux_shape) + prod(self.last_hidden_shape)) * self.dtype.itemsize

    def allocate(self, pinned: bool) -> torch.Tensor:
        """A host buffer for a frame, uint8 [bytes]."""
        return torch.empty(len(self.header) + self.nbytes, dtype=torch.uint8, pin_memory=pinned)

    def read(self, frame: torch.Tensor) -> TargetOutput:
        """The output in ``frame``, which :meth:`allocate` made; views of it.

        Raises:
            FrameError: the frame has another layout.
        """
        size = len(self.header)
        if (header := bytes(frame[:size].numpy())) != self.header:
            raise FrameError(f"the answer starts with {header[8:200]!r}: expected {self.header[8:].decode().strip()}")
        aux, hidden = frame[size:].view(self.dtype).split((prod(self.aux_shape), prod(self.last_hidden_shape)))
        return TargetOutput(aux.view(self.aux_shape), hidden.view(self.last_hidden_shape))


def pack_output(output: TargetOutput) -> list[memoryview]:
    """The answer as consecutive pieces: the header, and views of the tensors, which are on the CPU."""
    aux, hidden = output.aux_hidden_states.contiguous(), output.last_hidden_state.contiguous()
    layout = OutputLayout(hidden.dtype, tuple(aux.shape), tuple(hidden.shape))
    tensors = [x.detach().view(torch.uint8).flatten().numpy().data for x in (aux, hidden)]
    return [memoryview(layout.header), *tensors]
