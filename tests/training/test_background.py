"""Work beside the main thread, and the tokenizing that a training does while its target is loaded."""

import threading
import time

import pytest

from nemo_speculative.training.background import beside
from nemo_speculative.utils.errors import UserError
from tests.integration.conftest import data_file, run, settings  # noqa: F401
from tests.integration.test_bad_input import GOOD, SILENT, conversations

LONG = 60


def test_what_the_work_raises_ends_what_the_main_thread_waits_for():
    def work(go_on):
        time.sleep(0.1)
        raise UserError("line 3 is bad")

    with pytest.raises(UserError, match="line 3 is bad"), beside(work):
        time.sleep(LONG)
        pytest.fail("it went on")


def fails(go_on):
    raise UserError("line 1 is bad")


def test_work_that_fails_at_once_never_looks_like_an_interrupt():
    """Wherever the main thread is by then: starting it, waiting, or already leaving."""
    for turn in range(300):
        try:
            with beside(fails):
                if turn % 2:
                    time.sleep(LONG)
        except UserError as error:
            assert "line 1 is bad" in str(error)
        else:
            assert turn % 2 == 0


def test_what_the_work_raises_while_it_is_waited_for_is_raised_there():
    ready = threading.Event()

    def work(go_on):
        ready.wait(LONG)
        raise OSError("no room")

    with beside(work) as background:
        ready.set()
        with pytest.raises(OSError, match="no room"):
            background.wait()


def test_an_error_of_the_main_thread_ends_the_work():
    calls = []

    def work(go_on):
        while True:
            calls.append(go_on())
            time.sleep(0.01)

    for error in (UserError("no such target"), KeyboardInterrupt()):
        with pytest.raises(type(error)), beside(work):
            time.sleep(0.05)
            raise error
        so_far = len(calls)
        time.sleep(0.05)
        assert len(calls) == so_far > 0


def test_work_that_is_done_leaves_the_main_thread_alone():
    done = []
    with beside(lambda go_on: done.append(go_on())) as background:
        background.wait()
        time.sleep(0.05)
    assert done == [None]


PROGRAM = """
import os, pathlib, runpy, sys, time
from nemo_speculative.data import tokenized_dataset
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.training import build
cache, load, make = pathlib.Path(sys.argv.pop(1)), HFTarget.__init__, tokenized_dataset._create
def loads(self, *given, **settings):
    until = time.monotonic() + 60
    while len(list(cache.glob("tokens/*/meta.json"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    print("rows were there" if time.monotonic() < until else "rows were not there", flush=True)
    tokenized_dataset._create = None  # what is asked for later is what was made
    load(self, *given, **settings)
HFTarget.__init__ = loads
build.announce = lambda *_: sys.exit(0)
runpy.run_path("recipes/train_eagle3.py", run_name="__main__")
"""
"""A training whose target is not loaded before both sides of the data are tokenized, until it has its rows."""


@pytest.fixture
def training(settings, tmp_path):  # noqa: F811
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    cache = tmp_path / "cache"
    given = [*settings, f"data.cache_dir={cache}", f"output_dir={tmp_path / 'run'}", "trainer.max_steps=1"]
    return lambda *more: run(str(program), str(cache), *given, *more, ranks=2)


def test_the_first_rank_tokenises_while_the_target_is_loaded(training):
    done = training()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows were there") == 2


def test_a_data_error_ends_the_loading_with_its_one_line(training, tmp_path):
    done = training(f"data.path={conversations(tmp_path, GOOD, GOOD, SILENT)}", "data.held_out_share=0")
    assert done.returncode == 1 and "rows were" not in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "bad.jsonl:3: the conversation has no assistant turn" in errors[0] and "Traceback" not in done.stderr
