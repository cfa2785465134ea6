"""Metrics of a training run: the line per log step, ``metrics.jsonl``, TensorBoard and wandb."""

import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_speculative.config.schema import WandbMode
from nemo_speculative.distributed import titan
from nemo_speculative.utils.devices import StepTimes
from nemo_speculative.utils.progress import duration

GIB = 1 << 30


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: that of the CUDA device, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


class MetricsLogger:
    """Prints and writes the metrics of a run; rank 0 only, the others do nothing.

    Args:
        logger: None on the other ranks.
    """

    def __init__(self, output_dir: Path, logger: titan.BaseLogger | None, device: torch.device, total_steps: int):
        self.device, self.total_steps, self.logger = device, total_steps, logger
        self._file = output_dir / "metrics.jsonl"
        self._tokens = self._steps = 0
        self._first: tuple[int, float] | None = None
        """The first step printed, and when."""
        self._held: list[tuple[int, dict[str, float]]] | None = None

    def print(self, text: str) -> None:
        if self.logger:
            print(text, flush=True)

    def count_tokens(self, tokens: int) -> None:
        """Counts a step on ``tokens`` of this rank's rows."""
        self._tokens += tokens
        self._steps += 1

    def performance(self, times: StepTimes, data_ranks: int) -> dict[str, float]:
        """``perf/*`` of the steps since the last call; tokens are those of all ranks, padding included."""
        tokens, steps, self._tokens, self._steps = self._tokens, self._steps, 0, 0
        return {
            "perf/tokens_per_second": tokens * data_ranks / max(times.wall, 1e-9),
            "perf/step_seconds": times.wall / max(steps, 1),
            "perf/memory_gib": peak_memory_gib(self.device),
            **{f"perf/share_{name}": share for name, share in times.shares.items()},
        }

    def print_step(self, step: int, m: Mapping[str, float]) -> None:
        """Prints step, time left, loss, accuracy per TTT step, τ, tokens/s, time shares and memory."""
        now, left = time.perf_counter(), "?"
        first, started = self._first = self._first or (step, now)
        if step > first:
            left = duration((now - started) / (step - first) * (self.total_steps - step))
        accuracy = " ".join(f"{value:.2f}" for key, value in m.items() if key.startswith("train/acc_"))
        shares = " ".join(f"{name} {m.get(f'perf/share_{name}', 0):.0%}" for name in ("target", "draft", "data"))
        validation = f"  val loss {m['val/loss']:.3f} tau {m['val/tau']:.2f}" if "val/loss" in m else ""
        self.print(
            f"step {step}/{self.total_steps}  {left} left  loss {m['train/loss']:.3f}  acc {accuracy}  "
            f"tau {m['train/tau']:.2f}  {m['perf/tokens_per_second']:.0f} tok/s  {shares}  "
            f"{m['perf/memory_gib']:.2f} GiB{validation}"
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a line of ``metrics.jsonl`` and logs the same; after :meth:`hold` only at :meth:`release`."""
        if self._held is not None:
            self._held.append((step, dict(metrics)))
        elif self.logger:
            # Opened for every line: a resumed run replaces the file.
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.logger.log(dict(metrics), step)

    def hold(self) -> None:
        """Holds the following lines back, because metrics of the first are still to be measured."""
        self._held = []

    def release(self, metrics: Mapping[str, float]) -> None:
        """Writes the lines that were held back, the first one with ``metrics`` added."""
        held, self._held = self._held or [], None
        for step, own in held:
            self.write(step, {**own, **metrics})
            metrics = {}

    def close(self) -> None:
        self.release({})
        if self.logger:
            self.logger.close()


def no_logger(output_dir: Path, run_config: dict[str, Any]) -> titan.BaseLogger:
    """Logs to metrics.jsonl and the console only."""
    return titan.BaseLogger()


def tensorboard(output_dir: Path, run_config: dict[str, Any]) -> titan.BaseLogger:
    """Logs to event files in ``<output_dir>/tensorboard``."""
    return titan.TensorBoardLogger(str(output_dir / "tensorboard"))


class WandbLogger(titan.BaseLogger):
    """Logs to Weights & Biases; ``mode=offline`` needs no account."""

    def __init__(self, output_dir: Path, run_config: dict[str, Any], project: str, name: str | None, mode: WandbMode):
        import wandb

        self.run = wandb.init(project=project, name=name, mode=mode.value, dir=str(output_dir), config=run_config)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()
