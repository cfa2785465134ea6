"""From a JSONL file to an optimizer step: the files of the package that a reader has to follow."""

import json
import sys
import threading
from pathlib import Path

import pytest

import nemo_speculative
from nemo_speculative.config.app import to_job
from nemo_speculative.training import build, run
from nemo_speculative.training.trainer import DraftTrainer
from tests.config.test_groups import composed

PACKAGE = Path(nemo_speculative.__file__).parent
NOT_READ = ("config/", "utils/")
"""The configuration's schema, and helpers whose names say all: a lock, a progress bar, a timer, a copy to a device."""
MOST_FILES = 20


class FileTrace:
    """Files of the package whose functions are called, by any thread, while it records."""

    def __init__(self):
        self.files: set[str] = set()
        self._depth = 0

    def _record(self, frame, event, _):
        code = frame.f_code
        if event == "call" and self._depth and code.co_name != "<module>":
            path = Path(code.co_filename)
            if path.is_relative_to(PACKAGE):
                self.files.add(str(path.relative_to(PACKAGE)))

    def recording(self, function):
        def wrapper(*args, **kwargs):
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1

        return wrapper

    def __enter__(self):
        threading.setprofile(self._record)
        sys.setprofile(self._record)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


@pytest.fixture
def job(target_dir, tmp_path):
    conversations = tmp_path / "conversations.jsonl"
    with conversations.open("w") as file:
        for i in range(40):
            turns = [("user", f"tell me {i} about foxes"), ("assistant", "the fox jumps " * (i % 5 + 1))]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"id": str(i), "conversations": messages}) + "\n")
    job = to_job(
        composed(
            "train_eagle3", "model=local", f"model.path={target_dir}", "data=jsonl", f"data.path={conversations}",
            "data.packed_length=128", "data.max_length=128", "data.held_out_share=0.1",
            f"data.cache_dir={tmp_path / 'cache'}", "trainer.max_steps=2", "trainer.global_batch_size=4",
            "trainer.micro_batch_size=2", "draft.ttt_steps=3", "draft.vocab_size=200", "exporter.num_steps=3",
            "evaluation.num_questions=1", "evaluation.selection_questions=1", "evaluation.max_new_tokens=4",
            "logger=none",
        )
    )  # fmt: skip
    job.output_dir = str(tmp_path / "run")
    return job


def test_a_step_takes_few_files(job, monkeypatch):
    """Reading and tokenizing the file, loading rows, and two optimizer steps, with what threads do meanwhile."""
    with FileTrace() as trace:
        for module, name in ((run, "load_split"), (run, "build_data"), (build, "build_loader")):
            monkeypatch.setattr(module, name, trace.recording(getattr(module, name)))
        monkeypatch.setattr(DraftTrainer, "train_step", trace.recording(DraftTrainer.train_step))
        run.train(job)
    files = sorted(file for file in trace.files if not file.startswith(NOT_READ))
    print(*files, sep="\n")
    assert "training/trainer.py" in files and "algorithms/eagle3/training.py" in files
    assert len(files) <= MOST_FILES, files
