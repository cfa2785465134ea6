"""EAGLE's offline format: one ``.ckpt`` per sample, as the official code (``ge_data``) and its successors write it.

Each is a ``torch.save`` of ``{"input_ids": [L], "loss_mask": [L], "hidden_state": [L, h]}``, whose hidden state is the
output of the final norm; for EAGLE-3 (SpecForge) also ``"aux_hidden_state": [L, A * h]``.  A leading dimension of 1 is
accepted.  The files do not name the model that computed them: the share of next tokens that the target's head predicts
from them shows it.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_method

from nemo_speculative.config.schema import CaptureJob
from nemo_speculative.data.batch import Batch
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.data.tokenized_dataset import Tokenization
from nemo_speculative.distributed.parallelism import first_rank_first
from nemo_speculative.targets.base import Target, TargetOutput
from nemo_speculative.targets.cached.manifest import Tensors
from nemo_speculative.targets.cached.shards import document_key, document_of
from nemo_speculative.targets.describe import target_config
from nemo_speculative.utils.devices import to_device
from nemo_speculative.utils.errors import UserError, describe_error


class EagleFiles(Target):
    """Hidden states from the ``.ckpt`` files below ``directory``.

    Args:
        max_length: number of tokens to which documents are cut.

    Raises:
        UserError: there are no files, or one cannot be read, lacks a key or has other shapes.
    """

    def __init__(self, path: Path, directory: Path, *, max_length: int, row_tokens: int, **options: Any):
        super().__init__(path, **options)
        self.directory, self.row_tokens = directory, row_tokens
        self.files = {str(file.relative_to(directory)): file for file in sorted(directory.rglob("*.ckpt"))}
        if not self.files:
            raise UserError(f"eagle: {directory} holds no .ckpt file; expected those that EAGLE's ge_data wrote")
        rows = []
        for name, file in self.files.items():
            sample = self._read(file)
            rows.append(TokenRow(name, sample["input_ids"].tolist(), (sample["loss_mask"] != 0).tolist(), str(file)))
        documents = Tokenization(self.tokenizer, self.stop_ids, max_length, self.config.vocab_size)(rows)
        self.documents, self.dropped = list(documents.rows), documents.report()

    @classmethod
    def of(cls, job: CaptureJob, device: torch.device) -> "EagleFiles":
        """The files that ``job.eagle`` names, with the embedding and head of the job's model."""
        config = target_config(job.model)
        max_length, row_tokens = job.data.lengths(config.max_position_embeddings)
        path = first_rank_first(lambda: get_method(job.model._target_)(job.model))
        return cls(
            path, Path(str(job.eagle)), max_length=max_length, row_tokens=row_tokens,
            aux_layers=job.draft.chosen_aux_layers(config.num_hidden_layers),
            dtype=getattr(torch, job.model.dtype.value), device=device, trust_remote_code=job.model.trust_remote_code,
        )  # fmt: skip

    def _read(self, file: Path) -> Tensors:
        """The tensors of a file, memory-mapped; raises UserError as the class does."""
        try:
            sample = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # pickle, zipfile and torch raise classes of their own
            raise UserError(
                f"{file}: cannot be read as tensors alone ({describe_error(error, 120)}); files that run code "
                "are never loaded"
            ) from None
        hidden = self.config.hidden_size
        shapes: dict[str, list[int]] = {"input_ids": [], "loss_mask": [], "hidden_state": [hidden]}
        if self.aux_layers:
            shapes["aux_hidden_state"] = [hidden * len(self.aux_layers)]
        tensors: Tensors = {}
        for name, width in shapes.items():
            x = sample.get(name) if isinstance(sample, dict) else None
            if not isinstance(x, torch.Tensor):
                keys = sorted(map(str, sample)) if isinstance(sample, dict) else type(sample).__name__
                raise UserError(
                    f"{file}: found {keys}, expected the keys {', '.join(shapes)}, each a tensor: {name} is "
                    f"{type(x).__name__}"
                )
            tensors[name] = x[0] if x.dim() == len(width) + 2 and len(x) == 1 else x
            shape, expected = list(tensors[name].shape), [len(tensors["input_ids"]), *width]
            if shape != expected:
                raise UserError(f"{file}: {name} has shape {shape}, expected {expected} for this target")
        return tensors

    def compute_hidden_states(self, batch: Batch) -> TargetOutput:
        shape, h = batch.input_ids.shape, self.config.hidden_size
        hidden = torch.zeros(*shape, h, dtype=self.dtype)
        aux = torch.zeros(*shape, h * len(self.aux_layers), dtype=self.dtype)
        for span in batch.spans:
            tokens, length = (span.row, slice(span.start, span.end)), span.end - span.start
            sample = self._read(self._file_of_document[document_key(*document_of(batch, span))])
            hidden[tokens] = sample["hidden_state"][:length].to(self.dtype)
            if self.aux_layers:
                aux[tokens] = sample["aux_hidden_state"][:length].to(self.dtype)
        return TargetOutput(to_device(aux, self.device), to_device(hidden, self.device))

    @cached_property
    def _file_of_document(self) -> dict[bytes, Path]:
        return {document_key(row.input_ids, row.loss_mask): self.files[row.id] for row in self.documents}

    def report(self) -> str:
        """One line: the documents read, and how well the target's head fits them."""
        return (
            f"{self.directory}: {self.dropped}; the head of {self.path} ranks {self.agreement():.0%} of the supervised "
            "tokens first there (near 0: another model computed them)"
        )

    @torch.no_grad()
    def agreement(self) -> float:
        """Share of the supervised tokens of the first 16 files that the target's head ranks first."""
        hits = count = 0
        for row in self.documents[:16]:
            ids, mask = torch.tensor(row.input_ids), torch.tensor(row.loss_mask)
            hidden = self._read(self.files[row.id])["hidden_state"][: len(ids) - 1].to(self.device, self.dtype)
            correct = self.logits(hidden[mask[1:].to(hidden.device)]).argmax(-1).cpu() == ids[1:][mask[1:]]
            hits, count = hits + int(correct.sum()), count + len(correct)
        return hits / max(count, 1)
