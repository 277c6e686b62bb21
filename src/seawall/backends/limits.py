"""Any storage of the `limits` library (memcached, MongoDB, its own Redis) under Seawall's time-out, breaker and share.

It is for who has such a storage and nothing else. What every storage has is a counter, so the promises are weaker than
those of the Redis backend:

* A bucket is a **sliding-window counter**: its burst is what is admitted in the time in which it fills, rounded up to
  whole seconds, by counting fixed windows and weighting the one before by how much of it is still in sight. The rate
  holds on average, but any one window may see nearly twice its count, and a rate of 100/second with a burst of 10
  admits 100 at once. Waits are exact for that counter, which is what they are about.
* A **quota** counts its calendar window, exactly.
* Windows begin by the clock of **this process** and not by the storage's: hosts whose clocks differ count in different
  windows for so long.
* Several limits are **no single step**. All are read first, and where one refuses nothing is written; otherwise all are
  counted, and given back where another process was quicker. Between the two another caller may be refused for what is
  given back then, and a process that dies in between leaves it counted.
* A decision takes two round trips (three for the first of a window in memcached), a refusal one, and one that was
  refused within the last second none.
* Where the library's client tries again by itself, a unit may be counted twice.
* Whom an operator blocks is blocked in this process alone.

Keys are keyed hashes that tell neither a caller nor a limit. It needs limits 5.
"""

from __future__ import annotations

import asyncio
import logging
import re
from asyncio import AbstractEventLoop, Task, TimerHandle, get_running_loop
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from hashlib import blake2b
from importlib.util import find_spec
from random import random as draw
from threading import Lock
from time import monotonic_ns, time_ns
from typing import Any, NamedTuple, TypeVar, cast, final
from weakref import WeakValueDictionary

import limits
from limits.aio.storage import Storage
from limits.errors import ConfigurationError
from limits.storage import storage_from_string

from seawall.backends import DENIED_FOR, Charge, Failure, Key, Meter, Observer, Verdict, stored
from seawall.backends.breaker import Breaker
from seawall.backends.secret import hash_key
from seawall.backends.share import LocalMeter, LocalShare, locally
from seawall.blocks import Block, Blocks
from seawall.decision import NEVER, Clock
from seawall.rate import COUNT_MASK, SECOND, Quota, Rate

T = TypeVar("T")

_logger = logging.getLogger("seawall")

MOST_DENIED = 8_192
MOST_PENDING = 1_000
"""Debits and refunds under way. More are dropped: the storage does not keep up."""
LATE = 0.005
"""Seconds by which a timer has to be late to say that the event loop stalled, and not the storage."""
_EXTENSIONS = 2
_PROBE = 0.19
"""Seconds for a probe, which connects: less than there are between two of them."""
_PATIENCE = 1.0
"""Seconds that an operator waits."""
_STUCK = 1.0
"""Seconds without an answer in time after which connections are given up: less would make one for each time-out."""
_LONGEST_EXPIRY = 30 * 24 * 3600
"""Seconds beyond which memcached takes an expiry for a date."""
_DRIVERS = {"memcached": "memcachio", "mongodb": "motor", "redis": "redis", "valkey": "valkey"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "memcached": {"max_connections": 8},
    # The default client of limits does not work in its current versions; RESP3 reads replies that are not its own.
    "redis": {"implementation": "redispy", "protocol": 2},
    # Motor asks in threads, which nobody can cancel: they give up by themselves.
    "mongodb": {"serverSelectionTimeoutMS": 1_000, "connectTimeoutMS": 1_000, "socketTimeoutMS": 1_000},
}


class _Window(NamedTuple):
    """Where a charge is counted: keys of this window and of the one before (buckets), and when this one ends."""

    current: str
    previous: str | None
    end: int


class _Connected(NamedTuple):
    """What one event loop talks to, since when by its clock."""

    storage: Storage
    since: float


@final
class LimitsMeter(Meter):
    """One limit as counters of fixed windows. ``span`` is a window's nanoseconds, 0 for a calendar's."""

    __slots__ = ("_hash", "_prefix", "limit", "local", "most", "span")

    def __init__(self, name: str, store: str, rate: Rate | Quota, local: LocalMeter, prefix: str, secret: bytes):
        super().__init__(name, store, rate)
        self.local = local
        if isinstance(rate, Rate):
            seconds = -(-rate.burst * rate.period_ns // (rate.amount * SECOND))
            self.span = seconds * SECOND
            self.limit = rate.amount * self.span // rate.period_ns
            self.most = rate.burst
            kind = f"{seconds} s"
        else:
            self.span, self.limit, self.most, kind = 0, rate.limit, rate.limit, f"{rate.span} {rate.zone}"
        self._prefix = prefix
        self._hash = blake2b(_framed(name, stored(store), kind), digest_size=16, key=secret)

    def window(self, key: Key, wall: int) -> _Window:
        """Where ``key`` is counted at ``wall``."""
        owner = self._hash.copy()
        owner.update(_framed(key))
        if isinstance(self.rate, Quota):
            self.rate.enter(wall)
            return _Window(self._name(owner, self.rate.end_ns), None, self.rate.end_ns)
        end = wall - wall % self.span + self.span
        return _Window(self._name(owner, end), self._name(owner, end - self.span), end)

    def _name(self, owner: blake2b, end: int) -> str:
        whole = owner.copy()
        whole.update(b"%d" % end)
        return f"{self._prefix}:{whole.hexdigest()}"

    def used(self, before: int, count: int, wall: int, end: int) -> int:
        """Units in sight at ``wall``: ``count`` of the window that ends at ``end``, and a part of those ``before``."""
        return count + (before * (end - wall) // self.span if self.span else 0)

    def left(self, before: int, count: int, wall: int, end: int) -> int:
        return min(self.most, max(0, self.limit - self.used(before, count, wall, end)))

    def wait(self, before: int, count: int, cost: int, wall: int, end: int) -> int:
        """Nanoseconds until ``cost`` is admitted if nobody else spends: 0 for now, or ``NEVER``. Exact."""
        if cost > self.most:
            return NEVER
        if not cost or self.used(before, count, wall, end) + cost <= self.limit:
            return 0
        if not self.span:
            return end - wall
        room = self.limit - cost - count
        if room >= 0:
            # before * (end - t) // span <= room, solved for t; likewise below, a window later.
            return end - ((room + 1) * self.span - 1) // before - wall
        behind = ((self.limit - cost + 1) * self.span - 1) // count if count else self.span
        return end + max(0, self.span - behind) - wall

    def state(self, left: int, before: int, count: int, now: int, wall: int, end: int) -> int:
        """A state of the rate that says what is left, and where nothing is, when something will be."""
        if isinstance(self.rate, Quota):
            return self.rate.base + min(count, COUNT_MASK)
        full = now * self.rate.scale
        if left:
            return full + (self.rate.burst - left) * self.rate.interval
        wait = self.wait(before, count, 1, wall, end)
        return full + (self.rate.burst - 1) * self.rate.interval + wait * self.rate.scale


def _framed(*parts: Key) -> bytes:
    """Several parts as one, each told from the next by its length, and text from bytes."""
    framed = []
    for part in parts:
        raw = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        framed.append(b"%c%d:%b" % (b"b" if isinstance(part, bytes) else b"t", len(raw), raw))
    return b"".join(framed)


@final
class LimitsBackend:
    """A `seawall.backends.SharedBackend` on the storage that ``url`` names: ``async+memcached://127.0.0.1:11211``.

    A scheme without ``async+`` is the same storage with it. ``timeout_ns`` is for a whole decision; ``secret`` keys the
    hashes (without it a constant does); ``instances`` is the number of processes that share the limits while the
    storage is away, 1 if nobody says. ``max_keys`` is that of `seawall.backends.memory.MemoryBackend`, for the same
    time.

    Raises `ValueError` where there is no such storage or its driver is not installed.
    """

    name = "limits"

    def __init__(
        self,
        url: str,
        *,
        timeout_ns: int = 25_000_000,
        key_prefix: str = "seawall",
        secret: str | None = None,
        instances: int | None = None,
        max_keys: int = 100_000,
        on_failure: Failure = "local",
        deny_cache: bool = True,
        clock: Clock = monotonic_ns,
        wall_clock: Clock = time_ns,
        random: Callable[[], float] = draw,
    ) -> None:
        if not re.fullmatch("[!-~]{0,64}", key_prefix):
            raise ValueError("key_prefix must be at most 64 visible ASCII characters, for every storage takes those")
        self.on_failure: Failure = on_failure
        self.observer: Observer | None = None
        self._url, self._family = _storage_of(url)
        self._timeout = timeout_ns / SECOND
        self._prefix = key_prefix
        self._secret = hash_key(key_prefix, secret)
        self._clock = clock
        self._wall = wall_clock
        self._share = LocalShare(max_keys=max_keys, clock=clock, wall_clock=wall_clock)
        self._share.instances = instances or 1
        self._breaker = Breaker(clock, random)
        self.blocks = Blocks(wall_clock)
        self._meters: WeakValueDictionary[tuple[str, str, Rate | Quota], LimitsMeter] = WeakValueDictionary()
        self._making = Lock()
        self._denied: dict[tuple[Charge, ...], tuple[int, Verdict]] | None = {} if deny_cache else None
        self._storages: dict[AbstractEventLoop, _Connected] = {}
        self._pending: set[Task[Any]] = set()
        self._timer: TimerHandle | None = None
        if self._family != "mongodb":
            self._make()  # which says what is wrong with the rest of the URL; Motor's client needs a loop for that

    def __repr__(self) -> str:
        return f"<LimitsBackend on {self._family}, {self._breaker!r}>"

    @property
    def up(self) -> bool:
        """Whether the storage is asked: not while it is known to be away."""
        return self._breaker.closed

    def meter(self, name: str, store: str, rate: Rate | Quota) -> LimitsMeter:
        """The meter for a limit; the same one for the same name, store and rate."""
        with self._making:
            known = self._meters.get((name, store, rate))
            if known is None:
                # A quota of our own: it remembers the window it is in, by this backend's clock.
                own = Quota(rate.limit, rate.span, rate.zone) if isinstance(rate, Quota) else rate
                local = self._share.meter(name, store, own)
                known = LimitsMeter(name, store, own, local, self._prefix, self._secret)
                self._meters[name, store, own] = known
            return known

    def spend(
        self, charges: Sequence[Charge], failure: Failure | None = None
    ) -> Verdict | None | Awaitable[Verdict | None]:
        """Take all of ``charges`` or none; while the storage is away, at once what ``failure`` says."""
        if not self._breaker.closed:
            self._probe(get_running_loop())
            return self._fall_back(charges, failure)
        if self._denied:
            known = self._denied.get(tuple(charges))
            if known is not None:
                until, verdict = known
                now = self._clock()
                if now < until:
                    return _later(verdict, now)
                del self._denied[tuple(charges)]
        return self._ask(charges, failure)

    async def _ask(self, charges: Sequence[Charge], failure: Failure | None) -> Verdict | None:
        verdict = await self._call(lambda storage: self._decide(storage, charges))
        if verdict is None:
            return self._fall_back(charges, failure)
        if verdict.waits is not None and self._denied is not None:
            soonest = min((wait for wait in verdict.waits if wait > 0), default=DENIED_FOR)
            if len(self._denied) >= MOST_DENIED:
                del self._denied[next(iter(self._denied))]
            self._denied[tuple(charges)] = (verdict.now + min(soonest, DENIED_FOR), verdict)
        return verdict

    def _fall_back(self, charges: Sequence[Charge], failure: Failure | None) -> Verdict | None:
        return self._share.stand_in(_own(charges), failure or self.on_failure, self.observer)

    async def _decide(self, storage: Storage, charges: Sequence[Charge]) -> Verdict:
        """Read all, and if all fit count all; give them back if somebody was quicker."""
        now, wall = self._clock(), self._wall()
        own = _own(charges)
        windows = [meter.window(key, wall) for meter, key, _ in own]
        names = [name for window in windows for name in (window.current, window.previous) if name is not None]
        read = await _read(storage, names)
        befores = [read[window.previous] if window.previous else 0 for window in windows]
        counts = [read[window.current] for window in windows]

        def waits() -> list[int]:
            return [
                meter.wait(before, count, cost, wall, window.end)
                for (meter, _, cost), window, before, count in zip(own, windows, befores, counts, strict=True)
            ]

        refused = waits()
        if not any(refused):
            spent = [at for at, (_, _, cost) in enumerate(own) if cost]
            after = await _all(self._add(storage, own[at][0], windows[at], own[at][2]) for at in spent)
            for at, count in zip(spent, after, strict=True):
                counts[at] = count - own[at][2]
            refused = waits()
            if any(refused):
                await _all(self._take_back(storage, own[at][0], windows[at], own[at][2]) for at in spent)
            else:
                for at, count in zip(spent, after, strict=True):
                    counts[at] = count
        lefts, states = [], []
        for (meter, _, _), window, before, count in zip(own, windows, befores, counts, strict=True):
            left = meter.left(before, count, wall, window.end)
            lefts.append(left)
            states.append(meter.state(left, before, count, now, wall, window.end))
        return Verdict(charges, states, lefts, refused if any(refused) else None, now, wall)

    def _expiry(self, meter: LimitsMeter, window: _Window) -> int:
        """Seconds until nobody looks at a window any more, as the storage wants them; a minute more for its clock."""
        wall = self._wall()
        seconds = -(-(window.end + meter.span - wall) // SECOND) + 60
        if self._family == "memcached" and seconds > _LONGEST_EXPIRY:
            seconds += wall // SECOND
        return seconds

    async def _add(self, storage: Storage, meter: LimitsMeter, window: _Window, amount: int) -> int:
        return await storage.incr(window.current, self._expiry(meter, window), amount)

    async def _take_back(self, storage: Storage, meter: LimitsMeter, window: _Window, amount: int) -> None:
        # Those that cannot count downwards by a negative increment have a `decr`, though their base class does not.
        lower = getattr(storage, "decr", None) or getattr(getattr(storage, "bridge", None), "decr", None)
        if lower is not None:
            await lower(window.current, amount)
        else:
            await self._add(storage, meter, window, -amount)

    def debit(self, charges: Sequence[Charge]) -> list[int]:
        """Take ``charges`` without asking; the list says what was taken when that is known. A bucket takes no more than
        a window's worth."""
        if charges and isinstance(charges[0][0], LocalMeter):
            return self._share.debit(charges)
        taken = [0] * len(charges)
        if not self._breaker.closed:
            self._share.debit(locally(_own(charges)))
            return taken
        wall = self._wall()

        async def take(storage: Storage) -> None:
            for at, (meter, key, cost) in enumerate(_own(charges)):
                amount = min(cost, meter.limit) if meter.span else cost
                await self._add(storage, meter, meter.window(key, wall), amount)
                taken[at] = amount

        self._start(self._call(take))
        return taken

    def refund(self, charges: Sequence[Charge], spent_at: int) -> None:
        """Give ``charges`` back in the window of ``spent_at``, as long as it is in sight. Lost while the storage is
        away."""
        if charges and isinstance(charges[0][0], LocalMeter):
            self._share.refund(charges, spent_at)
            return
        if not charges or not self._breaker.closed:
            return
        wall = self._wall()

        async def give(storage: Storage) -> None:
            for meter, key, cost in _own(charges):
                window = meter.window(key, spent_at)
                if cost and wall < window.end + meter.span:
                    await self._take_back(storage, meter, window, cost)

        self._start(self._call(give))

    async def forget(self, charges: Sequence[tuple[Meter, Key]]) -> None:
        """Let these callers have spent nothing in the windows that are in sight. Raises `OSError` where the storage is
        away. Another process refuses for a second what it knows to be refused."""
        wall = self._wall()
        own = cast("Sequence[tuple[LimitsMeter, Key]]", charges)
        windows = [meter.window(key, wall) for meter, key in own]
        names = [name for window in windows for name in (window.current, window.previous) if name is not None]

        async def clear(storage: Storage) -> bool:
            await _all(storage.clear(name) for name in names)
            return True

        if not await self._call(clear, _PATIENCE):
            raise OSError(self._breaker.statistics()["reason"])
        if self._denied:
            forgotten = set(charges)
            for known in [known for known in self._denied if forgotten.intersection(charge[:2] for charge in known)]:
                del self._denied[known]
        await self._share.forget([(meter.local, key) for meter, key in own])

    async def block(self, tenant: str, block: Block | None) -> None:
        """Keep a tenant out of this process until then, or let it in again: the storage has no word for that."""
        if block is None:
            self.blocks.remove(tenant)
        else:
            self.blocks.add(tenant, block)

    def open(self) -> None:
        """Begin to connect, on the running loop, without waiting."""
        self._start(self._call(self._knock, _PROBE))

    async def _knock(self, storage: Storage) -> None:
        """Connect, and do what a decision does, in its time: who answers may be too slow, or unable to write."""
        key = f"{self._prefix}:{blake2b(_framed('canary'), digest_size=16, key=self._secret).hexdigest()}"
        await storage.get(key)
        async with asyncio.timeout(self._timeout):
            await storage.get(key)
            await storage.incr(key, 60)
        if self._breaker.succeed():
            _logger.info("the storage of the limits backend is back")

    def _probe(self, loop: AbstractEventLoop) -> None:
        """Send a probe if one is due."""
        if self._breaker.begin_probe():
            self._start(self._call(self._knock, _PROBE), loop)

    def _tick(self, loop: AbstractEventLoop) -> None:
        """Probe while the storage is away. Requests do so as well, for the loop that began this may be gone."""
        self._timer = None
        if not self._breaker.closed:
            self._probe(loop)
            self._timer = loop.call_later(max(0.001, self._breaker.probe_in() / SECOND), self._tick, loop)

    def _start(self, work: Coroutine[Any, Any, Any], loop: AbstractEventLoop | None = None) -> None:
        """Run ``work`` beside the request. Each has its own deadline."""
        if len(self._pending) >= MOST_PENDING:
            work.close()
            self._observe("timeout", self._clock())
            return
        task = (loop or get_running_loop()).create_task(work)
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def _call(self, work: Callable[[Storage], Coroutine[Any, Any, T]], seconds: float = 0) -> T | None:
        """What ``work`` returns within ``seconds``, or else the time-out; or ``None``, and the breaker is open."""
        loop, started = get_running_loop(), self._clock()
        try:
            connected = self._storages.get(loop) or self._connect(loop)
        except Exception as error:  # a driver that is too old, an option it does not know
            self._fail("error", error, started, loop, None)
            return None
        task = loop.create_task(work(connected.storage))
        try:
            await self._answered(task, loop, seconds or self._timeout)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not task.done():
            task.add_done_callback(_forget)
            task.cancel()
            self._fail("timeout", None, started, loop, connected)
            return None
        failure = asyncio.CancelledError() if task.cancelled() else task.exception()
        if failure is not None:
            self._fail(_result_of(failure), failure, started, loop, connected)
            return None
        self._observe("ok", started)
        return task.result()

    async def _answered(self, task: Task[Any], loop: AbstractEventLoop, seconds: float) -> None:
        """Wait until ``task`` is done or its time is over. A loop that stood still has not listened: then there is half
        as much time again."""
        deadline = loop.time() + seconds
        for _ in range(1 + _EXTENSIONS):
            await asyncio.wait((task,), timeout=deadline - loop.time())
            now = loop.time()
            if task.done() or now - deadline < LATE:
                return
            deadline = now + seconds / 2

    def _fail(
        self,
        result: str,
        error: BaseException | None,
        started: int,
        loop: AbstractEventLoop,
        connected: _Connected | None,
    ) -> None:
        """Note a failure, and give the connections up on which it happened, unless they are merely slow."""
        self._observe(result, started)
        stuck = connected is not None and (result != "timeout" or loop.time() - connected.since > _STUCK)
        if connected is not None and stuck and self._storages.get(loop) is connected:
            del self._storages[loop]
            self._release(connected.storage, loop)
        reason = result if error is None else f"{result}: {type(error).__name__}"
        if self._breaker.fail(reason):
            _logger.warning("the storage of the limits backend is away (%s): %s decides", reason, self.on_failure)
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_later(self._breaker.probe_in() / SECOND, self._tick, loop)

    def _observe(self, result: str, started: int) -> None:
        if self.observer is not None:
            self.observer.called(result, self._clock() - started)

    def _make(self) -> Storage:
        try:
            return cast(Storage, storage_from_string(self._url, **_OPTIONS.get(self._family, {})))
        except ConfigurationError as error:
            # Some of them repeat the whole URL, password and all.
            raise ValueError(re.sub(r"\S+://\S+", f"of {self._family}", str(error))) from None
        except ValueError:  # whose words may be a part of the password
            raise ValueError(f"the url of {self._family} cannot be read") from None

    def _connect(self, loop: AbstractEventLoop) -> _Connected:
        """The storage of ``loop``. Connections belong to a loop, and tests use several, one after the other."""
        for other in [other for other in self._storages if other.is_closed()]:
            del self._storages[other]
        connected = self._storages[loop] = _Connected(self._make(), loop.time())
        return connected

    def _release(self, storage: Storage, loop: AbstractEventLoop) -> None:
        """Close what ``storage`` holds open. The library has no word for it, but every client of its has one."""
        bridge: Any = getattr(storage, "bridge", storage)
        pending = None
        try:
            if self._family == "memcached" and bridge._storage is not None:
                pending = getattr(bridge._storage, "connection_pool", bridge._storage).close()
            elif self._family == "mongodb":
                bridge.storage.close()
            elif self._family in ("redis", "valkey"):
                pending = bridge.storage.aclose()
        except Exception:
            _logger.warning("connections of the limits backend could not be closed", exc_info=True)
        if asyncio.iscoroutine(pending):
            self._start(pending, loop)

    def statistics(self) -> dict[str, dict[str, int]]:
        """Of the keys that are tracked here while the storage is away, as `seawall.backends.memory` says it."""
        return self._share.statistics()

    async def aclose(self) -> None:
        """Let what is under way end, and close the connections of the running loop."""
        loop = get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        mine = [task for task in self._pending if task.get_loop() is loop]
        if mine:
            await asyncio.wait(mine)
        connected = self._storages.pop(loop, None)
        if connected is not None:
            self._release(connected.storage, loop)
            mine = [task for task in self._pending if task.get_loop() is loop]
            if mine:
                await asyncio.wait(mine, timeout=self._timeout)


def _storage_of(url: str) -> tuple[str, str]:
    """The URL of the asynchronous storage that is meant, and what kind it is."""
    if int(limits.__version__.partition(".")[0]) < 5:
        raise ValueError(f"the limits backend needs limits 5 and this is {limits.__version__}: pip install 'limits>=5'")
    scheme, separator, _ = url.partition("://")
    known = sorted(name for name in limits.storage.SCHEMES if name.startswith("async+"))  # type: ignore[attr-defined]
    wanted = scheme if scheme.startswith("async+") else f"async+{scheme}"
    if not separator or wanted not in known:
        what = f"no asynchronous storage for '{scheme}://'" if separator else "no scheme in the url"
        raise ValueError(f"{what}; there are {', '.join(f'{name}://' for name in known)}")
    family = wanted.split("+")[1]
    driver = _DRIVERS.get(family)
    if driver is not None and find_spec(driver) is None:
        raise ValueError(f"{wanted}:// needs a driver: pip install {driver}")
    return f"{wanted}{url[len(scheme) :]}", family


def _own(charges: Sequence[Charge]) -> Sequence[tuple[LimitsMeter, Key, int]]:
    return cast("Sequence[tuple[LimitsMeter, Key, int]]", charges)


def _later(verdict: Verdict, now: int) -> Verdict:
    """A refusal that is still one, with what is left of its waits."""
    waits = [wait - (now - verdict.now) if wait > 0 else wait for wait in verdict.waits or ()]
    return Verdict(verdict.charges, [*verdict.states], [*verdict.left], waits, verdict.now, verdict.wall)


def _result_of(error: BaseException) -> str:
    """How a call ended, by its exception. Clients have a ConnectionError of their own each."""
    if isinstance(error, TimeoutError):
        return "timeout"
    lost = isinstance(error, OSError) or any(kind.__name__ == "ConnectionError" for kind in type(error).__mro__)
    return "connection" if lost else "error"


async def _read(storage: Storage, names: Sequence[str]) -> dict[str, int]:
    """What is counted under ``names``: all in one command where the client has one (memcached)."""
    read = getattr(getattr(storage, "bridge", None), "get_many", None)
    if read is None:
        return dict(zip(names, await _all(storage.get(name) for name in names), strict=True))
    found = await read(names)
    return {name: found.get(name.encode(), 0) for name in names}


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all, at the same time; one alone needs no task."""
    several = list(work)
    return [await several[0]] if len(several) == 1 else list(await asyncio.gather(*several))


def _forget(task: Task[Any]) -> None:
    """Look at how a task ended that nobody waits for any more, or it is reported."""
    if not task.cancelled():
        task.exception()
