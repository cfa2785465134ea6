"""Time saved by training from captured features, and the speed of their reader.

python -m benchmarks.features [--steps 40] [--rounds 3] [key=value …]

By default the embedded target and its data are used; other keys of a training's command line may follow.  The features
are captured once.  In each round the same recipe trains once with its target in the process and once from the features;
"waits" is the share of a step in which the trainer waited for features or rows.  Finally the reader alone is compared
with a copy of as many bytes in memory, and reads all features once.  Medians; ratios are of the same round.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nemo_speculative.checkpoint.draft_checkpoint import read_servable
from nemo_speculative.config.schema import MaskConvention
from nemo_speculative.data.batch import Batch, collate, pack
from nemo_speculative.data.conversations import ConversationFile, TokenRow
from nemo_speculative.targets.cached.manifest import Manifest
from nemo_speculative.targets.cached.target import FeaturesTarget

EAGLE3 = "nemo_speculative.algorithms.eagle3.network.Eagle3Draft"
ROW_TOKENS, ROWS = 512, 4
Metrics = list[dict[str, float]]


def program(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")


def train(overrides: list[str], directory: Path, *backend: str) -> Metrics:
    """Trains, and returns the lines of its metrics without the first, which includes the warm-up."""
    program("recipes/train_eagle3.py", *overrides, f"output_dir={directory}", *backend)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()][1:]


def median(lines: Metrics, *names: str) -> float:
    """Median over the lines of the sum of the metrics ``names``."""
    return statistics.median(sum(line.get(f"perf/{name}", 0.0) for name in names) for line in lines)


def compare(overrides: list[str], features: Path, work: Path, rounds: int) -> None:
    print(f"{'round':6} {'online s/step':>14} {'features s/step':>16} {'ratio':>6} {'target online':>14} {'waits':>7}")
    for n in range(rounds):
        online = train(overrides, work / f"online{n}")
        cached = train(overrides, work / f"features{n}", "backend=features", f"backend.directory={features}")
        seconds = [median(lines, "step_seconds") for lines in (online, cached)]
        waits = median(cached, "share_target", "share_data")
        print(
            f"{n:<6} {seconds[0]:14.3f} {seconds[1]:16.3f} {seconds[0] / seconds[1]:6.2f} "
            f"{median(online, 'share_target'):14.1%} {waits:7.2%}",
            flush=True,
        )


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_alone(target_dir: Path, features: Path, rounds: int) -> None:
    reader = FeaturesTarget(
        target_dir, directory=str(features), mask_convention=MaskConvention.serving, draft=EAGLE3, aux_layers=None
    )
    batches = batches_of([row for row in ConversationFile(features / "training.jsonl") if isinstance(row, TokenRow)])
    read = [reader.compute_hidden_states(batch) for batch in batches[:8]]
    memory = [x for output in read for x in (output.aux_hidden_states, output.last_hidden_state)]
    size = sum(x.numel() * x.element_size() for x in memory) / 1e9
    ratios, rates = [], []
    for _ in range(rounds):
        copied = timed(lambda: [x.clone() for x in memory])
        seconds = timed(lambda: [reader.compute_hidden_states(batch) for batch in batches[:8]])
        ratios.append(seconds / copied)
        rates.append(size / seconds)
    tokens = sum(batch.num_tokens for batch in batches[:8]) / size
    stored = Manifest.read(features)
    print(
        f"reader alone ({stored.stored if stored else ''}): {statistics.median(rates):.2f} GB/s, "
        f"{statistics.median(rates) * tokens:.0f} tokens/s, {statistics.median(ratios):.2f} times as long as a copy in "
        "memory of the same bytes"
    )
    read_all(reader, batches)


def read_all(reader: FeaturesTarget, batches: list[Batch]) -> None:
    """Reads every batch once, as an epoch does; with more features than memory this measures the disk."""
    random.Random(0).shuffle(batches)
    size = 0

    def read() -> None:
        nonlocal size
        for batch in batches:
            output = reader.compute_hidden_states(batch)
            size += output.aux_hidden_states.nbytes + output.last_hidden_state.nbytes

    seconds = timed(read)
    print(f"all of them once in random order: {size / 1e9:.2f} GB, {size / seconds / 1e9:.2f} GB/s")


def batches_of(rows: list[TokenRow]) -> list[Batch]:
    packed = pack([len(row.input_ids) for row in rows], ROW_TOKENS, seed=1)
    groups = [packed[n : n + ROWS] for n in range(0, len(packed), ROWS)]
    return [collate([[rows[d] for d in row] for row in group], ROW_TOKENS, pad_id=0) for group in groups]


def target_of(run: Path) -> Path:
    """The directory of the run's target."""
    return Path(read_servable(run).provenance.target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--features", type=Path, help="features captured earlier with the same keys")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        features = options.features or work / "captured"
        if options.features is None:
            program("recipes/capture_features.py", *options.overrides, f"output={features}")
        settings = [
            "data=jsonl", "data.max_length=512", f"data.path={features}/training.jsonl",
            f"data.held_out_path={features}/held_out.jsonl", f"trainer.max_steps={options.steps}",
            f"trainer.val_interval={options.steps}", f"trainer.save_interval={options.steps}", "trainer.log_interval=5",
            "evaluation.num_questions=1", "evaluation.selection_questions=1", "logger=none",
        ]  # fmt: skip
        compare([*options.overrides, *settings], features, work, options.rounds)
        read_alone(target_of(work / "features0"), features, options.rounds)


if __name__ == "__main__":
    main()
