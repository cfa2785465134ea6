"""Time and memory that ``plan=true`` predicts for a training step, compared with the trainer's.

python -m benchmarks.plan [--cases tiny,S-50] [--rounds 3] [--threads N]

Every case runs the trainer in its own process: the embedded target's recipe with a random target of that shape; sizes S
and M of ``benchmarks.training_step`` with a share of their tokens supervised; a target much larger than its draft, on
two ranks, with each backend (``L-hf_tp``: ``backend=hf_tp``); a large draft with each parallelism (``ddp``, ``hsdp``,
…); or a long row that two ranks share (``cp-hf_tp-5``: ``backend=hf_tp``, 5 % supervised).  Rounds alternate between a
prediction and some steps, so that noise of the machine affects both.  Memory is that of the rank with the most: its
weights and the peak of all other tensors in the first steps, by torch's profiler (torch.cuda.max_memory_allocated on a
GPU).  "besides" is the further growth of its process.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.processes import exit_status, last_line_of
from benchmarks.training_step.case import SIZES, Case, Size
from benchmarks.training_step.table import machine
from benchmarks.training_step.worker import Memory, peak_of_tensors
from nemo_speculative.utils.errors import UsageError

MODULE = "benchmarks.plan"
STEPS, WARMUP, PROFILED = 3, 2, 2
COPIES = 8
"""Copies of a size's conversations in the data, so that a run has enough steps."""
LARGE = Size(
    hidden_size=1024, num_layers=12, num_heads=16, num_kv_heads=8, intermediate_size=2816, vocab_size=8192,
    draft_vocab_size=1024, aux_layers=[1, 5, 8], rows=2, row_tokens=256,
)  # fmt: skip
PLACEMENTS, RANKS = ("hf", "hf_fsdp2", "hf_tp"), 2
"""Backends of the large target, and the number of ranks."""
HEAVY = Size(
    hidden_size=512, num_layers=4, num_heads=8, num_kv_heads=4, intermediate_size=3072, vocab_size=8192,
    draft_vocab_size=6144, aux_layers=[0, 1, 2], rows=4, row_tokens=256,
)  # fmt: skip
"""A draft whose weights and moments take more memory than its activations."""
DRAFTS: dict[str, tuple[int, list[str]]] = {
    "ddp": (2, ["parallelism=ddp"]),
    "fsdp2": (2, ["parallelism=fsdp2"]),
    "hsdp": (4, ["parallelism=hsdp", "parallelism.shard=2"]),
    "accumulated": (2, ["parallelism=fsdp2", "trainer.micro_batch_size=1"]),
    "offload": (2, ["parallelism=fsdp2", "parallelism.offload=true"]),
    "average": (1, ["parallelism=single", "optimizer.ema_decay=0.999"]),
}
"""Placements of that draft: the number of ranks and the overrides."""
LONG = Size(
    hidden_size=256, num_layers=6, num_heads=4, num_kv_heads=2, intermediate_size=3072, vocab_size=2048,
    draft_vocab_size=1024, aux_layers=[1, 2, 3], rows=1, row_tokens=4096,
)  # fmt: skip
"""A row that takes more memory than the models: with few slots the target's forward has the peak, with many the draft.
"""


@dataclass(frozen=True)
class Recipe:
    """The recipe that a case runs."""

    overrides: Callable[[Path], list[str]]
    """Writes the input files into a folder, and returns the recipe's overrides."""
    ranks: int = 1


def _cases() -> dict[str, Recipe]:
    """All cases by name."""
    sizes = {
        f"{name}-{share}": Recipe(partial(_size, size=size, share=share / 100, rows=size.rows))
        for name, size in SIZES.items()
        for share in (25, 50, 100)
    }
    placements = {f"L-{backend}": Recipe(partial(_placed, backend=backend), RANKS) for backend in PLACEMENTS}
    drafts = {name: Recipe(partial(_held, ranks=ranks, how=how), ranks) for name, (ranks, how) in DRAFTS.items()}
    shared = {
        f"cp-{name}-{share}": Recipe(partial(_shared, share=share / 100, backend=backend), RANKS)
        for name, backend in SHARED.items()
        for share in (5, 50)
    }
    return {"tiny": Recipe(_tiny)} | sizes | placements | drafts | shared


def _tiny(folder: Path) -> list[str]:
    from transformers import LlamaForCausalLM

    from nemo_speculative.config.schema import TinyModelConfig
    from nemo_speculative.targets import demo

    config = TinyModelConfig(cache_dir=f"{folder}/targets")
    LlamaForCausalLM(demo.llama_config(config)).save_pretrained(demo.directory_of(config))
    demo.make_tokenizer(config).save_pretrained(demo.directory_of(config))
    return [f"model.cache_dir={folder}/targets", "data.answers=given"]


def _placed(folder: Path, backend: str) -> list[str]:
    return [*_size(folder, LARGE, share=0.5, rows=LARGE.rows // RANKS), f"backend={backend}", "draft.ttt_steps=3"]


def _held(folder: Path, ranks: int, how: list[str]) -> list[str]:
    return [*_size(folder, HEAVY, share=0.5, rows=HEAVY.rows // ranks), *how]


def _shared(folder: Path, share: float, backend: Callable[[Path, list[str]], list[str]]) -> list[str]:
    own = ["draft.intermediate_size=768", "draft.init_from_target.layer=false"]
    row = [*_size(folder, LONG, share, rows=LONG.rows), *own]
    return [*row, "parallelism=cp", f"parallelism.context={RANKS}", *backend(folder, row)]


def _captured(folder: Path, row: list[str]) -> list[str]:
    """Captures the hidden states of ``row`` to disk, and returns the overrides that read them."""
    from nemo_speculative.training.capture_features import capture

    capture(_job("capture_features", [*row, f"output={folder}/features"]))
    return ["backend=features", f"backend.directory={folder}/features"]


def _computed(folder: Path, row: list[str], backend: str) -> list[str]:
    return [f"backend={backend}"]


SHARED: dict[str, Callable[[Path, list[str]], list[str]]] = {
    **{backend: partial(_computed, backend=backend) for backend in PLACEMENTS},
    "features": _captured,
}
"""Sources of the hidden states of shared rows: functions that prepare one and return its overrides."""


def _job(recipe: str, overrides: list[str]) -> Any:
    from hydra import compose, initialize_config_dir

    from nemo_speculative.config.app import CONF, to_job

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_job(compose(recipe, overrides, return_hydra_config=False))


def _size(folder: Path, size: Size, share: float, rows: int) -> list[str]:
    """Writes target and data of ``size``; returns the overrides for micro-batches of ``rows`` rows."""
    from benchmarks.training_step.setup import write_setup

    case = Case(size=size, draft="eagle3", num_steps=7, dtype="float32", lengths="full", supervised=share, threads=1)
    conversations = write_setup(folder, case).conversations
    lines = [{"input_ids": c.input_ids.tolist(), "loss_mask": c.loss_mask.int().tolist()} for c in conversations]
    data = folder / "conversations.jsonl"
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines * COPIES))
    return [
        "model=local", f"model.path={folder}/target", "data=jsonl", f"data.path={data}", f"data.held_out_path={data}",
        f"data.max_length={size.row_tokens}", f"draft.vocab_size={size.draft_vocab_size}",
        f"draft.aux_layers={size.aux_layers}".replace(" ", ""), f"trainer.global_batch_size={size.rows}",
        f"trainer.micro_batch_size={rows}", "trainer.max_steps=1000",
    ]  # fmt: skip


def run_case(overrides: list[str], rounds: int) -> dict[str, Any]:
    """Runs one case in this process, or on this rank: seconds of a step and bytes, predicted and measured."""
    import torch

    from nemo_speculative.distributed.parallelism import context_group, fast_float32_matmuls, process_group
    from nemo_speculative.training import build, estimate
    from nemo_speculative.training.checks import draft_shape
    from nemo_speculative.utils.progress import quiet_transformers

    quiet_transformers()
    job, device = _job("train_eagle3", overrides), torch.device("cpu")
    with process_group(device, job.parallelism) as dims, fast_float32_matmuls(device):
        target = build.build_target(job, device)
        data = build.build_data(job, target, build.load_split(job))
        vocabulary = build.build_draft_vocabulary(job, target, data.training)
        draft = build.build_draft(job, target, vocabulary)
        trainer = build.build_trainer(
            job, target=target, draft=draft, objective=build.build_objective(job, target, context_group(dims)),
            data=data, questions=[], run=build.prepare_run_dir(job), dims=dims, device=device,
        )  # fmt: skip
        read = StatesRead(target) if target.requests_ahead else None
        with closing(trainer):
            memory = Memory()
            _steps(trainer, WARMUP)
            added = memory.added_mb() * 1e6
            getattr(target, "release", lambda: None)()  # otherwise gathered weights would count twice
            weights = [p for m in (target.model, draft) for p in m.parameters()]
            moments = [x for o in trainer.optimizers for state in o.state.values() for x in state.values()]
            moments += trainer.average.state_dict().values()
            peak = peak_of_tensors(lambda: _steps(trainer, PROFILED)) + _bytes(moments) + (read.most if read else 0)
            most = torch.tensor([peak + _bytes(weights), added - peak], dtype=torch.float64)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            shape = draft_shape(job, target.config, vocabulary.size)
            batches = build.build_loader(job, target, data, dims).next_global_batch()
            ranks = torch.distributed.get_world_size()
            counted = estimate.count(job, target.config, shape, batches, device, ranks)
            predicted, measured = [], []
            for _ in range(rounds):
                rates = estimate.measure(job, target.config, shape, batches[0], counted[0], device)
                predicted.append(sum(estimate.step_seconds(counted, rates, len(batches))))
                measured.append(_steps(trainer, STEPS))
            parts = estimate.peak_memory(
                job, estimate.size_models(job, target.config, shape), max(counted, key=lambda c: c.loss_bytes),
                ranks, device.type, accumulates=len(batches) > 1,
            )  # fmt: skip
    return {
        "predicted": predicted, "measured": measured, "bytes": sum(parts.values()), "peak": float(most[0]),
        "predicted besides": estimate.overhead(parts, device), "besides": float(most[1]),
    }  # fmt: skip


class StatesRead:
    """Peak bytes of the hidden states that threads have requested from ``target``.

    torch's profiler does not record the allocations of other threads.
    """

    def __init__(self, target: Any):
        self.alive = self.most = 0
        self._lock, self._compute = threading.Lock(), target.compute_hidden_states
        target.compute_hidden_states = self._recording

    def _recording(self, batch: Any) -> Any:
        output = self._compute(batch)
        for x in (output.aux_hidden_states, output.last_hidden_state):
            storage = x.untyped_storage()
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())
        return output

    def _add(self, size: int) -> None:
        with self._lock:
            self.alive += size
            self.most = max(self.most, self.alive)


def _bytes(tensors: Sequence[Any]) -> int:
    """Bytes of this rank's parts of ``tensors``."""
    parts = [x.to_local() if hasattr(x, "to_local") else x for x in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def _steps(trainer: Any, count: int) -> float:
    """Trains ``count`` steps; returns the median of their seconds."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        trainer.train_step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def line(name: str, result: dict[str, Any]) -> str:
    """A line of the table."""
    seconds, steps = (statistics.median(result[key]) for key in ("predicted", "measured"))
    ratios = [a / b for a, b in zip(result["predicted"], result["measured"], strict=True)]
    return (
        f"{name:14}{seconds:11.3f}{steps:11.3f}{seconds / steps:8.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        f"{result['bytes'] / 1e6:13.0f}{result['peak'] / 1e6:11.0f}{result['bytes'] / result['peak']:8.2f}"
        f"{result['predicted besides'] / 1e6:11.0f}{result['besides'] / 1e6:11.0f}"
    )


def in_process(name: str, rounds: int, threads: int) -> dict[str, Any]:
    """Runs :func:`run_case` in its own process, or on ranks that share the threads.

    Raises:
        UserError: it failed; the message quotes its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = last_line_of(MODULE, ["--prepare", folder, "--cases", name], threads)
        ranks, arguments = _cases()[name].ranks, ["--within", prepared, "--rounds", str(rounds)]
        return json.loads(last_line_of(MODULE, arguments, max(threads // ranks, 1), ranks))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(_cases()), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: all cores)")
    for internal in ("--prepare", "--within"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.prepare:
        folder = Path(options.prepare)
        shared = [f"output_dir={folder}/run", "logger=none", "trainer.val_rows=1"]
        print(json.dumps(shared + _cases()[options.cases].overrides(folder)))
    elif options.within:
        result = run_case(json.loads(options.within), options.rounds)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result))
    else:
        return exit_status(lambda: _table(options.cases.split(","), options.rounds, options.threads))
    return 0


def _table(names: Sequence[str], rounds: int, threads: int) -> None:
    if unknown := [name for name in names if name not in _cases()]:
        raise UsageError(f"--cases: {unknown[0]!r} is unknown; expected one or more of {', '.join(_cases())}")
    print(f"{machine(threads)}; {rounds} rounds")
    print(f"{'':14}{'seconds of a step':>22}{'':30}{'MB of tensors':>22}{'MB besides':>25}")
    pair = f"{'predicted':>11}{'measured':>11}"
    print(f"{'':14}{pair}{'ratio (min to max)':>23}{pair:>23}   ratio{pair}")
    for name in names:
        print(line(name, in_process(name, rounds, threads)), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
