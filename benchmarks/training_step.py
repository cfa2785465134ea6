"""Time and memory of one EAGLE-3 training step (forward, backward), ours beside the dense textbook implementation.

python -m benchmarks.training_step [--size S|M] [--supervised 0.5] [--rounds 7]     (make bench ARGS="--size M")

Both take the same weights, tokens and target features in one process, in turn, so that a noisy machine hits both;
medians of the rounds, with the smallest and the largest.  Memory is what a step adds to the process at its peak.
"""

import argparse
import ctypes
import platform
import statistics
import threading
import time
from pathlib import Path

import torch

from benchmarks.textbook import textbook_loss
from nemo_speculative.config.schema import MaskConvention
from nemo_speculative.data.batch import Batch
from nemo_speculative.drafts.eagle3 import Eagle3Draft, Eagle3Shape
from nemo_speculative.objectives.eagle3 import Eagle3Objective
from nemo_speculative.targets.base import Supervision
from nemo_speculative.training.parallelism import fast_float32_matmuls

SIZES = {
    "S": {"hidden": 256, "vocab": 8192, "draft_vocab": 2048, "rows": 2, "length": 512},
    "M": {"hidden": 512, "vocab": 32000, "draft_vocab": 8000, "rows": 1, "length": 1024},
}
NUM_STEPS, DECAY = 7, 0.8


class RandomTarget:
    """An embedding and a head: what the objective needs of a target beside its features."""

    def __init__(self, vocab: int, hidden: int):
        self.embedding, self.head = torch.randn(vocab, hidden), torch.randn(vocab, hidden) * hidden**-0.5

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding[ids]

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.head.T


def make_case(size: dict[str, int], supervised: float):
    """A draft, a target, a batch of which a share is supervised (a prompt, then an answer), and its features."""
    torch.manual_seed(0)
    hidden, rows, length = size["hidden"], size["rows"], size["length"]
    shape = Eagle3Shape(
        hidden_size=hidden, intermediate_size=3 * hidden, num_heads=hidden // 64, num_kv_heads=hidden // 128,
        head_dim=64, rms_norm_eps=1e-5, max_positions=2 * length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, vocab_size=size["vocab"],
        draft_vocab_size=size["draft_vocab"], aux_layers=(1, 2, 3), target_hidden_size=hidden,
    )  # fmt: skip
    positions = torch.arange(length).expand(rows, -1)
    batch = Batch(
        torch.randint(size["vocab"], (rows, length)), positions >= length * (1 - supervised), positions,
        torch.zeros(rows, length, dtype=torch.long),
    )  # fmt: skip
    features = Supervision(torch.randn(rows, length, 3 * hidden), torch.randn(rows, length, hidden))
    target = RandomTarget(size["vocab"], hidden)
    return Eagle3Draft(shape).attach(target), target, batch, features


def measure(step) -> tuple[float, float]:
    """Seconds of a step, and the MB that it adds to the process at its peak."""
    # What earlier steps freed would otherwise be taken again unseen.
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, running = resident_mb(), 0.0, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, resident_mb())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    running = False
    watcher.join()
    return seconds, max(peak - before, 0.0)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--supervised", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    draft, target, batch, features = make_case(SIZES[options.size], options.supervised)
    objective = Eagle3Objective(
        target, num_steps=NUM_STEPS, step_decay=DECAY, convention=MaskConvention.serving, tau_steps=5
    )  # fmt: skip
    counts = objective.counts(batch)

    def ours() -> None:
        draft.zero_grad()
        objective.loss(draft, batch, features, counts).loss.backward()

    def textbook() -> None:
        draft.zero_grad()
        textbook_loss(draft, target, batch, features, NUM_STEPS, DECAY).backward()

    ways = {"ours": ours, "textbook": textbook}
    with fast_float32_matmuls(torch.device("cpu")):
        for way in ways.values():
            way()
        rounds = [{name: measure(way) for name, way in ways.items()} for _ in range(options.rounds)]
    print(
        f"size {options.size}, {options.supervised:.0%} supervised, {NUM_STEPS} steps, float32, "
        f"{options.rounds} rounds, torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"
    )
    print(f"{'':10}{'tokens/s (min to max)':>28}{'MB added':>10}")
    for name in ways:
        speeds = [batch.num_tokens / r[name][0] for r in rounds]
        spread = f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
        print(f"{name:10}{spread:>28}{statistics.median(r[name][1] for r in rounds):10.0f}")
    ratios = [r["textbook"][0] / r["ours"][0] for r in rounds]
    print(f"ours / textbook: {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
