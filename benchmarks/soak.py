"""Watches a long training for growing memory, leaked resources and slower steps.

python -m benchmarks.soak --minutes 60 [--ranks 2] [--every 10] [--output outputs/soak] [override ...]

Trains an EAGLE-3 draft for the embedded target on several ranks, with a checkpoint every minute, which a separate
process evaluates every five minutes; then it stops the training with SIGTERM, as a scheduler does.  A sample has each
rank's memory without mapped files (RssAnon + RssShmem), open files, threads and CPU time, from /proc.  Samples are
written to <output>/soak.jsonl; the first fifth of them counts as warm-up.
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
    """The training's output directory; this program writes next to it."""
    return output / "run"


def marked(mark: str) -> dict[int, dict[str, str]]:
    """Environments, by pid, of the processes whose environment contains ``mark``."""
    environments = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            lines = (directory / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if f"{MARK}={mark}" in lines:
            environments[int(directory.name)] = dict(line.split("=", 1) for line in lines if "=" in line)
    return environments


def of_process(pid: int) -> dict[str, float]:
    """Memory in MB, open files, threads, and seconds of CPU time of a process."""
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
    """A sample; None before the first line of metrics, or if a process ends meanwhile."""
    metrics = run_of(output) / "metrics.jsonl"
    if not metrics.exists() or not (lines := metrics.read_text().splitlines()):
        return None
    try:
        ranks = {e["RANK"]: of_process(pid) for pid, e in marked(mark).items() if "RANK" in e}
    except (OSError, KeyError):
        return None
    files = [path for path in (run_of(output) / "checkpoints").rglob("*") if path.is_file() and not path.is_symlink()]
    return {
        "seconds": time.monotonic() - start,
        "step": json.loads(lines[-1])["step"],
        "processes": len(marked(mark)),
        "checkpoint files": len(files),
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
    """Takes samples and starts evaluations; returns the samples and the evaluations' exit codes."""
    samples: list[dict] = []
    evaluations: list[subprocess.Popen] = []
    start = time.monotonic()
    with (options.output / "soak.jsonl").open("w") as out:
        while process.poll() is None and (not samples or samples[-1]["seconds"] < options.minutes * 60):
            time.sleep(options.every)
            latest = sample(mark, options.output, start)
            if latest is None:
                start = start if samples else time.monotonic()
                continue
            samples.append(latest)
            out.write(json.dumps(latest) + "\n")
            out.flush()
            if latest["seconds"] > EVALUATION_MINUTES * 60 * (len(evaluations) + 1):
                evaluations.append(evaluation(options.output))
    return samples, [done.wait() for done in evaluations]


def report(samples: list[dict]) -> None:
    warm = samples[int(len(samples) * WARM_UP) :]
    hours = [entry["seconds"] / 3600 for entry in warm]
    for rank in sorted(warm[0]["ranks"]):
        memory = [entry["ranks"][rank]["MB"] for entry in warm]
        line = linear_regression(hours, memory)
        files, threads = ({entry["ranks"][rank][name] for entry in warm} for name in ("files", "threads"))
        print(
            f"rank {rank}: {mean(memory):.0f} MB, from {min(memory):.0f} to {max(memory):.0f}, slope "
            f"{line.slope:+.1f} MB an hour; {min(files)} to {max(files)} open files, {min(threads)} to {max(threads)} "
            "threads"
        )
    counts = {entry["processes"] for entry in warm}, {entry["checkpoint files"] for entry in warm}
    print("{} to {} processes; {} to {} files in checkpoints/".format(*(f(c) for c in counts for f in (min, max))))
    edges = [warm[n * (len(warm) - 1) // QUARTERS] for n in range(QUARTERS + 1)]
    for quarter, (first, last) in enumerate(pairwise(edges), 1):
        steps, seconds = last["step"] - first["step"], last["seconds"] - first["seconds"]
        cpu = sum(last["ranks"][rank]["cpu"] - first["ranks"][rank]["cpu"] for rank in last["ranks"])
        print(f"quarter {quarter}: {steps / seconds:.2f} steps/s, {steps / cpu:.3f} per second of CPU time")


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
        remaining = marked(mark)
    if ended is not None or len(samples) < 2 * QUARTERS:
        sys.exit(f"the training ended by itself (exit {ended}) after {len(samples)} samples: see {options.output}")
    saved = len((options.output / "training.log").read_text().split("saved step_")) - 1
    print(
        f"{os.cpu_count()} cores, {options.ranks} ranks, {samples[-1]['seconds'] / 60:.0f} minutes, "
        f"{samples[-1]['step']} steps, {saved} checkpoints; {len(evaluated)} evaluations, exits {set(evaluated)}"
    )
    report(samples)
    print(f"after SIGTERM: exit status {status} of the launcher; remaining processes: {len(remaining)}")


if __name__ == "__main__":
    main()
