"""Overload on the servers that people run, each a process of its own: what waits, what is refused, what is left."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from hashlib import sha256
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from websockets.asyncio.client import connect as websocket
from websockets.exceptions import InvalidStatus

from serving import ASGI_SERVERS, Caller, Reply, Served, asgi_server, serving

pytestmark = pytest.mark.slow

TIMEOUT = 20.0
SECOND = {"X-Request-Priority": "second"}
SOAK_SECONDS = float(os.environ.get("SEAWALL_SOAK_SECONDS", "8"))
"""How long the mixed load lasts. A minute shows more."""
GROWTH = 24 << 20
"""Bytes that a server may be larger after the mixed load than after a quarter of it: the allocator's, not ours."""

_numbers = count()


@pytest.fixture(scope="module", params=ASGI_SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(asgi_server(request.param, "tests.overloaded:app"), log) as served:
        yield served


@pytest.fixture
async def connect(server: Served) -> AsyncIterator[Callable[[], Awaitable[Caller]]]:
    """Opens connections to the server, and closes them when the test ends."""
    callers: list[Caller] = []

    async def opened() -> Caller:
        callers.append(await Caller.connect(server.port))
        return callers[-1]

    yield opened
    for caller in callers:
        await caller.closed()


Connect = Callable[[], Awaitable[Caller]]


class Case:
    """One application on the server, as its operator sees it."""

    def __init__(self, policy: str, operator: Caller) -> None:
        self.path = f"/{policy}-{next(_numbers)}"
        self._operator = operator

    async def handlers(self) -> dict[str, int]:
        """How many have begun and ended."""
        found: dict[str, int] = json.loads((await self._operator.ask(f"{self.path}/control")).body)
        return found

    async def release(self) -> None:
        await self._operator.ask(f"{self.path}/control", "POST")

    async def metric(self, name: str, **labels: str) -> int:
        """The sum of a metric's samples."""
        text = (await self._operator.ask(f"{self.path}/metrics")).body.decode()
        samples = re.findall(rf"^{name}({{.*}})? (\S+)$", text, re.MULTILINE)
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return int(sum(float(value) for found, value in samples if all(label in found for label in wanted)))

    async def begun(self, expected: int) -> None:
        await until(lambda: self.handlers(), lambda found: found["begun"] == expected)

    async def queued(self, expected: int) -> None:
        await until(lambda: self.metric("seawall_queued_requests"), lambda found: found == expected)

    async def drained(self) -> None:
        """Nothing in flight, nothing waits, no stream is open."""
        for name in ("seawall_inflight_requests", "seawall_queued_requests", "seawall_streams"):
            await until(lambda name=name: self.metric(name), lambda found: found == 0)  # type: ignore[misc]


async def until(read: Callable[[], Awaitable[Any]], holds: Callable[[Any], bool]) -> None:
    """Wait for something that the server does."""
    deadline = monotonic() + TIMEOUT
    while not holds(found := await read()):
        assert monotonic() < deadline, f"it did not happen, the last was {found}"
        await asyncio.sleep(0.01)


async def hold(case: Case, connect: Connect, number: int = 2) -> list[Caller]:
    """Take all the permits there are."""
    callers = [await connect() for _ in range(number)]
    for caller in callers:
        await caller.send(f"{case.path}/wait")
    await case.begun(number)
    return callers


def check_refusal(reply: Reply) -> None:
    document = json.loads(reply.body)
    assert (reply.status, document["status"]) == (503, 503)
    assert document["reason"] in {"overload", "queue_full", "queue_timeout"}
    assert int(reply.headers["retry-after"]) == document["retry_after"] >= 1
    assert reply.headers.get("connection", "keep-alive") == "keep-alive"


async def test_beyond_the_limit_the_first_wait_and_the_second_are_refused(connect: Connect) -> None:
    case = Case("fixed", await connect())
    held = await hold(case, connect)
    waiting = [await connect() for _ in range(4)]
    for caller in waiting:
        await caller.send(f"{case.path}/wait")
    await case.queued(4)
    refused = [await connect() for _ in range(12)]
    for reply in await asyncio.gather(*(caller.ask(f"{case.path}/wait", headers=SECOND) for caller in refused)):
        check_refusal(reply)
    assert await case.metric("seawall_queued_requests", priority="first") == 4
    assert await case.metric("seawall_inflight_requests") == 2

    await case.release()
    assert [(await caller.reply()).status for caller in (*held, *waiting)] == [200] * 6
    await case.drained()
    assert await case.handlers() == {"begun": 6, "ended": 6}
    assert await case.metric("seawall_requests_total", outcome="shed") == 12
    for caller in refused:  # over the connections on which they were refused
        await until(lambda caller=caller: caller.ask(f"{case.path}/wait"), lambda reply: reply.status == 200)  # type: ignore[misc]


async def test_who_leaves_while_it_waits_is_never_served(connect: Connect) -> None:
    case = Case("fixed", await connect())
    path = f"{case.path}/wait"
    held = await hold(case, connect)
    closing, crashing, uploaded, uploading, patient, sender = waiting = [await connect() for _ in range(6)]
    for caller in (closing, crashing, patient):
        await caller.send(path)
    for caller in (uploaded, sender):
        await caller.send(path, "POST", body=b"all of it")
    await uploading.send(path, "POST", {"Content-Length": "10"})
    uploading.writer.write(b"half")
    await case.queued(len(waiting))
    for caller in (closing, uploaded, uploading):
        caller.leave()
    crashing.abort()
    for _ in range(3):  # round trips, behind which the server has read what came before them
        await case.handlers()

    await case.release()
    assert [(await caller.reply()).status for caller in (*held, patient, sender)] == [200] * 4
    await case.drained()
    assert await case.handlers() == {"begun": 4, "ended": 4}
    assert await case.metric("seawall_requests_total", outcome="cancelled") == 4


def described(body: bytes) -> dict[str, Any]:
    return {"size": len(body), "digest": sha256(body).hexdigest()}


async def test_what_somebody_sends_who_waits_arrives_whole(connect: Connect) -> None:
    case = Case("fixed", await connect())
    path = f"{case.path}/wait"
    await hold(case, connect)
    bodies = [os.urandom(size) for size in (0, 10, 60_000, 1_000_000)]
    posts = [await connect() for _ in bodies]
    sending = [
        asyncio.create_task(caller.send(path, "POST", body=body)) for caller, body in zip(posts, bodies, strict=True)
    ]
    chunked, body = await connect(), os.urandom(300_000)
    await chunked.send(path, "POST", {"Transfer-Encoding": "chunked"})
    chunks = (body[at : at + 7_001] for at in range(0, len(body), 7_001))
    sending.append(asyncio.create_task(chunked.send_chunks(chunks)))
    asking = await connect()
    await asking.send(path, "POST", {"Content-Length": str(len(body)), "Expect": "100-continue"})
    await case.queued(len(bodies) + 2)

    await case.release()
    assert (await asking.start()).status == 100
    asking.writer.write(body)
    for caller, sent in zip((*posts, chunked, asking), (*bodies, body, body), strict=True):
        reply = await caller.reply()
        assert (reply.status, json.loads(reply.body)) == (200, described(sent))
    await asyncio.gather(*sending)
    await case.drained()


async def test_bodies_arrive_whole_where_all_the_time_somebody_waits(connect: Connect) -> None:
    case = Case("fixed", await connect())
    deadline = monotonic() + TIMEOUT

    async def sender() -> None:
        caller = await connect()
        served = 0
        while served < 30:
            assert monotonic() < deadline
            body = os.urandom(1_000 * served)
            reply = await caller.ask(f"{case.path}/sum", "POST", body=body)
            if reply.status != 200:
                check_refusal(reply)
                await caller.closed()  # which some servers do, where the body was still on its way
                caller = await connect()
                continue
            assert json.loads(reply.body) == described(body)
            served += 1

    await asyncio.gather(*(sender() for _ in range(6)))
    await case.drained()
    assert await case.metric("seawall_queue_wait_seconds_count", result="admitted") > 0


@pytest.mark.parametrize("path", ["busy", "thread"])
async def test_a_burst_on_handlers_that_never_await_is_answered(path: str, connect: Connect) -> None:
    case = Case("adaptive", await connect())
    callers = [await connect() for _ in range(60)]
    observer = await connect()
    delays: list[float] = []

    async def observe() -> None:
        while True:
            sent = monotonic()
            assert (await observer.ask(f"{case.path}/control")).status == 200
            delays.append(monotonic() - sent)

    observing = asyncio.create_task(observe())
    replies = await asyncio.gather(*(caller.ask(f"{case.path}/{path}", headers=SECOND) for caller in callers))
    await until(case.handlers, lambda _: len(delays) > 0)
    observing.cancel()
    served = [reply for reply in replies if reply.status == 200]
    for reply in replies:
        if reply.status != 200:
            check_refusal(reply)
    assert 0 < len(served) < 60
    assert max(delays) < 5.0
    await case.drained()
    assert await case.handlers() == {"begun": len(served), "ended": len(served)}
    # The storm is over, and whoever comes now is served.
    assert (await callers[0].ask(f"{case.path}/{path}")).status == 200


async def test_a_handler_in_a_thread_keeps_its_permit_until_it_ends(connect: Connect) -> None:
    case = Case("fixed", await connect())
    held = [await connect() for _ in range(2)]
    for caller in held:
        await caller.send(f"{case.path}/thread-wait")
    await case.begun(2)
    held[0].abort()
    other = await connect()
    check_refusal(await other.ask(f"{case.path}/sum", "POST", SECOND))
    assert await case.metric("seawall_inflight_requests") == 2

    await case.release()
    assert (await held[1].reply()).status == 200
    await case.drained()
    assert await case.handlers() == {"begun": 2, "ended": 2}


async def test_a_background_task_keeps_the_permit_of_its_request(connect: Connect) -> None:
    case = Case("fixed", await connect())
    callers = [await connect() for _ in range(2)]
    for caller in callers:
        assert (await caller.ask(f"{case.path}/background")).status == 200
    assert await case.metric("seawall_inflight_requests") == 2
    other = await connect()
    check_refusal(await other.ask(f"{case.path}/sum", "POST", SECOND))

    await case.release()
    await case.drained()
    assert await case.handlers() == {"begun": 2, "ended": 2}
    assert (await other.ask(f"{case.path}/sum", "POST")).status == 200


async def test_a_stream_gives_its_permit_back_as_it_starts(connect: Connect) -> None:
    case = Case("fixed", await connect())
    listeners = [await connect() for _ in range(4)]
    for listener in listeners:
        await listener.send(f"{case.path}/events")
        assert (await listener.start()).status == 200
        assert await listener.chunk() == b"data: 1\n\n"
    assert await case.metric("seawall_streams") == 4
    other = await connect()
    assert (await other.ask(f"{case.path}/sum", "POST")).status == 200
    check_refusal(await other.ask(f"{case.path}/events"))  # of the streams' own budget

    await case.release()
    for listener in listeners:
        assert await listener.chunk() == b"data: 2\n\n"
        assert await listener.chunk() == b""
    await case.drained()


async def test_a_websocket_gives_its_permit_back_as_it_is_accepted(connect: Connect, server: Served) -> None:
    case = Case("fixed", await connect())
    address = f"ws://127.0.0.1:{server.port}{case.path}"
    opening = [asyncio.create_task(open_socket(f"{address}/slow-chat")) for _ in range(2)]
    await until(lambda: case.metric("seawall_inflight_requests"), lambda found: found == 2)
    other = await connect()
    check_refusal(await other.ask(f"{case.path}/sum", "POST", SECOND))
    with pytest.raises(InvalidStatus) as caught:
        await open_socket(f"{address}/chat", SECOND)
    assert caught.value.response.status_code == 503
    assert int(caught.value.response.headers["Retry-After"]) >= 1

    await case.release()
    sockets = [*await asyncio.gather(*opening), await open_socket(f"{address}/chat")]
    for socket in sockets:
        await socket.send("hi")
        assert await socket.recv() == "HI"
    assert (await other.ask(f"{case.path}/sum", "POST")).status == 200
    await asyncio.gather(*(socket.close() for socket in sockets))
    await case.drained()


async def open_socket(address: str, headers: dict[str, str] | None = None) -> Any:
    return await websocket(address, additional_headers=headers, open_timeout=TIMEOUT, close_timeout=TIMEOUT)


async def test_what_has_no_time_left_is_not_begun(connect: Connect) -> None:
    case = Case("fixed", await connect())
    caller = await connect()
    reply = await caller.ask(f"{case.path}/sum", "POST", {"X-Request-Timeout-Ms": "0"})
    assert (reply.status, json.loads(reply.body)["reason"]) == (504, "expired")
    assert "retry-after" not in reply.headers
    assert await case.handlers() == {"begun": 0, "ended": 0}
    assert (await caller.ask(f"{case.path}/sum", "POST", {"X-Request-Timeout-Ms": "20000"})).status == 200
    assert await case.metric("seawall_requests_total", outcome="expired") == 1


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("soaked") / "log"
    with serving(asgi_server("uvicorn-httptools", "tests.overloaded:app"), log) as served:
        yield served


def resident(served: Served) -> int:
    """Bytes of memory that the server's process holds; 0 where the system does not tell."""
    status = Path(f"/proc/{served.process.pid}/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) << 10 if found else 0


async def test_after_a_mixed_load_nothing_is_left_and_memory_is_flat(soaked: Served) -> None:
    port = soaked.port
    operator = await Caller.connect(port)
    case = Case("adaptive", operator)
    statuses: Counter[int | str] = Counter()
    began = monotonic()

    async def visit(kind: int) -> None:
        """One client: it asks for this and that, in a mix of its own, and leaves now and then."""
        caller = await Caller.connect(port)
        for turn in count(kind):
            if monotonic() - began > SOAK_SECONDS:
                break
            headers = SECOND if turn % 3 else {"X-Request-Timeout-Ms": "500"}
            what = turn * 7 % 13
            if what == 0:
                await caller.send(f"{case.path}/busy", headers=headers)
                caller.abort()
            elif what == 1:
                await caller.send(f"{case.path}/sum", "POST", {"Content-Length": "1000"})
                caller.leave()
            elif what == 2:
                await caller.send(f"{case.path}/events", headers=headers)
                statuses[(await caller.start()).status] += 1
                caller.leave()
            elif what == 3:
                statuses["chat"] += await chatted(f"ws://127.0.0.1:{port}{case.path}/chat", headers)
            elif what < 7:
                body = os.urandom(turn % 50_000)
                reply = await caller.ask(f"{case.path}/sum", "POST", headers, body)
                statuses[reply.status] += 1
                assert reply.status != 200 or json.loads(reply.body) == described(body)
            else:
                path = "thread" if what == 7 else "busy"
                statuses[(await caller.ask(f"{case.path}/{path}", headers=headers)).status] += 1
            if what < 3:
                await caller.closed()
                caller = await Caller.connect(port)
        await caller.closed()

    async def watch() -> int:
        await asyncio.sleep(SOAK_SECONDS / 4)
        return resident(soaked)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(visit(kind) for kind in range(24)))
    early = await watching
    await case.release()
    await case.drained()
    late = resident(soaked)
    print(f"{SOAK_SECONDS:.0f} s: {dict(statuses)}, resident {early >> 10} KiB early, {late >> 10} KiB late")
    await operator.closed()
    assert set(statuses) <= {200, 503, 504, "chat"}
    assert statuses[200] > 0
    assert statuses[503] > 0
    assert statuses["chat"] > 0
    assert late - early < GROWTH


async def chatted(address: str, headers: dict[str, str]) -> bool:
    """Whether a WebSocket was accepted, and answered."""
    try:
        socket = await open_socket(address, headers)
    except InvalidStatus as refused:
        if refused.response.status_code not in (503, 504):
            raise
        return False
    async with socket:
        await socket.send("hi")
        assert await socket.recv() == "HI"
    return True
