"""``manifest.json`` of a feature directory: which target computed it, for which kind of draft, in which encoding."""

import dataclasses
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from hydra.utils import get_class

from nemo_speculative import __version__
from nemo_speculative.config.schema import MaskConvention
from nemo_speculative.data.chat_template import rules_digest
from nemo_speculative.targets.base import Target
from nemo_speculative.targets.remote.protocol import TargetIdentity
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_write_text

MANIFEST_FILE = "manifest.json"
FORMAT = 1
AUX, LAST_HIDDEN = "aux", "last_hidden"
"""Names of the two kinds of tensors in a shard."""

Tensors = dict[str, torch.Tensor]
Layout = dict[str, tuple[torch.dtype, int]]
"""Dtype and width of each tensor that a codec makes of one kind of states, by the suffix of its name."""


@dataclass(frozen=True)
class Codec:
    """Encoding of s hidden states of h numbers each, [n, s * h], as numbers of one dtype."""

    name: str
    """Name of the codec in a manifest."""
    dtype: torch.dtype

    def layout(self, states: int, hidden: int) -> Layout:
        return {"": (self.dtype, states * hidden)}

    def encode(self, x: torch.Tensor, hidden: int) -> Tensors:
        """[n, s * h] → tensors of n rows, by the suffix of their names."""
        return {"": x.to(self.dtype)}

    def decode(self, parts: Tensors, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        """Inverse of :meth:`encode`, for any leading dimensions: → [..., s * h]."""
        return parts[""].to(dtype)


class Float8Codec(Codec):
    """float8 with one float32 scale per hidden state: magnitudes differ by orders between layers and tokens."""

    def layout(self, states: int, hidden: int) -> Layout:
        return {"": (self.dtype, states * hidden), "_scale": (torch.float32, states)}

    def encode(self, x: torch.Tensor, hidden: int) -> Tensors:
        states = x.float().unflatten(-1, (-1, hidden))
        # The minimum is the scale of a state that is all zeros.
        scale = (states.abs().amax(-1) / torch.finfo(self.dtype).max).clamp(min=1e-12)
        return {"": (states / scale[..., None]).to(self.dtype).flatten(-2), "_scale": scale}

    def decode(self, parts: Tensors, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        states = parts[""].float().unflatten(-1, (-1, hidden))
        return (states * parts["_scale"][..., None]).flatten(-2).to(dtype)


CODECS = {
    codec.name: codec
    for codec in (
        *(Codec(str(dtype).removeprefix("torch."), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        Float8Codec("fp8", torch.float8_e4m3fn),
    )
}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of ``manifest.json``.  Logits and probabilities are never stored: the head recomputes them."""

    format: int = FORMAT
    target: str
    """Fingerprint of the target's weights."""
    dtype: str
    """Dtype in which the target computed."""
    hidden_size: int
    aux_layers: list[int]
    tokenizer: str
    """Hash of the tokenizer's rules."""
    chat_template: str
    """Hash of the chat template."""
    mask_convention: str
    last_hidden: str
    """Positions whose last hidden state is stored: ``supervised`` ones, or all ``attended`` ones as well."""
    stored: str
    """Name of the codec."""
    versions: dict[str, str]
    documents: int = 0
    """Number of documents after the last writer finished."""
    content: str = ""
    """Hash of the documents' keys at that time."""

    @classmethod
    def of(cls, target: Target, convention: MaskConvention, draft: str, codec: Codec | None = None) -> "Manifest":
        """The manifest for what ``target`` computes for the draft class ``draft``; ``codec`` None: in its own dtype."""
        draft_class: Any = get_class(draft)
        identity = TargetIdentity.of(target)
        return cls(
            target=identity.fingerprint,
            dtype=identity.dtype,
            hidden_size=target.config.hidden_size,
            aux_layers=identity.aux_layers,
            tokenizer=rules_digest(target.tokenizer),
            chat_template=xxhash.xxh3_128_hexdigest((target.tokenizer.chat_template or "").encode()),
            mask_convention=convention.value,
            last_hidden="attended" if draft_class.READS_LAST_HIDDEN else "supervised",
            stored=codec.name if codec else identity.dtype,
            versions={name: version(name) for name in ("torch", "transformers")} | {"nemo_speculative": __version__},
        )

    @classmethod
    def read(cls, directory: Path) -> "Manifest | None":
        """The manifest of ``directory``, or None if it has none.

        Raises:
            UserError: the file is damaged.
        """
        file = directory / MANIFEST_FILE
        if not file.exists():
            return None
        try:
            manifest = cls(**json.loads(file.read_text()))
            if manifest.stored not in CODECS or manifest.format != FORMAT:
                raise ValueError(f"stored is {manifest.stored!r} in format {manifest.format}")
            return manifest
        except (ValueError, TypeError, OSError) as error:
            raise UserError(
                f"{file}: not a manifest of features ({error}); restore it from a copy, or capture again elsewhere"
            ) from None

    def write(self, directory: Path) -> None:
        """Writes the manifest into ``directory``, atomically."""
        atomic_write_text(directory / MANIFEST_FILE, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    def require_same(
        self,
        other: "Manifest",
        directory: Path,
        ignore: tuple[str, ...] = ("stored", "versions", "documents", "content"),
    ) -> None:
        """Checks that the features of ``directory``, which self describes, are usable where ``other`` is needed.

        Raises:
            UserError: a field that is not in ``ignore`` differs.
        """
        stored, needed = dataclasses.asdict(self), dataclasses.asdict(other)
        for name in stored:
            if name not in ignore and stored[name] != needed[name]:
                raise UserError(
                    f"{name} is {stored[name]} in {directory} and {needed[name]} here; train with what captured them, "
                    "or capture into another directory"
                )

    @property
    def convention(self) -> MaskConvention:
        return MaskConvention(self.mask_convention)

    @property
    def codec(self) -> Codec:
        return CODECS[self.stored]

    @property
    def layouts(self) -> dict[str, Layout]:
        """The tensors that encode aux, [n, A * h], and last_hidden, [m, h]."""
        states = {AUX: len(self.aux_layers), LAST_HIDDEN: 1}
        return {kind: self.codec.layout(count, self.hidden_size) for kind, count in states.items() if count}

    @property
    def bytes_per_position(self) -> dict[str, int]:
        """Stored bytes of one position, by kind."""
        return {
            kind: sum(dtype.itemsize * width for dtype, width in layout.values())
            for kind, layout in self.layouts.items()
        }
