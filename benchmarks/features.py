"""What training from captured features saves, and whether their reader keeps the trainer busy.

python -m benchmarks.features [--steps 40] [--rounds 3] [key=value …]

The embedded target and its data (other keys of a training's command line may follow).  They are captured once; then
the same training runs with its target in the process and from the features, round by round, both as their user starts
them.  ``waits`` is the share of a step in which the trainer waited for features and for rows.  Then the reader alone,
beside a copy in memory of as many bytes, and once over all there is.  Medians; ratios are of the same round.
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
from nemo_speculative.data.batch import Batch
from nemo_speculative.data.conversation import TokenRow
from nemo_speculative.data.conversations import ConversationFile
from nemo_speculative.data.packing import collate, pack
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
    """The log lines of a training, but for the first: nothing is warm there."""
    program("recipes/train_eagle3.py", *overrides, f"output_dir={directory}", *backend)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()][1:]


def median(lines: Metrics, *names: str) -> float:
    """Of the sum of ``names``."""
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
    memory = [x for made in read for x in (made.aux_hidden_states, made.last_hidden_state)]
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
    """As an epoch does; of more than fits into memory it is the disk that is measured."""
    random.Random(0).shuffle(batches)
    made = 0

    def read() -> None:
        nonlocal made
        for batch in batches:
            supervision = reader.compute_hidden_states(batch)
            made += supervision.aux_hidden_states.nbytes + supervision.last_hidden_state.nbytes

    seconds = timed(read)
    print(f"all of them once in random order: {made / 1e9:.2f} GB, {made / seconds / 1e9:.2f} GB/s")


def batches_of(rows: list[TokenRow]) -> list[Batch]:
    packed = pack([len(row.input_ids) for row in rows], ROW_TOKENS, seed=1)
    groups = [packed[n : n + ROWS] for n in range(0, len(packed), ROWS)]
    return [collate([[rows[d] for d in row] for row in group], ROW_TOKENS, pad_id=0) for group in groups]


def target_of(run: Path) -> Path:
    """Where the run's target lies."""
    return Path(read_servable(run).provenance.target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--features", type=Path, help="captured before, by this command's keys")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        features = options.features or work / "captured"
        if options.features is None:
            program("recipes/capture_features.py", *options.overrides, f"output={features}")
        given = [
            "data=jsonl", "data.max_length=512", f"data.path={features}/training.jsonl",
            f"data.held_out_path={features}/held_out.jsonl", f"trainer.max_steps={options.steps}",
            f"trainer.val_interval={options.steps}", f"trainer.save_interval={options.steps}", "trainer.log_interval=5",
            "evaluation.num_questions=1", "evaluation.selection_questions=1", "logger=none",
        ]  # fmt: skip
        compare([*options.overrides, *given], features, work, options.rounds)
        read_alone(target_of(work / "features0"), features, options.rounds)


if __name__ == "__main__":
    main()
