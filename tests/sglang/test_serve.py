"""serve_sglang with the real SGLang: server, engine and dry run, for each algorithm of the family."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nemo_speculative.checkpoint.draft_checkpoint import read_servable
from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.decoding.drafters import EagleDrafter
from nemo_speculative.decoding.engine import Generation, generate
from nemo_speculative.decoding.tree_builder import tree_builder_for
from nemo_speculative.serving.command import from_checkpoint
from nemo_speculative.serving.server import require_free
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils import network
from tests.sglang.conftest import ROOT, START_SECONDS
from tests.sglang.random_run import make_runs

TEMPLATE = (
    "{% for message in messages %}t7 {{ message.content }} {% endfor %}{% if add_generation_prompt %}t9{% endif %}"
)
PROMPTS = ["t11 t12 t13 t14", "t200 t3", "t42 t42 t43 t17 t18 t19"]
MAX_NEW_TOKENS = 24
ALGORITHMS = ["eagle1", "eagle2", "eagle3", "eagle3_1"]
PROGRAM = [sys.executable, "-m", "nemo_speculative.serve_sglang", "--device", "cpu"]
ANSWER = re.compile(r"\n> (.*)\n(.*)\n\[(\d+) tokens in (\d+) verifications, acceptance length (\d+\.\d\d)\]")


@dataclass(frozen=True)
class Served:
    """A run and its serving options."""

    run: Path
    speculative: SpeculativeSettings

    @property
    def command(self) -> list[str]:
        steps, topk, tokens = self.speculative.num_steps, self.speculative.topk, self.speculative.num_draft_tokens
        given = ["--num-steps", str(steps), "--topk", str(topk), "--num-draft-tokens", str(tokens)]
        return [*PROGRAM, "--draft", str(self.run), *given]

    @property
    def target(self) -> Path:
        return Path(from_checkpoint(self.run).target)

    def decoded(self, prompts: list[list[int]], limit: int) -> list[Generation]:
        """The decoder's answers."""
        servable = read_servable(self.run)
        target = HFTarget(self.target, aux_layers=servable.aux_layers)
        drafter = EagleDrafter(servable.build(), target, tree_builder_for(self.speculative))
        stop_ids = tuple(sorted(target.stop_ids))
        return generate(target, drafter, prompts, max_new_tokens=limit, stop_ids=stop_ids)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Drafts of one target, which has a chat template here."""
    runs = make_runs(tmp_path_factory.mktemp("runs"), 8, MAX_NEW_TOKENS)
    target = from_checkpoint(runs["eagle3"]).target
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(target)
    return runs


def all_or(*some: str) -> list[str]:
    """Each takes a start of SGLang, and test_checkpoints.py starts servers of all: without NEMO_ALL a few suffice."""
    return ALGORITHMS if os.environ.get("NEMO_ALL") else list(some)


@pytest.fixture(scope="module", params=ALGORITHMS)
def served(request, runs) -> Served:
    """EAGLE-2 is EAGLE-1's draft with trees."""
    if request.param == "eagle2":
        return Served(runs["eagle1"], SpeculativeSettings(num_steps=3, topk=4, num_draft_tokens=8))
    return Served(runs[request.param], SpeculativeSettings(num_steps=5, topk=1, num_draft_tokens=6))


@pytest.fixture
def free_port() -> int:
    return network.free_port()


@pytest.fixture
def server(served, free_port, tmp_path) -> Iterator[tuple[subprocess.Popen, str, Path]]:
    """The running program, its line that reports it, and SGLang's log."""
    log = tmp_path / "sglang.log"
    command = [*served.command, "--port", str(free_port), "--timeout", str(START_SECONDS), "--log", str(log)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline().split()[-1] == str(log)
            yield process, process.stdout.readline(), log
        finally:
            process.terminate()


@pytest.mark.parametrize("served", all_or("eagle3"), indirect=True)
def test_it_serves_tests_and_stops(server, served, free_port):
    process, line, log = server
    tried = re.fullmatch(r"serving (.*) on (\S+) \(tried with 8 tokens in (\d+) verifications\); .*\n", line)
    assert tried, log.read_text()[-3000:]
    assert tried[2] == f"http://127.0.0.1:{free_port}"
    assert int(tried[3]) == _verifications(tried[2])
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    require_free("127.0.0.1", free_port)


def _verifications(url: str) -> int:
    """The counts of the same request, sent again."""
    body = {"input_ids": [1, 2, 3, 4], "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}}
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
        return json.load(reply)["meta_info"]["spec_verify_ct"]


@pytest.mark.parametrize("served", all_or("eagle2"), indirect=True)
def test_the_engine_answers_as_the_decoder(served):
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    command = [*served.command, *prompts, "--max-new-tokens", str(MAX_NEW_TOKENS), "--timeout", str(START_SECONDS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=START_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = ANSWER.findall(done.stdout)
    assert [prompt for prompt, *_ in answers] == PROMPTS
    tokenizer = AutoTokenizer.from_pretrained(served.target)
    rendered = [tokenizer(f"t7 {prompt} t9")["input_ids"] for prompt in PROMPTS]
    for (_, text, tokens, verifications, length), ours in zip(
        answers, served.decoded(rendered, MAX_NEW_TOKENS), strict=True
    ):
        ids = [i for i in ours.tokens if i != tokenizer.eos_token_id]
        assert text.split() == tokenizer.decode(ids).split()
        assert (int(tokens), int(verifications)) == (len(ours.tokens), len(ours.emitted))
        assert float(length) == pytest.approx(len(ours.tokens) / len(ours.emitted), abs=0.005)


@pytest.mark.parametrize("served", all_or("eagle1", "eagle3_1"), indirect=True)
def test_the_command_is_understood(served):
    done = subprocess.run([*served.command, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    understood = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  "))
    assert understood["speculative_algorithm"] == read_servable(served.run).algorithm
    assert understood["speculative_num_steps"] == str(served.speculative.num_steps)
    assert understood["speculative_eagle_topk"] == str(served.speculative.topk)
    assert understood["speculative_num_draft_tokens"] == str(served.speculative.num_draft_tokens)
    assert understood["model_path"] == str(served.target)


def test_a_command_for_gpus_is_understood_without_one(runs):
    command = [word for word in PROGRAM if word not in ("--device", "cpu")]
    given = ["--draft", str(runs["eagle1"]), "--cuda-graph-max-bs", "8", "--rejection-sampling", "--tp-size", "2"]
    done = subprocess.run([*command, *given, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"tp_size +2\n", done.stdout)


def test_an_unknown_flag_is_refused_in_one_line(runs):
    command = [*PROGRAM, "--draft", str(runs["eagle3"]), "--dry-run", "--", "--cuda-graph-max", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: SGLang refuses the command: sglang serve: error: ambiguous")
