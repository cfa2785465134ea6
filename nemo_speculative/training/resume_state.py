"""The resume state: float32 weights, optimizer and schedule by torch's distributed checkpoint, the rest as JSON.

A checkpoint saved on N ranks resumes on M: DCP reshards, and the position in the data is a count of rows.  The
position, the configuration and the checksums of the tensors' files lie beside them, so that a contradiction or a damage
is found before anything is loaded.
"""

import json
import warnings
import zlib
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from nemo_speculative.config.renames import translate
from nemo_speculative.distributed import titan
from nemo_speculative.distributed.collectives import FIRST_RANK_TIMEOUT
from nemo_speculative.training.ema import WeightAverage
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_write_text

# The first rank reads its own weights back alone, which DCP takes for an oversight.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

POSITION = "position.json"
CHUNK = 1 << 24
STAGER_IS_KEPT = "2.13"
"""The torch from which on one goes on working after its first state, and keeps its memory for the next."""

FREE_TO_CHANGE = (
    "resume", "plan", "output_dir", "logger", "parallelism", "exporter.dtype", "exporter.topk",
    "exporter.num_draft_tokens", "evaluation.num_questions", "evaluation.num_threads", "evaluation.ngram",
    "trainer.max_steps",
    "trainer.epochs", "trainer.micro_batch_size", "trainer.device", "trainer.ttt_chunk_slots",
    "trainer.compile", "trainer.log_interval", "trainer.save_interval", "trainer.save_minutes", "trainer.async_save",
    "trainer.keep_checkpoints", "trainer.timeout_seconds",
    "trainer.val_interval", "trainer.val_rows", "trainer.profile", "data.cache_dir", "data.generation_batch_size",
    "data.workers",
    "model.cache_dir", "model.path", "data.path", "data.held_out_path", "backend",
)  # fmt: skip
"""Keys that may differ from the run's first start; what model.path and data.path hold is compared instead."""


class Damaged(Exception):
    """A checkpoint that cannot be read back; says why."""


@dataclass(frozen=True)
class Position:
    """Where a run stands, and what it was started with."""

    step: int
    data: dict[str, int]
    config: dict[str, Any]
    target_fingerprint: str
    data_fingerprint: str
    files: dict[str, list[int]] = field(default_factory=dict)
    """Size in bytes and CRC-32 of each file of tensors beside it."""

    @classmethod
    def read(cls, checkpoint: Path) -> "Position":
        """Raises Damaged if it is not there or was cut off."""
        file = checkpoint / "state" / POSITION
        try:
            position = cls(**json.loads(file.read_text()))
            return replace(position, config=translate(position.config))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise Damaged(f"state/{POSITION}: {root_cause(error)}") from None

    def write(self, checkpoint: Path) -> None:
        atomic_write_text(checkpoint / "state" / POSITION, json.dumps(vars(self)) + "\n")

    def check_whole(self, checkpoint: Path) -> None:
        """Raises Damaged if a file of tensors is not as it was written: DCP would not notice every change."""
        for name, (size, checksum) in self.files.items():
            file = checkpoint / "state" / name
            if not file.is_file():
                raise Damaged(f"state/{name} is missing")
            if (found := file.stat().st_size) != size:
                raise Damaged(f"state/{name} has {found} bytes, {size} were written")
            if crc32(file) != checksum:
                raise Damaged(f"state/{name} holds other bytes than were written")

    def check_same_run(self, other: "Position", checkpoint: Path) -> None:
        """Raises UserError where ``other``, a new start, is not a continuation of this run."""
        self.check_same_config(other.config, checkpoint)
        if self.target_fingerprint != other.target_fingerprint:
            raise UserError(f"{checkpoint}: trained for another target than model.path; resume with the same target")
        if self.data_fingerprint != other.data_fingerprint:
            raise UserError(f"{checkpoint}: trained on other data than data.path holds; resume with the same data")

    def check_same_config(self, config: dict[str, Any], checkpoint: Path) -> None:
        """Raises UserError where a run of ``config`` would give other results than this one."""
        changed = [
            f"{key} is {_select(config, key)!r}, the run was started with {value!r}"
            for key, value in _leaves(self.config)
            if not key.startswith(FREE_TO_CHANGE) and _select(config, key) != value
        ]
        if changed:
            raise UserError(
                f"{checkpoint}: cannot go on from it: {'; '.join(changed)}; give the same values, or another output_dir"
            )


def _leaves(config: dict[str, Any], prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _select(config: dict[str, Any], key: str) -> Any:
    return OmegaConf.select(OmegaConf.create(config), key)


class ResumeState:
    """The tensors of a run: what a checkpoint's ``state/`` holds, and how they get there and back.

    Args:
        device: where the tensors live; on CUDA they are copied to pinned memory, which torch 2.13 keeps from save to
            save.
    """

    def __init__(
        self, model: nn.Module, optimizers: titan.OptimizersContainer, schedules: titan.LRSchedulersContainer,
        average: WeightAverage, device: torch.device,
    ):  # fmt: skip
        self.model, self.optimizers, self.schedules = titan.ModelWrapper(model), optimizers, schedules
        self.average = average
        self._exported = {name: (x.shape, x.dtype) for name, x in self.model.state_dict().items()}
        # Its own, because it is used by a thread beside the training's collectives; and a slow disk is no lost rank.
        self._group = dist.new_group(backend="gloo", timeout=FIRST_RANK_TIMEOUT)
        self._cuda = device.type == "cuda"
        self._stager = self._new_stager()

    def _new_stager(self) -> DefaultStager:
        return DefaultStager(StagingOptions(self._cuda, False, False, self._cuda))

    def _states(self) -> dict[str, Any]:
        rest = {"optimizer": self.optimizers, "lr_scheduler": self.schedules, "ema": self.average}
        return {**self.model.state_dict(), **rest}

    def save(self, checkpoint: Path) -> "Future[Any]":
        """Copies the tensors to the host's memory and begins to write them, on every rank at once.

        Returns:
            Done when all that every rank has is on the disk.
        """
        if torch.__version__ < STAGER_IS_KEPT:
            self._stager = self._new_stager()
        uploaded = dcp.async_save(
            self._states(), checkpoint_id=str(checkpoint / "state"), process_group=self._group,
            async_stager=self._stager,
        )  # fmt: skip
        assert isinstance(uploaded, Future)  # the stager is done when it returns
        return uploaded

    def weights(self, checkpoint: Path) -> dict[str, torch.Tensor]:
        """The whole weights that a checkpoint exports, float32 and on the host: their average where one is kept.

        Read from ``state/`` by this rank alone, so that the ranks that train need not gather them.
        """
        whole = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self._exported.items()}
        averaged = {name: whole[name] for name in self.average.names}
        rest = {name: x for name, x in whole.items() if name not in averaged}
        wanted: dict[str, Any] = rest | ({"ema": averaged} if averaged else {})
        dcp.load(wanted, checkpoint_id=str(checkpoint / "state"), no_dist=True)
        return whole

    def load(self, checkpoint: Path) -> None:
        """Raises Damaged if the checkpoint was cut off or belongs to another draft shape."""
        states = self._states()
        try:
            # First by itself: DCP prints a traceback of its own for a damaged one.
            dcp.FileSystemReader(str(checkpoint / "state")).read_metadata()
            dcp.load(states, checkpoint_id=str(checkpoint / "state"))
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            raise Damaged(f"or of another draft shape: {root_cause(error)}") from error
        self.model.load_state_dict(states)

    def close(self) -> None:
        """Lets go of the host's memory."""
        self._stager.close()


def checksums(folder: Path) -> dict[str, list[int]]:
    """Size in bytes and CRC-32 of each file in ``folder``."""
    return {file.name: [file.stat().st_size, crc32(file)] for file in sorted(folder.iterdir())}


def crc32(file: Path) -> int:
    """CRC-32 of what ``file`` holds."""
    checksum = 0
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def root_cause(error: BaseException) -> str:
    """One line of what the first failing rank met: DCP wraps it."""
    if isinstance(error, CheckpointException) and error.failures:
        failure = next(iter(error.failures.values()))
        error = failure[0] if isinstance(failure, tuple) else failure
    if "inline_container" in str(error):  # torch's writer says no more than where in its own code it stood
        return "a file could not be written to its end; most likely the disk is full"
    return (str(error).strip().splitlines() or [repr(error)])[-1][:200]
