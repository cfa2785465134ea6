"""One document of a feature directory: its key, the positions that are stored, and its encoded tensors.

Slot t of a draft reads the features at or before t of its document, and its labels are the target's outputs at t + 1,
t + 2, …  Nothing after the last supervised slot is read, so nothing is stored there.  The number of TTT steps does not
matter: the labels of later steps are those of later slots' first step (tests/targets/cached/test_documents.py proves
it for every mask convention).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from xxhash import xxh3_128_digest

from nemo_speculative.data.batch import Batch, Span, supervision_mask
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.cached.manifest import AUX, LAST_HIDDEN, Manifest, Tensors

KEY_BYTES = 16


def document_key(input_ids: torch.Tensor | Sequence[int], loss_mask: torch.Tensor | Sequence[bool]) -> bytes:
    """The name of a document, a 16-byte hash of its token ids [L] and loss mask [L], on the host."""
    ids, mask = torch.as_tensor(input_ids, dtype=torch.long), torch.as_tensor(loss_mask, dtype=torch.bool)
    return xxh3_128_digest(ids.numpy().tobytes() + mask.numpy().tobytes())


@dataclass(frozen=True)
class StoredPositions:
    """Positions of a document whose hidden states are stored."""

    num_aux: int
    """Aux states are stored for the first ``num_aux`` positions."""
    last_hidden: torch.Tensor
    """int64 [m], ascending: positions whose last hidden state is stored."""

    @classmethod
    def of(cls, loss_mask: torch.Tensor, manifest: Manifest) -> "StoredPositions":
        """The positions that a draft trained as ``manifest`` says reads; ``loss_mask``: bool [L], on the host."""
        row = loss_mask[None]
        mask = supervision_mask(row, torch.zeros_like(row, dtype=torch.long), 1, manifest.convention)
        slots = mask[0, 0].nonzero()[:, 0]
        attended = int(slots[-1]) + 1 if len(slots) else 0
        if manifest.last_hidden == "supervised":
            return cls(attended, slots + 1)
        return cls(attended, torch.arange(attended + 1 if attended else 0))


@dataclass(frozen=True)
class Document:
    """A document's stored tensors, on the host."""

    key: bytes
    tensors: Tensors
    """The tensors by their names in a shard: ``aux``, ``last_hidden``, and these with the codec's suffixes."""

    @classmethod
    def cut(cls, key: bytes, batch: Batch, span: Span, output: TargetOutput, manifest: Manifest) -> "Document":
        """Takes the document of ``span`` out of a batch's output; encoded on the output's device."""
        tokens = slice(span.start, span.end)
        positions = StoredPositions.of(batch.on_host.loss_mask[span.row, tokens], manifest)
        aux = output.aux_hidden_states[span.row, tokens][: positions.num_aux]
        hidden = output.last_hidden_state[span.row, tokens]
        hidden = hidden.index_select(0, positions.last_hidden.to(hidden.device))
        tensors: Tensors = {}
        for kind, x in ((AUX, aux), (LAST_HIDDEN, hidden)):
            if x.numel():
                parts = manifest.codec.encode(x, manifest.hidden_size)
                # Always a copy: a view would keep the whole batch in memory.
                tensors |= {kind + suffix: part.to("cpu", copy=True) for suffix, part in parts.items()}
        return cls(key, tensors)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors.values())

    def rows(self, kind: str) -> int:
        return len(self.tensors[kind]) if kind in self.tensors else 0
