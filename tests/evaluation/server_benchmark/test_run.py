"""Whole benchmarks with a small program in place of SGLang."""

import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from transformers import AutoTokenizer

from nemo_speculative.checkpoint.draft_checkpoint import read_servable
from nemo_speculative.config.app import to_job
from nemo_speculative.config.schema import BenchmarkJob, ServerConfig
from nemo_speculative.data.chat_template import prompt_ids
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import Unauthorized
from tests.config.test_groups import composed
from tests.evaluation.server_benchmark.conftest import PROMPTS
from tests.evaluation.server_benchmark.fake_sglang import ACCEPTED, answer_tokens, arrivals

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "benchmark.py"


@dataclass(frozen=True)
class Done:
    """Output and error of a benchmark."""

    out: str
    err: str
    error: UserError | None


@pytest.fixture
def overrides(run_dir, suite_file, fake_site, free_port, tmp_path) -> list[str]:
    return [
        "suite=jsonl", f"suite.path={suite_file}", f"checkpoint={run_dir}", f"results={tmp_path / 'results'}",
        "server.device=cpu", f"server.port={free_port}", "server.timeout=30", "temperature=[0]", "concurrency=[1,2]",
        "warmup=1",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def recipe():
    """The recipe's own function, without the way to it from a command line."""
    return runpy.run_path(str(RECIPE))["main"].__wrapped__


@pytest.fixture
def run(recipe, overrides, capsys, monkeypatch):
    """Runs the recipe in this process, the servers in theirs; later overrides win."""
    monkeypatch.setattr("nemo_speculative.serving.server.POLL_SECONDS", 0.05)

    def go(*more: str, **environment: str) -> Done:
        error = None
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                recipe(to_job(composed("benchmark", *overrides, *more)))
            except UserError as refused:
                error = refused
        return Done(*capsys.readouterr(), error)

    return go


@pytest.fixture
def lines(tmp_path):
    """The cells on disk."""
    return lambda: [json.loads(line) for line in (tmp_path / "results" / "cells.jsonl").read_text().splitlines()]


def settings(lines) -> Counter:
    """Number of successful measurements of each (setting, concurrency)."""
    names = ("num_steps", "topk", "num_draft_tokens")
    drafts = [(line["cell"]["draft"] or {}).get("speculative") for line in lines if line["figures"]]
    at_once = [line["cell"]["concurrency"] for line in lines if line["figures"]]
    called = ["-".join(str(draft[name]) for name in names) if draft else "baseline" for draft in drafts]
    return Counter(zip(called, at_once, strict=True))


def expected_prompts(target_dir) -> list[list[int]]:
    """Prompts that the server should receive: the chat template with the previous answers."""
    tokenizer, prompts = AutoTokenizer.from_pretrained(target_dir), []
    for row in PROMPTS:
        messages = []
        for turn in row.get("turns") or [row["prompt"]]:
            messages.append({"role": "user", "content": turn})
            prompts.append(prompt_ids(tokenizer, messages, "test"))
            answer = " ".join(f"a{i}" for i in range(answer_tokens(len(prompts[-1]))))
            messages.append({"role": "assistant", "content": answer})
    return prompts


def test_a_draft_and_its_baseline_are_measured_once(run, lines, tmp_path, target_dir):
    done = run()
    measured = lines()
    assert settings(measured) == {(name, n): 1 for name in ("baseline", "5-1-6") for n in (1, 2)}
    prompts = expected_prompts(target_dir)
    tokens = sum(answer_tokens(len(prompt)) for prompt in prompts)
    verifications = sum([*arrivals(len(prompt), True)][-1][1] for prompt in prompts)
    for line in measured:
        figures = line["figures"]
        assert figures["answers"] == len(prompts) == 4, "all turns"
        assert figures["completion_tokens"] == tokens and figures["refused"] == 0
        drafted = line["cell"]["draft"] is not None
        assert figures["tau"] == (tokens / verifications if drafted else None)
        assert figures["histogram"] == ([0, 0, verifications] if drafted else [])
        assert figures["acceptance_per_position"] == ([1.0] * ACCEPTED if drafted else [])
        assert "--port" not in str(line["cell"]) and "speculative" not in str(line["cell"]["server"])
    results = tmp_path / "results"
    assert (results / "table.md").read_text() in done.out and "5-1-6" in (results / "heatmap.svg").read_text()

    again = run(FAKE_SGLANG="die")
    assert lines() == measured and again.out == done.out, "nothing is left to measure, no server is started"
    run("concurrency=[1,2,3]")
    assert settings(lines()) == settings(measured) + Counter({("baseline", 3): 1, ("5-1-6", 3): 1})


def test_a_sweep_and_its_best_setting_written_back(run, lines, run_dir):
    # A chunk takes a while, so that drafting pays.
    done = run("sweep=[[3,1],[2,4,8]]", "concurrency=[2]", "write_back=2", FAKE_SECONDS="0.02")
    assert settings(lines()) == {(name, 2): 1 for name in ("baseline", "3-1-4", "2-4-8")}
    speeds = {line["figures"]["output_tokens_per_second"]: line["cell"]["draft"] for line in lines()}
    best = speeds[max(speeds)]
    assert best is not None, "drafting pays here"
    after = read_servable(run_dir).provenance.speculative
    assert vars(after) == best["speculative"] and "is now served with" in done.out
    rows = [line.split("|")[1].strip() for line in done.out.splitlines() if line.startswith("|")][2:]
    assert rows[0] == f"{after.num_steps}-{after.topk}-{after.num_draft_tokens}" and rows[-1] == "baseline"


def test_a_changed_target_at_the_same_path_is_measured_again(run, lines, target_dir, tmp_path):
    target = f"target={shutil.copytree(target_dir, tmp_path / 'target')}"
    run(target, "concurrency=[1]")
    run(target, "concurrency=[1]")
    assert set(settings(lines()).values()) == {1}
    weights = tmp_path / "target" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    refused = str(run(target, "concurrency=[1]").error)
    assert "are not those that" in refused and "server.target_variant=true" in refused and "\n" not in refused
    assert set(settings(lines()).values()) == {1}, "it is not measured unless it is declared a variant"
    run(target, "concurrency=[1]", "server.target_variant=true")
    assert set(settings(lines()).values()) == {2}


def test_a_dead_server_fails_only_its_point(run, lines, tmp_path):
    # The warm-up's two turns and the first cell's four are answered, the first one of the next cell is not.
    done = run("sweep=[[3,1],[4,1]]", FAKE_SGLANG="die_at:7", FAKE_ONCE=str(tmp_path / "died"))
    assert [bool(line["figures"]) for line in lines()] == [True, False, True, True, True, True]
    # Whichever is seen first: no connection, or one that ends.
    assert any(message in lines()[1]["error"] for message in ("cannot be reached", "the answer broke off"))
    assert str(done.error).startswith("1 point(s) failed, the first, baseline, jsonl, 2 at once, temperature 0: ")
    assert run("sweep=[[3,1],[4,1]]").error is None
    assert set(settings(lines()).values()) == {1} and len(settings(lines())) == 6, "only the failed cell was left"


def test_a_server_that_never_becomes_healthy(run, lines):
    done = run(FAKE_SGLANG="die")
    assert "CUDA error: out of memory" in done.err
    assert "4 point(s) failed" in str(done.error) and "SGLang ended with code 7" in str(done.error)
    assert all(line["figures"] is None for line in lines())


def test_running_servers(run, serve, target_dir, lines, tmp_path):
    flags = ["--model-path", str(target_dir), "--speculative-algorithm", "EAGLE3", "--speculative-num-steps", "4"]
    flags += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "5"]
    url = serve(*flags, FAKE_SGLANG="token:right")
    there = ["checkpoint=null", f"url={url}", "concurrency=[2]", "temperature=[0,0.7]"]
    for wrong in ({}, {"SGLANG_API_KEY": "wrong"}):
        assert isinstance(run(*there, **wrong).error, Unauthorized)
    assert run(*there, SGLANG_API_KEY="right").error is None
    assert settings(lines()) == {("4-1-5", 2): 2} and "right" not in (tmp_path / "results" / "cells.jsonl").read_text()
    assert "the settings of a running server are its own" in str(run(*there, "num_steps=3").error)
    speculates = run(*there, f"baseline_url={url}", SGLANG_API_KEY="right")
    assert f"baseline_url: {url} speculates" in str(speculates.error)


def test_a_baseline_of_another_model_is_refused(run, serve, target_dir, tmp_path):
    draft = ["--model-path", str(target_dir), "--speculative-algorithm", "EAGLE3"]
    other = shutil.copytree(target_dir, tmp_path / "other")
    for base, name in ((["--model-path", str(other)], "model_path"), ([*draft[:2], "--dtype", "float16"], "dtype")):
        there = ["checkpoint=null", f"url={serve(*draft)}", f"baseline_url={serve(*base)}"]
        assert f"baseline_url: {name} of " in str(run(*there).error)


def test_a_changed_draft_of_a_running_server_is_measured_again(run, serve, run_dir, target_dir, lines):
    draft = run_dir / "checkpoints" / "step_3" / "model"
    url = serve("--model-path", str(target_dir), "--speculative-algorithm", "EAGLE3",
                "--speculative-draft-model-path", str(draft))  # fmt: skip
    there = ["checkpoint=null", f"url={url}", "concurrency=[1]"]
    run(*there)
    run(*there)
    assert len(lines()) == 1
    weights = draft / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    run(*there)
    assert len(lines()) == 2


def test_a_server_without_server_info_fails_its_points(run, lines):
    done = run("sweep=[[3,1],[4,1]]", FAKE_SGLANG="info")
    assert len(lines()) == 6 and all("/server_info: HTTP 500" in line["error"] for line in lines())
    assert str(done.error).startswith("6 point(s) failed")


def test_a_draft_without_verifications_fails(run, lines):
    done = run("concurrency=[1]", FAKE_SGLANG="plain")
    assert settings(lines()) == {("baseline", 1): 1}
    assert "1 point(s) failed" in str(done.error) and "not one verification" in lines()[-1]["error"]


def test_write_back_needs_every_point(run, run_dir, tmp_path):
    config = run_dir / "checkpoints" / "step_3" / "model" / "config.json"
    before = config.read_bytes()
    # The baseline's server dies at its last turn; both settings of the draft are measured.
    done = run("sweep=[[3,1],[4,1]]", "concurrency=[1]", "warmup=0", "write_back=1", FAKE_SGLANG="die_at:4",
               FAKE_ONCE=str(tmp_path / "died"))  # fmt: skip
    assert "1 point(s) failed" in str(done.error) and config.read_bytes() == before


def test_prompts_that_the_scheduler_aborts_are_counted_as_refused(run, lines, suite_file):
    with suite_file.open("a") as file:
        file.write(json.dumps({"prompt": "box " * 50}) + "\n")
    assert run("concurrency=[1]", FAKE_SGLANG="pool:45").error is None
    assert [(line["figures"]["answers"], line["figures"]["refused"]) for line in lines()] == [(4, 1)] * 2


def test_a_busy_port(run, free_port):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", free_port))
        busy.listen()
        assert f"server.port={free_port}: " in str(run().error)


def test_a_running_baseline(run, serve, target_dir, lines):
    url = serve("--model-path", str(target_dir))
    assert run("checkpoint=null", f"url={url}", "concurrency=[2]").error is None
    assert settings(lines()) == {("baseline", 2): 1}


def test_prompts_that_are_too_long_are_counted_as_refused(run, lines, suite_file):
    with suite_file.open("a") as file:
        file.write(json.dumps({"turns": ["box " * 500, "again"]}) + "\n")
    done = run("concurrency=[1]", "baseline=false")
    (line,) = lines()
    assert (line["figures"]["answers"], line["figures"]["refused"]) == (4, 2) and "2 turn(s) refused" in done.err
    suite_file.write_text(json.dumps({"prompt": "box " * 500}) + "\n")
    refused = str(run("concurrency=[1]", "baseline=false", "warmup=0").error)
    assert "every prompt of jsonl was refused" in refused and "longer than the context" in refused


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["checkpoint=null"], "checkpoint and url: expected one of them"),
        (["checkpoint=null", "url=http://127.0.0.1:9"], "http://127.0.0.1:9: cannot be reached"),
        (["server.python=/no/such/python"], "server.python: /no/such/python has no SGLang"),
        (["checkpoint=/no/such/run"], "/no/such/run does not exist"),
        (["suite.path=/no/such/file"], "suite.path: /no/such/file does not exist"),
        (["target=/no/such/target"], "target: /no/such/target does not exist"),
        (["server.flags=[--api-key,secret]"], "server.flags: --api-key would be written into the results"),
        (["server.flags=[--speculative-num-steps,3]"], "--speculative-num-steps after --"),
        (["sweep=[[3,1,9]]"], "sweep=[3, 1, 9]: --num-draft-tokens is 9"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(run, more, message, tmp_path):
    done = run(*more)
    assert message in str(done.error) and "\n" not in str(done.error)
    assert not (tmp_path / "results" / "cells.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sweep": [[5]]}, r"sweep holds \[5\]: expected \[steps, topk\]"),
        ({"sweep": [[0, 1]]}, r"sweep holds \[0, 1\]"),
        ({"concurrency": [0]}, r"concurrency is \[0\]"),
        ({"concurrency": []}, "concurrency is empty"),
        ({"temperature": [-1.0]}, r"temperature is \[-1\.0\]"),
        ({"write_back": 7, "concurrency": [1]}, r"write_back is 7: expected one of concurrency=\[1\]"),
        ({"num_steps": 0}, r"num_steps is 0"),
        ({"server": ServerConfig(device="cpu")}, r"temperature is \[0\.0, 1\.0\] with server\.device=cpu"),
    ],
)
def test_a_contradiction_is_refused(more, message):
    with pytest.raises(UserError, match=message):
        BenchmarkJob(**more)


def started(overrides, *more, **environment) -> subprocess.Popen:
    """The recipe as a program."""
    return subprocess.Popen(
        [sys.executable, str(RECIPE), *more, *overrides], env={**os.environ, **environment}, cwd=ROOT, text=True,
        stderr=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def appears(file: Path) -> None:
    """Waits until something is in it."""
    deadline = time.monotonic() + 180
    while not (file.exists() and file.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)


def test_results_survive_ctrl_c(overrides, run, lines, tmp_path):
    with started(overrides, FAKE_SECONDS="0.1") as going:
        appears(tmp_path / "results" / "cells.jsonl")
        going.send_signal(signal.SIGINT)
        out, err = going.communicate(timeout=30)
    assert going.returncode == 130 and "baseline" in out
    assert err.splitlines()[-1].startswith("error: interrupted") and "Traceback" not in err
    assert 1 <= len(settings(lines())) < 4
    # Its server is gone, or this one could not listen there.
    assert run().error is None
    assert settings(lines()) == {(name, n): 1 for name in ("baseline", "5-1-6") for n in (1, 2)}


def test_results_survive_sigterm(run, lines, tmp_path):
    def kill() -> None:
        appears(tmp_path / "results" / "cells.jsonl")
        os.kill(os.getpid(), signal.SIGTERM)

    killer = Thread(target=kill)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # should it come too late
    try:
        killer.start()
        with pytest.raises(KeyboardInterrupt):
            run(FAKE_SECONDS="0.1")
        killer.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert 1 <= len(settings(lines())) < 4 and "baseline" in (tmp_path / "results" / "table.md").read_text()
    assert run().error is None and len(settings(lines())) == 4


def test_the_jobs_of_a_multirun_share_one_table(run, lines, monkeypatch):
    running = SimpleNamespace(mode=RunMode.MULTIRUN, job=SimpleNamespace(num=1))
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: running))
    done = [run(f"num_steps={steps}", "concurrency=[1]") for steps in (1, 2)]
    assert settings(lines()) == {(name, 1): 1 for name in ("baseline", "1-1-2", "2-1-3")}
    assert all(name in done[-1].out for name in ("baseline", "1-1-2", "2-1-3"))
