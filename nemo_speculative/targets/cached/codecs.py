"""Numbers as they are stored: a dtype, or float8 with scales.

A codec turns s hidden states of h numbers each, [n, s * h], into named parts with n rows, and back.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

Parts = dict[str, torch.Tensor]
"""By the suffix of their names in a shard; ``""`` are the values."""
Layout = dict[str, tuple[torch.dtype, int]]
"""Dtype and width of each part."""
FP8 = torch.float8_e4m3fn
SMALLEST = 1e-12
"""The scale of a state that is all zeros."""


class Codec(Protocol):
    """See the module's text."""

    @property
    def name(self) -> str:
        """As the manifest says it."""
        ...

    def layout(self, states: int, hidden: int) -> Layout:
        """The parts of [n, states * hidden]."""
        ...

    def encode(self, x: torch.Tensor, hidden: int) -> Parts: ...

    def decode(self, parts: Parts, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        """[..., s * h], for parts [..., width]."""
        ...


@dataclass(frozen=True)
class Plain:
    """Numbers of one dtype."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def layout(self, states: int, hidden: int) -> Layout:
        return {"": (self.dtype, states * hidden)}

    def encode(self, x: torch.Tensor, hidden: int) -> Parts:
        return {"": x.to(self.dtype)}

    def decode(self, parts: Parts, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        return parts[""].to(dtype)


@dataclass(frozen=True)
class Float8:
    """float8_e4m3fn, with a float32 scale for each hidden state: layers, and tokens of one, differ by orders."""

    name = "fp8"

    def layout(self, states: int, hidden: int) -> Layout:
        return {"": (FP8, states * hidden), "_scale": (torch.float32, states)}

    def encode(self, x: torch.Tensor, hidden: int) -> Parts:
        states = x.float().unflatten(-1, (-1, hidden))
        scale = (states.abs().amax(-1) / torch.finfo(FP8).max).clamp(min=SMALLEST)
        return {"": (states / scale[..., None]).to(FP8).flatten(-2), "_scale": scale}

    def decode(self, parts: Parts, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        states = parts[""].float().unflatten(-1, (-1, hidden))
        return (states * parts["_scale"][..., None]).flatten(-2).to(dtype)


CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (Plain(torch.float32), Plain(torch.bfloat16), Plain(torch.float16), Float8())
}
"""By what a manifest calls them."""
