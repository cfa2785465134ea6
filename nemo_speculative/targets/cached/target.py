"""The target's hidden states from disk, ``backend=features``.

Of the target itself only embedding and head are loaded.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_speculative.config.schema import READ_AHEAD, MaskConvention
from nemo_speculative.data.batch import Batch, Span
from nemo_speculative.data.conversation import TokenRow
from nemo_speculative.distributed.collectives import is_first_rank
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.cached.budget import Budget
from nemo_speculative.targets.cached.manifest import AUX, LAST_HIDDEN, Manifest
from nemo_speculative.targets.cached.positions import Positions, key_of
from nemo_speculative.targets.cached.shards import Tensors
from nemo_speculative.targets.cached.store import Place, Store
from nemo_speculative.targets.cached.upkeep import opened, prepare, remove_unfinished, seal
from nemo_speculative.targets.cached.writer import MIB, Writer, stored_hidden
from nemo_speculative.targets.embedding_and_head import EmbeddingAndHead
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.devices import send
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.locks import JobLock


class FeaturesTarget(EmbeddingAndHead):
    """The ends of the model in ``path``, and supervision from the features in ``directory``.

    Positions that no loss reads are zeros.

    Args:
        mask_convention, draft: of the training; features for others are refused.
        fill: what is missing is computed by the model itself when it is first asked for, and kept.
        shard_mb: MiB of a shard that is written then.
        ends: those of :class:`nemo_speculative.targets.embedding_and_head.EmbeddingAndHead`.

    Raises:
        UserError: the directory holds no features or those of something else, or a shard is damaged or missing.
    """

    requests_ahead = READ_AHEAD

    def __init__(
        self, path: Path, *, directory: str, mask_convention: MaskConvention, draft: str, fill: bool = False,
        shard_mb: int = 1024, **ends: Any,
    ):  # fmt: skip
        super().__init__(path, **ends)
        self.directory = Path(directory)
        wanted = Manifest.of(self, mask_convention, draft)
        self._filler: _Filler | None = None
        if fill:
            lock = JobLock(self.directory, "backend.directory", first=is_first_rank())
            if is_first_rank():
                remove_unfinished(self.directory)
            self.store = Store(self.directory, prepare(self.directory, wanted))
            self._filler = _Filler(self.store, shard_mb, path, ends, lock)
        else:
            self.store = opened(self.directory, "backend.directory")
            self.store.manifest.require_same(wanted, self.directory)

    def expect(self, *documents: Sequence[TokenRow]) -> None:
        """
        Raises:
            UserError: some are not there, or, where they are to be added, there is no room for them.
        """
        if self._filler:
            self._filler.lock.join()  # by now the first rank has kept other trainings out
        budget = Budget.of(self.store, *documents)
        if not budget.missing:
            return
        if self._filler is None:
            total = len(budget.missing) + budget.present
            raise UserError(
                f"backend.directory: {len(budget.missing)} of {total} documents are not in {self.directory}, the first "
                f"is {budget.first}: this command line for recipes/capture_features.py output={self.directory} adds "
                "what is missing, or backend.fill=true does on the way"
            )
        if is_first_rank():
            print(f"{budget.report(self.directory)}; captured on the way", flush=True)
            budget.require_room(self.directory, "backend.directory")

    def compute_hidden_states(self, batch: Batch) -> TargetOutput:
        """
        Raises:
            UserError: a document is not there, or its shard is damaged.
        """
        host = batch.on_host
        keys = [key_of(*_document(host, span)) for span in host.spans]
        found = self._filler.find(keys, host) if self._filler else self.store.find(keys)
        if None not in found:
            return self._read(host, found)
        if self._filler:
            return self._filler.compute_hidden_states(batch, keys)
        span = host.spans[found.index(None)]
        raise UserError(f"backend.directory: document {span.id} is not in {self.directory}; capture it first")

    def _read(self, batch: Batch, found: list[Place | None]) -> TargetOutput:
        manifest = self.store.manifest
        rows: Tensors = {
            kind + suffix: torch.zeros(*batch.input_ids.shape, width, dtype=dtype)
            for kind, layout in manifest.layouts.items()
            for suffix, (dtype, width) in layout.items()
        }
        for span, stored in zip(batch.spans, [self.store.tensors(place) for place in found if place], strict=True):
            self._lay(batch, span, stored, rows)
        shared = {name: batch.shard.local(x) for name, x in rows.items()}
        return TargetOutput(self._decoded(AUX, shared, batch), self._decoded(LAST_HIDDEN, shared, batch))

    def _lay(self, batch: Batch, span: Span, stored: Tensors, rows: Tensors) -> None:
        positions = Positions.of(_document(batch, span)[1], self.store.manifest.convention)
        hidden = stored_hidden(positions, self.store.manifest)
        for name, x in stored.items():
            into = rows[name][span.row, span.start : span.end]
            if name.startswith(AUX):
                into[: len(x)] = x
            elif len(hidden) == int(hidden[-1]) + 1 - int(hidden[0]):  # one run: no index
                into[int(hidden[0]) : int(hidden[-1]) + 1] = x
            else:
                _bytes(into).index_copy_(0, hidden, _bytes(x))

    def _decoded(self, kind: str, rows: Tensors, batch: Batch) -> torch.Tensor:
        manifest, dtype = self.store.manifest, self.dtype
        layout = manifest.layouts.get(kind)
        if layout is None:
            return torch.zeros(*batch.shard.local(batch.input_ids).shape, 0, dtype=dtype, device=self.device)
        parts = {suffix: send(rows[kind + suffix], self.device) for suffix in layout}
        return manifest.codec.decode(parts, manifest.hidden_size, dtype)

    def close(self) -> None:
        if self._filler:
            self._filler.close()


class _Filler:
    """The target itself, as long as documents are missing; what it computes goes to disk in a thread.

    Args:
        lock: of the directory, which every rank holds that writes there.
    """

    def __init__(self, store: Store, shard_mb: int, path: Path, ends: dict[str, Any], lock: JobLock):
        self.store, self.path, self.ends, self.lock = store, path, ends, lock
        self.writer = Writer(store.directory, store.manifest, shard_mb * MIB)
        self._one_at_a_time, self._epoch = threading.Lock(), 0
        self._target: HFTarget | None = None

    def find(self, keys: list[bytes], batch: Batch) -> list[Place | None]:
        """Where each document of a batch is by now, those that other ranks wrote among them; None: nowhere."""
        with self._one_at_a_time:
            if (epoch := max((span.epoch for span in batch.spans), default=0)) > self._epoch:
                # A pass is over: what the last shard waits for has been seen, and other ranks will ask for it.
                self._epoch = epoch
                self.writer.flush()
            found = self.store.find(keys)
            if None in found:
                self.store.refresh()
                found = self.store.find(keys)
            return found

    def compute_hidden_states(self, batch: Batch, keys: list[bytes]) -> TargetOutput:
        """The share of a batch that the target computes as a whole.

        What of it is missing on disk is written, by one of the ranks that share it: the others find it there later.
        """
        with self._one_at_a_time:
            self._target = self._target or HFTarget(self.path, **self.ends)
            with torch.no_grad():
                supervision = self._target.compute_hidden_states(batch.whole)
            if batch.shard.is_first:
                for key, span, place in zip(keys, batch.on_host.spans, self.store.find(keys), strict=True):
                    if place is None:
                        self.writer.put(key, batch, span, supervision)
            return supervision.of(batch.shard)

    def close(self) -> None:
        """Writes what there is; the last rank that does so seals the directory."""
        with self._one_at_a_time:
            try:
                self.writer.close()
            finally:
                self.lock.leave(lambda: print(seal(self.store.directory), flush=True))


def _document(batch: Batch, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """Its ids and its loss mask, [L] each, of a batch on the host."""
    place = span.row, slice(span.start, span.end)
    return batch.input_ids[place], batch.loss_mask[place]


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """``x`` as torch can copy any dtype."""
    return x.view(torch.uint8)
