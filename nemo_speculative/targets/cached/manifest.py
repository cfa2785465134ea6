"""``manifest.json`` of a feature directory: which target computed it, for which kind of draft, in which encoding."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
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
from nemo_speculative.utils.files import differing_keys, read_manifest, write_manifest

MANIFEST_FILE = "manifest.json"
FORMAT = 1
AUX, LAST_HIDDEN = "aux", "last_hidden"
"""The two kinds of tensors in a shard."""
FP8, SCALE = "fp8", "_scale"
"""The encoding with a scale for each hidden state, and what its name adds to that of the kind."""
ENCODINGS = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, FP8: torch.float8_e4m3fn
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


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
    """Name of the encoding."""
    versions: dict[str, str]
    documents: int = 0
    """Number of documents after the last writer finished."""
    content: str = ""
    """Hash of the documents' keys at that time."""

    @classmethod
    def of(cls, target: Target, convention: MaskConvention, draft: str, encoding: str | None = None) -> "Manifest":
        """The manifest for what ``target`` computes for the draft class ``draft``; in its own dtype by default."""
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
            stored=encoding or identity.dtype,
            versions={name: version(name) for name in ("torch", "transformers")} | {"nemo_speculative": __version__},
        )

    @classmethod
    def read(cls, directory: Path) -> "Manifest | None":
        """The manifest of ``directory``, or None if it has none; raises UserError if the file is damaged."""
        file = directory / MANIFEST_FILE
        try:
            if (values := read_manifest(file)) is None:
                return None
            manifest = cls(**values)
            if manifest.stored not in ENCODINGS or manifest.format != FORMAT:
                raise ValueError(f"stored is {manifest.stored!r} in format {manifest.format}")
            return manifest
        except (ValueError, TypeError, OSError) as error:
            raise UserError(
                f"{file}: not a manifest of features ({error}); restore it from a copy, or capture again elsewhere"
            ) from None

    def write(self, directory: Path) -> None:
        """Writes the manifest into ``directory``, atomically."""
        write_manifest(directory / MANIFEST_FILE, asdict(self), indent=2)

    def require_same(self, other: "Manifest", directory: Path, ignored: Collection[str] = ("stored",)) -> None:
        """Raises UserError unless the features of ``directory``, which self describes, are usable for ``other``."""
        stored, needed = asdict(self), asdict(other)
        for name in differing_keys(stored, needed, {*ignored, "versions", "documents", "content"}):
            raise UserError(
                f"{name} is {stored[name]} in {directory} and {needed[name]} here; train with what captured them, or "
                "capture into another directory"
            )

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, int]]:
        """Dtype and width of every stored tensor: aux [n, A * h], last_hidden [m, h], and with fp8 their scales."""
        layout, dtype = {}, ENCODINGS[self.stored]
        for kind, states in ((AUX, len(self.aux_layers)), (LAST_HIDDEN, 1)):
            if states:
                layout[kind] = dtype, states * self.hidden_size
                if self.stored == FP8:
                    layout[kind + SCALE] = torch.float32, states
        return layout

    @property
    def bytes_per_position(self) -> dict[str, int]:
        """Stored bytes of one position, by kind."""
        sizes: dict[str, int] = {}
        for name, (dtype, width) in self.layout.items():
            kind = name.removesuffix(SCALE)
            sizes[kind] = sizes.get(kind, 0) + dtype.itemsize * width
        return sizes

    def encode(self, kind: str, x: torch.Tensor) -> Tensors:
        """The tensors that store hidden states x [n, s * h], s of which belong to a position."""
        dtype = ENCODINGS[self.stored]
        if self.stored != FP8:
            return {kind: x.to(dtype)}
        # A scale per hidden state: magnitudes differ by orders between layers and tokens.
        states = x.float().unflatten(-1, (-1, self.hidden_size))
        # The minimum is the scale of a state that is all zeros.
        scale = (states.abs().amax(-1) / torch.finfo(dtype).max).clamp(min=1e-12)
        return {kind: (states / scale[..., None]).to(dtype).flatten(-2), kind + SCALE: scale}

    def decode(self, kind: str, stored: Tensors, dtype: torch.dtype) -> torch.Tensor:
        """Inverse of :meth:`encode`, for any leading dimensions: → [..., s * h]."""
        if self.stored != FP8:
            return stored[kind].to(dtype)
        states = stored[kind].float().unflatten(-1, (-1, self.hidden_size))
        return (states * stored[kind + SCALE][..., None]).flatten(-2).to(dtype)
