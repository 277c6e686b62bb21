"""One thread a process for what is due now and then and must not cost a request anything.

A request path that looked at the clock for each of these would pay for all of them, and an event loop is not always
there: some servers do not speak of their life span, and some applications are made before a fork. So a thread waits,
a daemon that keeps no process alive, and a child that was forked gets one of its own.

Chores are short. What they do to a running application they hand to its loop.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from inspect import ismethod
from threading import Condition, Thread
from time import monotonic
from typing import Any, final
from weakref import ReferenceType, WeakMethod

logger = logging.getLogger("seawall")


@final
class Chore:
    """What is done every so many seconds, until it is cancelled or its owner is gone."""

    __slots__ = ("_function", "due", "seconds")

    def __init__(self, seconds: float, function: Callable[[], None]) -> None:
        # Bound methods are held weakly: a chore keeps nobody alive.
        held: Any = WeakMethod(function) if ismethod(function) else function
        self._function: Callable[[], None] | ReferenceType[Callable[[], None]] | None = held
        self.seconds = seconds
        self.due = monotonic() + seconds

    def __repr__(self) -> str:
        return f"<Chore every {self.seconds:g} s>"

    @property
    def function(self) -> Callable[[], None] | None:
        """What there is to do; ``None`` once there is nobody to do it for."""
        held = self._function
        return held() if isinstance(held, ReferenceType) else held

    def cancel(self) -> None:
        """Never do it again. Safe twice."""
        self._function = None

    def soon(self) -> None:
        """Do it now, and not only when it is due."""
        _ticker.hurry(self)


@final
class Ticker:
    """The thread, which is there as long as there are chores."""

    def __init__(self) -> None:
        self._chores: list[Chore] = []
        self._thread: Thread | None = None
        self._changed = Condition()

    def __repr__(self) -> str:
        return f"<Ticker with {len(self._chores)} chores>"

    def add(self, chore: Chore) -> None:
        with self._changed:
            self._chores.append(chore)
            self._begin()
            self._changed.notify()

    def hurry(self, chore: Chore) -> None:
        with self._changed:
            chore.due = monotonic()
            self._changed.notify()

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = Thread(target=self._run, name="seawall", daemon=True)
            self._thread.start()

    def start_anew(self) -> None:
        """After a fork: the thread stayed with the parent, and so did whoever held the lock."""
        self._changed = Condition()
        self._thread = None
        if self._chores:
            self._begin()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._chores = [chore for chore in self._chores if chore.function is not None]
                if not self._chores:
                    self._thread = None
                    return
                chore = min(self._chores, key=lambda one: one.due)
                wait = chore.due - monotonic()
                if wait > 0:
                    # Owners that are gone are noticed now and then: the list is short.
                    self._changed.wait(min(wait, 60.0))
                    continue
                chore.due = monotonic() + chore.seconds
            self._do(chore)
            del chore  # or its owner would live on until the next is due

    def _do(self, chore: Chore) -> None:
        function = chore.function
        if function is None:
            return
        try:
            function()
        except Exception:
            with suppress(Exception):  # of a handler of logs, say, and then there is nobody to tell
                logger.exception("%s has failed; it is tried again in %g s", function.__qualname__, chore.seconds)


_ticker = Ticker()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ticker.start_anew)


def every(seconds: float, function: Callable[[], None]) -> Chore:
    """Have ``function`` called every ``seconds`` in a thread, the first time after as many.

    It may raise, which is logged. A bound method is held weakly.
    """
    chore = Chore(seconds, function)
    _ticker.add(chore)
    return chore
