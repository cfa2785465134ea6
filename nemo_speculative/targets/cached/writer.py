"""Documents into shards, in a thread beside the target's work."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from nemo_speculative.data.batch import Batch, Span
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.cached.manifest import AUX, LAST_HIDDEN, Manifest
from nemo_speculative.targets.cached.positions import Positions
from nemo_speculative.targets.cached.shards import Document, Tensors, write_shard

MIB = 1 << 20
WAITING = 1
"""Shards that may wait for the disk: with the one that is filled and the one that is written, three are in memory."""


class Writer:
    """Cuts supervisions into documents, and writes a shard whenever there are ``shard_bytes`` of them.

    A document that was put in is not put in again.
    """

    def __init__(self, directory: Path, manifest: Manifest, shard_bytes: int):
        self.directory, self.manifest, self.shard_bytes = directory, manifest, shard_bytes
        self._filling: list[Document] = []
        self._bytes, self._taken = 0, set[bytes]()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="features")
        self._room, self._under_way = threading.Semaphore(1 + WAITING), list[Future[Path]]()

    def put(self, key: bytes, batch: Batch, span: Span, supervision: TargetOutput) -> None:
        """Takes the document of ``span``.  Waits where the disk is slower than the target.

        Raises:
            UserError: the disk is full.
        """
        if key in self._taken:
            return
        self._taken.add(key)
        document = document_of(key, batch, span, supervision, self.manifest)
        self._filling.append(document)
        self._bytes += document.nbytes
        if self._bytes >= self.shard_bytes:
            self._send()

    def _send(self) -> None:
        self._raise_what_failed()
        self._room.acquire()
        documents, self._filling, self._bytes = self._filling, [], 0
        self._under_way.append(self._thread.submit(self._write, documents))

    def _write(self, documents: list[Document]) -> Path:
        try:
            return write_shard(self.directory, documents)
        finally:
            self._room.release()

    def _raise_what_failed(self) -> None:
        for written in [w for w in self._under_way if w.done()]:
            self._under_way.remove(written)
            written.result()

    def flush(self) -> None:
        """Writes what there is, and waits for the disk.

        Raises:
            UserError: the disk is full.
        """
        if self._filling:
            self._send()
        while self._under_way:
            self._under_way.pop().result()

    def close(self) -> None:
        """:meth:`flush`, and the end of the thread."""
        try:
            self.flush()
        finally:
            self._thread.shutdown()


def document_of(key: bytes, batch: Batch, span: Span, supervision: TargetOutput, manifest: Manifest) -> Document:
    """What is stored of the document of ``span``, on the host; encoded where the supervision is."""
    host, place = batch.on_host, slice(span.start, span.end)
    positions = Positions.of(host.loss_mask[span.row, place], manifest.convention)
    aux = supervision.aux_hidden_states[span.row, place][: positions.attended]
    hidden = supervision.last_hidden_state[span.row, place]
    hidden = hidden.index_select(0, stored_hidden(positions, manifest).to(hidden.device))
    tensors: Tensors = {}
    for kind, x in ((AUX, aux), (LAST_HIDDEN, hidden)):
        if x.numel():
            parts = manifest.codec.encode(x, manifest.hidden_size)
            # A copy in any case: a view would keep the whole batch.
            tensors |= {kind + suffix: part.to("cpu", copy=True) for suffix, part in parts.items()}
    return Document(key, tensors)


def stored_hidden(positions: Positions, manifest: Manifest) -> torch.Tensor:
    """int64 [m], ascending: where the last hidden state of a document is stored."""
    if manifest.last_hidden == "supervised":
        return positions.labels
    return torch.arange(positions.attended + 1 if positions.attended else 0)
