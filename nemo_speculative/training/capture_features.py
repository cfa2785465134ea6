"""The target run once over the documents of a training, its hidden states kept on disk."""

import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import ConcatDataset

from nemo_speculative.config.schema import CaptureJob, FeatureDtype
from nemo_speculative.data.batch import Batch
from nemo_speculative.data.conversation import TokenRow
from nemo_speculative.data.packing import collate, pack
from nemo_speculative.distributed.collectives import ignore_sigterm, on_first_rank
from nemo_speculative.distributed.parallelism import fast_float32_matmuls, process_group
from nemo_speculative.targets.base import Target
from nemo_speculative.targets.cached.budget import Budget
from nemo_speculative.targets.cached.documents import document_key
from nemo_speculative.targets.cached.eagle_files import EagleFiles
from nemo_speculative.targets.cached.manifest import CODECS, Codec, Manifest
from nemo_speculative.targets.cached.shards import MIB, ShardWriter
from nemo_speculative.targets.cached.store import (
    HELD_OUT,
    TRAINING,
    FeatureStore,
    prepare_directory,
    remove_partial_files,
    require_same_manifest,
    seal,
)
from nemo_speculative.training import build
from nemo_speculative.utils.devices import choose_device
from nemo_speculative.utils.errors import PeerLostError, UserError
from nemo_speculative.utils.files import atomic_write
from nemo_speculative.utils.locks import dir_lock
from nemo_speculative.utils.progress import Progress

INTERRUPTED = 130
CODEC: dict[FeatureDtype, Codec | None] = {
    FeatureDtype.target: None, FeatureDtype.bf16: CODECS["bfloat16"], FeatureDtype.fp8: CODECS["fp8"]
}  # fmt: skip


def capture(job: CaptureJob) -> None:
    """Captures what ``job``, a training, will read; with ``plan=true`` only says what that takes.

    Raises:
        UserError: bad input, a directory that holds other features, or a disk that is too small.
        SystemExit: interrupted; every document so far was written.
    """
    build.check_target(job)
    device = choose_device(job.trainer.device, "trainer.device")
    with process_group(device, job.parallelism), fast_float32_matmuls(device):
        target, parts, row_tokens = _sources(job, device)
        documents: Any = ConcatDataset(list(parts.values()))  # reads them where they are
        manifest = Manifest.of(target, job.draft.mask_convention, job.draft._target_, CODEC[job.dtype])
        output = Path(job.output)
        require_same_manifest(output, manifest)
        budget = Budget.of(FeatureStore(output, manifest), *parts.values())
        on_first_rank(lambda: print(budget.report(output), flush=True))
        if job.plan:
            return
        with _held(output):
            on_first_rank(lambda: _begin(output, manifest, budget, parts))
            rows = job.trainer.micro_batch_size
            run(target, documents, budget, output, row_tokens=row_tokens, rows=rows, megabytes=job.shard_mb)
            on_first_rank(lambda: print(seal(output), flush=True))


def _sources(job: CaptureJob, device: torch.device) -> tuple[Target, dict[str, Any], int]:
    """What computes the features, the documents of each side of the data, and the length of a row of them."""
    if job.eagle:
        files = EagleFiles.of(job, device)
        on_first_rank(lambda: print(files.report(), flush=True))
        return files, {TRAINING: files.documents}, files.row_tokens
    split = build.load_split(job)
    target = build.build_target(job, device)
    data = build.build_data(job, target, split)
    return target, {TRAINING: data.training.rows, HELD_OUT: data.held_out.rows}, data.row_tokens


@contextmanager
def _held(output: Path) -> Iterator[None]:
    """``output``, held by the first rank for all of them."""
    with ExitStack() as stack:
        on_first_rank(lambda: stack.enter_context(dir_lock(output, "output")))
        yield


def _begin(output: Path, manifest: Manifest, budget: Budget, parts: dict[str, Sequence[TokenRow]]) -> None:
    remove_partial_files(output)
    budget.require_room(output, "output")
    prepare_directory(output, manifest)
    for name, documents in parts.items():
        write_documents(output / name, documents)


def write_documents(file_of_rows: Path, documents: Iterable[TokenRow]) -> None:
    """The documents as token ids, for ``data=jsonl``: what answers=target wrote, and EAGLE's files, have no other."""
    with atomic_write(file_of_rows) as file:
        for row in documents:
            said = {"id": row.id, "input_ids": row.input_ids, "loss_mask": [int(m) for m in row.loss_mask]}
            file.write((json.dumps(said | ({"source": row.source} if row.source else {})) + "\n").encode())


def run(
    target: Target, documents: Sequence[TokenRow], budget: Budget, output: Path, *, row_tokens: int, rows: int,
    megabytes: int,
) -> None:  # fmt: skip
    """This rank's share of what ``budget`` says is missing of ``documents``, into shards of its own.

    Args:
        row_tokens, rows: of a batch.
        megabytes: MiB of a shard.

    Raises:
        UserError: the disk is full.
        SystemExit: interrupted.
    """
    missing = list(budget.missing.values())
    batches = _of_this_rank(pack(budget.lengths, row_tokens, seed=0), rows)
    progress = Progress("capturing", sum(len(row) for batch in batches for row in batch))
    writer = ShardWriter(output, budget.manifest, megabytes * MIB)
    with closing(writer), _stopping() as stop:
        for batch_rows in batches:
            taken = [[documents[missing[d]] for d in row] for row in batch_rows]
            batch = collate(taken, row_tokens, pad_id=0).to(target.device)
            _together(partial(_capture, target, batch, writer))
            progress.advance(by=len(batch.spans))
            if _any_rank(stop.is_set()):
                _together(writer.flush)
                print("interrupted; every document so far was written, the same command goes on", flush=True)
                raise SystemExit(INTERRUPTED)
        _together(writer.flush)
    progress.close()


@torch.no_grad()
def _capture(target: Target, batch: Batch, writer: ShardWriter) -> None:
    supervision, host = target.compute_hidden_states(batch), batch.on_host
    for span in host.spans:
        place = span.row, slice(span.start, span.end)
        writer.add(document_key(host.input_ids[place], host.loss_mask[place]), batch, span, supervision)


def _together(work: Callable[[], None]) -> None:
    """``work()`` on every rank; an error of one ends all of them, which else would wait for it."""
    failure = None
    try:
        work()
    except UserError as error:
        failure = error
        ignore_sigterm()
    if _any_rank(failure is not None):
        raise failure or PeerLostError("another rank failed; its message says why")


def _of_this_rank(rows: Sequence[list[int]], size: int) -> list[list[list[int]]]:
    """Its share in batches; every rank has as many, for a target that all of them run together."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine, count = rows[rank::ranks], -(-len(rows) // (size * ranks))
    return [list(mine[n * size : (n + 1) * size]) or [[]] for n in range(count)]


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Set by SIGINT and SIGTERM."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _any_rank(wanted: bool) -> bool:
    said = torch.tensor([float(wanted)])
    dist.all_reduce(said)
    return bool(said)
