"""What travels between a trainer and a target server: safetensors frames, nothing that is executed.

A request is a batch, an answer is its supervision in the target's own dtype, bit for bit: (A + 1) * h numbers a token.
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

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""safetensors' names of the dtypes that a target may have."""
TOKEN_BYTES = 8 + 1 + 8 + 3 * 8
"""Most bytes that a token takes in a request: its id, mask and position, and a span if it is a document of its own."""
HEADER_BYTES = 1024
"""Most bytes of a request beside its tokens."""
TOKEN_VARIABLE = "NEMO_TARGET_TOKEN"
"""The environment variable of the bearer token.  Not a configuration key, which a run would write down."""


def bearer_token() -> str | None:
    """What a request carries, from the environment; None: nothing.

    Raises:
        UserError: it is set to nothing, which would let everybody in, or to what no header can hold.
    """
    if (token := os.environ.get(TOKEN_VARIABLE)) is None:
        return None
    if not (token := token.strip()):
        raise UserError(f"{TOKEN_VARIABLE} is empty: give it a value, or unset it to go without a token")
    if not re.fullmatch("[!-~]+", token):  # not said: it is a secret
        raise UserError(f"{TOKEN_VARIABLE} has a space, a line break or no ASCII in it: expected letters and digits")
    return token


class FrameError(ValueError):
    """Bytes that are no frame of this kind."""


@dataclass(frozen=True)
class Identity:
    """What two targets have in common that give the same supervision."""

    fingerprint: str
    dtype: str
    aux_layers: list[int]

    @classmethod
    def of(cls, target: Target) -> "Identity":
        return cls(target.fingerprint, str(target.dtype).removeprefix("torch."), list(target.aux_layers))

    @property
    def tag(self) -> str:
        """As an HTTP entity tag."""
        return f'"{self.fingerprint}:{self.dtype}:{",".join(map(str, self.aux_layers))}"'

    def difference(self, other: "Identity") -> str | None:
        """``name is X there and Y here``, of the first thing in which ``other``, there, differs; None: of none."""
        here, there = asdict(self), asdict(other)
        return next((f"{n} is {there[n]} there and {here[n]} here" for n in here if here[n] != there[n]), None)


def pack_batch(batch: Batch) -> bytes:
    """The request for ``batch``: all of it but the names of its conversations."""
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
        FrameError: it is none that a target of ``vocab_size`` ids can read.
    """
    tensors = _tensors(frame, {"input_ids", "loss_mask", "positions", "spans"})
    ids, mask, positions, spans = (tensors[n] for n in ("input_ids", "loss_mask", "positions", "spans"))
    if ids.dim() != 2 or not ids.numel() or not ids.shape == mask.shape == positions.shape:
        raise FrameError(f"input_ids have shape {list(ids.shape)}: expected [B, L], as loss_mask and positions")
    if (ids.dtype, mask.dtype, positions.dtype) != (torch.long, torch.bool, torch.long):
        raise FrameError(f"dtypes {ids.dtype}, {mask.dtype}, {positions.dtype}: expected int64, bool, int64")
    # What is out of range ends a CUDA process, not only its request.
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise FrameError(f"input_ids lie from {int(ids.min())} to {int(ids.max())}: expected 0 to {vocab_size - 1}")
    begins = positions == 0
    if not begins[:, 0].all() or not (begins[:, 1:] | (positions.diff() == 1)).all():
        raise FrameError("positions do not count from 0 in every document")
    return Batch(ids, mask, positions, begins.cumsum(1) - 1, _spans(spans, begins))


def _spans(spans: torch.Tensor, begins: torch.Tensor) -> tuple[Span, ...]:
    rows, length = begins.shape
    if spans.dtype != torch.long or spans.dim() != 2 or spans.shape[1] != 3:
        raise FrameError(f"spans are {spans.dtype} of shape {list(spans.shape)}: expected int64 of [S, 3]")
    row, start, end = spans.unbind(1)
    there = (row >= 0) & (row < rows) & (start >= 0) & (start < end) & (end <= length)
    if not there.all() or not begins[row, start].all():
        raise FrameError(f"spans name what is no document of {rows} rows of {length} tokens")
    edges = torch.cat([begins.flatten().nonzero()[:, 0], torch.tensor([begins.numel()])])
    starts, ends = row * length + start, row * length + end
    if not (edges[torch.searchsorted(edges, starts, right=True)] == ends).all() or not (starts.diff() > 0).all():
        raise FrameError("spans name more or less than one document each, or not in the order of the rows")
    return tuple(Span("", 0, *place) for place in spans.tolist())


@dataclass(frozen=True)
class Layout:
    """Where a supervision of B rows of L tokens lies in its frame, a safetensors file: aux, then last_hidden."""

    dtype: torch.dtype
    aux_hidden_states: tuple[int, ...]
    """[B, L, A * h]."""
    last_hidden_state: tuple[int, ...]
    """[B, L, h]."""

    @classmethod
    def of(cls, batch: Batch, hidden_size: int, identity: Identity) -> "Layout":
        rows, length = batch.input_ids.shape
        aux = (rows, length, len(identity.aux_layers) * hidden_size)
        return cls(getattr(torch, identity.dtype), aux, (rows, length, hidden_size))

    @cached_property
    def header(self) -> bytes:
        """What the frame begins with; the tensors behind it lie aligned."""
        between, end = prod(self.aux_hidden_states) * self.dtype.itemsize, self.nbytes
        places = (
            ("aux", self.aux_hidden_states, [0, between]),
            ("last_hidden", self.last_hidden_state, [between, end]),
        )
        described = {n: {"dtype": DTYPES[self.dtype], "shape": s, "data_offsets": at} for n, s, at in places}
        text = json.dumps(described).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Of the tensors; the frame has those of the header beside them."""
        return (prod(self.aux_hidden_states) + prod(self.last_hidden_state)) * self.dtype.itemsize

    def buffer(self, pinned: bool) -> torch.Tensor:
        """uint8 [bytes of a frame], on the host."""
        return torch.empty(len(self.header) + self.nbytes, dtype=torch.uint8, pin_memory=pinned)

    def read(self, frame: torch.Tensor) -> TargetOutput:
        """The supervision in ``frame``, which was made by :meth:`buffer`; views of it.

        Raises:
            FrameError: the frame is not of this layout.
        """
        size = len(self.header)
        if (found := bytes(frame[:size].numpy())) != self.header:
            raise FrameError(f"the answer begins with {found[8:200]!r}: expected {self.header[8:].decode().strip()}")
        aux, hidden = frame[size:].view(self.dtype).split((prod(self.aux_hidden_states), prod(self.last_hidden_state)))
        return TargetOutput(aux.view(self.aux_hidden_states), hidden.view(self.last_hidden_state))


def frame_supervision(supervision: TargetOutput) -> list[memoryview]:
    """The answer, as pieces that follow each other; views of the tensors, which are on the CPU: none is copied."""
    aux, hidden = supervision.aux_hidden_states.contiguous(), supervision.last_hidden_state.contiguous()
    layout = Layout(hidden.dtype, tuple(aux.shape), tuple(hidden.shape))
    tensors = [x.detach().view(torch.uint8).flatten().numpy().data for x in (aux, hidden)]
    return [memoryview(layout.header), *tensors]


def _tensors(frame: bytes, names: set[str]) -> dict[str, torch.Tensor]:
    try:
        tensors = load(frame)
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise FrameError(f"not a safetensors frame ({' '.join(str(error).split())[:100]})") from None
    if set(tensors) != names:
        raise FrameError(f"it holds {', '.join(sorted(tensors))}: expected {', '.join(sorted(names))}")
    return tensors
