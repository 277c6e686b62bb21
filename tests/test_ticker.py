"""One thread a process for what is due now and then."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from collections.abc import Callable
from time import monotonic, sleep

import pytest

from seawall import ticker
from seawall.ticker import Ticker


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, "it has not happened"
        sleep(0.005)


class Owner:
    def __init__(self, done: list[int]) -> None:
        self.done = done

    def work(self) -> None:
        self.done.append(threading.get_ident())


def test_a_chore_is_done_again_and_again_in_a_thread_until_it_is_cancelled() -> None:
    done: list[int] = []
    owner = Owner(done)
    chore = ticker.every(0.005, owner.work)
    assert repr(chore) == "<Chore every 0.005 s>"
    until(lambda: len(done) > 3)
    assert threading.get_ident() not in done
    chore.cancel()
    chore.cancel()
    until(lambda: chore not in ticker._ticker._chores)
    count = len(done)
    sleep(0.05)
    assert len(done) == count


def test_a_chore_keeps_its_owner_from_nothing() -> None:
    done: list[int] = []
    owner = Owner(done)
    chore = ticker.every(0.005, owner.work)
    until(lambda: bool(done))
    del owner
    gc.collect()
    until(lambda: chore not in ticker._ticker._chores)


def test_what_is_due_later_can_be_done_at_once() -> None:
    done: list[int] = []
    owner = Owner(done)
    chore = ticker.every(float("inf"), owner.work)
    chore.soon()
    until(lambda: len(done) == 1)
    chore.cancel()


class Failing(logging.Handler):
    def handle(self, record: logging.LogRecord) -> bool:
        raise OSError("no space left on device")


def test_a_chore_that_fails_is_logged_and_tried_again_also_where_that_fails_as_well(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried: list[int] = []

    def fail() -> None:
        tried.append(1)
        raise ValueError("on purpose")

    logger, broken = logging.getLogger("seawall"), Failing()
    chore = ticker.every(0.005, fail)
    try:
        until(lambda: len(tried) > 1)
        assert "fail has failed; it is tried again in 0.005 s" in caplog.text
        logger.addHandler(broken)
        seen = len(tried)
        until(lambda: len(tried) > seen + 2)
    finally:
        logger.removeHandler(broken)
        chore.cancel()


def test_a_thread_is_there_while_there_is_something_to_do() -> None:
    own = Ticker()
    chore = ticker.Chore(0.005, lambda: None)
    own.add(chore)
    assert own._thread is not None
    assert repr(own) == "<Ticker with 1 chores>"
    chore.cancel()
    until(lambda: own._thread is None)
    again = ticker.Chore(0.005, lambda: None)
    own.add(again)
    assert own._thread is not None
    again.cancel()
    until(lambda: own._thread is None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_that_is_forked_does_its_chores_itself() -> None:
    done: list[int] = []
    owner = Owner(done)
    chore = ticker.every(0.005, owner.work)
    with ticker._ticker._changed:  # by somebody who stays with the parent
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            try:
                done.clear()
                until(lambda: len(done) > 2)
            except BaseException:
                os._exit(1)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    chore.cancel()
