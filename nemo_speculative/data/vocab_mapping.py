"""The draft vocabulary: the target ids that a draft can propose, chosen by how often the assistant wrote them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from nemo_speculative.config.schema import VocabularySize
from nemo_speculative.data.tokenized_dataset import TokenizedDataset
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_write

ENTRIES_MULTIPLE = 64
"""Matrix products are fastest where the number of the head's rows is a multiple of this."""


@dataclass(frozen=True)
class VocabMapping:
    """Maps draft id j to target id ``ids[j]``; ``ids`` are ascending."""

    ids: torch.Tensor
    """int64 [V_d]."""
    target_size: int
    coverage: float
    """Share of the supervised tokens that are in the draft vocabulary, from 0 to 1."""

    @property
    def size(self) -> int:
        return len(self.ids)

    @property
    def d2t(self) -> torch.Tensor:
        """int64 [V_d], an offset: target id = j + d2t[j]."""
        return self.ids - torch.arange(self.size)

    @property
    def t2d(self) -> torch.Tensor:
        """bool [V]: whether a target id is in the draft vocabulary."""
        inside = torch.zeros(self.target_size, dtype=torch.bool)
        inside[self.ids] = True
        return inside


def build_vocab_mapping(counts: torch.Tensor, size: VocabularySize) -> VocabMapping:
    """The ids of the highest ``counts`` int64 [V]; ties, and ids that the assistant never wrote, go to the lower id."""
    entries = size.entries if size.entries is not None else entries_for_coverage(counts, size.coverage)
    ids = torch.sort(counts, descending=True, stable=True).indices[:entries].sort().values
    return VocabMapping(ids, len(counts), coverage(counts, ids))


def vocab_mapping_from_d2t(d2t: torch.Tensor, counts: torch.Tensor) -> VocabMapping:
    """The mapping that ``d2t`` int64 [V_d] describes, with its coverage of ``counts`` int64 [V]."""
    ids = torch.arange(len(d2t)) + d2t
    return VocabMapping(ids, len(counts), coverage(counts, ids))


def coverage(counts: torch.Tensor, ids: torch.Tensor) -> float:
    """The share of the tokens counted in int64 [V] whose id is in ``ids``, from 0 to 1."""
    total = int(counts.sum())
    return int(counts[ids].sum()) / total if total else 0.0


def entries_for_coverage(counts: torch.Tensor, coverage: float) -> int:
    """The fewest ids that cover a share of the tokens counted in int64 [V], rounded up to a multiple of 64."""
    covered = counts.sort(descending=True).values.cumsum(0)
    fewest = int((covered < coverage * covered[-1]).sum()) + 1
    return min(-(-fewest // ENTRIES_MULTIPLE) * ENTRIES_MULTIPLE, len(counts))


def build_and_store_vocab_mapping(dataset: TokenizedDataset, size: VocabularySize) -> VocabMapping:
    """The ids that the assistant wrote most often in ``dataset``.

    A mapping smaller than the target's vocabulary is written next to a dataset that is stored, as
    ``vocabulary-<size>.safetensors``: ``d2t`` and ``t2d`` as in checkpoints, and in the header what determined it.
    Where it is stored already, as after the first rank or in a resumed run, nothing is written.
    Raises UserError if the disk is full.
    """
    mapping = build_vocab_mapping(dataset.all_counts, size)
    if dataset.directory is None or not size.own_head:
        return mapping
    name = f"{size.entries}" if size.entries is not None else f"{size.coverage:.10g}"
    file = dataset.directory / f"vocabulary-{name}.safetensors"
    header = {"rule": "the most frequent ids of the assistant, 1", "rows": dataset.fingerprint, "size": name}
    header |= {"entries": str(mapping.size), "coverage": f"{mapping.coverage:.6f}"}
    if _is_stored(file, mapping, header):
        return mapping
    try:
        with atomic_write(file) as out:
            out.write(save({"d2t": mapping.d2t, "t2d": mapping.t2d}, header))
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {file} cannot be written ({error.strerror}); make room there, or name another directory"
        ) from None
    return mapping


def _is_stored(file: Path, mapping: VocabMapping, header: dict[str, str]) -> bool:
    try:
        with safe_open(file, framework="pt") as stored:
            return stored.metadata() == header and torch.equal(stored.get_tensor("d2t"), mapping.d2t)
    except (OSError, SafetensorError):
        return False
