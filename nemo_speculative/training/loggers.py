"""Where metrics go: ``metrics.jsonl`` and the console always, TensorBoard or wandb by configuration."""

import json
from pathlib import Path
from typing import Any

from nemo_speculative.config.schema import WandbMode
from nemo_speculative.distributed import titan


def no_logger(output_dir: Path, run_config: dict[str, Any]) -> titan.BaseLogger:
    """metrics.jsonl and the console only."""
    return titan.BaseLogger()


def tensorboard(output_dir: Path, run_config: dict[str, Any]) -> titan.BaseLogger:
    """Event files in ``<output_dir>/tensorboard``."""
    return titan.TensorBoardLogger(str(output_dir / "tensorboard"))


class WandbLogger(titan.BaseLogger):
    """Weights & Biases; ``mode=offline`` needs no account."""

    def __init__(self, output_dir: Path, run_config: dict[str, Any], project: str, name: str | None, mode: WandbMode):
        import wandb

        self.run = wandb.init(project=project, name=name, mode=mode.value, dir=str(output_dir), config=run_config)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()


class MetricsFile:
    """``metrics.jsonl``: one object a log step.  Opened for every line: a resumed run replaces the file."""

    def __init__(self, path: Path):
        self._path = path

    def write(self, step: int, metrics: dict[str, float]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
