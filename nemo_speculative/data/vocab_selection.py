"""The draft vocabulary beside the rows that it was chosen from."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from nemo_speculative.config.vocab_and_aux_layers import VocabularySize
from nemo_speculative.data.tokenized_dataset import TokenizedDataset
from nemo_speculative.data.vocab_mapping import VocabMapping, build_vocabulary, vocabulary_of
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_write

RULE = "the most frequent ids of the assistant, 1"
"""Its number is raised when the same counts would give another vocabulary."""


def chosen_vocabulary(documents: TokenizedDataset, size: VocabularySize) -> VocabMapping:
    """The ids that the assistant wrote most often in ``documents``.

    Where these are stored it lies beside them, ``vocabulary-<size>.safetensors``: ``d2t`` and ``t2d`` as checkpoints
    have them, and what chose it; there it is found when the same is asked for again.

    Raises:
        UserError: there is no room for it.
    """
    if documents.directory is None or not size.own_head:
        return build_vocabulary(documents.all_counts, size)
    asked = f"{size.entries}" if size.entries is not None else f"{size.coverage:.10g}"
    file = documents.directory / f"vocabulary-{asked}.safetensors"
    chosen_by = {"rule": RULE, "rows": documents.fingerprint, "size": asked}
    found = _read(file, chosen_by, documents)
    if found is None:
        found = build_vocabulary(documents.all_counts, size)
        _write(file, found, chosen_by)
    return found


def _read(file: Path, chosen_by: dict[str, str], documents: TokenizedDataset) -> VocabMapping | None:
    """None: it is not there, was chosen otherwise, or is damaged."""
    try:
        with safe_open(file, framework="pt") as stored:
            if {key: stored.metadata().get(key) for key in chosen_by} != chosen_by:
                return None
            found = vocabulary_of(stored.get_tensor("d2t"), documents.all_counts)
            return found if torch.equal(found.t2d, stored.get_tensor("t2d")) else None
    except (OSError, SafetensorError, IndexError, AttributeError):
        return None


def _write(file: Path, vocabulary: VocabMapping, chosen_by: dict[str, str]) -> None:
    said = chosen_by | {"entries": str(vocabulary.size), "coverage": f"{vocabulary.coverage:.6f}"}
    try:
        with atomic_write(file) as out:
            out.write(save({"d2t": vocabulary.d2t, "t2d": vocabulary.t2d}, said))
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {file} cannot be written ({error.strerror}); make room there, or name another directory"
        ) from None
