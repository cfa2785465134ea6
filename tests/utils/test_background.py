"""Background work and its effect on the main thread."""

import threading
import time

import pytest

from nemo_speculative.utils.background import background_task
from nemo_speculative.utils.errors import UserError

LONG = 60


def test_an_error_of_the_work_interrupts_the_main_thread():
    def work(check_cancelled):
        time.sleep(0.1)
        raise UserError("line 3 is bad")

    with pytest.raises(UserError, match="line 3 is bad"), background_task(work):
        time.sleep(LONG)
        pytest.fail("not interrupted")


def fail(check_cancelled):
    raise UserError("line 1 is bad")


def test_work_that_fails_at_once_never_looks_like_an_interrupt():
    """Wherever the main thread is: starting it, waiting, or leaving the block."""
    for n in range(300):
        try:
            with background_task(fail):
                if n % 2:
                    time.sleep(LONG)
        except UserError as error:
            assert "line 1 is bad" in str(error)
        else:
            assert n % 2 == 0


def test_wait_raises_the_error_of_the_work():
    ready = threading.Event()

    def work(check_cancelled):
        ready.wait(LONG)
        raise OSError("no room")

    with background_task(work) as task:
        ready.set()
        with pytest.raises(OSError, match="no room"):
            task.wait()


def test_an_error_of_the_main_thread_cancels_the_work():
    calls = []

    def work(check_cancelled):
        while True:
            calls.append(check_cancelled())
            time.sleep(0.01)

    for error in (UserError("no such target"), KeyboardInterrupt()):
        with pytest.raises(type(error)), background_task(work):
            time.sleep(0.05)
            raise error
        count = len(calls)
        time.sleep(0.05)
        assert len(calls) == count > 0


def test_finished_work_does_not_interrupt_the_main_thread():
    done = []
    with background_task(lambda check_cancelled: done.append(check_cancelled())) as task:
        task.wait()
        time.sleep(0.05)
    assert done == [None]
