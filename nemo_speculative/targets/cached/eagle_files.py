"""EAGLE's offline format: a ``.ckpt`` for each sample, as the official code (``ge_data``) and others after it write.

Each is a ``torch.save`` of ``{"input_ids": [L], "loss_mask": [L], "hidden_state": [L, h]}``, of which the last is after
the final norm; for EAGLE-3 (SpecForge) with ``"aux_hidden_state": [L, A * h]``.  A leading dimension of 1 is accepted.
The files do not say which model computed them: the share of next tokens that the head finds in them does.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_method

from nemo_speculative.config.schema import CaptureJob
from nemo_speculative.data.batch import Batch
from nemo_speculative.data.conversation import TokenRow
from nemo_speculative.data.tokenized_dataset import tokenize_conversations
from nemo_speculative.distributed.collectives import first_rank_first
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.cached.positions import key_of, key_of_lists
from nemo_speculative.targets.describe import target_config
from nemo_speculative.targets.embedding_and_head import EmbeddingAndHead
from nemo_speculative.utils.devices import send
from nemo_speculative.utils.errors import UserError, describe_error

SAMPLE = 16
"""Files that are tried with the head."""
Sample = dict[str, torch.Tensor]


class EagleFiles(EmbeddingAndHead):
    """The ends of the model in ``path``, and supervision from the files below ``directory``.

    Args:
        max_length: documents are cut to so many tokens.
        ends: those of :class:`nemo_speculative.targets.embedding_and_head.EmbeddingAndHead`.

    Raises:
        UserError: there are none, or one cannot be read, lacks a key or has other shapes.
    """

    def __init__(self, path: Path, directory: Path, *, max_length: int, row_tokens: int, **ends: Any):
        super().__init__(path, **ends)
        self.directory, self.row_tokens = directory, row_tokens
        self.files = {str(file.relative_to(directory)): file for file in sorted(directory.rglob("*.ckpt"))}
        if not self.files:
            raise UserError(f"eagle: {directory} holds no .ckpt file; expected those that EAGLE's ge_data wrote")
        rows = [self._row(name, file) for name, file in self.files.items()]
        found = tokenize_conversations(rows, self.tokenizer, self.stop_ids, max_length, self.config.vocab_size)
        self.documents, self.left_out = list(found.rows), found.report()

    @classmethod
    def of(cls, job: CaptureJob, device: torch.device) -> "EagleFiles":
        """Those that ``job.eagle`` names."""
        config = target_config(job.model)
        max_length, row_tokens = job.data.lengths(config.max_position_embeddings)
        return cls(
            first_rank_first(lambda: get_method(job.model._target_)(job.model)),
            Path(str(job.eagle)),
            max_length=max_length,
            row_tokens=row_tokens,
            aux_layers=job.draft.chosen_aux_layers(config.num_hidden_layers),
            dtype=getattr(torch, job.model.dtype.value),
            device=device,
            trust_remote_code=job.model.trust_remote_code,
        )

    def _row(self, name: str, file: Path) -> TokenRow:
        sample = self._read(file)
        return TokenRow(name, sample["input_ids"].tolist(), (sample["loss_mask"] != 0).tolist(), str(file))

    def _read(self, file: Path) -> Sample:
        """A file's tensors; mapped, so that only what is looked at is read.

        Raises:
            UserError: see the class.
        """
        try:
            sample = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # pickle, zipfile and torch have their own
            raise UserError(
                f"{file}: cannot be read as tensors alone ({describe_error(error, 120)}); "
                "what runs code is never loaded"
            ) from None
        hidden = self.config.hidden_size
        widths = {"input_ids": None, "loss_mask": None, "hidden_state": hidden}
        if self.aux_layers:
            widths["aux_hidden_state"] = hidden * len(self.aux_layers)
        if not isinstance(sample, dict) or not widths.keys() <= sample.keys():
            keys = sorted(map(str, sample)) if isinstance(sample, dict) else type(sample).__name__
            raise UserError(f"{file}: found {keys}, expected the keys {', '.join(widths)}")
        read = {name: _unbatched(sample[name], 1 if width is None else 2, name, file) for name, width in widths.items()}
        length = len(read["input_ids"])
        for name, width in widths.items():
            shape = [length] if width is None else [length, width]
            if list(read[name].shape) != shape:
                raise UserError(f"{file}: {name} has shape {list(read[name].shape)}, expected {shape} for this target")
        return read

    def compute_hidden_states(self, batch: Batch) -> TargetOutput:
        host, h = batch.on_host, self.config.hidden_size
        dtype, shape = self.dtype, batch.input_ids.shape
        hidden = torch.zeros(*shape, h, dtype=dtype)
        aux = torch.zeros(*shape, h * len(self.aux_layers), dtype=dtype)
        for span in host.spans:
            place = span.row, slice(span.start, span.end)
            file = self._of_document[key_of(host.input_ids[place], host.loss_mask[place])]
            sample, length = self._read(file), span.end - span.start
            hidden[place] = sample["hidden_state"][:length].to(dtype)
            if self.aux_layers:
                aux[place] = sample["aux_hidden_state"][:length].to(dtype)
        return TargetOutput(send(aux, self.device), send(hidden, self.device))

    @cached_property
    def _of_document(self) -> dict[bytes, Path]:
        return {key_of_lists(row.input_ids, row.loss_mask): self.files[row.id] for row in self.documents}

    def report(self) -> str:
        """What was found, and whether it is this target's."""
        return (
            f"{self.directory}: {self.left_out}; the head of {self.path} puts {self.agreement():.0%} of the supervised "
            "tokens first there (near 0: they are another model's)"
        )

    @torch.no_grad()
    def agreement(self) -> float:
        """Share of the supervised tokens of some files that the target's head puts first."""
        hits = count = 0
        for row in self.documents[:SAMPLE]:
            ids, mask = torch.tensor(row.input_ids), torch.tensor(row.loss_mask)
            hidden = self._read(self.files[row.id])["hidden_state"][: len(ids) - 1].to(self.device, self.dtype)
            right = self.logits(hidden[mask[1:].to(hidden.device)]).argmax(-1).cpu() == ids[1:][mask[1:]]
            hits, count = hits + int(right.sum()), count + len(right)
        return hits / max(count, 1)


def _unbatched(value: Any, dimensions: int, name: str, file: Path) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise UserError(f"{file}: {name} is a {type(value).__name__}, expected a tensor")
    return value[0] if value.dim() == dimensions + 1 and len(value) == 1 else value
