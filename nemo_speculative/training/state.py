"""The resume state: float32 weights, optimizer and schedule by torch's distributed checkpoint, the rest as JSON.

A checkpoint saved on N ranks resumes on M: DCP reshards, and the position in the data is a count of rows.  The
position and the configuration lie beside the tensors, so that a contradiction is found before anything is loaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from nemo_speculative.errors import UserError
from nemo_speculative.training import titan
from nemo_speculative.training.ema import WeightAverage

FREE_TO_CHANGE = (
    "resume", "plan", "output_dir", "logger", "parallelism", "exporter.dtype", "exporter.topk",
    "exporter.num_draft_tokens", "evaluation.num_questions", "evaluation.num_threads", "evaluation.ngram",
    "trainer.max_steps",
    "trainer.epochs", "trainer.micro_batch_size", "trainer.device", "trainer.slots_alive",
    "trainer.compile", "trainer.log_interval", "trainer.save_interval", "trainer.keep_checkpoints",
    "trainer.val_interval", "trainer.val_rows", "trainer.profile", "data.cache_dir", "data.generation_batch_size",
    "data.workers",
    "model.cache_dir", "model.path", "data.path", "data.held_out_path", "backend",
)  # fmt: skip
"""Keys that may differ from the run's first start; what model.path and data.path hold is compared instead."""


@dataclass(frozen=True)
class Position:
    """Where a run stands, and what it was started with."""

    step: int
    data: dict[str, int]
    config: dict[str, Any]
    target_fingerprint: str
    data_fingerprint: str

    @classmethod
    def read(cls, checkpoint: Path) -> "Position":
        """Raises UserError if the checkpoint was cut off."""
        file = checkpoint / "state" / "position.json"
        try:
            return cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise damaged(checkpoint, error) from None

    def write(self, checkpoint: Path) -> None:
        (checkpoint / "state" / "position.json").write_text(json.dumps(vars(self)) + "\n")

    def check_same_run(self, other: "Position", checkpoint: Path) -> None:
        """Raises UserError where ``other``, a new start, is not a continuation of this run."""
        if self.target_fingerprint != other.target_fingerprint:
            raise UserError(f"{checkpoint}: trained for another target than model.path; resume with the same target")
        changed = [
            f"{key} is {_select(other.config, key)!r}, the run was started with {value!r}"
            for key, value in _leaves(self.config)
            if not key.startswith(FREE_TO_CHANGE) and _select(other.config, key) != value
        ]
        if changed:
            raise UserError(
                f"{checkpoint}: cannot go on from it: {'; '.join(changed)}; give the same values, or another output_dir"
            )
        if self.data_fingerprint != other.data_fingerprint:
            raise UserError(f"{checkpoint}: trained on other data than data.path holds; resume with the same data")


def _leaves(config: dict[str, Any], prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _select(config: dict[str, Any], key: str) -> Any:
    return OmegaConf.select(OmegaConf.create(config), key)


class ResumeState:
    """The tensors of a run: what :func:`save` writes and :func:`load` puts back in place."""

    def __init__(
        self, model: nn.Module, optimizers: titan.OptimizersContainer, schedules: titan.LRSchedulersContainer,
        average: WeightAverage,
    ):  # fmt: skip
        self.model, self.optimizers, self.schedules = titan.ModelWrapper(model), optimizers, schedules
        self.average = average

    def _states(self) -> dict[str, Any]:
        rest = {"optimizer": self.optimizers, "lr_scheduler": self.schedules, "ema": self.average}
        return {**self.model.state_dict(), **rest}

    def save(self, checkpoint: Path) -> None:
        """Writes on every rank at once."""
        dcp.save(self._states(), checkpoint_id=str(checkpoint / "state"))

    def load(self, checkpoint: Path) -> None:
        """Raises UserError if the checkpoint was cut off or belongs to another draft shape."""
        states = self._states()
        try:
            # First by itself: DCP prints a traceback of its own for a damaged one.
            dcp.FileSystemReader(str(checkpoint / "state")).read_metadata()
            dcp.load(states, checkpoint_id=str(checkpoint / "state"))
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            raise damaged(checkpoint, error) from error
        self.model.load_state_dict(states)


def root_cause(error: BaseException) -> str:
    """One line of what the first failing rank met: DCP wraps it."""
    if isinstance(error, CheckpointException) and error.failures:
        failure = next(iter(error.failures.values()))
        error = failure[0] if isinstance(failure, tuple) else failure
    return (str(error).strip().splitlines() or [repr(error)])[-1][:200]


def damaged(checkpoint: Path, error: BaseException) -> UserError:
    """The error for a checkpoint that cannot be read back."""
    return UserError(
        f"{checkpoint}: the resume state is damaged or of another draft shape ({root_cause(error)}); "
        "remove this directory, and resume=auto goes on from the one before it, or where there is none from step 0"
    )
