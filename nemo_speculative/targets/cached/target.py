"""``backend=features``: the target's hidden states from disk; of the target only embedding and head are loaded."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_speculative.config.schema import READ_AHEAD, MaskConvention
from nemo_speculative.data.batch import Batch, Span
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.distributed.parallelism import is_first_rank
from nemo_speculative.targets.base import Target, TargetOutput
from nemo_speculative.targets.cached.manifest import AUX, LAST_HIDDEN, Manifest, Tensors
from nemo_speculative.targets.cached.shards import MIB, ShardWriter, document_key, document_of, stored_positions
from nemo_speculative.targets.cached.store import (
    Budget,
    FeatureStore,
    Location,
    open_store,
    prepare_directory,
    remove_partial_files,
    seal,
)
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.devices import to_device
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import JobLock


class FeaturesTarget(Target):
    """Hidden states from the feature directory ``directory``; positions that no loss reads are zeros.

    Its options are those of FeaturesBackendConfig; features for another draft or mask convention are refused.

    Raises:
        UserError: the directory holds no features or those of another target, or a shard is damaged or missing.
    """

    requests_ahead = READ_AHEAD

    def __init__(
        self, path: Path, *, directory: str, mask_convention: MaskConvention, draft: str, fill: bool = False,
        shard_mb: int = 1024, **options: Any,
    ):  # fmt: skip
        super().__init__(path, **options)
        self.directory = Path(directory)
        manifest = Manifest.of(self, mask_convention, draft)
        self._filler: _Filler | None = None
        if fill:
            lock = JobLock(self.directory, "backend.directory", first=is_first_rank())
            if is_first_rank():
                remove_partial_files(self.directory)
            self.store = FeatureStore(self.directory, prepare_directory(self.directory, manifest))
            self._filler = _Filler(self.store, shard_mb, path, options, lock)
        else:
            self.store = open_store(self.directory, "backend.directory")
            self.store.manifest.require_same(manifest, self.directory)

    def expect(self, *documents: Sequence[TokenRow]) -> None:
        """Checks that all documents are stored, or with ``fill`` that the disk has room for the missing ones."""
        if self._filler:
            self._filler.lock.join()  # the first rank holds it by now, and keeps other trainings out
        budget = Budget(self.store, *documents)
        if not budget.missing:
            return
        if self._filler is None:
            total = len(budget.missing) + budget.present
            raise UserError(
                f"backend.directory: {len(budget.missing)} of {total} documents are not in {self.directory}, the first "
                f"is {budget.first}: this command line for recipes/capture_features.py output={self.directory} adds "
                "what is missing, or backend.fill=true does during training"
            )
        if is_first_rank():
            print(f"{budget.report(self.directory)}; captured during training", flush=True)
            budget.require_room(self.directory, "backend.directory")

    def compute_hidden_states(self, batch: Batch) -> TargetOutput:
        """Raises UserError if a document is not stored, or its shard is damaged."""
        host = batch.on_host
        keys = [document_key(*document_of(host, span)) for span in host.spans]
        locations = self._filler.find(keys, host) if self._filler else self.store.find(keys)
        if None not in locations:
            return self._read(host, [location for location in locations if location])
        if self._filler:
            return self._filler.compute_hidden_states(batch, locations)
        span = host.spans[locations.index(None)]
        raise UserError(f"backend.directory: document {span.id} is not in {self.directory}; capture it first")

    def _read(self, batch: Batch, locations: list[Location]) -> TargetOutput:
        """Lays the encoded tensors out in the batch's rows, takes this rank's shard of them, and decodes that."""
        rows: Tensors = {
            name: torch.zeros(*batch.input_ids.shape, width, dtype=dtype)
            for name, (dtype, width) in self.store.manifest.layout.items()
        }
        # All documents first: the system reads them ahead while the first are copied.
        documents = [self.store.tensors(location) for location in locations]
        for span, tensors in zip(batch.spans, documents, strict=True):
            self._copy_document(batch, span, tensors, rows)
        shard = {name: to_device(batch.shard.local(x), self.device) for name, x in rows.items()}
        hidden = self.store.manifest.decode(LAST_HIDDEN, shard, self.dtype)
        return TargetOutput(
            self.store.manifest.decode(AUX, shard, self.dtype) if AUX in shard else hidden[..., :0], hidden
        )

    def _copy_document(self, batch: Batch, span: Span, tensors: Tensors, rows: Tensors) -> None:
        _, hidden = stored_positions(document_of(batch, span)[1], self.store.manifest)
        for name, x in tensors.items():
            into = rows[name][span.row, span.start : span.end]
            if name.startswith(AUX):
                into[: len(x)] = x
            elif len(hidden) == int(hidden[-1]) + 1 - int(hidden[0]):  # contiguous: a slice is faster than an index
                into[int(hidden[0]) : int(hidden[-1]) + 1] = x
            else:
                # As bytes: index_copy_ does not know float8.
                into.view(torch.uint8).index_copy_(0, hidden, x.view(torch.uint8))

    def close(self) -> None:
        if self._filler:
            self._filler.close()


class _Filler:
    """Computes missing documents with the model itself, loaded when the first is missing, and stores them."""

    def __init__(self, store: FeatureStore, shard_mb: int, path: Path, options: dict[str, Any], lock: JobLock):
        self.store, self.path, self.options, self.lock = store, path, options, lock
        self.writer = ShardWriter(store.directory, store.manifest, shard_mb * MIB)
        self._mutex, self._epoch = threading.Lock(), 0
        self._target: HFTarget | None = None

    def find(self, keys: list[bytes], batch: Batch) -> list[Location | None]:
        """The location of each document of a batch, including those that other ranks wrote; None: not stored."""
        with self._mutex:
            if (epoch := max((span.epoch for span in batch.spans), default=0)) > self._epoch:
                # In the next epoch other ranks need the documents that wait for the last shard to fill up.
                self._epoch = epoch
                self.writer.flush()
            locations = self.store.find(keys)
            if None in locations:
                self.store.refresh()
                locations = self.store.find(keys)
            return locations

    def compute_hidden_states(self, batch: Batch, locations: list[Location | None]) -> TargetOutput:
        """This rank's shard of a batch, which the model computes as a whole.

        One of the ranks that share the batch stores the documents without a location; the others find them later.
        """
        with self._mutex:
            self._target = self._target or HFTarget(self.path, **self.options)
            with torch.no_grad():
                output = self._target.compute_hidden_states(batch.whole)
            if batch.shard.is_first:
                for span, location in zip(batch.on_host.spans, locations, strict=True):
                    if location is None:
                        self.writer.add(batch, span, output)
            return output.shard(batch.shard)

    def close(self) -> None:
        """Writes the remaining documents; the last rank that closes seals the directory."""
        with self._mutex:
            try:
                self.writer.close()
            finally:
                self.lock.leave(lambda: print(seal(self.store.directory), flush=True))
