"""The recipes as a user runs them, and as machines end them."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from nemo_speculative.generate_data.run import generate_data
from tests.generate_data.conftest import read, start_recipe
from tests.programs import ROOT

ENDS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 130}
"""What ends a run, and the exit status that it has then."""


@pytest.fixture
def arguments(target_dir, questions):
    return [
        "model=local", f"model.path={target_dir}", f"path={questions}", "max_new_tokens=12", "temperature=1.0",
        "engine=endpoint", "engine.concurrency=1",
    ]  # fmt: skip


def wait_for_lines(file, number):
    for _ in range(1200):
        if file.exists() and file.read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.05)
    raise AssertionError(f"{file} has not {number} lines")


def test_an_interrupted_or_killed_run_resumes(arguments, serve, endpoint_job, tmp_path):
    url = serve("sglang", FAKE="slow:0.2")
    outputs = {number: tmp_path / number.name for number in ENDS}
    programs = {
        number: start_recipe("generate_data.py", *arguments, f"engine.urls=[{url}]", f"output={output}")
        for number, output in outputs.items()
    }
    partial = {}
    for number, program in programs.items():
        answers = outputs[number] / "0-end" / "answers.jsonl"
        wait_for_lines(answers, 3)
        program.send_signal(number)
        assert program.wait(60) == ENDS[number]
        printed = "".join(program.stderr)
        if number != signal.SIGKILL:
            assert printed.splitlines()[-1].startswith("error: interrupted") and "Traceback" not in printed
        partial[number] = answers.read_bytes()
        assert 3 <= partial[number].count(b"\n") < 12
    url = serve("sglang")
    whole = generate_data(endpoint_job(url, temperature=1.0)).directory / "answers.jsonl"
    for number, output in outputs.items():
        resumed = generate_data(endpoint_job(url, temperature=1.0, output=str(output)))
        assert resumed.answered == 12
        assert (resumed.directory / "answers.jsonl").read_bytes() == whole.read_bytes()
        assert set(partial[number].splitlines()[:3]) <= set(whole.read_bytes().splitlines())


def test_sigterm_ends_a_background_job_of_a_script(arguments, serve, tmp_path):
    """There a shell has it ignore Ctrl-C."""
    url, output = serve("sglang", FAKE="slow:0.2"), tmp_path / "out"
    command = ["recipes/generate_data.py", *arguments, f"engine.urls=[{url}]", f"output={output}"]
    script = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, *command]
    with subprocess.Popen(
        script, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    ) as program:
        wait_for_lines(output / "0-end" / "answers.jsonl", 1)
        program.send_signal(signal.SIGINT)
        wait_for_lines(output / "0-end" / "answers.jsonl", 3)
        program.send_signal(signal.SIGTERM)
        printed = program.communicate(timeout=60)[1].decode()
    assert program.returncode == 130 and printed.splitlines()[-1].startswith("error: interrupted")
    assert "Traceback" not in printed


def test_the_recipes_answer_ranges_in_parallel_and_merge_them(arguments, serve, tmp_path):
    url, output = serve("sglang"), tmp_path / "out"
    command = [*arguments, f"engine.urls=[{url}]", f"output={output}", "reasoning=split"]
    programs = [start_recipe("generate_data.py", *command, f"range={lines}") for lines in ("0:5", "5:12")]
    for program, lines in zip(programs, (5, 7), strict=True):
        assert program.wait(60) == 0, "".join(program.stderr)
        printed = "".join(program.stdout)
        assert re.search(f"^input +{lines} ", printed, re.M) and re.search(f"^answered +{lines} ", printed, re.M)
    program = start_recipe("merge_data.py", f"parts=[{output}]", f"output={tmp_path / 'all.jsonl'}")
    assert program.wait(60) == 0, "".join(program.stderr)
    assert "".join(program.stdout).strip() == f"{tmp_path / 'all.jsonl'}: 12 conversations answered, 0 skipped"
    assert [record["index"] for record in read(tmp_path / "all.jsonl")] == list(range(12))
