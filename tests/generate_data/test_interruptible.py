import asyncio
import os
import signal
import threading
import time

import pytest

from nemo_speculative.generate_data.run import interruptible

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def soon(number):
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_blocking_step_is_interrupted(number):
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(KeyboardInterrupt), interruptible():
        soon(number)
        time.sleep(20)
        pytest.fail("it went on")
    assert [signal.getsignal(n) for n in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_coroutine_is_canceled_and_another_can_run(number):
    ended = []

    async def wait():
        try:
            soon(number)
            await asyncio.sleep(20)
        finally:
            ended.append("cancelled")

    async def close():
        ended.append("closed")

    with pytest.raises(KeyboardInterrupt), interruptible() as run:
        try:
            run(wait())
        finally:
            run(close())
    assert ended == ["cancelled", "closed"]


def test_an_ignored_interrupt_stays_ignored_and_sigterm_works():
    async def nothing():
        return "done"

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), interruptible() as run:
            signal.raise_signal(signal.SIGINT)
            assert run(nothing()) == "done"
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
