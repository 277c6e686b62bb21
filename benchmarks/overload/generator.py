"""An open-loop HTTP/1.1 load generator: requests leave when the schedule says so, whatever has become of the others.

A closed loop slows down with the server it measures and so hides what callers see. Here arrivals are a Poisson process
drawn beforehand, latency counts from the *scheduled* instant, and a caller that has waited for its patience closes its
connection, as real ones do. Requests in flight have a connection each; idle connections are used again, the last one
first. How late the generator itself was is kept for every request.

Run as a process of its own (``python -m benchmarks.overload.generator CORE``) it takes one JSON command a line on
stdin and answers one JSON line: ``{"open": {...}}`` for `run`, ``{"closed": {...}}`` for `benchmarks.load.run`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import resource
import signal
import sys
import time
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from heapq import heappop, heappush
from typing import Any, cast

from benchmarks import apps, harness, load
from benchmarks.server import cpu_ns

GAVE_UP, LOST, NOT_SENT = 0, -1, -2
"""What stands for a status where there was no answer: the caller's patience ended; the server closed or reset the
connection; the generator itself could not send (no port, no descriptor)."""

STREAMS = "/v1/events/"
"""What the path of a stream begins with."""
TICK = b"tick"
"""What every event of a stream carries, and nothing else in its bytes."""
CONNECTIONS = 15_000
"""Open at once, at most; a request beyond is `NOT_SENT`."""
DRAIN = 0.05
"""Seconds between two looks at whether everything has ended, once everything was sent."""

Phase = Mapping[str, Any]
"""``seconds``; ``rates``: requests per second by kind; ``signal``: a signal's name that the server gets first."""


# The schedule


def arrivals(phases: Sequence[Phase], kinds: Sequence[str], seed: int) -> tuple[list[float], list[int]]:
    """When requests are sent, in seconds from the start, ascending, and of which kind (an index into ``kinds``).

    Every kind is a Poisson process of its own with its own stream of random numbers, so that one kind's rate does not
    move another's arrivals.
    """
    drawn: list[tuple[float, int]] = []
    for index, kind in enumerate(kinds):
        source = random.Random(f"{seed} {kind}")
        begin = 0.0
        for phase in phases:
            end = begin + phase["seconds"]
            rate = phase["rates"].get(kind, 0.0)
            if rate > 0:
                at = begin + source.expovariate(rate)
                while at < end:
                    drawn.append((at, index))
                    at += source.expovariate(rate)
            begin = end
    drawn.sort()
    return [at for at, _ in drawn], [kind for _, kind in drawn]


# The wire


def request_bytes(port: int, path: str, key: str) -> bytes:
    """The measured request, for another path and with another API key."""
    return load.request_bytes(port).replace(apps.PATH.encode(), path.encode(), 1).replace(apps.API_KEY, key.encode(), 1)


def upgrade_bytes(port: int, path: str, key: str) -> bytes:
    """The handshake of a WebSocket."""
    plain = request_bytes(port, path, key)
    upgrade = (
        b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    return plain.replace(b"connection: keep-alive\r\n", b"", 1)[:-2] + upgrade


def answer(data: bytes) -> tuple[int, bool] | None:
    """The status of a whole answer and whether its connection stays open; ``None`` while some of it is missing."""
    if not load.complete(data):
        return None
    head = data[: data.find(b"\r\n\r\n")].lower()
    return int(data[9:12]), b"connection: close" not in head


class Caller(asyncio.Protocol):
    """One connection, with at most one request on it."""

    __slots__ = ("buffer", "connecting", "lost", "request", "run", "transport")

    def __init__(self, run: OpenLoop, request: int) -> None:
        self.run = run
        self.request = request
        self.transport: asyncio.Transport | None = None
        self.connecting: asyncio.Task[None] | None = None
        self.buffer = b""
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none, but behaves as one
        if self.request >= 0:
            self.transport.write(self.run.bytes_of(self.request))

    def send(self, request: int) -> None:
        """Send a request on a connection that is idle."""
        assert self.transport is not None
        self.request = request
        self.transport.write(self.run.bytes_of(request))

    def data_received(self, data: bytes) -> None:
        data = self.buffer + data if self.buffer else data
        whole = answer(data)
        if whole is None:
            self.buffer = data
            return
        self.buffer = b""
        request, self.request = self.request, -1
        if request < 0:
            return
        status, open_ = whole
        self.run.answered(request, status)
        if open_ and not self.run.fresh:
            self.run.idle.append(self)
        elif self.transport is not None:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone(LOST)

    def gone(self, status: int) -> None:
        """There is no connection any more; a request that was on it ends with ``status``."""
        if not self.lost:
            self.lost = True
            self.run.open -= 1
        request, self.request = self.request, -1
        if request >= 0:
            self.run.answered(request, status)

    def give_up(self) -> None:
        """Leave without an answer: close the connection, or stop connecting."""
        self.request = -1
        if self.transport is not None:
            self.transport.abort()
        elif self.connecting is not None:
            self.connecting.cancel()


class Listener(asyncio.Protocol):
    """One stream: an SSE answer or a WebSocket. Counts events and the longest silence between two."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.status = GAVE_UP
        self.events = 0
        self.last = 0.0
        self.silence = 0.0
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if self.status == GAVE_UP and data.startswith(b"HTTP/1.1 "):
            self.status = int(data[9:12])
        ticks = data.count(TICK)
        if ticks:
            now = time.monotonic()
            if self.events:
                self.silence = max(self.silence, now - self.last)
            self.last = now
            self.events += ticks

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


# One run


def core_ns(core: int) -> int:
    """How long a processor core has been busy since the system's start, with anything, to a tick (mostly 10 ms)."""
    with open("/proc/stat") as file:
        fields = next(line.split()[1:] for line in file if line.startswith(f"cpu{core} "))
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) * 10**9 // os.sysconf("SC_CLK_TCK")


class OpenLoop:
    """One schedule against one server. The records of all requests are plain arrays, one entry per attempt."""

    def __init__(
        self,
        *,
        port: int,
        pid: int,
        phases: Sequence[Phase],
        kinds: Mapping[str, tuple[str, str]],
        patience: float,
        connections: int = 0,
        fresh: bool = False,
        retries: int = 0,
        backoff: float = 0.1,
        seed: int = 1,
    ) -> None:
        self.port, self.pid, self.phases = port, pid, phases
        self.patience, self.connections, self.fresh, self.retries, self.backoff = (
            patience,
            connections,
            fresh,
            retries,
            backoff,
        )
        self.requests = [request_bytes(port, path, key) for path, key in kinds.values()]
        times, kind = arrivals(phases, list(kinds), seed)
        self.planned = len(times)
        self.at = array("d", times)
        self.kind = array("B", kind)
        self.status = array("h", bytes(2 * self.planned))
        self.latency = array("d", bytes(8 * self.planned))
        self.late = array("d", bytes(8 * self.planned))
        self.attempt = array("B", bytes(self.planned))
        self.core = min(os.sched_getaffinity(pid))
        self.marks: list[tuple[float, int, int]] = []
        self.idle: list[Caller] = []
        self.open = 0
        self.opened = 0
        self._random = random.Random(f"{seed} retries")
        self._next = 0
        self._pending = 0
        self._again: list[tuple[float, int]] = []
        self._waiting: deque[tuple[float, int, Caller]] = deque()
        self._boundaries = deque(self._edges())

    def _edges(self) -> list[tuple[float, str | None]]:
        edges: list[tuple[float, str | None]] = []
        at = 0.0
        for phase in self.phases:
            edges.append((at, phase.get("signal")))
            at += phase["seconds"]
        edges.append((at, None))
        return edges

    async def run(self) -> None:
        """Send everything and wait until every caller has its answer or has given up."""
        self._loop = asyncio.get_running_loop()
        self._over = self._loop.create_future()
        for _ in range(self.connections):
            caller = Caller(self, -1)
            self.open += 1
            await self._connect(caller)
            self.idle.append(caller)
        self._start = time.monotonic() + 0.02
        self._loop.call_later(0.02, self._tick)
        await self._over
        for caller in self.idle:
            if caller.transport is not None:
                caller.transport.abort()
        await asyncio.sleep(0)

    def bytes_of(self, request: int) -> bytes:
        """What goes over the wire for a request."""
        return self.requests[self.kind[request]]

    def answered(self, request: int, status: int) -> None:
        """Record what became of a request, once."""
        now = time.monotonic() - self._start
        self.status[request] = status
        self.latency[request] = now - self.at[request]
        self._pending -= 1
        if self.attempt[request] < self.retries and not 200 <= status < 500:
            heappush(self._again, (now + self.backoff * self._random.uniform(0.5, 1.5), request))

    def _tick(self) -> None:
        """Do what is due, and come back when the next thing is."""
        now = time.monotonic() - self._start
        while self._boundaries and self._boundaries[0][0] <= now:
            _, name = self._boundaries.popleft()
            if name:
                os.kill(self.pid, getattr(signal, name))
            self.marks.append((now, cpu_ns(self.pid), core_ns(self.core)))
        while self._waiting and self._waiting[0][0] <= now:
            _, request, caller = self._waiting.popleft()
            if caller.request == request:
                caller.give_up()
                self.answered(request, GAVE_UP)
        while self._again and self._again[0][0] <= now:
            at, first = heappop(self._again)
            self._send(self._retry(at, first), now)
        while self._next < self.planned and self.at[self._next] <= now:
            self._send(self._next, now)
            self._next += 1
        if self._next == self.planned and not (self._pending or self._again or self._boundaries):
            self._over.set_result(None)
            return
        due = [entries[0][0] for entries in (self._boundaries, self._waiting, self._again) if entries]
        due.append(self.at[self._next] if self._next < self.planned else now + DRAIN)
        self._loop.call_later(max(0.0, min(due) - (time.monotonic() - self._start)), self._tick)

    def _retry(self, at: float, before: int) -> int:
        """A record for one more attempt at what ``before`` was."""
        self.at.append(at)
        self.kind.append(self.kind[before])
        self.status.append(GAVE_UP)
        self.latency.append(0.0)
        self.late.append(0.0)
        self.attempt.append(self.attempt[before] + 1)
        return len(self.at) - 1

    def _send(self, request: int, now: float) -> None:
        self.late[request] = now - self.at[request]
        self._pending += 1
        caller = None
        while self.idle and caller is None:
            caller = self.idle.pop()
            if caller.lost:
                caller = None
        if caller is not None:
            caller.send(request)
        elif self.open >= CONNECTIONS:
            self.answered(request, NOT_SENT)
            return
        else:
            caller = Caller(self, request)
            self.open += 1
            self.opened += 1
            caller.connecting = self._loop.create_task(self._connect(caller))
        self._waiting.append((self.at[request] + self.patience, request, caller))

    async def _connect(self, caller: Caller) -> None:
        request = caller.request
        try:
            await self._loop.create_connection(lambda: caller, "127.0.0.1", self.port)
            if caller.request != request and caller.transport is not None:
                caller.transport.abort()  # it gave up in the very step in which it was connected
        except (OSError, asyncio.CancelledError) as error:
            caller.gone(LOST if isinstance(error, ConnectionError) else NOT_SENT)

    def result(self) -> dict[str, Any]:
        """The columns, times in whole microseconds."""
        return {
            "at": harness.micros(self.at),
            "kind": self.kind.tolist(),
            "status": self.status.tolist(),
            "latency": harness.micros(self.latency),
            "late": harness.micros(self.late),
            "attempt": self.attempt.tolist(),
            "marks": self.marks,
            "opened": self.opened,
        }


async def listen(port: int, counts: Mapping[str, int], key: str) -> list[Listener]:
    """Open ``sse`` and ``websocket`` streams, fifty every tenth of a second."""
    loop = asyncio.get_running_loop()
    listeners: list[Listener] = []
    for make, name in ((request_bytes, "sse"), (upgrade_bytes, "websocket")):
        for number in range(counts.get(name, 0)):
            listener = Listener(make(port, f"{STREAMS}{number}", key))
            await loop.create_connection(lambda listener=listener: listener, "127.0.0.1", port)  # type: ignore[misc]
            listeners.append(listener)
            if number % 50 == 49:
                await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)
    return listeners


async def run(streams: Mapping[str, int] | None = None, streams_key: str = "", **plan: Any) -> dict[str, Any]:
    """Run one plan (the arguments of `OpenLoop`), with ``streams`` held open beside it; the records."""
    loop = OpenLoop(**plan)
    listeners = await listen(plan["port"], streams, streams_key) if streams else []
    events = sum(listener.events for listener in listeners)
    began = time.monotonic()
    gc.freeze()
    gc.disable()
    try:
        await loop.run()
    finally:
        gc.enable()
        gc.unfreeze()
    result = loop.result()
    if listeners:
        alive = [listener for listener in listeners if not listener.lost and listener.status in (101, 200)]
        result["streams"] = {
            "asked": len(listeners),
            "alive": len(alive),
            "events": sum(listener.events for listener in listeners) - events,
            "seconds": time.monotonic() - began,
            "silence": sorted(listener.silence for listener in alive),
        }
        for listener in listeners:
            listener.transport.abort()
    return result


def main() -> None:
    """Serve commands from stdin until it ends; ``seconds`` in a command is how long it may take before all ends."""
    harness.pin(int(sys.argv[1]))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for line in sys.stdin:
            command = json.loads(line)
            signal.alarm(int(command["limit"]))
            if "closed" in command:
                result: Any = asdict(runner.run(load.run(**command["closed"])))
            else:
                result = runner.run(run(**command["open"]))
            print(json.dumps(result, separators=(",", ":")), flush=True)
            signal.alarm(0)


if __name__ == "__main__":
    main()
