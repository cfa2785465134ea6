"""recipes/prepare_data.py as a program."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.programs import ROOT, Program, run_program
from tests.target_servers import until

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
ROWS = [{"conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "a"}]} for n in range(30)]


def prepared(*overrides: str):
    return run_program("recipes/prepare_data.py", *overrides, environment=ENVIRONMENT, timeout=120)


@pytest.fixture
def path(tmp_path) -> str:
    (tmp_path / "rows.json").write_text(json.dumps([*ROWS, ROWS[0]]))
    return str(tmp_path / "rows.json")


def test_a_dataset_from_a_copy_and_again(tmp_path, path):
    command = ("data=sharegpt", f"data.path={path}", f"output={tmp_path}/out")
    first, again = prepared(*command), prepared(*command)
    assert first.returncode == again.returncode == 0, first.stderr
    (row,) = (line for line in first.stdout.splitlines() if line.startswith("| sharegpt "))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert (cells[1], cells[4], cells[5]) == ("31", "1", "1 duplicate") and int(cells[2]) + int(cells[3]) == 30
    assert first.stdout.endswith(f"{tmp_path}/out: written\n") and again.stdout.endswith("/out: up to date\n")
    assert first.stdout.splitlines()[:-1] == again.stdout.splitlines()[:-1]


def test_a_mix_on_the_command_line(tmp_path, path):
    done = prepared("data=mix", f"data.sources=[{{name: alpaca, path: {path}, weight: 2}}]", f"output={tmp_path}/out")
    assert done.returncode == 0 and "| alpaca | 31 " in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data=sharegpt"], "data.repository: Aeala/ShareGPT_Vicuna_unfiltered cannot be loaded here"),
        (["data=mix"], "data.repository: HuggingFaceH4/ultrachat_200k cannot be loaded here"),
        (["data=jsonl", "data.path=/nowhere"], "data.path: /nowhere does not exist"),
        (["data=sharegpt", "data.weight=2"], "data.weight=2: unknown key 'weight'"),
        (["data=mix", "data.sources=[{nam: a}]"], "data.sources=[{nam: a}]: unknown key 'nam'; did you mean 'name'?"),
        (["data=tiny"], "data: nothing to prepare here"),
    ],
)
def test_data_that_cannot_be_loaded_is_one_line_and_leaves_no_files(tmp_path, overrides, expected):
    done = prepared(*overrides, f"output={tmp_path}/out")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {expected}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_ends_in_one_line_and_is_resumed(tmp_path, number):
    """It is stopped in the middle: after row 2100 the program sleeps."""
    rows = [{"question": f"q{n}", "answer": "a"} for n in range(3000)]
    path, slow = tmp_path / "rows.jsonl", tmp_path / "slow.py"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    slow.write_text(
        "import runpy, sys, time\n"
        "from nemo_speculative.prepare_data import run\n"
        "put = run._Preparation._process_row\n"
        "def slow(self, output, stream, found):\n"
        "    put(self, output, stream, found)\n"
        "    if sum(c.read for c in output.counts.values()) > 2100: time.sleep(60)\n"
        "run._Preparation._process_row = slow\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = ("recipes/prepare_data.py", "data=jsonl", f"data.path={path}", f"output={tmp_path}/out")
    with Program(str(slow), *command, environment=ENVIRONMENT) as program:
        state = tmp_path / "out" / "state.json"
        until(lambda: state.exists() and '"read": 2000' in state.read_text())
        program.send_signal(number)
        assert program.wait(60) == 130
        errors = list(program.stderr)
    assert errors == ["error: interrupted; start again with the same command (a training with resume=auto)\n"]
    done = run_program(*command, environment=ENVIRONMENT, timeout=120)
    assert f"{tmp_path}/out: resuming after row 2000" in done.stdout and "| rows   | 3000 " in done.stdout, done.stdout


def test_the_processes_of_a_job_prepare_once(tmp_path, path):
    """Each rank of a training requests the rows; one prepares them, the others read them."""
    program = tmp_path / "rank.py"
    program.write_text(
        "from nemo_speculative.config.schema import DatasetConfig\n"
        "from nemo_speculative.prepare_data.load import load_prepared\n"
        f"config = DatasetConfig(path={path!r}, repository='x', prepared={str(tmp_path / 'prepared')!r})\n"
        "split = load_prepared(config, seed=0)\n"
        "print(len(split.training) + len(split.held_out), split.training[0].id)\n"
    )
    with ThreadPoolExecutor() as pool:
        ranks = [pool.submit(run_program, str(program), environment=ENVIRONMENT, timeout=120) for _ in range(3)]
    outs = [rank.result() for rank in ranks]
    assert [out.returncode for out in outs] == [0, 0, 0], outs[0].stderr
    assert len({out.stdout.splitlines()[-1] for out in outs}) == 1 and outs[0].stdout.splitlines()[-1].startswith("30 ")
    assert sum(": prepared\n" in out.stdout for out in outs) == 1
