"""What the tests of `seawall.client` share: a library to call with, a host that answers by a script, a call played."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Thread
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
    """A small answer that has not been read."""
    status, headers = (outcome, {}) if isinstance(outcome, int) else outcome
    return library.Response(status, headers={"content-length": "4", **headers}, stream=library.ByteStream(b"body"))


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
            if isinstance(step, Send):
                played.sent.append(step.request)
                played.within.append(step.within)
            if played.steps == stop_at:
                call.throw(Cancelled())
                raise AssertionError("it went on")
            told = None
            if isinstance(step, Send):
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
    """Awaits ``coroutine``, and is cancelled where that waits for the ``at``-th time (from 1): by ``cancel``, or as a
    task of asyncio is."""

    def __init__(self, coroutine: Any, at: int, cancel: Callable[[], object] | None = None) -> None:
        self._coroutine = coroutine
        self._at = at
        self._cancel = cancel
        self.was_cancelled = False

    def __await__(self) -> Any:
        inner, waits = self._coroutine.__await__(), 0
        told: Any = None
        error: BaseException | None = None
        while True:
            try:
                awaited = inner.send(told) if error is None else inner.throw(error)
            except StopIteration as end:
                return end.value
            told, error, waits = None, None, waits + 1
            if waits == self._at:
                if self._cancel is None:
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()
                else:
                    self._cancel()
                self.was_cancelled = True
            try:
                told = yield awaited
            except BaseException as raised:
                error = raised


# A host on the loopback


@dataclass(frozen=True, slots=True)
class Heard:
    """A request as the host has it; ``number`` counts them from 1, ``connection`` those that they came over."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    number: int
    connection: int


Answer: TypeAlias = Callable[[Heard], Awaitable[bytes | None]]
"""What is sent back, as it goes over the wire; ``None`` closes the connection."""


def reply(status: int = 200, body: bytes = b"hello", **headers: str) -> bytes:
    """An answer with its length; underscores are hyphens."""
    lines = [f"HTTP/1.1 {status} Said", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def script(*answers: bytes | None) -> Answer:
    """One answer after the other, and the last one to all that come after."""

    async def answer(heard: Heard) -> bytes | None:
        return answers[min(heard.number, len(answers)) - 1]

    return answer


@dataclass(slots=True)
class Loopback:
    """A host that listens on 127.0.0.1, in a thread and a loop of its own."""

    answer: Answer
    port: int = 0
    connections: int = 0
    open: int = 0
    heard: list[Heard] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        connection = self.connections
        try:
            # Cancelled is who is still there at the end; asyncio would complain of it.
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._converse(reader, writer, connection)
        finally:
            self._tasks.discard(task)
            self.open -= 1
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, path, _ = head[0].split(" ")
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)
            }
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            heard = Heard(method, path, headers, body, len(self.heard) + 1, connection)
            self.heard.append(heard)
            # Who hangs up is noticed while the answer is made, as by a server.
            answering = asyncio.ensure_future(self.answer(heard))
            leaving = asyncio.ensure_future(reader.read(1))
            try:
                await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                has_answered = answering.done()
                answering.cancel()
                leaving.cancel()
                await asyncio.wait((answering, leaving))
            said = answering.result() if has_answered else None
            if said is None:
                return
            writer.write(said)
            await writer.drain()
            if b"connection: close" in said:
                return


@contextmanager
def listening(answer: Answer) -> Iterator[Loopback]:
    """A host for as long as the block lasts."""
    host = Loopback(answer)
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()
    # Here and there: a test may have a loop of its own.
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(host.serve, "127.0.0.1", 0), loop).result(10)
    host.port = server.sockets[0].getsockname()[1]

    async def end() -> None:
        server.close()
        for task in list(host._tasks):
            task.cancel()
        await asyncio.gather(*host._tasks, return_exceptions=True)

    try:
        yield host
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
