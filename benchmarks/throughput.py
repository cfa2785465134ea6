"""Tokens/s, memory and utilization of training an EAGLE-3 draft for a target of 8B parameters on one device.

python -m benchmarks.throughput [--size 8b|tiny] [--lengths 4096,8192,16384,32768] [--compile off,on] [--trace FILE]

The target has Llama-3.1-8B's shape and random weights, created on the device; nothing is downloaded.  Rows are packed
with conversations of ShareGPT's lengths.  A step is the trainer's: the target's forward (on CUDA in its own stream,
during the draft's work on the previous batch), loss, backward pass, clipping, AdamW.

"bare" is the ratio of the target's forward alone to the step.  "of peak" is the counted multiply-adds per second
(nemo_speculative/training/estimate.py) divided by those of a large square matrix product in the same process and dtype.
Memory is the device's peak of allocated bytes; on a CPU the process's peak so far.  A combination that does not fit is
reported as such; none starts after --minutes.  --size tiny runs everything on a CPU.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import log
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.training_step.case import LENGTH_SIGMA, MEAN_ANSWER, MEAN_EXCHANGES, MEAN_QUESTION
from benchmarks.training_step.setup import _tokenizer as tokenizer_of_nothing
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.algorithms.eagle3.training import Eagle3Objective
from nemo_speculative.config.schema import (
    Dtype,
    Eagle3DraftConfig,
    OptimizerConfig,
    ParallelismConfig,
    TrainerConfig,
    TrainJob,
)
from nemo_speculative.data.batch import collate, pack
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.data.vocab_mapping import VocabMapping
from nemo_speculative.distributed import titan
from nemo_speculative.distributed.parallelism import fast_float32_matmuls, process_group, shard_draft
from nemo_speculative.targets import hf
from nemo_speculative.training import estimate
from nemo_speculative.training.metrics import GIB, peak_memory_gib
from nemo_speculative.training.optimizer import build_optimizers
from nemo_speculative.training.prefetch import TargetPrefetcher
from nemo_speculative.training.trainer import TTTModule
from nemo_speculative.utils.devices import StepTimer, choose_device

LLAMA_31_8B: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 192, "vocab_size": 1024, "tie_word_embeddings": False,
}  # fmt: skip
LONGEST_CONVERSATION = 4096
ROWS = 4
"""Number of packed rows, each of which is one step."""


@dataclass(frozen=True)
class Size:
    """Shape of the models, and settings of the measurement."""

    config: dict[str, Any]
    draft_vocab_size: int
    dtype: torch.dtype
    lengths: str
    peak_width: int
    """Width of the square matrices whose product defines the peak."""


SIZES = {
    "8b": Size(LLAMA_31_8B, 32000, torch.bfloat16, "4096,8192,16384,32768", 8192),
    "tiny": Size(TINY, 512, torch.float32, "512,1024", 1024),
}


def random_target(size: Size, device: torch.device, longest: int) -> hf.HFTarget:
    """A target of random weights, created on the device."""
    config = LlamaConfig(
        **size.config, max_position_embeddings=max(longest, LONGEST_CONVERSATION), pad_token_id=0, bos_token_id=1,
        eos_token_id=2, dtype=size.dtype,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with device:
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer_of_nothing().save_pretrained(folder)
        # Avoids writing 16 GB of weights to disk and reading them back.
        with patch.object(hf, "load_model", lambda *_, **__: model):
            return hf.HFTarget(Path(folder), aux_layers=None, dtype=size.dtype, device=device)


def conversations(tokens: int, vocabulary: int) -> list[TokenRow]:
    """At least ``tokens`` of random conversations of ShareGPT's lengths: lognormal turns, geometric exchanges."""
    rows: list[TokenRow] = []
    rng, total = random.Random(0), 0
    words = torch.Generator().manual_seed(0)
    while total < tokens:
        mask: list[bool] = []
        while not mask or rng.random() > 1 / MEAN_EXCHANGES:
            for mean, assistant in ((MEAN_QUESTION, False), (MEAN_ANSWER, True)):
                mask += [assistant] * max(1, round(rng.lognormvariate(log(mean) - LENGTH_SIGMA**2 / 2, LENGTH_SIGMA)))
        mask = mask[:LONGEST_CONVERSATION]
        ids = torch.randint(3, vocabulary, (len(mask),), generator=words).tolist()
        rows.append(TokenRow(str(len(rows)), ids, mask, ""))
        total += len(mask)
    return rows


class Bench:
    """A draft in training."""

    def __init__(self, size: Size, target: hf.HFTarget, dims: titan.ParallelDims, compiled: bool, alive: int | None):
        self.size, self.target, self.device = size, target, target.device
        config = Eagle3DraftConfig(vocab_size=size.draft_vocab_size)
        shape = Eagle3Draft.shape_for(config, target.config, target.aux_layers, size.draft_vocab_size)
        with self.device:
            draft = Eagle3Draft(shape).attach(target)
        ids = torch.arange(size.draft_vocab_size)
        draft.set_vocab_mapping(VocabMapping(ids, target.config.vocab_size, 1.0))
        if compiled:
            for layer in draft.decoder_layers:
                layer.finish = torch.compile(layer.finish)  # type: ignore[method-assign]
        slots = TrainerConfig(ttt_chunk_slots=alive).slots(target.config.hidden_size, self.device.type)
        self.objective = Eagle3Objective(target, config, seed=0, tau_steps=5, chunk_slots=slots)
        self.shape, self.job = shape, TrainJob(draft=config, trainer=TrainerConfig(ttt_chunk_slots=alive))
        self.job.model.dtype = self.job.trainer.dtype = Dtype(str(size.dtype).removeprefix("torch."))
        self.trainee = shard_draft(TTTModule(draft, self.objective), dims, size.dtype)
        self.optimizers = build_optimizers(OptimizerConfig(), self.trainee)

    def schedules(self, length: int) -> list[Any]:
        """Schedules of packed rows of ``length`` tokens, one per step."""
        documents = conversations(ROWS * max(length, LONGEST_CONVERSATION), self.target.config.vocab_size)
        documents = [TokenRow(d.id, d.input_ids[:length], d.loss_mask[:length], "") for d in documents]
        rows = pack([len(d.input_ids) for d in documents], length, 0)[:ROWS]
        self.batches = [collate([[documents[i] for i in row]], length, 0) for row in rows]
        return [self.objective.schedule(batch, self.device) for batch in self.batches]

    def work(self) -> float:
        """Multiply-adds of a step, on average."""
        counted = estimate.count(self.job, self.target.config, self.shape, self.batches, self.device)
        return sum(batch.flops.total() for batch in counted) / len(counted) / 2

    def train(self, schedules: Sequence[Any], ahead: TargetPrefetcher) -> None:
        """Trains one step for each of ``schedules``, as the trainer does."""
        for n, schedule in enumerate(schedules):
            following = [schedules[(n + 1) % len(schedules)]]
            for current, output in ahead.iterate([schedule], partial(list, following)):
                self.trainee(current, output, current.counts).loss.backward()
            titan.clip_grad_norm_(self.trainee.parameters(), 0.5)
            self.optimizers.step()
            self.optimizers.zero_grad()


def seconds_each(run: Callable[[], Any], count: int, device: torch.device, rounds: int) -> float:
    """Seconds of ``run`` divided by ``count``: the median of ``rounds`` after one that does not count."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - started) / count)
    return statistics.median(seconds[1:])


def peak_speed(size: Size, device: torch.device) -> float:
    """Multiply-adds per second of a large square matrix product."""
    a, b = torch.randn(2, size.peak_width, size.peak_width, device=device).to(size.dtype)
    return size.peak_width**3 / seconds_each(lambda: a @ b, 1, device, 10)


def line(bench: Bench, length: int, peak: float, rounds: int, label: str) -> str:
    """The line of one combination."""
    device = bench.device
    schedules = bench.schedules(length)
    ahead = TargetPrefetcher(bench.target, device, StepTimer(device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = seconds_each(lambda: bench.train(schedules, ahead), len(schedules), device, rounds)
    memory = peak_memory_gib(device) * GIB / 1e9
    bare = seconds_each(
        lambda: [bench.target.compute_hidden_states(schedule.batch) for schedule in schedules],
        len(schedules),
        device,
        rounds,
    )
    share = bench.work() / step / peak
    return f"{length:8}{label:>10}{length / step:12.0f}{step:10.3f}{memory:10.2f}{share:10.1%}{bare / step:10.1%}"


def trace(bench: Bench, length: int, file: Path) -> None:
    """Writes a Chrome trace of two steps, and prints the operators that took the most time."""
    schedules, ahead = bench.schedules(length), TargetPrefetcher(bench.target, bench.device, StepTimer(bench.device))
    bench.train(schedules, ahead)
    activities, order = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
    if bench.device.type == "cuda":
        activities, order = [*activities, torch.profiler.ProfilerActivity.CUDA], "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        bench.train(schedules[:2], ahead)
    profiler.export_chrome_trace(str(file))
    print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60))


def measure(options: argparse.Namespace, device: torch.device) -> None:
    """Prints one line per combination."""
    started, size = time.perf_counter(), SIZES[options.size]
    lengths = [int(n) for n in (options.lengths or size.lengths).split(",")]
    with process_group(device, ParallelismConfig()) as dims, fast_float32_matmuls(device):
        peak = peak_speed(size, device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        print(f"{options.size} on {name}, torch {torch.__version__}, {size.dtype}".replace("torch.", ""))
        print(f"peak: {2 * peak / 1e12:.4g} TFLOP/s, a product of {size.peak_width} x {size.peak_width} matrices")
        target = random_target(size, device, max(lengths))
        print(f"{'tokens':>8}{'compile':>10}{'tokens/s':>12}{'s a step':>10}{'GB':>10}{'of peak':>10}{'bare':>10}")
        for length in lengths:
            for label in options.compile.split(","):
                if time.perf_counter() - started > 60 * options.minutes:
                    return print(f"stopped after {options.minutes} minutes, before {length} tokens, compile {label}")
                print(attempt(options, size, target, dims, length, label, peak), flush=True)
        if options.trace:
            bench = Bench(size, target, dims, options.compile == "on", options.slots_alive)
            trace(bench, lengths[0], options.trace)
    return None


def attempt(
    options: argparse.Namespace, size: Size, target: hf.HFTarget, dims: titan.ParallelDims, length: int, label: str,
    peak: float,
) -> str:  # fmt: skip
    """The line of one combination, or one that says that it does not fit."""
    try:
        return line(Bench(size, target, dims, label == "on", options.slots_alive), length, peak, options.rounds, label)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return f"{length:8}{label:>10}  does not fit: {str(error).splitlines()[0]}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--lengths", help="tokens of a row (default: 4096,8192,16384,32768; tiny: 512,1024)")
    parser.add_argument("--compile", default="off,on", help="(default: off,on)")
    parser.add_argument("--slots-alive", type=int, help="trainer.ttt_chunk_slots (default: the trainer's)")
    parser.add_argument("--rounds", type=int, default=3, help=f"rounds of {ROWS} steps each (default: 3)")
    parser.add_argument("--minutes", type=float, default=8, help="(default: 8)")
    parser.add_argument("--trace", type=Path, help="writes a torch profiler trace of two steps")
    options = parser.parse_args(argv)
    measure(options, choose_device("auto", "device"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
