"""What the tests of `seawall.client` share: a library to call with, a host that answers by a script, a call played."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeAlias

import httpx
import httpx2

from seawall.client.budget import RetryBudget
from seawall.client.core import Call, Caller, Discard, Options, Send, Sleep
from seawall.client.host import Host
from seawall.client.library import Library
from seawall.client.retry import RetryPolicy
from seawall.client.surroundings import NONE, Surroundings
from seawall.testing import ManualClock

LIBRARIES = (httpx2, httpx)
URL = "http://host.test/"

Outcome: TypeAlias = int | tuple[int, Mapping[str, str]] | type[Exception] | Exception | None
"""A status, one with headers, an error, or ``None``: no answer in time."""


class Cancelled(BaseException):
    """Somebody does not want to wait any more."""


def caller(
    clock: ManualClock,
    *,
    library: ModuleType = httpx2,
    random: Callable[[], float] = lambda: 1.0,
    around: Surroundings = NONE,
    **options: Any,
) -> Caller:
    """A caller whose every jitter is the longest, without a throttle and a breaker where none are given."""
    defaults: dict[str, Any] = {
        "retry": RetryPolicy(),
        "budget": RetryBudget,
        "throttle": None,
        "breaker": None,
        "concurrency": None,
        "hedge": False,
        "timeout": None,
        "connect": 1.0,
        "propagate": True,
        "route": None,
    }
    return Caller(
        Options(**{**defaults, **options}),
        Library(library),
        clock=clock,
        wall_clock=lambda: clock.wall_ns() / 1e9,
        random=random,
        around=lambda: around,
    )


def request(method: str = "GET", url: str = URL, *, library: ModuleType = httpx2, **how: Any) -> Any:
    return library.Request(method, url, **how)


def response(outcome: int | tuple[int, Mapping[str, str]], library: ModuleType = httpx2) -> Any:
    """An answer that has not been read."""
    status, headers = (outcome, {}) if isinstance(outcome, int) else outcome
    return library.Response(status, headers=headers, stream=library.ByteStream(b"body"))


@dataclass(slots=True)
class Played:
    """What a call did, and what came of it."""

    sent: list[Any] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)
    within: list[float | None] = field(default_factory=list)
    discarded: int = 0
    steps: int = 0
    answer: Any = None
    error: BaseException | None = None
    host: Host | None = None
    """Whom to leave when the answer was read."""

    @property
    def status(self) -> int:
        assert self.error is None, self.error
        return int(self.answer.status_code)

    @property
    def ended(self) -> str:
        """Why nothing was tried again."""
        if self.error is not None:
            return str(getattr(self.error, "retries_ended", ""))
        return str(self.answer.extensions.get("retries_ended", ""))

    @property
    def attempts(self) -> list[int | str]:
        made = self.answer.extensions["attempts"] if self.error is None else self.error.attempts  # type: ignore[attr-defined]
        return [attempt.status or attempt.error for attempt in made]


def play(
    caller: Caller,
    outcomes: Iterable[Outcome],
    clock: ManualClock,
    *,
    sent: Any = None,
    took: float = 0.0,
    stop_at: int | None = None,
    keep: bool = True,
) -> Played:
    """Make one call (of a GET, or of ``sent``): each attempt takes ``took`` seconds and ends as the next of
    ``outcomes``. At the step ``stop_at`` (from 1) it is cancelled. ``keep``: what is discarded can still be given."""
    module = caller.library.module
    played = Played()
    left = iter(outcomes)
    call: Call = caller.call(request(library=module) if sent is None else sent)
    told: Any = None
    try:
        step = call.send(None)
        while True:
            played.steps += 1
            if played.steps == stop_at:
                call.throw(Cancelled())
                raise AssertionError("it went on")
            told = None
            if isinstance(step, Send):
                played.sent.append(step.request)
                played.within.append(step.within)
                clock.advance(took)
                told = outcome_of(next(left), module)
            elif isinstance(step, Sleep):
                played.slept.append(step.seconds)
                clock.advance(step.seconds)
            elif isinstance(step, Discard):
                played.discarded += 1
                told = keep and step.within > 0
            step = call.send(told)
    except StopIteration as end:
        played.answer, played.host = end.value
    except (Exception, Cancelled) as error:
        if isinstance(error, AssertionError):
            raise
        played.error = error
    return played


def outcome_of(outcome: Outcome, module: ModuleType) -> Any:
    if outcome is None or isinstance(outcome, Exception):
        return outcome
    return outcome("it broke") if isinstance(outcome, type) else response(outcome, module)


def host_of(caller: Caller) -> Host:
    """The only one that was called."""
    (host,) = caller._hosts.values()
    return host


class CancelledAt:
    """Awaits ``coroutine``, and is cancelled where that waits for the ``at``-th time (from 1)."""

    def __init__(self, coroutine: Any, at: int) -> None:
        self._coroutine = coroutine
        self._at = at
        self.was_cancelled = False

    def __await__(self) -> Any:
        inner, waits = self._coroutine.__await__(), 0
        error: BaseException | None = None
        while True:
            try:
                awaited = inner.send(None) if error is None else inner.throw(error)
            except StopIteration as end:
                return end.value
            error, waits = None, waits + 1
            if waits == self._at:
                task = asyncio.current_task()
                assert task is not None
                self.was_cancelled = task.cancel()
            try:
                yield awaited
            except BaseException as raised:
                error = raised
