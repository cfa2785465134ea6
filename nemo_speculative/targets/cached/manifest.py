"""``manifest.json``: what computed the features of a directory, and for which kind of training."""

import dataclasses
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import xxhash
from hydra.utils import get_class

from nemo_speculative import __version__
from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.config.schema import MaskConvention
from nemo_speculative.data.chat_template import rules_digest
from nemo_speculative.targets.base import Target
from nemo_speculative.targets.cached.codecs import CODECS, Codec, Layout
from nemo_speculative.targets.remote.protocol import Identity
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_write_text

FILE = "manifest.json"
FORMAT = 1
AUX, LAST_HIDDEN = "aux", "last_hidden"
FREE = ("stored", "versions", "documents", "content")
"""What a reader takes as it is."""
ADVICE = "train with what captured them, or capture into another directory"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """See the module's text."""

    format: int = FORMAT
    target: str
    """Fingerprint of its weights."""
    dtype: str
    """What the target computed in."""
    hidden_size: int
    aux_layers: list[int]
    tokenizer: str
    """Hash of what turns text into ids."""
    chat_template: str
    """Hash."""
    mask_convention: str
    last_hidden: str
    """Where the last hidden state is stored: ``supervised``, or also ``attended`` positions."""
    stored: str
    """The codec."""
    versions: dict[str, str]
    documents: int = 0
    """How many there are, as the last writer left them."""
    content: str = ""
    """Hash of their keys."""

    @classmethod
    def of(cls, target: Target, convention: MaskConvention, draft: str, codec: Codec | None = None) -> "Manifest":
        """What ``target`` computes for the class ``draft``; stored by ``codec``, or as the target computes it."""
        draft_class: type[Draft] = get_class(draft)
        identity = Identity.of(target)
        return cls(
            target=identity.fingerprint,
            dtype=identity.dtype,
            hidden_size=target.config.hidden_size,
            aux_layers=identity.aux_layers,
            tokenizer=rules_digest(target.tokenizer),
            chat_template=_hash(target.tokenizer.chat_template or ""),
            mask_convention=convention.value,
            last_hidden="attended" if draft_class.READS_LAST_HIDDEN else "supervised",
            stored=codec.name if codec else identity.dtype,
            versions={name: version(name) for name in ("torch", "transformers")} | {"nemo_speculative": __version__},
        )

    @classmethod
    def read(cls, directory: Path) -> "Manifest | None":
        """That of ``directory``; None: there is none.

        Raises:
            UserError: it is damaged.
        """
        file = directory / FILE
        if not file.exists():
            return None
        try:
            found = cls(**json.loads(file.read_text()))
            if found.stored not in CODECS or found.format != FORMAT:
                raise ValueError(f"stored is {found.stored!r} in format {found.format}")
            return found
        except (ValueError, TypeError, OSError) as error:
            raise UserError(
                f"{file}: not a manifest of features ({error}); take it from a copy, or capture anew elsewhere"
            ) from None

    def write(self, directory: Path) -> None:
        """Replaces the file as a whole."""
        atomic_write_text(directory / FILE, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    def require_same(self, other: "Manifest", directory: Path, free: tuple[str, ...] = FREE) -> None:
        """
        Raises:
            UserError: what ``directory`` holds, self, is not what ``other``, here, asks for; named by its key.
        """
        there, here = dataclasses.asdict(self), dataclasses.asdict(other)
        for name in there:
            if name not in free and there[name] != here[name]:
                raise UserError(f"{name} is {there[name]} in {directory} and {here[name]} here; {ADVICE}")

    @property
    def convention(self) -> MaskConvention:
        return MaskConvention(self.mask_convention)

    @property
    def codec(self) -> Codec:
        return CODECS[self.stored]

    @property
    def layouts(self) -> dict[str, Layout]:
        """The parts of aux, [n, A * h], and of last_hidden, [m, h]."""
        states = {AUX: len(self.aux_layers), LAST_HIDDEN: 1}
        return {kind: self.codec.layout(count, self.hidden_size) for kind, count in states.items() if count}

    @property
    def position_bytes(self) -> dict[str, int]:
        """Of one position of each."""
        return {
            kind: sum(dtype.itemsize * width for dtype, width in layout.values())
            for kind, layout in self.layouts.items()
        }


def _hash(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())
