"""What a run says while it trains: a line a log step, ``metrics.jsonl``, and the configured logger."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from nemo_speculative.distributed import titan
from nemo_speculative.training.loggers import MetricsFile
from nemo_speculative.training.step_timer import peak_memory_gib
from nemo_speculative.utils.progress import duration


class Reporter:
    """Speaks on the first rank only."""

    def __init__(self, output_dir: Path, logger: titan.BaseLogger | None, device: torch.device, total_steps: int):
        self.device, self.total_steps = device, total_steps
        self.logger = logger
        self._file = MetricsFile(output_dir / "metrics.jsonl") if logger else None
        self._tokens = 0
        self._steps_since = 0
        self._started = time.perf_counter()
        self._first_step: int | None = None
        self._held: list[tuple[int, dict[str, float]]] | None = None

    def say(self, text: str) -> None:
        if self.logger:
            print(text, flush=True)

    def count_tokens(self, tokens: int) -> None:
        """``tokens`` of this rank's rows were trained on."""
        self._tokens += tokens
        self._steps_since += 1

    def performance(self, wall: float, shares: Mapping[str, float], world_size: int) -> dict[str, float]:
        """``perf/*`` since the last call; tokens are those of all ranks, padding included."""
        metrics = {
            "perf/tokens_per_second": self._tokens * world_size / max(wall, 1e-9),
            "perf/step_seconds": wall / max(self._steps_since, 1),
            "perf/memory_gib": peak_memory_gib(self.device),
        }
        metrics |= {f"perf/share_{name}": share for name, share in shares.items()}
        self._tokens = self._steps_since = 0
        return metrics

    def line(self, step: int, m: Mapping[str, float]) -> None:
        """The live line: step, time left, loss, accuracy per position, τ, tokens/s, shares of the time, memory."""
        if self._first_step is None:
            self._first_step, self._started = step, time.perf_counter()
        done = step - self._first_step
        left = duration((time.perf_counter() - self._started) / done * (self.total_steps - step)) if done else "?"
        accuracy = " ".join(f"{value:.2f}" for key, value in m.items() if key.startswith("train/acc_"))
        shares = " ".join(f"{part} {m.get(f'perf/share_{part}', 0):.0%}" for part in ("target", "draft", "data"))
        validation = f"  val loss {m['val/loss']:.3f} tau {m['val/tau']:.2f}" if "val/loss" in m else ""
        self.say(
            f"step {step}/{self.total_steps}  {left} left  loss {m['train/loss']:.3f}  acc {accuracy}  "
            f"tau {m['train/tau']:.2f}  {m['perf/tokens_per_second']:.0f} tok/s  {shares}  "
            f"{m['perf/memory_gib']:.2f} GiB{validation}"
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One object of ``metrics.jsonl``, and the same to the logger; after :meth:`hold`, not yet."""
        if self._held is not None:
            self._held.append((step, dict(metrics)))
        elif self._file and self.logger:
            self._file.write(step, dict(metrics))
            self.logger.log(dict(metrics), step)

    def hold(self) -> None:
        """From now on lines are kept back: of the first something is still to be measured."""
        self._held = []

    def release(self, figures: Mapping[str, float]) -> None:
        """Writes the lines that were kept back, the first one with ``figures``."""
        held, self._held = self._held or [], None
        for number, (step, metrics) in enumerate(held):
            self.write(step, metrics if number else {**metrics, **figures})

    def close(self) -> None:
        self.release({})
        if self.logger:
            self.logger.close()
