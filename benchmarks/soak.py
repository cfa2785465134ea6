"""A long training that is watched from outside: does its memory grow, does it leak, does it slow down?

python -m benchmarks.soak --minutes 60 [--ranks 2] [--every 10] [--output outputs/soak] [override ...]

Trains an EAGLE-3 draft for the embedded target on several ranks, with a checkpoint every minute, and every five minutes
an evaluation of the newest one by a program of its own; then asks the training to end, as a scheduler does.  A sample
is what Linux says of each rank: memory that is no file (RssAnon + RssShmem), open files, threads, and processor time.
Samples go to <output>/soak.jsonl; the first fifth of them is warming up.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression, mean

ROOT = Path(__file__).parent.parent
MARK, MB = "NEMO_SPECULATIVE_SOAK", 1e6
EVALUATION_MINUTES, WARM_UP, QUARTERS = 5, 0.2, 4
SETTINGS = [
    "trainer.max_steps=10000000", "trainer.save_interval=10000000", "trainer.save_minutes=1",
    "trainer.val_interval=500", "trainer.log_interval=10", "evaluation.selection_questions=4",
    "evaluation.num_questions=4", "evaluation.max_new_tokens=64",
]  # fmt: skip


def run_of(output: Path) -> Path:
    """The training's own directory; what watches it writes beside it."""
    return output / "run"


def marked(mark: str) -> dict[int, dict[str, str]]:
    """The environment of every process that was started under ``mark``."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            lines = (directory / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if f"{MARK}={mark}" in lines:
            found[int(directory.name)] = dict(line.split("=", 1) for line in lines if "=" in line)
    return found


def of_process(pid: int) -> dict[str, float]:
    """Memory in MB, open files, threads, and seconds of processor time."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = {name: value.split() for name, value in (line.split(":", 1) for line in lines)}
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return {
        "MB": sum(int(status[name][0]) for name in ("RssAnon", "RssShmem")) * 1024 / MB,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"][0]),
        "cpu": sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
    }


def sample(mark: str, output: Path, start: float) -> dict | None:
    """None before the first line of metrics, and where a process ends meanwhile."""
    metrics = run_of(output) / "metrics.jsonl"
    if not metrics.exists() or not (lines := metrics.read_text().splitlines()):
        return None
    try:
        ranks = {e["RANK"]: of_process(pid) for pid, e in marked(mark).items() if "RANK" in e}
    except (OSError, KeyError):
        return None
    kept = [path for path in (run_of(output) / "checkpoints").rglob("*") if path.is_file() and not path.is_symlink()]
    return {
        "seconds": time.monotonic() - start,
        "step": json.loads(lines[-1])["step"],
        "processes": len(marked(mark)),
        "checkpoint files": len(kept),
        "ranks": ranks,
    }


@contextmanager
def training(mark: str, output: Path, ranks: int, overrides: list[str]) -> Iterator[subprocess.Popen]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    recipe = ["recipes/train_eagle3.py", *SETTINGS, f"output_dir={run_of(output)}", *overrides]
    environment = os.environ | {MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (output / "training.log").open("w") as log:
        process = subprocess.Popen(
            [*launcher, *recipe], env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield process
        finally:
            for pid in marked(mark):
                os.kill(pid, signal.SIGKILL)


def evaluation(output: Path) -> subprocess.Popen:
    log = (output / "evaluations.log").open("a")
    command = [sys.executable, "recipes/evaluate.py", f"checkpoint={run_of(output)}", "evaluation.num_questions=4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)


def watch(process: subprocess.Popen, mark: str, options: argparse.Namespace) -> tuple[list[dict], list[int]]:
    """The samples, and the exit codes of the evaluations."""
    samples: list[dict] = []
    evaluations: list[subprocess.Popen] = []
    start = time.monotonic()
    with (options.output / "soak.jsonl").open("w") as out:
        while process.poll() is None and (not samples or samples[-1]["seconds"] < options.minutes * 60):
            time.sleep(options.every)
            taken = sample(mark, options.output, start)
            if taken is None:
                start = start if samples else time.monotonic()
                continue
            samples.append(taken)
            out.write(json.dumps(taken) + "\n")
            out.flush()
            if taken["seconds"] > EVALUATION_MINUTES * 60 * (len(evaluations) + 1):
                evaluations.append(evaluation(options.output))
    return samples, [done.wait() for done in evaluations]


def report(samples: list[dict]) -> None:
    warm = samples[int(len(samples) * WARM_UP) :]
    hours = [taken["seconds"] / 3600 for taken in warm]
    for rank in sorted(warm[0]["ranks"]):
        memory = [taken["ranks"][rank]["MB"] for taken in warm]
        line = linear_regression(hours, memory)
        files, threads = ({taken["ranks"][rank][name] for taken in warm} for name in ("files", "threads"))
        print(
            f"rank {rank}: {mean(memory):.0f} MB, from {min(memory):.0f} to {max(memory):.0f}, slope "
            f"{line.slope:+.1f} MB an hour; {min(files)} to {max(files)} open files, {min(threads)} to {max(threads)} "
            "threads"
        )
    counts = {taken["processes"] for taken in warm}, {taken["checkpoint files"] for taken in warm}
    print("{} to {} processes; {} to {} files in checkpoints/".format(*(f(c) for c in counts for f in (min, max))))
    edges = [warm[n * (len(warm) - 1) // QUARTERS] for n in range(QUARTERS + 1)]
    for quarter, (first, last) in enumerate(pairwise(edges), 1):
        steps, seconds = last["step"] - first["step"], last["seconds"] - first["seconds"]
        cpu = sum(last["ranks"][rank]["cpu"] - first["ranks"][rank]["cpu"] for rank in last["ranks"])
        print(f"quarter {quarter}: {steps / seconds:.2f} steps/s, {steps / cpu:.3f} per second of processor time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--every", type=float, default=10, help="seconds between two samples")
    parser.add_argument("--output", type=Path, default=Path("outputs/soak"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    with training(mark, options.output, options.ranks, options.overrides) as process:
        samples, evaluated = watch(process, mark, options)
        ended = process.poll()
        process.terminate()
        status = process.wait(timeout=300)
        time.sleep(2)
        left = marked(mark)
    if ended is not None or len(samples) < 2 * QUARTERS:
        sys.exit(f"the training ended by itself (exit {ended}) after {len(samples)} samples: see {options.output}")
    saved = len((options.output / "training.log").read_text().split("saved step_")) - 1
    print(
        f"{os.cpu_count()} cores, {options.ranks} ranks, {samples[-1]['seconds'] / 60:.0f} minutes, "
        f"{samples[-1]['step']} steps, {saved} checkpoints; {len(evaluated)} evaluations, exits {set(evaluated)}"
    )
    report(samples)
    print(f"asked to end: the launcher's exit {status}; processes left: {len(left)}")


if __name__ == "__main__":
    main()
