"""The Redis backend against real servers, by the real clock: exact over processes, and nothing left behind or told."""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from hashlib import sha256
from ipaddress import ip_address
from typing import Any, TypeAlias

import hiredis
import pytest
from prometheus_client import CollectorRegistry, generate_latest

import fleet
import stores
from contracts.subjects import Calls, questions_open
from fleet import Part
from harness import config, hash_of, hello
from proxy import Proxy
from seawall import Seawall
from seawall.backends import Charge, Verdict
from seawall.backends.redis import RedisBackend
from seawall.backends.redis.slots import SlotPermit
from seawall.rate import SECOND, Quota, Rate
from seawall.testing import drive
from stores import HOST, Cluster, Server, standalone
from strategies import DAY, HOUR, MINUTE

MONTH = 30 * DAY
DECADE = 3_650 * DAY
PATIENT = 10 * SECOND

Connect: TypeAlias = Callable[..., RedisBackend]


def calls(backend: RedisBackend) -> Calls:
    assert isinstance(backend.observer, Calls)
    return backend.observer


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Makes backends that ask for every decision and have time; they are closed at the end."""
    made: list[RedisBackend] = []

    def make(url: str, **options: Any) -> RedisBackend:
        backend = RedisBackend(url, **{"timeout_ns": PATIENT, "leases": False, "deny_cache": False, **options})
        backend.observer = Calls()
        made.append(backend)
        return backend

    yield make
    for backend in made:
        await backend.aclose()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with stores.cluster() as nodes:
        yield nodes


async def spend(backend: RedisBackend, *charges: Charge) -> Verdict:
    answer = backend.spend(charges)
    verdict = await answer if inspect.isawaitable(answer) else answer
    assert verdict is not None
    return verdict


async def left(backend: RedisBackend, *charges: Charge) -> list[int]:
    return (await spend(backend, *[(meter, key, 0) for meter, key, _ in charges])).left


async def settled(backend: RedisBackend) -> None:
    while questions_open(backend):  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0.001)


async def eventually(true: Callable[[], bool], within: float = 20.0) -> None:
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


# Over processes


@pytest.mark.slow
def test_eight_processes_admit_exactly_the_burst_and_tell_nobody_the_same(store: Server) -> None:
    burst = 1_000
    options = {"leases": False, "deny_cache": False}
    part = Part(store.url, [("rate", "tenant", burst, MONTH)], decisions=200, options=options)
    told = fleet.run([part] * 8)
    assert sorted(left for one in told for (left,) in one.lefts) == list(range(burst))
    assert sum(one.refused for one in told) == 8 * 200 - burst
    assert [(set(one.results), one.fallen) for one in told] == [({"ok"}, 0)] * 8


@pytest.mark.slow
async def test_eight_processes_with_leases_admit_the_burst_but_for_what_they_hold(
    store: Server, connect: Connect
) -> None:
    """And give back at their end what they hold, so that nothing is lost."""
    burst, processes = 4_000, 8
    lease = burst // (4 * processes)
    options = {"leases": True, "deny_cache": False, "instances": processes}
    part = Part(store.url, [("rate", "tenant", burst, MONTH)], decisions=2 * burst // processes, options=options)
    told = await asyncio.to_thread(fleet.run, [part] * processes)
    admitted = sum(one.admitted for one in told)
    assert burst - processes * (lease - 1) <= admitted <= burst + processes * (lease - 1)
    # Some of it was decided without a call, or this proves nothing.
    assert sum(sum(one.results.values()) for one in told) < processes * part.decisions
    assert [one.fallen for one in told] == [0] * processes
    backend = connect(store.url)
    assert await left(backend, (backend.meter("rate", "tenant", Rate(burst, MONTH)), "tenant acme", 0)) == [
        burst - admitted
    ]


LIMITS: Sequence[tuple[str, str, int, int]] = [
    ("minute", "tenant", 300, MONTH),
    ("second", "tenant", 700, MONTH),
    ("address", "address", 150, MONTH),
]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["one server", "cluster"])
async def test_what_was_debited_of_each_limit_is_what_was_admitted(
    where: str, request: pytest.FixtureRequest, connect: Connect
) -> None:
    """All or nothing, also where a request's limits lie in several slots and refusals are given back."""
    url = request.getfixturevalue("store" if where == "one server" else "cluster").url
    callers = ["acme", "globex", "initech"]
    options = {"leases": False, "deny_cache": False, "key_prefix": f"fleet-{where}"}
    part = Part(url, LIMITS, decisions=450, callers=callers, options=options)
    told = await asyncio.to_thread(fleet.run, [part] * 4)
    assert [(set(one.results), one.fallen) for one in told] == [({"ok"}, 0)] * 4
    admitted = Counter(callers[number % 3] for one in told for number in one.numbers)
    backend = connect(url, key_prefix=f"fleet-{where}")
    for caller in callers:
        for name, kind, amount, period in LIMITS:
            meter = backend.meter(name, kind, Rate(amount, period))
            assert await left(backend, (meter, f"{kind} {caller}", 0)) == [amount - admitted[caller]]
        # One server admits as many as the narrowest limit does; over several slots two may refuse each other.
        assert admitted[caller] == 150 if where == "one server" else 0 < admitted[caller] <= 150


# Cancelled callers


@pytest.mark.slow
async def test_fifty_thousand_cancelled_calls_cost_no_connection_and_no_wrong_reply(
    store: Server, connect: Connect
) -> None:
    """Each caller has a limit of its own size, of which less is left each time: a reply to another call is noticed."""
    drawn, size, callers = random.Random(4), 1_000, 250
    loop = asyncio.get_running_loop()
    with Proxy(store.address) as proxy:
        backend = connect(proxy.url)
        meters = [backend.meter(f"m{n}", "tenant", Rate(size * (n + 1), DECADE)) for n in range(callers)]
        last = [size * (n + 1) for n in range(callers)]
        cancelled = answered = 0

        async def call(n: int) -> None:
            verdict = await spend(backend, (meters[n], f"caller {n}", 1))
            assert verdict.admitted
            assert size * n < verdict.left[0] < last[n]
            last[n] = verdict.left[0]

        while cancelled < 50_000:
            proxy.delayed(drawn.choice((0.0, 0.001, 0.005)), reply_only=drawn.random() < 0.5)
            tasks = [asyncio.create_task(call(n)) for n in range(callers) for _ in range(4)]
            for task in tasks:
                moment = drawn.random()
                if moment < 0.1:
                    task.cancel()
                elif moment < 0.9:
                    loop.call_later(moment * 0.015, task.cancel)
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if outcome is None:
                    answered += 1
                else:
                    assert isinstance(outcome, asyncio.CancelledError), outcome
                    cancelled += 1
        await settled(backend)
        assert answered > 1_000
        assert (proxy.connections, proxy.open) == (1, 1)
        assert (set(calls(backend).results), calls(backend).fallen) == ({"ok"}, [])
        assert asyncio.all_tasks() == {asyncio.current_task()}
        # What was sent was done, whether anybody waited for it or not; each of it once.
        for n, meter in enumerate(meters):
            (now,) = await left(backend, (meter, f"caller {n}", 0))
            assert size * n < now <= last[n]
        await backend.aclose()


@pytest.mark.slow
async def test_what_is_answered_too_late_is_answered_to_nobody(store: Server, connect: Connect) -> None:
    with Proxy(store.address) as proxy:
        backend = connect(proxy.url, timeout_ns=50_000_000)
        meters = [backend.meter(f"m{n}", "tenant", Rate(1_000 * (n + 1), DECADE)) for n in range(100)]
        for _ in range(5):
            proxy.passing()
            await eventually(lambda: backend.up)
            await spend(backend, (meters[0], "acme", 0))
            proxy.delayed(0.15, reply_only=True)
            late = await asyncio.gather(*(spend(backend, (meter, "acme", 1)) for meter in meters))
            proxy.passing()
            await eventually(lambda: backend.up)
            at_once = await asyncio.gather(*(spend(backend, (meter, "acme", 1)) for meter in reversed(meters)))
            for n, verdict in [*enumerate(late), *enumerate(reversed(at_once))]:
                assert 1_000 * n < verdict.left[0] < 1_000 * (n + 1)
        assert proxy.connections == 1
        assert "mismatch" not in calls(backend).results
        assert calls(backend).results.count("timeout") > 0
        await backend.aclose()


# What is kept, and for how long


def expiries(server: Server) -> dict[str, int]:
    """Milliseconds that each key has left; -1 is for ever, -2 for one that is gone by now."""
    return {key: server.command("PTTL", key) for key in server.command("KEYS", "*")}


@pytest.mark.parametrize("leases", [False, True])
async def test_every_key_expires(store: Server, connect: Connect, leases: bool) -> None:
    """After every operation: decisions that fit and that do not, debits, refunds, slots, leases and signs of life."""
    backend = connect(store.url, leases=leases, deny_cache=True)
    charges: list[Charge] = [
        (backend.meter("rate", "tenant", Rate(200, MINUTE)), "acme", 1),
        (backend.meter("quota", "tenant", Quota(1_000, "month", "Asia/Kathmandu")), "acme", 1),
        (backend.meter("huge", "address", Rate(1_000_000, MONTH, 5)), b"\0\0\0\1", 1),
    ]
    drawn, seen = random.Random(5), set()
    for _ in range(60):
        chosen = drawn.sample(charges, drawn.randint(1, 3))
        match drawn.randrange(5):
            case 0:
                backend.debit([(meter, key, drawn.randint(1, 50)) for meter, key, _ in chosen])
            case 1:
                backend.refund(chosen, time.time_ns())
            case 2:
                permit = backend.permit("tenant", "acme", 3)
                answer = backend.spend_with(permit, chosen)
                if inspect.isawaitable(answer):
                    await answer
                if drawn.random() < 0.5:
                    backend.release(permit)
            case _:
                for _ in range(20):
                    await spend(backend, *chosen)
        await settled(backend)
        found = expiries(store)
        assert -1 not in found.values()
        seen |= set(found)
    assert len(seen) >= 4
    assert calls(backend).fallen == []


async def test_nothing_is_left_of_callers_who_are_gone(store: Server, connect: Connect) -> None:
    backend = connect(store.url, leases=True, deny_cache=True)
    meter = backend.meter("rate", "tenant", Rate(5, SECOND))
    for batch in range(10):
        await asyncio.gather(*(spend(backend, (meter, f"tenant {batch} {n}", 1)) for n in range(50)))
    assert store.command("DBSIZE") > 100
    await backend.aclose()
    await eventually(lambda: store.command("DBSIZE") == 0)


async def test_one_script_is_kept_whatever_is_asked(store: Server, connect: Connect) -> None:
    backend = connect(store.url, leases=True)
    for n in range(1, 200):
        meters = [backend.meter(f"m{n} {m}", "tenant", Rate(n, MINUTE, m + 1)) for m in range(n % 7 + 1)]
        await asyncio.gather(*(spend(backend, *[(meter, f"t{t}", 1) for meter in meters]) for t in range(n % 100)))
    backend.debit([(backend.meter("quota", "tenant", Quota(5, "day")), "acme", 1)])
    await settled(backend)
    assert store.info("memory")["number_of_cached_scripts"] == "1"


def kept(server: Server) -> list[bytes]:
    """Each key with its value."""
    client = server.client()
    return [key + (client.get(key) or b"") for key in client.scan_iter(count=1_000)]


@pytest.mark.slow
async def test_no_caller_can_be_read_in_redis_in_the_log_or_in_metrics(
    connect: Connect, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """A thousand callers, by API key, by the id that the application gives, and by address."""
    caplog.set_level(logging.DEBUG)
    secret = "canary-of-the-backend"
    settings = config(
        identity={"tenant": [{"api_key": {"header": "X-API-Key"}}, {"state": "tenant_id"}]},
        plans={"own": {"rate": "3/hour", "quota": "2/month", "concurrency": 4}},
        shedding={"algorithm": "off"},
        defaults={"plan": "own", "anonymous_plan": "own"},
        tenants={f"listed-{n}": {"plan": "own", "keys": [hash_of(f"canary-key-{n}")]} for n in range(300)},
        routes=[{"name": "all", "match": {"path": "/**"}, "limits": {"ip": {"rate": "9/hour", "per": "client_ip"}}}],
    )
    callers: list[dict[str, Any]] = [
        *({"headers": {"X-API-Key": f"canary-key-{n}"}, "client": (f"198.51.1.{n % 250}", 1)} for n in range(300)),
        *({"state": {"tenant_id": f"canary-id-{n}"}, "client": (f"198.51.2.{n % 250}", 1)} for n in range(300)),
        *({"client": (f"198.51.{n}.3", 1)} for n in range(200)),
        *({"client": (f"2001:db8:ca4a:{n:x}::1", 1)} for n in range(200)),
    ]
    password = "canary-of-the-user"
    with standalone(password=password) as server, Proxy(server.address) as proxy:
        backend = connect(
            proxy.url.replace("//", f"//default:{password}@"), leases=True, deny_cache=True, secret=secret
        )
        app = Seawall(hello, config=settings, backend=backend, registry=registry)
        answers = []
        for many in range(0, 1_000, 10):
            asked = [drive(app, **caller) for caller in callers[many : many + 10] for _ in range(3)]
            answers += await asyncio.gather(*asked)
        assert {answer.status for answer in answers} == {200, 429}
        await settled(backend)
        stored = kept(server)
        proxy.refusing()
        await eventually(lambda: not backend.up)
        for caller in callers:
            await drive(app, **caller)
        await backend.aclose()
    assert len(stored) >= 2_000
    assert "is away" in caplog.text
    told = [caplog.text, repr(backend), repr(app), generate_latest(registry).decode()]
    for spelled in ("canary", "198.51.", "2001:db8", "ca4a"):
        assert not any(spelled.encode() in entry for entry in stored)
        assert not any(spelled in text for text in told)
    packed = [ip_address(caller["client"][0]).packed for caller in callers]
    digests = [sha256(f"canary-key-{n}".encode()).digest() for n in range(300)]
    assert not any(raw in entry for entry in stored for raw in (*(part[:8] for part in packed), *digests))


# Scripts, limits and clocks that change


async def test_a_script_that_is_flushed_is_sent_again_in_time(store: Server, connect: Connect) -> None:
    backend = connect(store.url, timeout_ns=2 * SECOND)
    meter = backend.meter("rate", "tenant", Rate(1_000_000, MONTH))
    admin, ended = store.client(), asyncio.Event()

    async def flush() -> int:
        count = 0
        while not ended.is_set():
            await asyncio.to_thread(admin.script_flush)
            count += 1
        return count

    flushing = asyncio.create_task(flush())
    lefts = []
    for _ in range(100):
        verdicts = await asyncio.gather(*(spend(backend, (meter, "acme", 1)) for _ in range(20)))
        lefts += [verdict.left[0] for verdict in verdicts]
    ended.set()
    assert await flushing > 10
    assert sorted(lefts, reverse=True) == list(range(999_999, 999_999 - 2_000, -1))
    assert (set(calls(backend).results), calls(backend).fallen) == ({"ok"}, [])
    assert store.calls()["eval"] > 1


@pytest.mark.parametrize(
    ("before", "used", "after", "remains"),
    [
        (Rate(100, MONTH), 50, Rate(10, MONTH), 5),
        (Rate(100, MONTH), 50, Rate(1_000, MONTH), 500),
        (Rate(100, MONTH), 100, Rate(10, MONTH), 0),
        (Rate(100, MONTH), 0, Rate(10, MONTH), 10),
        (Rate(3, MONTH), 1, Rate(100, MONTH), 66),  # a third is used, and what is begun is used
        (Rate(100, DAY), 50, Rate(100, 10 * DAY), 50),
        (Rate(100, MONTH, 200), 150, Rate(100, MONTH, 20), 5),
        (Quota(100, "month"), 30, Quota(50, "month"), 20),
        (Quota(100, "month"), 30, Quota(1_000, "month"), 970),
        (Quota(100, "month"), 30, Quota(20, "month"), 0),
    ],
    ids=str,
)
async def test_a_limit_that_is_changed_keeps_its_usage(
    store: Server, connect: Connect, before: Rate | Quota, used: int, after: Rate | Quota, remains: int
) -> None:
    """A bucket the part of it that is used, a quota the count."""
    old, new = connect(store.url), connect(store.url)
    await spend(old, (old.meter("limit", "tenant", before), "acme", used))
    changed = new.meter("limit", "tenant", after)
    assert await left(new, (changed, "acme", 0)) == [remains]
    if remains:
        assert (await spend(new, (changed, "acme", 1))).left == [remains - 1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Rate(100, MONTH), Rate(10, MONTH)),
        (Rate(100, MONTH), Rate(99, MONTH)),
        (Rate(7, MONTH), Rate(1_000, MONTH)),
        (Rate(50, DAY), Quota(50, "month")),
        (Quota(10, "month"), Quota(100, "month")),
        (Quota(50, "day"), Quota(50, "month")),
    ],
    ids=str,
)
async def test_two_versions_of_a_limit_at_once_admit_at_most_two_bursts(
    store: Server, connect: Connect, one: Rate | Quota, other: Rate | Quota
) -> None:
    """A deployment under way: old and new processes ask in turn, for the same caller."""
    backends = [connect(store.url), connect(store.url)]
    meters = [backend.meter("limit", "tenant", limit) for backend, limit in zip(backends, (one, other), strict=True)]
    least, most = sorted(limit.burst if isinstance(limit, Rate) else limit.limit for limit in (one, other))
    admitted = 0
    for _ in range(2 * most + 5):
        for backend, meter in zip(backends, meters, strict=True):
            admitted += (await spend(backend, (meter, "acme", 1))).admitted
    assert least <= admitted <= 2 * most
    assert [(set(calls(backend).results), calls(backend).fallen) for backend in backends] == [({"ok"}, [])] * 2


@pytest.mark.parametrize("ahead", [-400 * DAY, -30 * HOUR, -3 * HOUR, 3 * HOUR, 30 * HOUR, 400 * DAY])
@pytest.mark.parametrize("span", ["day", "month"])
async def test_windows_are_those_of_the_server_whatever_time_it_is_here(
    store: Server, connect: Connect, ahead: int, span: Any
) -> None:
    right, wrong = connect(store.url), connect(store.url, wall_clock=lambda: time.time_ns() + ahead)
    meters = [backend.meter("quota", "tenant", Quota(10, span, "Europe/Berlin")) for backend in (right, wrong)]
    bucket = wrong.meter("rate", "tenant", Rate(10, HOUR))
    first = await spend(wrong, (meters[1], "acme", 4), (bucket, "acme", 4))
    assert (first.admitted, first.left) == (True, [6, 6])
    assert abs(first.wall - time.time_ns()) < MINUTE
    assert await left(right, (meters[0], "acme", 0)) == [6]
    refused = await spend(wrong, (meters[1], "acme", 7))
    expected = await spend(right, (meters[0], "acme", 7))
    assert refused.waits is not None
    assert expected.waits is not None
    assert abs(refused.waits[0] - expected.waits[0]) < MINUTE
    wrong.refund(first.charges, first.wall)
    await settled(wrong)
    assert await left(wrong, *first.charges) == [10, 10]
    assert (set(calls(wrong).results), calls(wrong).fallen) == ({"ok"}, [])


# Replies that are none


def resp(value: Any) -> bytes:
    """A reply as a server writes it."""
    match value:
        case None:
            return b"$-1\r\n"
        case int():
            return b":%d\r\n" % value
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(value), value)
        case Exception():
            return b"-%b\r\n" % str(value).encode()
        case str():
            return b"+%b\r\n" % value.encode()
    return b"*%d\r\n" % len(value) + b"".join(map(resp, value))


class Liar:
    """A port before a server that changes what it says about scripts: lists of integers, which nothing else is."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.lie: Callable[[list[int]], Any] | None = None
        self.connections = 0
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Liar:
        self._server = await asyncio.start_server(self._serve, HOST)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        there, to = await asyncio.open_connection(*self._target)
        self._tasks |= {asyncio.create_task(self._ask(reader, to)), asyncio.create_task(self._answer(there, writer))}

    async def _ask(self, reader: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                to.write(data)
        except ConnectionError:
            pass  # which is what is to be done with a liar
        finally:
            to.close()

    async def _answer(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = hiredis.Reader()
        try:
            while data := await there.read(65_536):
                parser.feed(data)
                while (reply := parser.gets()) is not False:
                    if self.lie is not None and isinstance(reply, list) and set(map(type, reply)) == {int}:
                        said = self.lie(reply)
                        writer.write(said if isinstance(said, bytearray) else resp(said))
                    else:
                        writer.write(resp(reply))
        finally:
            writer.close()


def at(place: int, value: Any) -> Callable[[list[int]], Any]:
    """One element is another. A reply is a number, seconds, microseconds, a status, and three for each charge."""
    return lambda reply: [*reply[:place], value, *reply[place + 1 :]]


LIES: dict[str, Callable[[list[int]], Any]] = {
    "another number": lambda reply: [reply[0] + 1, *reply[1:]],
    "the number of the call before": lambda reply: [reply[0] - 1, *reply[1:]],
    "one more": lambda reply: [*reply, 0],
    "one less": lambda reply: reply[:-1],
    "nothing": lambda reply: [],
    "only the number": lambda reply: reply[:1],
    "twice as much": lambda reply: [*reply, *reply],
    "no time": at(1, 0),
    "a time without end": at(1, 2**62),
    "a second of two": at(2, 1_500_000),
    "a negative second": at(2, -1),
    "no such status": at(3, 7),
    "a negative status": at(3, -1),
    "a bucket of long ago": at(4, 0),
    "a negative bucket": at(4, -(2**60)),
    "a bucket too far": at(4, 2**62),
    "a part that is none": at(5, 2**62),
    "a negative part": at(5, -1),
    "a negative count": at(7, -5),
    "a count without end": at(7, 2**62),
    "text among numbers": at(4, b"17"),
    "nil among numbers": at(4, None),
    "a list among numbers": at(4, [1]),
    "text": lambda _: b"*3",
    "a status line": lambda _: "OK",
    "nil": lambda _: None,
    "a number": lambda _: 12,
    "no protocol at all": lambda _: bytearray(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "binary": lambda _: bytearray(bytes(range(256))),
    "a length without end": lambda _: bytearray(b"*99999999999\r\n:1\r\n"),
    "a negative length": lambda _: bytearray(b"*-7\r\n"),
}
TOLD_IN_PART = ("one more", "one less", "twice as much")
"""What was asked is answered before it is seen that the reply is as long as none; nothing else is believed then."""


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
async def test_what_is_no_reply_closes_the_connection_and_is_decided_here(
    store: Server, connect: Connect, lie: str
) -> None:
    async with Liar(store.address) as liar:
        backend = connect(liar.url, random=lambda: 0.0)
        meters = [backend.meter("rate", "tenant", Rate(10, HOUR)), backend.meter("q", "tenant", Quota(10, "month"))]
        charges: list[Charge] = [(meter, "acme", 1) for meter in meters]
        assert (await spend(backend, *charges)).left == [9, 9]
        await settled(backend)
        liar.lie = LIES[lie]
        verdict = await asyncio.wait_for(spend(backend, *charges), 5)
        if lie in TOLD_IN_PART:
            assert verdict.left == [8, 8]
        else:
            assert verdict.left == [9, 9]  # of this process's own share
            assert calls(backend).fallen == ["local"]
        assert set(calls(backend).results) == {"ok", "mismatch"}
        assert not backend.up
        liar.lie = None
        await eventually(lambda: backend.up)
        assert liar.connections >= 2
        assert (await spend(backend, *charges)).left == [7, 7]  # what it lied about had been done
        await backend.aclose()


async def test_an_error_that_writes_terminals_is_one_printable_line(
    store: Server, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    async with Liar(store.address) as liar:
        backend = connect(liar.url, random=lambda: 0.0)
        meter = backend.meter("rate", "tenant", Rate(10, HOUR))
        await spend(backend, (meter, "acme", 1))
        await settled(backend)
        liar.lie = lambda _: Exception("ERR \x1b[31mred\x07 \x00\x7f\u202e " + "x" * 5_000)
        assert (await spend(backend, (meter, "acme", 1))).left == [9]
        assert calls(backend).results[-1] == "error"
        (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert line.isprintable()
        assert len(line) < 500
        await backend.aclose()


# Rights, passwords and sockets

RIGHTS = ("evalsha", "eval", "get", "set", "del", "time")


def user(*rights: str) -> dict[str, str]:
    return {"app": " ".join(["on >pw resetchannels ~seawall:*", *(f"+{right}" for right in rights)])}


async def test_a_user_with_the_rights_to_evalsha_eval_get_set_del_and_time_on_its_keys_is_enough(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    with standalone(password="else", users=user(*RIGHTS)) as server:
        backend = connect(server.url_as("app", "pw"), leases=True)
        charges: list[Charge] = [
            (backend.meter("rate", "tenant", Rate(10, HOUR)), "acme", 1),
            (backend.meter("quota", "tenant", Quota(10, "day")), "acme", 1),
        ]
        assert (await spend(backend, *charges)).left == [9, 9]
        verdict = await spend(backend, *charges)
        assert verdict.left == [8, 8]
        backend.debit(charges)
        backend.refund(charges, verdict.wall)
        permit = backend.permit("tenant", "acme", 2)
        assert isinstance(permit, SlotPermit)
        answer = backend.spend_with(permit, charges)
        assert isinstance(answer, Awaitable)
        await answer
        backend.release(permit)
        for n in range(200):
            await spend(backend, (charges[0][0], f"t{n}", 1))
        await settled(backend)
        await backend.aclose()
        assert (set(calls(backend).results), calls(backend).fallen) == ({"ok"}, [])
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cluster", "sentinel"])
async def test_a_cluster_needs_cluster_slots_and_asking_as_well_and_a_sentinel_s_master_role(
    connect: Connect, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    also = ("cluster|slots", "asking") if kind == "cluster" else ("role",)
    start: Callable[..., AbstractContextManager[Any]] = getattr(stores, kind)
    with start(password="else", users=user(*RIGHTS, *also)) as servers:
        backend = connect(servers.url.replace(":else@", "app:pw@"))
        meter = backend.meter("rate", "tenant", Rate(10, HOUR))
        for n in range(30):
            assert (await spend(backend, (meter, f"caller {n}", 1))).left == [9]
        if kind == "cluster":
            slot = servers.slot_of(meter.tags["caller 1"])
            source = servers.node_of(slot)
            migration = servers.migration(slot, next(node for node in servers.nodes if node is not source))
            migration.begin()
            migration.move()
            assert (await spend(backend, (meter, "caller 1", 1))).left == [8]
            migration.finish()
        await backend.aclose()
        assert (set(calls(backend).results), calls(backend).fallen) == ({"ok"}, [])
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.slow
@pytest.mark.parametrize("missing", [right for right in RIGHTS if right != "del"])
async def test_without_a_right_it_is_away_and_says_which_in_one_line(
    connect: Connect, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    at = RIGHTS.index(missing)
    with standalone(password="else", users=user(*RIGHTS[:at], *RIGHTS[at + 1 :])) as server:
        backend = connect(server.url_as("app", "pw"), random=lambda: 0.0)
        meter = backend.meter("rate", "tenant", Rate(10, HOUR))
        for n in range(5):
            verdict = await spend(backend, (meter, "acme", 1))
            assert verdict.left == [9 - n]
            await asyncio.sleep(0.25)
        assert not backend.up
        (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert missing in line.lower()
        assert "acme" not in line
        server.command("ACL", "SETUSER", "app", f"+{missing}")
        await eventually(lambda: backend.up)
        assert (await spend(backend, (meter, "acme", 1))).left == [9]
        await backend.aclose()


async def test_a_password_that_is_wrong_is_a_reason_and_is_not_told(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    with standalone(password="right-one") as server:
        good = connect(server.url)
        meter = good.meter("rate", "tenant", Rate(10, HOUR))
        assert (await spend(good, (meter, "acme", 1))).left == [9]
        bad = connect(server.url.replace("right-one", "wrong-one"))
        assert (await spend(bad, (bad.meter("rate", "tenant", Rate(10, HOUR)), "acme", 2))).left == [8]
        assert calls(bad).fallen == ["local"]
        (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert "WRONGPASS" in line
        for secret in ("wrong-one", "right-one"):
            assert secret not in caplog.text + repr(bad) + repr(bad.session())
        await good.aclose()
        await bad.aclose()


async def test_a_socket_of_the_file_system_is_a_server_as_well(connect: Connect) -> None:
    with standalone(unix=True, password="p@ss/word") as server:
        backend = connect(server.url)
        meter = backend.meter("rate", "tenant", Rate(10, HOUR))
        assert (await spend(backend, (meter, "acme", 1))).left == [9]
        assert calls(backend).fallen == []
        assert server.port == 0
        await backend.aclose()


async def test_tls_is_spoken_with_who_shows_a_certificate(connect: Connect) -> None:
    with standalone(tls=True, password="secret") as server:
        backend = connect(server.url)
        meter = backend.meter("rate", "tenant", Rate(10, HOUR))
        assert (await spend(backend, (meter, "acme", 1))).left == [9]
        assert calls(backend).fallen == []
        stranger = connect(server.url.partition("?")[0])
        assert (await spend(stranger, (stranger.meter("rate", "tenant", Rate(10, HOUR)), "acme", 1))).left == [9]
        assert calls(stranger).fallen == ["local"]
        await backend.aclose()
        await stranger.aclose()


@pytest.mark.parametrize("number", [1, 15])
async def test_a_database_is_the_one_of_the_url(store: Server, connect: Connect, number: int) -> None:
    backends = [connect(store.url), connect(f"{store.url}/{number}")]
    lefts = [
        (await spend(backend, (backend.meter("rate", "tenant", Rate(10, HOUR)), "acme", 1))).left
        for backend in (*backends, *backends)
    ]
    assert lefts == [[9], [9], [8], [8]]
