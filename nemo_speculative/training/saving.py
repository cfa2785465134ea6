"""Checkpoints of a run: what is written, in which order, and what happens when the disk is full."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from nemo_speculative.checkpoints.run import RunDirectory
from nemo_speculative.checkpoints.servable import Provenance, Servable, read_servable, write_servable
from nemo_speculative.drafts.base import Draft, DraftShape
from nemo_speculative.errors import UserError
from nemo_speculative.ranks import first_rank_only
from nemo_speculative.training.state import Position, ResumeState, root_cause


@dataclass
class Saver:
    """Writes ``model/`` and ``state/`` of a step, measures the draft as it lies on disk, then names the checkpoint."""

    run: RunDirectory
    keep: int
    draft: type[Draft]
    shape: DraftShape
    provenance: Provenance
    export_dtype: torch.dtype
    special_ids: dict[str, Any]
    start: Position
    """The position of a fresh start: what a resumed run must agree with."""
    measure: Callable[[Servable], float] | None
    """τ of a draft on the selection questions; None where there are none."""

    @property
    def first(self) -> bool:
        return dist.get_rank() == 0

    def save(
        self, step: int, state: ResumeState, trainee: nn.Module, data: dict[str, int], *, measure: bool,
        before_publishing: Callable[[float | None], None],
    ) -> None:  # fmt: skip
        """Writes the checkpoint of ``step``.

        Raises:
            UserError: it could not be written; the checkpoints before it are as they were.
        """
        with state.average.applied():
            weights = get_model_state_dict(trainee, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

        def finish() -> None:
            partial = self.run.partial(step)
            self._write_model(partial, step, weights)
            replace(self.start, step=step, data=data).write(partial)
            tau = self.measure(read_servable(partial)) if measure and self.measure else None
            before_publishing(tau)
            self.run.publish(step, tau, self.keep)

        try:
            first_rank_only(lambda: self.run.begin(step))
            state.save(self.run.partial(step))
            first_rank_only(finish)
        except (OSError, CheckpointException) as error:
            if self.first:
                self.run.abandon(step)
            raise UserError(
                f"{self.run.path(step)}: could not be written ({root_cause(error)}); the last good checkpoint is "
                f"{self.last_good()}; make room and go on with resume=auto"
            ) from error

    def _write_model(self, partial: Path, step: int, weights: Mapping[str, Any]) -> None:
        tensors = {name.removeprefix("draft."): value for name, value in weights.items()}
        provenance = replace(self.provenance, step=step)
        write_servable(
            partial / "model", self.draft, tensors, self.shape, provenance, self.export_dtype, self.special_ids
        )

    def load_latest(self, state: ResumeState) -> Position | None:
        """Loads the newest checkpoint into ``state``; None where there is none.

        Raises:
            UserError: it is damaged, or was made by a run with another configuration, target or data.
        """
        steps = self.run.steps()
        if not steps:
            return None
        checkpoint = self.run.path(steps[-1])
        position = Position.read(checkpoint)
        position.check_same_run(self.start, checkpoint)
        state.load(checkpoint)
        if self.first:
            self.run.keep_metrics_until(position.step)
        return position

    def report(self, step: int) -> str:
        """What was saved, what it accepts when it decodes, and which is the best so far."""
        tau = self.run.tau(step)
        measured = "" if tau is None else f", tau {tau:.2f} decoded"
        return f"saved {self.run.path(step).name}{measured}; best: step_{self.run.best()}"

    def last_good(self) -> str:
        steps = self.run.steps()
        return str(self.run.path(steps[-1])) if steps else "none"
