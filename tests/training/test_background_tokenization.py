"""Tokenization in the background while a training loads its target."""

import pytest

from tests.integration.conftest import data_file, run, settings  # noqa: F401
from tests.integration.test_bad_input import GOOD, SILENT, conversations

PROGRAM = """
import os, pathlib, runpy, sys, time
from nemo_speculative.data import tokenized_dataset
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.training import build
cache, load, make = pathlib.Path(sys.argv.pop(1)), HFTarget.__init__, tokenized_dataset._create
def wait_and_load(self, *args, **settings):
    until = time.monotonic() + 60
    while len(list(cache.glob("tokens/*/meta.json"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    print("cache was complete" if time.monotonic() < until else "cache was incomplete", flush=True)
    tokenized_dataset._create = None  # later calls must find the cache
    load(self, *args, **settings)
HFTarget.__init__ = wait_and_load
build.print_data_report = lambda *_: sys.exit(0)
runpy.run_path("recipes/train_eagle3.py", run_name="__main__")
"""
"""A training that loads its target only once both sides of the data are tokenized, and ends when it has its rows."""


@pytest.fixture
def training(settings, tmp_path):  # noqa: F811
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    cache = tmp_path / "cache"
    overrides = [*settings, f"data.cache_dir={cache}", f"output_dir={tmp_path / 'run'}", "trainer.max_steps=1"]
    return lambda *more: run(str(program), str(cache), *overrides, *more, ranks=2)


def test_rank_0_tokenizes_while_the_target_is_loaded(training):
    done = training()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cache was complete") == 2


def test_a_data_error_interrupts_the_loading_with_its_one_line(training, tmp_path):
    done = training(f"data.path={conversations(tmp_path, GOOD, GOOD, SILENT)}", "data.held_out_share=0")
    assert done.returncode == 1 and "cache was" not in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "bad.jsonl:3: the conversation has no assistant turn" in errors[0] and "Traceback" not in done.stderr
