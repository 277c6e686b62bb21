"""One asyncio event loop with its sockets, its downstream and its callers, in simulated time and whole nanoseconds.

The order of things is that of ``asyncio.base_events._run_once``, because sensors of overload live on it. An iteration
(1) finds what the selector reports and puts it behind what is ready already, (2) puts due timers behind that, (3) runs
exactly what was ready at that moment; whatever this makes ready runs in the next iteration. Each item moves the clock
by its CPU time, and nothing else does while anything is ready. So

* a request that has arrived waits in its socket until the next iteration begins, is parsed there (``PARSE_NS``), and
  takes its first step one iteration later, as a task does. All that have arrived are parsed before any of them;
* a handler that awaits goes to the end of the line twice: when its I/O is found, and as the task that this wakes;
* timers fire up to a millisecond late while the loop is idle, as ``epoll_wait`` counts in milliseconds;
* a caller that gives up closes its connection, and the server learns this once it has read the data before: the end
  of the stream is found one iteration after the data.

What a controller computes takes no time, only its callbacks do (``CALLBACK_NS``); what Seawall really costs is measured
by ``overhead.py``. Waking a task takes none either: it is part of what its handler computes.

Arrivals are an open loop: they come when they come. Everything outside (arrivals, callers, downstream) happens at its
own instant, however late the loop looks. Same sources, same numbers, on any machine: integers, seeded Mersenne
Twisters, and ties broken by a sequence number.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import log
from typing import Any, Protocol, TypeAlias

US, MS, S = 1_000, 1_000_000, 1_000_000_000

PARSE_NS = 40 * US
"""To read and parse a request and make its task: uvicorn with httptools on asyncio."""
REFUSE_NS = 14 * US
"""To write a prepared refusal. With the parse 54 us, the floor measured for httptools on asyncio (overload.md)."""
ACCEPT_NS = 163 * US
"""To accept and close a connection: 217 us for a refusal on a new connection (overload.md) less the 54 us."""
CLOSE_NS = 20 * US
"""To read the end of a stream and tear down the transport; an estimate."""
CALLBACK_NS = 1 * US
"""A callback or timer of a controller."""
BACKLOG = 2048
"""Connections that the kernel holds until they are accepted, as uvicorn sets it; further ones are dropped."""
SWITCH_NS = 5 * MS
"""``sys.getswitchinterval()``: how long a thread keeps the interpreter lock while others wait."""
POOL_THREADS = 40
"""Threads that serve ``def`` handlers: anyio's default."""

NEVER = 1 << 62

# Steps of a handler: (what, nanoseconds)
CPU, IO, DOWN, THREAD, RESPOND = range(5)
Step: TypeAlias = tuple[int, int]
Steps: TypeAlias = tuple[Step, ...]

# How a request ended
SERVED, REFUSED, UNFINISHED, LOST = range(4)

# Where a request is
_NEW, _ACCEPTED, _READ, _WAITING, _GRANTED, _RUNNING, _ENDED, _LOST = range(8)


class Request:
    """One request as a controller sees it, and what the engine knows of it."""

    __slots__ = (
        "arrived_ns",
        "attempt",
        "called_ns",
        "closed",
        "connects",
        "deadline_ns",
        "gone",
        "group",
        "kind",
        "loop",
        "priority",
        "reason",
        "seen_ns",
        "source",
        "started_ns",
        "state",
        "step",
        "steps",
        "tenant",
        "ticket",
    )

    def __init__(self, loop: Loop, source: Source, arrived_ns: int, steps: Steps, called_ns: int, attempt: int) -> None:
        self.loop = loop
        self.source = source
        self.arrived_ns = arrived_ns
        """When it was to arrive; latency counts from here."""
        self.seen_ns = 0
        """When its task took its first step."""
        self.started_ns = 0
        """When its handler was started."""
        self.called_ns = called_ns
        """When its caller made the first attempt."""
        self.attempt = attempt
        self.priority = source.priority
        """Index of the class, 0 the most important."""
        self.tenant = source.tenant
        self.group = source.group
        """Index of the rule of the policy that it falls under."""
        self.kind = source.kind
        self.deadline_ns = arrived_ns + source.deadline_ns if source.deadline_ns else 0
        """Absolute; 0 for none."""
        self.gone = False
        """The loop has read that the caller closed the connection."""
        self.closed = False
        """The caller has closed the connection, which the loop may not know yet."""
        self.connects = source.connects
        self.steps = steps
        self.step = 0
        self.state = _NEW
        self.reason = ""
        self.ticket: Any = None
        """A controller's own."""

    def start(self, check: Callable[[Request], bool] | None = None) -> None:
        """Wake the task that waits for admission; its handler starts one iteration later.

        The woken task asks ``check`` first, and answers a refusal if that says no.
        """
        if self.state != _WAITING:
            raise RuntimeError("start() is for a request that waits")
        self.state = _GRANTED
        self.loop.ready.append((self.loop._woken, (self, check)))

    def refuse(self, reason: str = "") -> None:
        """Wake the task that waits for admission; it answers the refusal one iteration later."""
        if self.state != _WAITING:
            raise RuntimeError("refuse() is for a request that waits")
        self.state = _GRANTED
        self.reason = reason
        self.loop.ready.append((self.loop._refuse, (self,)))


class Controller(Protocol):
    """What decides over requests."""

    name: str

    def attach(self, loop: Loop, capacity_hint: float) -> None:
        """Called once before the first request; ``capacity_hint`` is in requests a second, for a limit set by hand."""

    def arrive(self, request: Request) -> bool | None:
        """True starts the handler in this very step, False refuses; None lets it wait for start() or refuse()."""

    def finish(self, request: Request, outcome: str) -> None:
        """The handler has returned: "success", "ignored" (the caller had gone) or "dropped" (overload downstream)."""

    def started_response(self, request: Request) -> None:
        """A long-lived request has sent the start of its response."""

    def stats(self) -> dict[str, float]:
        """Numbers for a time series, the limit among them."""


@dataclass(slots=True)
class Source:
    """Callers of one kind: when they come, what their requests do, how long they wait."""

    phases: Sequence[tuple[int, int]]
    """(until_ns, mean nanoseconds between arrivals), in order; NEVER as a mean is silence."""
    draw: Callable[[random.Random], Steps]
    """The handler of one request."""
    kind: str = "http"
    priority: int = 1
    tenant: str = "tenant"
    group: int = 0
    deadline_ns: int = 0
    """After arrival; 0 for none."""
    patience_ns: int = 0
    """The caller closes the connection after this; 0 waits for ever."""
    retries: int = 0
    """Further attempts after a refusal or a time-out."""
    retry_after_ns: int = 0
    """The mean of the (uniform) pause before one."""
    connects: bool = False
    """A new connection for each request."""
    even: bool = False
    """Arrivals at even distances, else a Poisson process."""
    instants: Sequence[int] = ()
    """Arrivals at exactly these, instead of phases."""
    seed: int = 0
    index: int = field(default=0, init=False)
    """Where it stands among the sources of its loop."""


def _exponential_table(bits: int) -> list[int]:
    """Quantiles of the exponential distribution at the middle of 2**bits equal shares, with a mean of 2**20.

    Drawing from a table makes gaps whole numbers: the last bit of ``log`` differs between C libraries, and the first
    request that arrives a nanosecond later changes everything after it.
    """
    size = 1 << bits
    raw = [-log(1 - (number + 0.5) / size) for number in range(size)]
    factor = size / sum(raw) * (1 << 20)
    return [round(value * factor) for value in raw]


_TABLE_BITS = 12
_GAPS = _exponential_table(_TABLE_BITS)


def stream(seed: int, *names: object) -> random.Random:
    """An independent stream of random numbers for one purpose."""
    return random.Random(f"{seed}/{'/'.join(map(str, names))}")


def _arrivals(source: Source, random_bits: random.Random) -> Iterator[int]:
    """When the requests of a source arrive, in order."""
    yield from source.instants
    bits, gaps = random_bits.getrandbits, _GAPS
    start = 0
    for until, mean in source.phases:
        if mean < NEVER:
            at = start
            if source.even:
                while (at := at + mean) < until:
                    yield at
            else:
                while (at := at + (gaps[bits(_TABLE_BITS)] * mean >> 20) + 1) < until:
                    yield at
        start = until


class Timer:
    """What ``call_later`` returns."""

    __slots__ = ("args", "cancelled", "fn")

    def __init__(self, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.fn, self.args, self.cancelled = fn, args, False

    def cancel(self) -> None:
        """It will not be called."""
        self.cancelled = True


class Downstream:
    """A service that requests wait for: ``slots`` at a time, first come first served, at times slower."""

    __slots__ = ("busy", "slots", "slow", "waiting")

    def __init__(self, slots: int, slow: Sequence[tuple[int, int, int]] = ()) -> None:
        self.slots = slots
        self.slow = tuple(slow)
        """(from_ns, to_ns, how many times slower)."""
        self.busy = 0
        self.waiting: deque[tuple[Request, int]] = deque()

    def taking(self, ns: int, at: int) -> int:
        """How long a call takes that begins at ``at``."""
        for start, end, factor in self.slow:
            if start <= at < end:
                return ns * factor
        return ns


class Log:
    """How every request ended, column by column."""

    __slots__ = ("arrived", "attempt", "ended", "source", "started", "status")

    def __init__(self) -> None:
        self.source, self.attempt, self.status = array("h"), array("h"), array("b")
        self.arrived, self.started, self.ended = array("q"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self.status)


class Loop:
    """One event loop in simulated time.

    ``capacity_hint`` goes to the controller. ``worker`` of ``workers`` keeps a random share of the arrivals: run one
    loop for each number with the same seed.
    """

    def __init__(
        self,
        controller: Controller,
        sources: Sequence[Source],
        *,
        seed: int,
        capacity_hint: float = 0.0,
        downstream: Downstream | None = None,
        worker: int = 0,
        workers: int = 1,
        sample_ns: int = 0,
    ) -> None:
        self.now = 0
        self.ready: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self.log = Log()
        self.controller = controller
        self.downstream = downstream or Downstream(1 << 30)
        self.slow = 1
        """How many times slower the processor is than it should be."""
        self.late_grants = 0
        """Handlers that were started after the deadline of their request."""
        self.running = 0
        """Handlers that were started and have not ended."""
        self.iterations = 0
        self.idle_ns = 0
        """How long it had nothing to do."""
        self.samples: list[tuple[int, dict[str, float]]] = []
        self._seq = 0
        self._timers: list[tuple[int, int, Timer]] = []
        self._io: list[tuple[int, int, Request, bool]] = []
        self._sources = sources
        self._service: list[random.Random] = []
        self._retry_random = stream(seed, "retry", worker)
        streams = []
        for index, source in enumerate(sources):
            source.index = index
            self._service.append(stream(seed, "service", index, source.seed))
            streams.append(_arrivals(source, stream(seed, "arrivals", index, source.seed)))
        self._stream = self._requests(streams, stream(seed, "workers"), worker, workers)
        self._next = next(self._stream, None)
        self._next_ns = self._next.arrived_ns if self._next else NEVER
        # Only with callers that give up, retry or connect anew.
        self._patient = not any(source.patience_ns or source.retries or source.connects for source in sources)
        self._retries: list[tuple[int, int, Request]] = []
        self._closes: list[tuple[int, int, Request]] = []
        self._backlog: list[Request] = []
        self._readable: list[Request] = []
        self._ends: list[Request] = []
        # Threads that hold or want the interpreter lock: [request, CPU left]
        self._runnable: deque[list[Any]] = deque()
        self._threads = 0
        self._thread_wait: deque[tuple[Request, int]] = deque()
        self._thread_done: list[Request] = []
        self._slice_end = NEVER
        self._unfinished: dict[Request, None] = {}
        controller.attach(self, capacity_hint)
        self._arrive = controller.arrive
        self._finished = controller.finish
        if sample_ns:
            self._sample(sample_ns)

    # What a controller uses

    def clock(self) -> int:
        """Now, in nanoseconds."""
        return self.now

    def call_soon(self, fn: Callable[..., object], *args: Any) -> None:
        """Call it in the next iteration."""
        self.ready.append((self._callback, (fn, args)))

    def call_later(self, seconds: float, fn: Callable[..., object], *args: Any) -> Timer:
        """Call it in the first iteration after ``seconds``."""
        return self.call_at(self.now + max(0, round(seconds * S)), fn, *args)

    # What a scenario uses

    def call_at(self, at: int, fn: Callable[..., object], *args: Any) -> Timer:
        """Call it in the first iteration after the instant ``at``."""
        timer = Timer(fn, args)
        self._seq += 1
        heappush(self._timers, (at, self._seq, timer))
        return timer

    def pause(self, ns: int) -> None:
        """Nothing runs for so long: a garbage collection, a throttled container."""
        self.now += ns

    def run(self, until: int) -> None:
        """Run until the clock has reached ``until``; requests under way then are logged as unfinished."""
        ready, timers = self.ready, self._timers
        popleft = ready.popleft
        while True:
            if not ready and not self._idle(until):
                break
            if self.now >= until:
                break
            if self._runnable:
                self._yield_lock()
            self.iterations += 1
            self._select()
            while timers and timers[0][0] <= self.now:
                timer = heappop(timers)[2]
                if not timer.cancelled:
                    ready.append((self._fire, (timer,)))
            if self._runnable:
                self._slice_end = self.now + SWITCH_NS
                for _ in range(len(ready)):
                    fn, args = popleft()
                    fn(*args)
                    if self.now >= self._slice_end and self._runnable:
                        self._yield_lock()
                        self._slice_end = self.now + SWITCH_NS
            else:
                for _ in range(len(ready)):
                    fn, args = popleft()
                    fn(*args)
        self.now = max(self.now, until)
        for request in list(self._unfinished):
            self._record(request, UNFINISHED)
        while self._next_ns < until and self._next is not None:
            self._record(self._next, UNFINISHED)
            self._advance_stream()

    # An iteration

    def _idle(self, until: int) -> bool:
        """Move the clock to the next thing that happens; False if nothing does before ``until``."""
        at = self._next_ns
        if self._io and self._io[0][0] < at:
            at = self._io[0][0]
        if not self._patient:
            if self._readable or self._ends:
                return True
            if self._retries and self._retries[0][0] < at:
                at = self._retries[0][0]
            if self._closes and self._closes[0][0] < at:
                at = self._closes[0][0]
        while self._timers and self._timers[0][2].cancelled:
            heappop(self._timers)
        if self._timers:
            wait = self._timers[0][0] - self.now
            due = self.now + (-(-wait // MS) * MS if wait > 0 else 0)
            if due < at:
                at = due
        if self._thread_done:
            return True
        while self._runnable and self.now < at:
            self._run_thread()
            if self._thread_done:
                return True
        if at > self.now:
            if at >= until:
                return False
            self.idle_ns += at - self.now
            self.now = at
        return True

    def _select(self) -> None:
        """Find what has arrived, in order of arrival, and put it behind what is ready."""
        now, io = self.now, self._io
        if not self._patient:
            self._select_callers()
        found: list[Request] = []
        if self._thread_done:
            found, self._thread_done = self._thread_done, found
        if self._readable:
            found += self._readable
            self._readable = []
        while True:
            at = self._next_ns
            if io and io[0][0] <= at:
                if io[0][0] > now:
                    break
                ended, _, request, downstream = heappop(io)
                if downstream:
                    self._downstream_ended(ended)
                found.append(request)
            elif at <= now:
                request = self._next  # type: ignore[assignment]
                self._advance_stream()
                if self._patient:
                    found.append(request)
                else:
                    self._arrived(request, found)
            else:
                break
        if found:
            self.ready.append((self._deliver, (found,)))
        if self._backlog:
            self.ready.append((self._accept, (self._backlog,)))
            self._backlog = []

    def _deliver(self, found: list[Request]) -> None:
        """Read what the selector reported: new requests are parsed, the I/O of others wakes their tasks."""
        append, begin, advance = self.ready.append, self._begin, self._advance
        parse = PARSE_NS * self.slow
        unfinished = self._unfinished
        for request in found:
            if request.state <= _ACCEPTED:
                self.now += parse
                request.state = _READ
                unfinished[request] = None
                append((begin, (request,)))
                if request.closed:
                    self._ends.append(request)
            else:
                append((advance, (request,)))

    def _callback(self, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.now += CALLBACK_NS * self.slow
        fn(*args)

    def _fire(self, timer: Timer) -> None:
        if not timer.cancelled:
            self.now += CALLBACK_NS * self.slow
            timer.fn(*timer.args)

    def _sample(self, every: int) -> None:
        self.samples.append((self.now, self.controller.stats()))
        self.call_at(self.now + every, self._sample, every)

    # Arrivals

    def _requests(
        self, streams: list[Iterator[int]], shares: random.Random, worker: int, workers: int
    ) -> Iterator[Request]:
        """The requests of all sources in order of arrival."""
        sources, service = self._sources, self._service
        heads = [(at, index) for index, arrivals in enumerate(streams) if (at := next(arrivals, None)) is not None]
        heads.sort()
        if len(heads) == 1 and workers == 1:
            at, index = heads[0]
            source, bits, draw = sources[index], service[index], sources[index].draw
            yield Request(self, source, at, draw(bits), at, 0)
            for at in streams[index]:
                yield Request(self, source, at, draw(bits), at, 0)
            return
        heap = heads
        while heap:
            at, index = heappop(heap)
            following = next(streams[index], None)
            if following is not None:
                heappush(heap, (following, index))
            steps = sources[index].draw(service[index])
            if workers == 1 or shares.randrange(workers) == worker:
                yield Request(self, sources[index], at, steps, at, 0)

    def _advance_stream(self) -> None:
        following = next(self._stream, None)
        self._next = following
        self._next_ns = NEVER if following is None else following.arrived_ns

    # Callers that give up, retry or connect anew

    def _select_callers(self) -> None:
        """Let everything happen outside that had to until now: callers give up, and retry."""
        closes, retries = self._closes, self._retries
        found: list[Request] = []
        while True:
            closing = closes[0][0] if closes else NEVER
            retrying = retries[0][0] if retries else NEVER
            if self._next_ns <= min(closing, retrying, self.now):
                # Arrivals become known in their turn, as the time-out of one may come before the arrival of the next.
                request = self._next
                self._advance_stream()
                self._arrived(request, found)  # type: ignore[arg-type]
            elif closing <= retrying and closing <= self.now:
                self._close(heappop(closes)[2])
            elif retrying <= self.now:
                self._arrived(heappop(retries)[2], found)
            else:
                break
        self._readable += found
        if self._ends:
            self.ready.append((self._read_ends, (self._ends,)))
            self._ends = []

    def _arrived(self, request: Request, found: list[Request]) -> None:
        patience = request.source.patience_ns
        if patience:
            self._seq += 1
            heappush(self._closes, (request.arrived_ns + patience, self._seq, request))
        self._unfinished[request] = None
        if not request.connects:
            found.append(request)
        elif len(self._backlog) < BACKLOG:
            self._backlog.append(request)
        else:
            request.state = _LOST
            self._record(request, LOST)

    def _accept(self, batch: list[Request]) -> None:
        """Accept connections; asyncio makes the transport in the next iteration, and reads from the one after."""
        self.now += len(batch) * (ACCEPT_NS // 2) * self.slow
        self.ready.append((self._connect, (batch,)))

    def _connect(self, batch: list[Request]) -> None:
        self.now += len(batch) * (ACCEPT_NS // 2) * self.slow
        self.ready.append((self._register, (batch,)))

    def _register(self, batch: list[Request]) -> None:
        self._readable += batch

    def _close(self, request: Request) -> None:
        """Its caller gives up, unless it has its answer."""
        if request.state == _ENDED:
            return
        request.closed = True
        if _READ <= request.state < _ENDED:
            self._ends.append(request)
        self._retry(request, request.arrived_ns + request.source.patience_ns)

    def _read_ends(self, batch: list[Request]) -> None:
        for request in batch:
            self.now += CLOSE_NS * self.slow
            request.gone = True

    def _retry(self, request: Request, at: int) -> None:
        source = request.source
        if request.attempt >= source.retries:
            return
        if source.retry_after_ns:
            at += self._retry_random.randrange(2 * source.retry_after_ns)
        again = Request(self, source, at, request.steps, request.called_ns, request.attempt + 1)
        again.connects = request.connects or request.closed
        self._seq += 1
        heappush(self._retries, (at, self._seq, again))

    # A task

    def _begin(self, request: Request) -> None:
        request.seen_ns = self.now
        request.state = _WAITING
        verdict = self._arrive(request)
        if verdict:
            self._start(request)
        elif verdict is not None:
            self._refuse(request)

    def _woken(self, request: Request, check: Callable[[Request], bool] | None) -> None:
        if check is None or check(request):
            self._start(request)
        else:
            self._refuse(request)

    def _start(self, request: Request) -> None:
        request.state = _RUNNING
        request.started_ns = self.now
        if request.deadline_ns and self.now >= request.deadline_ns:
            self.late_grants += 1
        self.running += 1
        self._advance(request)

    def _refuse(self, request: Request) -> None:
        self.now += REFUSE_NS * self.slow
        request.state = _ENDED
        self._record(request, REFUSED)
        if not request.closed and request.source.retries:
            self._retry(request, self.now)

    def _advance(self, request: Request) -> None:
        """Run a handler until it awaits or returns."""
        steps, number = request.steps, request.step
        for what, ns in steps[number:] if number else steps:
            number += 1
            if what == CPU:
                self.now += ns * self.slow
            elif what == IO:
                request.step = number
                self._seq += 1
                heappush(self._io, (self.now + ns, self._seq, request, False))
                return
            elif what == RESPOND:
                self.controller.started_response(request)
            elif what == DOWN:
                request.step = number
                self._call_downstream(request, ns, self.now)
                return
            else:
                request.step = number
                if self._threads < POOL_THREADS:
                    self._threads += 1
                    self._runnable.append([request, ns])
                else:
                    self._thread_wait.append((request, ns))
                return
        self.running -= 1
        request.state = _ENDED
        self._record(request, SERVED)
        self._finished(request, "ignored" if request.gone else "success")

    def _record(self, request: Request, status: int) -> None:
        self._unfinished.pop(request, None)
        log = self.log
        log.source.append(request.source.index)
        log.attempt.append(request.attempt)
        log.status.append(status)
        log.arrived.append(request.arrived_ns)
        log.started.append(request.started_ns)
        log.ended.append(self.now)

    # Downstream

    def _call_downstream(self, request: Request, ns: int, at: int) -> None:
        pool = self.downstream
        if pool.busy >= pool.slots:
            pool.waiting.append((request, ns))
            return
        pool.busy += 1
        self._seq += 1
        heappush(self._io, (at + pool.taking(ns, at), self._seq, request, True))

    def _downstream_ended(self, at: int) -> None:
        """A slot is free since the instant ``at``, whenever the loop learns of the answer."""
        pool = self.downstream
        pool.busy -= 1
        if pool.waiting:
            request, ns = pool.waiting.popleft()
            self._call_downstream(request, ns, at)

    # Threads

    def _run_thread(self) -> None:
        """The thread that has waited longest holds the interpreter lock until it ends or the switch interval does."""
        job = self._runnable.popleft()
        taken = min(job[1], SWITCH_NS)
        self.now += taken * self.slow
        job[1] -= taken
        if job[1]:
            self._runnable.append(job)
            return
        self._thread_done.append(job[0])
        if self._thread_wait:
            request, ns = self._thread_wait.popleft()
            self._runnable.append([request, ns])
        else:
            self._threads -= 1

    def _yield_lock(self) -> None:
        """The loop lets go of the interpreter lock, as every call of the selector does, and queues behind the threads.

        One core, and threads that only compute: the loop's turn comes after one switch interval of each of them (the
        convoy effect of the lock). Within its own turn it gives the lock up after a switch interval, between items.
        """
        for _ in range(len(self._runnable)):
            self._run_thread()
