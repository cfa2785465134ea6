"""Rows of every kind, and jobs that prepare them."""

import hashlib
import json
from pathlib import Path

from nemo_speculative.config.schema import (
    DataConfig,
    MixDataConfig,
    PrepareJob,
    SourceConfig,
)


def chat(question: str, answer: str, **more) -> dict:
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def write(file: Path, records: list) -> str:
    file.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return str(file)


def rows_of(directory: Path, *names: str) -> list[dict]:
    return [
        json.loads(line) for name in names or ("train", "held_out") for line in (directory / f"{name}.jsonl").open()
    ]


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != ".lock"}


def naive_share(identity: str) -> float:
    return int(hashlib.sha256(identity.encode()).hexdigest()[:8], 16) / 2**32


MIXED = [
    *(chat(f"question {n}", f"answer {n}", id=f"c{n}") for n in range(40)),
    chat("question 3", " answer   3\n", id="again"),
    {"question": "how much", "answer": "so much"},
    chat("", "nothing"),
    {"conversations": chat("q", "a")["conversations"][::-1]},
    {"foo": 1},
    "{broken\n",
    {"input_ids": [1, 2, 3], "loss_mask": [0, 0, 1]},
    {"input_ids": [1, 2, 3], "labels": [-100, -100, -100]},
    chat("different", "but the same id", id="c0"),
]
EXPECTED = {
    "duplicate": 1, "empty content": 1, "starts with the assistant": 1, "unknown shape": 1,
    "not JSON": 1, "nothing supervised": 1,
}  # fmt: skip


def job_for(tmp_path: Path, records: list = MIXED, share: float = 0.2, **more) -> PrepareJob:
    data = DataConfig(path=write(tmp_path / "rows.jsonl", records), held_out_share=share)
    return PrepareJob(data=data, output=str(tmp_path / "out"), **more)


def mix_job(tmp_path: Path, sources: list[SourceConfig], **more) -> PrepareJob:
    data = MixDataConfig(sources=sources, prepared=str(tmp_path / "mix"), held_out_share=0.1)
    return PrepareJob(data=data, **more)
