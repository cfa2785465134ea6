"""Capturing features: the target runs once over the documents of a training, and its hidden states are stored."""

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
from nemo_speculative.data.batch import Batch, collate, pack
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.distributed.parallelism import fast_float32_matmuls, ignore_sigterm, on_first_rank, process_group
from nemo_speculative.targets.base import Target
from nemo_speculative.targets.cached import store
from nemo_speculative.targets.cached.eagle_files import EagleFiles
from nemo_speculative.targets.cached.manifest import FP8, Manifest
from nemo_speculative.targets.cached.shards import MIB, ShardWriter
from nemo_speculative.training.build import build_data, build_target, load_split, rank_batches
from nemo_speculative.training.checks import check_target
from nemo_speculative.utils.devices import choose_device
from nemo_speculative.utils.errors import PeerLostError, UserError
from nemo_speculative.utils.files import atomic_write, dir_lock
from nemo_speculative.utils.progress import Progress

ENCODINGS = {FeatureDtype.target: None, FeatureDtype.bf16: "bfloat16", FeatureDtype.fp8: FP8}


def capture(job: CaptureJob) -> None:
    """Captures the features that the training ``job`` will read; with ``plan=true`` only prints the space they take.

    Raises:
        UserError: bad input, a directory that holds other features, or a disk that is too small.
        SystemExit: after a signal; every document so far was written.
    """
    check_target(job)
    device = choose_device(job.trainer.device, "trainer.device")
    with process_group(device, job.parallelism), fast_float32_matmuls(device), ExitStack() as lock:
        target, sides, row_tokens = _target_and_documents(job, device)
        documents: Any = ConcatDataset(list(sides.values()))  # reads them lazily
        manifest = Manifest.of(target, job.draft.mask_convention, job.draft._target_, ENCODINGS[job.dtype])
        output = Path(job.output)
        store.require_same_manifest(output, manifest)
        budget = store.Budget(store.FeatureStore(output, manifest), *sides.values())
        on_first_rank(lambda: print(budget.report(output), flush=True))
        if job.plan:
            return
        on_first_rank(lambda: lock.enter_context(dir_lock(output, "output")))
        on_first_rank(lambda: _prepare_output(output, budget, sides))
        rows = job.trainer.micro_batch_size
        run(target, documents, budget, output, row_tokens=row_tokens, rows=rows, megabytes=job.shard_mb)
        on_first_rank(lambda: print(store.seal(output), flush=True))


def _target_and_documents(job: CaptureJob, device: torch.device) -> tuple[Target, dict[str, Any], int]:
    """The target that computes the features, the documents of each side of the data, and the packed length of a row."""
    if job.eagle:
        files = EagleFiles.of(job, device)
        on_first_rank(lambda: print(files.report(), flush=True))
        return files, {store.TRAINING: files.documents}, files.row_tokens
    split, target = load_split(job), build_target(job, device)
    data = build_data(job, target, split)
    return target, {store.TRAINING: data.training.rows, store.HELD_OUT: data.held_out.rows}, data.row_tokens


def _prepare_output(output: Path, budget: store.Budget, sides: dict[str, Sequence[TokenRow]]) -> None:
    store.remove_partial_files(output)
    budget.require_room(output, "output")
    store.prepare_directory(output, budget.manifest)
    for name, documents in sides.items():
        write_documents(output / name, documents)


def write_documents(path: Path, documents: Iterable[TokenRow]) -> None:
    """Writes documents as token ids for ``data=jsonl``: those of answers=target or EAGLE's files exist nowhere else."""
    with atomic_write(path) as file:
        for row in documents:
            record = {"id": row.id, "input_ids": row.input_ids, "loss_mask": [int(m) for m in row.loss_mask]}
            file.write((json.dumps(record | ({"source": row.source} if row.source else {})) + "\n").encode())


def run(
    target: Target, documents: Sequence[TokenRow], budget: store.Budget, output: Path, *, row_tokens: int, rows: int,
    megabytes: int,
) -> None:  # fmt: skip
    """Captures this rank's part of the documents that ``budget`` lists as missing, into shards of its own.

    Args:
        row_tokens, rows: size of a batch.
        megabytes: size of a shard in MiB.

    Raises:
        UserError: the disk is full.
        SystemExit: interrupted.
    """
    # Every rank has equally many batches, as ranks may compute the target together.
    batches = rank_batches(pack(budget.lengths, row_tokens, seed=0), rows, dist.get_rank(), dist.get_world_size())
    progress = Progress("capturing", sum(len(row) for batch in batches for row in batch))
    writer = ShardWriter(output, budget.manifest, megabytes * MIB)
    with closing(writer), _stop_on_signal() as stop:
        for batch_rows in batches:
            packed = [[documents[budget.missing[d]] for d in row] for row in batch_rows]
            batch = collate(packed, row_tokens, pad_id=0).to(target.device)
            on_all_ranks(partial(_capture, target, batch, writer))
            progress.advance(by=len(batch.spans))
            if _any_rank(stop.is_set()):
                on_all_ranks(writer.flush)
                print("interrupted; every document so far was written, the same command resumes", flush=True)
                raise SystemExit(130)
        on_all_ranks(writer.flush)
    progress.close()


@torch.no_grad()
def _capture(target: Target, batch: Batch, writer: ShardWriter) -> None:
    output = target.compute_hidden_states(batch)
    for span in batch.spans:
        writer.add(batch, span, output)


def on_all_ranks(work: Callable[[], None]) -> None:
    """Calls ``work`` on every rank; an error on one ends all of them, which would otherwise wait for it."""
    failure = None
    try:
        work()
    except UserError as error:
        failure = error
        ignore_sigterm()
    if _any_rank(failure is not None):
        raise failure or PeerLostError("another rank failed; its message says why")


def _any_rank(flag: bool) -> bool:
    count = torch.tensor([float(flag)])
    dist.all_reduce(count)
    return bool(count)


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
