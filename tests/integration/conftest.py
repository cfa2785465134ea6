import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import ROOT, run_program

TOPICS = ["foxes", "dogs", "wizards", "jugs", "boxes", "liquor", "sevens", "dozens", "jumps", "browns"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    """Sixty short conversations."""
    file = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    with file.open("w") as out:
        for i in range(60):
            topic = TOPICS[i % 10]
            messages = [
                {"role": "user", "content": f"tell me {i} about {topic}"},
                {"role": "assistant", "content": f"the {topic} jump over " + "lazy " * (i % 7) + f"{topic}."},
            ]
            out.write(json.dumps({"id": str(i), "conversations": messages}) + "\n")
    return file


@pytest.fixture(scope="session")
def settings(target_dir, data_file) -> list[str]:
    """A run of ten steps that saves at 3, 6, 9 and 10."""
    return [
        "model=local", f"model.path={target_dir}", "data=jsonl", f"data.path={data_file}", "data.packed_length=128",
        "data.max_length=128", "trainer.max_steps=10", "trainer.global_batch_size=4", "trainer.micro_batch_size=2",
        "trainer.log_interval=1", "trainer.save_interval=3", "trainer.val_interval=4", "optimizer.lr=3e-3",
        "draft.ttt_steps=3", "draft.vocab_size=200", "exporter.dtype=float32", "exporter.num_steps=3",
        "evaluation.num_questions=2", "evaluation.selection_questions=1", "evaluation.max_new_tokens=12",
        "data.held_out_share=0.1", f"data.cache_dir={data_file.parent}",
    ]  # fmt: skip


def run(
    *command: str, ranks: int = 1, timeout: int = 240, path: str = "", grace: float = 0
) -> subprocess.CompletedProcess:
    """Runs a program of the repository in its own process, which also imports from ``path``."""
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), path)))}
    return run_program(*command, environment=environment, timeout=timeout, ranks=ranks, grace=grace)


def torchrun(*command: str, timeout: int = 240, restarts: int = 0) -> subprocess.CompletedProcess:
    """The same run on two ranks by the launcher; ``restarts`` is described in docs/checkpoints.md."""
    how = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *how]
    return subprocess.run(
        [*launcher, *command], capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False,
        env=ENVIRONMENT | ({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if restarts else {}),
    )  # fmt: skip


def train(
    settings: list[str], output_dir: Path, *overrides: str, ranks: int = 1, run=run
) -> subprocess.CompletedProcess:
    more = {"ranks": ranks} if ranks > 1 else {}
    return run("recipes/train_eagle3.py", *settings, f"output_dir={output_dir}", *overrides, **more)


def drive(fault: str, step: int, settings: list[str], output_dir: Path, run=run, **how) -> subprocess.CompletedProcess:
    """The same run with an injected fault: see ``driver.py``."""
    overrides = (*settings, f"output_dir={output_dir}", "resume=auto")
    return run("tests/integration/driver.py", fault, str(step), *overrides, **how)


def metrics(output_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without values that depend on time."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


@pytest.fixture(scope="session")
def finished(settings, tmp_path_factory) -> Path:
    """The directory of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    done = train(settings, directory)
    assert done.returncode == 0, done.stderr
    return directory
