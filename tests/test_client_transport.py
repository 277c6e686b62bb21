"""The transports of `seawall.client` over real connections, with both libraries, on both kinds of event loop."""

from __future__ import annotations

import asyncio
import gc
import gzip
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import httpx2
import pytest

from calling import LIBRARIES, CancelledAt, Heard, Loopback, listening, reply, script
from seawall.client import (
    AsyncClient,
    CircuitBreaker,
    CircuitOpen,
    Client,
    DeadlineExceeded,
    ResilientTransport,
    RetryBudget,
    RetryBudgetExhausted,
    RetryPolicy,
    SyncResilientTransport,
    TooManyInFlight,
)
from seawall.client.hedging import first_of_two
from seawall.client.latency import LEAST
from seawall.testing import ManualClock

AT_ONCE = RetryPolicy(base=0, throttled_base=0)
"""No waits, or a suite of them takes minutes."""

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda module: module.__name__)


@pytest.fixture(params=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[Any]]], Any]:
    """Runs a coroutine function on one of the event loops."""
    if request.param == "trio":
        pytest.importorskip("trio", reason="trio is not installed")
    return lambda main: anyio.run(main, backend=request.param)


def resilient(library: ModuleType, **options: Any) -> ResilientTransport:
    return ResilientTransport(library.AsyncHTTPTransport(), **{"retry": AT_ONCE, **options})


def pool_of(transport: Any) -> Any:
    return transport._transport._pool


async def cancelled_at(call: Any, at: int) -> Any:
    """The answer of a call, or ``None`` where it was cancelled at its ``at``-th await."""
    cancelling = CancelledAt(call, at)
    try:
        return await cancelling
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        assert cancelling.was_cancelled
        task.uncancel()
        return None


async def left_at(call: Any, at: int) -> Any:
    """`cancelled_at` by a scope, as that of a deadline is: on either loop, and at all later awaits as well."""
    with anyio.CancelScope() as scope:
        return await CancelledAt(call, at, scope.cancel)


async def loses_connections(library: ModuleType, cancelled_at: Any = cancelled_at) -> bool:
    """Whether the library by itself loses a connection whose request is cancelled, as httpcore 1.0.9 does."""
    with listening(script(reply(200, b"x" * 70_000))) as host:
        for at in range(1, 100):
            transport = library.AsyncHTTPTransport()
            async with library.AsyncClient(transport=transport) as client:
                answer = await cancelled_at(client.get(host.url), at)
                if not all(connection.is_idle() for connection in transport._pool.connections):
                    return True
                if answer is not None:
                    return False
    raise AssertionError("it is never answered")


def assert_nothing_is_left(transport: Any, name: str) -> None:
    """No connection that is not idle, nobody who waits for one, no place in flight."""
    assert transport.statistics()[name]["in_flight"] == 0
    pool = pool_of(transport)
    assert [connection for connection in pool.connections if not connection.is_idle()] == []
    assert pool._requests == []


# One call


@libraries
def test_a_retry_goes_over_the_connection_of_a_small_refusal(library: ModuleType, run: Any) -> None:
    async def main() -> None:
        transport = resilient(library)
        async with library.AsyncClient(transport=transport) as client:
            answer = await client.get(host.url)
            assert (answer.status_code, answer.text) == (200, "hello")
            assert [attempt.status for attempt in answer.extensions["attempts"]] == [503, 429, 200]
            assert answer.elapsed.total_seconds() > 0
            assert_nothing_is_left(transport, host.url)

    with listening(script(reply(503), reply(429), reply())) as host:
        run(main)
        assert host.connections == 1
        assert [heard.headers.get("x-retry-attempt") for heard in host.heard] == [None, "1", "2"]


@libraries
def test_a_large_refusal_is_not_read_for_its_connection(library: ModuleType, run: Any) -> None:
    async def main() -> None:
        transport = resilient(library)
        async with library.AsyncClient(transport=transport) as client:
            assert (await client.get(host.url)).status_code == 200
            assert_nothing_is_left(transport, host.url)

    with listening(script(reply(503, b"x" * 20_000), reply())) as host:
        run(main)
        assert host.connections == 2


@libraries
def test_a_refusal_that_does_not_end_is_not_waited_for(library: ModuleType, run: Any) -> None:
    async def main() -> None:
        transport = resilient(library, timeout=30.0)
        async with library.AsyncClient(transport=transport, timeout=None) as client:
            assert (await client.get(host.url)).status_code == 200
            assert_nothing_is_left(transport, host.url)

    began = time.monotonic()
    with listening(script(reply(503, b"")[:-4].replace(b": 0", b": 9") + b"\r\n\r\nhell", reply())) as host:
        run(main)
        assert host.connections == 2
    assert time.monotonic() - began < 15, "it is given a second"


@libraries
def test_a_refusal_whose_connection_breaks_is_tried_again(library: ModuleType, run: Any) -> None:
    async def answer(heard: Heard) -> bytes | None:
        return (
            reply()
            if heard.number > 1
            else reply(503, b"")[:-4].replace(b": 0", b": 9") + b"\r\nconnection: close\r\n\r\nhell"
        )

    async def main() -> None:
        transport = resilient(library)
        async with library.AsyncClient(transport=transport, timeout=5.0) as client:
            assert (await client.get(host.url)).status_code == 200
            assert_nothing_is_left(transport, host.url)

    with listening(answer) as host:
        run(main)


@libraries
@pytest.mark.parametrize("encoded", [False, True])
def test_the_answer_that_there_was_is_given_whole_where_a_retry_is_refused_here(
    library: ModuleType, encoded: bool, run: Any
) -> None:
    body = gzip.compress(b"sorry") if encoded else b"sorry"

    async def main() -> None:
        transport = resilient(library, breaker=lambda: CircuitBreaker(calls=1))
        async with library.AsyncClient(transport=transport) as client:
            answer = await client.get(host.url)
            assert (answer.status_code, answer.text, answer.extensions["retries_ended"]) == (
                500,
                "sorry",
                "circuit_open",
            )
            assert answer.elapsed.total_seconds() > 0
            with pytest.raises(CircuitOpen):
                await client.get(host.url)
            assert_nothing_is_left(transport, host.url)

    with listening(script(reply(500, body, **({"content_encoding": "gzip"} if encoded else {})))) as host:
        run(main)
        assert len(host.heard) == 1


@libraries
def test_a_stream_holds_its_place_until_it_is_closed(library: ModuleType, run: Any) -> None:
    async def main() -> None:
        transport = resilient(library, concurrency=1)
        async with library.AsyncClient(transport=transport) as client:
            async with client.stream("GET", host.url) as answer:
                assert transport.statistics()[host.url]["in_flight"] == 1
                with pytest.raises(TooManyInFlight):
                    await client.get(host.url)
                assert await answer.aread() == b"x" * 100_000
            assert_nothing_is_left(transport, host.url)
            async with client.stream("GET", host.url):
                pass  # and not read
            assert_nothing_is_left(transport, host.url)

    with listening(script(reply(200, b"x" * 100_000))) as host:
        run(main)


@libraries
async def test_so_does_one_of_which_only_a_part_is_read(library: ModuleType) -> None:
    with listening(script(reply(200, b"x" * 100_000))) as host:
        transport = resilient(library)
        async with library.AsyncClient(transport=transport) as client:
            async with client.stream("GET", host.url) as answer:
                async for part in answer.aiter_raw(10):
                    assert part == b"x" * 10
                    break
                assert transport.statistics()[host.url]["in_flight"] == 1
            assert_nothing_is_left(transport, host.url)


@libraries
def test_an_answer_that_breaks_in_its_middle_is_not_tried_again(library: ModuleType, run: Any) -> None:
    """The caller may have used the beginning."""

    async def main() -> None:
        transport = resilient(library)
        async with library.AsyncClient(transport=transport) as client:
            with pytest.raises(library.RemoteProtocolError):
                await client.get(host.url)
            assert_nothing_is_left(transport, host.url)

    with listening(half_of(reply(200, b"x" * 100))) as host:
        run(main)
        assert len(host.heard) == 1


def half_of(answer: bytes) -> Callable[[Heard], Awaitable[bytes | None]]:
    async def half(heard: Heard) -> bytes | None:
        return answer.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")[:-50]

    return half


@libraries
def test_a_connection_that_is_closed_without_an_answer_is_tried_again(library: ModuleType, run: Any) -> None:
    async def main() -> None:
        transport = resilient(library)
        async with library.AsyncClient(transport=transport) as client:
            assert (await client.get(host.url)).status_code == 200
            with pytest.raises(library.RemoteProtocolError) as caught:
                await client.post(host.url, content=b"body")
            assert caught.value.request.method == "POST"
            assert_nothing_is_left(transport, host.url)

    with listening(script(None, reply(), None)) as host:
        run(main)
        assert [heard.method for heard in host.heard] == ["GET", "GET", "POST"]


@libraries
def test_nobody_there_is_a_connect_error_whatever_is_left_of_the_budget(library: ModuleType, run: Any) -> None:
    async def main() -> None:
        transport = resilient(library, budget=lambda: RetryBudget(floor=1, ratio=0))
        async with library.AsyncClient(transport=transport) as client:
            for errors in (2, 1):
                with pytest.raises(library.ConnectError) as caught:
                    await client.post(host.url, content=b"body")
                assert isinstance(caught.value, RetryBudgetExhausted)
                assert len(caught.value.attempts) == errors
                assert caught.value.request.url == host.url

    with listening(script(reply())) as host:
        pass
    run(main)


@libraries
def test_a_body_is_sent_whole_each_time(library: ModuleType, run: Any) -> None:
    async def main() -> None:
        async with library.AsyncClient(transport=resilient(library)) as client:
            assert (await client.put(host.url, json={"a": 1})).status_code == 200

    with listening(script(reply(503), reply(503), reply())) as host:
        run(main)
        assert [heard.body for heard in host.heard] == [library.Request("PUT", "http://x", json={"a": 1}).content] * 3


@libraries
def test_a_deadline_ends_a_call_that_hangs(library: ModuleType, run: Any) -> None:
    async def hang(heard: Heard) -> bytes | None:
        await asyncio.sleep(60)
        return None

    async def main() -> None:
        transport = resilient(library, timeout=0.2)
        async with library.AsyncClient(transport=transport, timeout=None) as client:
            with pytest.raises(DeadlineExceeded) as caught:
                await client.get(host.url)
            assert isinstance(caught.value, library.TimeoutException)
            assert caught.value.request.url == host.url
            assert_nothing_is_left(transport, host.url)

    began = time.monotonic()
    with listening(hang) as host:
        run(main)
        assert [int(heard.headers["x-request-timeout-ms"]) <= 190 for heard in host.heard] == [True]
    assert time.monotonic() - began < 20


@libraries
def test_a_time_out_that_is_not_ours_is_no_deadline(library: ModuleType, run: Any) -> None:
    """A transport that lets the system's own through."""

    class Odd(library.AsyncBaseTransport):  # type: ignore[misc, name-defined]
        async def handle_async_request(self, request: Any) -> Any:
            raise TimeoutError("the name server")

    async def main() -> None:
        for timeout in (None, 9.0):
            transport = ResilientTransport(Odd(), timeout=timeout)
            async with library.AsyncClient(transport=transport) as client:
                with pytest.raises(TimeoutError, match="the name server"):
                    await client.get("http://host.test/")
            assert transport.statistics()["http://host.test"]["in_flight"] == 0

    run(main)


# Cancellation


# What such a library loses is complained of when it is collected.
unsound = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@unsound
@libraries
@pytest.mark.parametrize("seconds", [None, 30.0])
async def test_a_cancellation_at_any_await_leaves_no_connection_and_no_place(
    library: ModuleType, seconds: float | None
) -> None:
    async def answer(heard: Heard) -> bytes | None:
        return reply(503) if "x-retry-attempt" not in heard.headers else reply(200, b"x" * 70_000)

    finished, is_sound = 0, not await loses_connections(library)
    with listening(answer) as host:
        for at in range(1, 500):
            transport = resilient(
                library, timeout=seconds, retry=RetryPolicy(base=0.001), budget=lambda: RetryBudget(floor=99)
            )
            async with library.AsyncClient(transport=transport) as client:
                answered = await cancelled_at(client.get(host.url), at)
                assert transport.statistics()[host.url]["in_flight"] == 0
                if is_sound:
                    assert_nothing_is_left(transport, host.url)
            if answered is not None:
                finished = at
                break
    assert finished > 8, "connect, send, receive, discard, sleep, send, receive, and parts of the body"


@unsound
@libraries
@pytest.mark.parametrize("hedge", [False, True])
def test_nor_does_a_scope_that_ends_at_any_await_on_either_loop(library: ModuleType, hedge: bool, run: Any) -> None:
    async def answer(heard: Heard) -> bytes | None:
        if heard.path == "/usual":
            return reply()
        if hedge:
            await asyncio.sleep(0.01 if "x-retry-attempt" in heard.headers else 30)
        return reply(200, b"x" * 70_000) if "x-retry-attempt" in heard.headers else reply(503)

    async def main() -> None:
        is_sound = not await loses_connections(library, left_at)
        for at in range(1, 500):
            transport = resilient(library, hedge=hedge, retry=RetryPolicy(base=0.001))
            async with library.AsyncClient(transport=transport, timeout=60.0) as client:
                for _ in range(LEAST if hedge else 0):
                    await client.get(f"{host.url}/usual")
                answered = await left_at(client.get(host.url), at)
                assert transport.statistics()[host.url]["in_flight"] == 0
                if is_sound:
                    assert_nothing_is_left(transport, host.url)
            if answered is not None:
                assert (answered.status_code, at > 2) == (200, True)
                return
        raise AssertionError("it is never answered")

    with listening(answer) as host:
        run(main)


@unsound
@libraries
async def test_a_cancellation_at_any_await_of_a_hedge_leaves_no_connection_and_no_place(library: ModuleType) -> None:
    async def answer(heard: Heard) -> bytes | None:
        if heard.path == "/slow":
            await asyncio.sleep(0.03 if "x-retry-attempt" in heard.headers else 30)
        return reply()

    finished, is_sound = 0, not await loses_connections(library)
    with listening(answer) as host:
        for at in range(1, 500):
            transport = resilient(library, hedge=True)
            async with library.AsyncClient(transport=transport) as client:
                for _ in range(LEAST):
                    await client.get(host.url)
                answered = await cancelled_at(client.get(f"{host.url}/slow"), at)
                assert transport.statistics()[host.url]["in_flight"] == 0
                if is_sound:
                    assert_nothing_is_left(transport, host.url)
            if answered is not None:
                assert answered.text == "hello"
                finished = at
                break
    assert finished > 2, "before the second is sent, and beside it"


# Hedging


class Both:
    """Answers of two requests: the first is not answered before the second is there."""

    def __init__(self, first: bytes | None, second: bytes | None, *, second_waits: bool = False) -> None:
        self._first = first
        self._second = second
        self._second_waits = second_waits
        self._is_there = asyncio.Event()

    async def __call__(self, heard: Heard) -> bytes | None:
        if "x-retry-attempt" not in heard.headers:
            await self._is_there.wait()
            return self._first
        self._is_there.set()
        await asyncio.sleep(0.3 if self._second_waits else 0)
        return self._second


def hedged(library: ModuleType, answer: Callable[[Heard], Awaitable[bytes | None]], check: Any, **options: Any) -> Any:
    """A coroutine function that calls ``/slow`` once the usual latency is known, and the host that answers it."""

    async def answers(heard: Heard) -> bytes | None:
        return await answer(heard) if heard.path == "/slow" else reply()

    host = listening(answers)

    async def main() -> None:
        with host as there:
            transport = resilient(library, hedge=True, **options)
            async with library.AsyncClient(transport=transport) as client:
                for _ in range(LEAST):
                    await client.get(there.url)
                before = len(there.heard)
                await check(client, there)
                assert_nothing_is_left(transport, there.url)
                check.heard = there.heard[before:]

    return main


def ending_as_a_pair(library: ModuleType, first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    """A transport that answers until the usual latency is known. Then a call ends as ``first`` once its hedge has been
    sent, and after that the hedge as ``second``."""

    class Pair(library.AsyncBaseTransport):  # type: ignore[misc, name-defined]
        calls = 0

        async def handle_async_request(self, request: Any) -> Any:
            self.calls += 1
            if self.calls <= LEAST:
                return library.Response(200)
            if "x-retry-attempt" not in request.headers:
                self.sent, self.ended = anyio.Event(), anyio.Event()
                await self.sent.wait()
                self.ended.set()
                return first()
            self.sent.set()
            await self.ended.wait()
            return second()

    return Pair()


@libraries
def test_the_quicker_of_two_is_the_answer_and_the_other_is_hung_up_on(library: ModuleType, run: Any) -> None:
    gone = threading.Event()

    async def answer(heard: Heard) -> bytes | None:
        if "x-retry-attempt" in heard.headers:
            return reply(200, b"second" * 10_000)
        try:
            await asyncio.sleep(60)
        finally:
            gone.set()
        return None

    async def check(client: Any, host: Loopback) -> None:
        answer = await client.get(f"{host.url}/slow")
        assert answer.content == b"second" * 10_000
        (attempt,) = answer.extensions["attempts"]
        assert attempt.hedged

    run(hedged(library, answer, check))
    assert gone.wait(10)
    assert [heard.headers.get("x-retry-attempt") for heard in check.heard] == [None, "1"]  # type: ignore[attr-defined]


@libraries
def test_the_first_may_still_be_the_quicker(library: ModuleType, run: Any) -> None:
    async def check(client: Any, host: Loopback) -> None:
        answer = await client.get(f"{host.url}/slow")
        assert (answer.text, len(answer.extensions["attempts"])) == ("first", 1)

    run(hedged(library, Both(reply(200, b"first"), reply(200, b"second"), second_waits=True), check))
    assert len(check.heard) == 2  # type: ignore[attr-defined]


@libraries
@pytest.mark.parametrize("fails", [False, True])
def test_a_first_that_ends_early_is_all_there_is(library: ModuleType, fails: bool, run: Any) -> None:
    async def send(request: Any) -> Any:
        await anyio.lowlevel.checkpoint()
        if fails:
            raise library.ReadError("it broke")
        return library.Response(500)

    def second() -> Any:
        raise AssertionError("nobody is asked a second time")

    async def main() -> None:
        sent = library.Request("GET", "http://host.test/")
        call = first_of_two(send, sent, 60.0, second, lambda answer: answer.status_code < 500, library.TransportError)
        if fails:
            with pytest.raises(library.ReadError):
                await call
        else:
            answer, is_second = await call
            assert (answer.status_code, is_second) == (500, False)

    run(main)


@libraries
@pytest.mark.parametrize("failure", [None, reply(503)])
def test_a_first_that_fails_late_leaves_it_to_the_second(library: ModuleType, failure: bytes | None, run: Any) -> None:
    async def check(client: Any, host: Loopback) -> None:
        answer = await client.get(f"{host.url}/slow")
        assert (answer.text, len(answer.extensions["attempts"])) == ("second", 1)

    run(hedged(library, Both(failure, reply(200, b"second"), second_waits=True), check))


@libraries
@pytest.mark.parametrize("answers", [(reply(500, b"sorry"), None), (None, reply(500, b"sorry"))])
@pytest.mark.parametrize("second_waits", [False, True])
def test_where_both_fail_an_answer_goes_before_an_error(
    library: ModuleType, answers: tuple[bytes | None, bytes | None], second_waits: bool, run: Any
) -> None:
    async def check(client: Any, host: Loopback) -> None:
        answer = await client.get(f"{host.url}/slow")
        assert (answer.status_code, answer.text) == (500, "sorry")

    run(hedged(library, Both(*answers, second_waits=second_waits), check, retry=RetryPolicy(attempts=1)))


@libraries
def test_where_both_break_there_is_an_error(library: ModuleType, run: Any) -> None:
    async def check(client: Any, host: Loopback) -> None:
        with pytest.raises(library.RemoteProtocolError) as caught:
            await client.get(f"{host.url}/slow")
        assert [attempt.hedged for attempt in caught.value.attempts] == [True]

    run(hedged(library, Both(None, None), check, retry=RetryPolicy(attempts=1)))


@libraries
def test_a_loser_that_cannot_be_closed_takes_no_answer_away(library: ModuleType, run: Any) -> None:
    closed: list[int] = []

    class Body(library.AsyncByteStream):  # type: ignore[misc, name-defined]
        def __init__(self, status: int) -> None:
            self.status = status

        async def __aiter__(self) -> Any:
            yield b"body"

        async def aclose(self) -> None:
            closed.append(self.status)
            if self.status == 503:
                raise library.WriteError("the connection is gone")

    def answer(status: int) -> Any:
        return library.Response(status, stream=Body(status))

    async def main() -> None:
        odd = ending_as_a_pair(library, lambda: answer(503), lambda: answer(200))
        transport = ResilientTransport(odd, hedge=True)
        async with library.AsyncClient(transport=transport) as client:
            for _ in range(LEAST):
                await client.get("http://host.test/")
            given = await client.get("http://host.test/")
        assert (given.status_code, given.text, len(given.extensions["attempts"])) == (200, "body", 1)
        assert closed == [503, 200]

    run(main)


@libraries
def test_a_budget_that_is_empty_denies_the_second(library: ModuleType, run: Any) -> None:
    async def answer(heard: Heard) -> bytes | None:
        await asyncio.sleep(0.3)
        return reply()

    async def check(client: Any, host: Loopback) -> None:
        answer = await client.get(f"{host.url}/slow")
        assert [attempt.hedged for attempt in answer.extensions["attempts"]] == [False]

    run(hedged(library, answer, check, budget=lambda: RetryBudget(floor=0, ratio=0)))
    assert len(check.heard) == 1  # type: ignore[attr-defined]


@libraries
def test_a_deadline_ends_both(library: ModuleType, run: Any) -> None:
    async def answer(heard: Heard) -> bytes | None:
        await asyncio.sleep(60)
        return reply()

    async def check(client: Any, host: Loopback) -> None:
        with pytest.raises(DeadlineExceeded):
            await client.get(f"{host.url}/slow", extensions={"deadline": 1.0})

    run(hedged(library, answer, check))
    assert len(check.heard) == 2  # type: ignore[attr-defined]


@libraries
def test_a_mistake_in_a_transport_is_raised_as_it_is(library: ModuleType, run: Any) -> None:
    """And not in a group of one."""

    class Odd(library.AsyncBaseTransport):  # type: ignore[misc, name-defined]
        calls = 0

        async def handle_async_request(self, request: Any) -> Any:
            self.calls += 1
            if self.calls <= LEAST:
                return library.Response(200)
            await anyio.sleep(0.01)
            raise KeyError("a bug")

    async def main() -> None:
        transport = ResilientTransport(Odd(), hedge=True)
        async with library.AsyncClient(transport=transport) as client:
            for _ in range(LEAST):
                await client.get("http://host.test/")
            with pytest.raises(KeyError, match="a bug"):
                await client.get("http://host.test/")
        assert transport.statistics()["http://host.test"]["in_flight"] == 0

    run(main)


# Blocking


@libraries
def test_code_that_blocks_gets_the_same(library: ModuleType) -> None:
    with listening(script(reply(503), reply(429), reply(), reply(503, b"x" * 20_000), reply(200, b"more"))) as host:
        transport = SyncResilientTransport(library.HTTPTransport(), retry=AT_ONCE)
        with library.Client(transport=transport) as client:
            answer = client.get(host.url)
            assert (answer.status_code, answer.text, host.connections) == (200, "hello", 1)
            assert [attempt.status for attempt in answer.extensions["attempts"]] == [503, 429, 200]
            with client.stream("GET", host.url) as answer:
                assert transport.statistics()[host.url]["in_flight"] == 1
                assert b"".join(answer.iter_bytes()) == b"more"
            assert host.connections == 2
            assert_nothing_is_left(transport, host.url)


@libraries
def test_code_that_blocks_is_refused_as_well(library: ModuleType) -> None:
    with listening(script(reply(500, b"sorry"))) as host:
        transport = SyncResilientTransport(
            library.HTTPTransport(), retry=AT_ONCE, breaker=lambda: CircuitBreaker(calls=1)
        )
        with library.Client(transport=transport) as client:
            answer = client.get(host.url)
            assert (answer.text, answer.extensions["retries_ended"]) == ("sorry", "circuit_open")
            with pytest.raises(CircuitOpen) as caught:
                client.get(host.url)
            assert isinstance(caught.value, library.TransportError)
            assert_nothing_is_left(transport, host.url)


@libraries
def test_a_refusal_that_breaks_off_is_tried_again_by_code_that_blocks(library: ModuleType) -> None:
    broken = reply(503, b"")[:-4].replace(b": 0", b": 9") + b"\r\n\r\nhell"
    with listening(script(broken, reply())) as host:
        transport = SyncResilientTransport(library.HTTPTransport(), retry=AT_ONCE)
        with library.Client(transport=transport, timeout=0.5) as client:
            assert client.get(host.url).status_code == 200
            assert_nothing_is_left(transport, host.url)


@libraries
def test_a_refusal_that_drips_is_not_waited_for_by_code_that_blocks(library: ModuleType) -> None:
    clock, left = ManualClock(), []

    class Dripping(library.SyncByteStream):  # type: ignore[misc, name-defined]
        def __iter__(self) -> Any:
            for part in range(100):
                clock.advance(0.3)
                left.append(part)
                yield b"x"

        def close(self) -> None:
            left.append("closed")

    answers = iter([library.Response(503, headers={"content-length": "100"}, stream=Dripping()), library.Response(200)])
    transport = SyncResilientTransport(library.MockTransport(lambda _: next(answers)), retry=AT_ONCE, clock=clock)
    with library.Client(transport=transport) as client:
        assert client.get("http://host.test/").status_code == 200
    assert left == [0, 1, 2, 3, "closed"], "it is given a second"


@libraries
def test_a_deadline_ends_a_call_that_blocks(library: ModuleType) -> None:
    async def hang(heard: Heard) -> bytes | None:
        await asyncio.sleep(60)
        return None

    began = time.monotonic()
    with listening(hang) as host:
        transport = SyncResilientTransport(library.HTTPTransport(), timeout=0.2)
        with library.Client(transport=transport, timeout=None) as client:
            with pytest.raises(DeadlineExceeded) as caught:
                client.get(host.url)
            assert isinstance(caught.value, library.ReadTimeout)
            assert_nothing_is_left(transport, host.url)
    assert time.monotonic() - began < 20


@libraries
def test_threads_share_one_client_and_none_waits_for_another_s_answer(library: ModuleType) -> None:
    """Each answer is given when all requests are there: a lock held while one is sent would end in a time-out."""
    all_are_there = asyncio.Event()

    async def answer(heard: Heard) -> bytes | None:
        if heard.path == "/together":
            if heard.number == 8:
                all_are_there.set()
            await all_are_there.wait()
        return reply(503) if heard.path == "/flaky" and heard.number % 7 == 0 else reply()

    with listening(answer) as host:
        transport = SyncResilientTransport(library.HTTPTransport(), retry=AT_ONCE)
        with library.Client(transport=transport, timeout=25.0) as client, ThreadPoolExecutor(8) as threads:
            answers = threads.map(lambda _: client.get(f"{host.url}/together").status_code, range(8))
            assert list(answers) == [200] * 8
            answers = threads.map(lambda _: client.get(f"{host.url}/flaky").status_code, range(400))
            assert set(answers) <= {200, 503}
            assert_nothing_is_left(transport, host.url)
            statistics = transport.statistics()[host.url]
    assert 0 <= statistics["tokens"] <= 50
    attempts = len(host.heard) - 8
    assert attempts <= 408 + 3 + 40.8


def test_hedging_needs_an_event_loop() -> None:
    with pytest.raises(ValueError, match="hedge is for the asynchronous transport"):
        SyncResilientTransport(hedge=True)


# Nothing for the garbage collector


@libraries
def test_an_error_that_was_caught_leaves_nothing_to_the_garbage_collector(library: ModuleType, run: Any) -> None:
    class Broken(library.AsyncBaseTransport, library.BaseTransport):  # type: ignore[misc, name-defined]
        def handle_request(self, request: Any) -> Any:
            raise library.ConnectError("nobody is there")

        async def handle_async_request(self, request: Any) -> Any:
            return self.handle_request(request)

    waiting, blocking = ResilientTransport(Broken(), retry=AT_ONCE), SyncResilientTransport(Broken(), retry=AT_ONCE)
    requests = [library.Request("GET", "http://host.test/") for _ in range(6)]
    gone = [weakref.ref(request) for request in requests]

    async def main() -> None:
        while len(requests) > 3:
            with pytest.raises(library.ConnectError):
                await waiting.handle_async_request(requests.pop())

    gc.collect()
    gc.disable()
    try:
        run(main)
        while requests:
            with pytest.raises(library.ConnectError):
                blocking.handle_request(requests.pop())
        assert [reference() for reference in gone] == [None] * 6
    finally:
        gc.enable()


@libraries
def test_neither_do_the_errors_of_a_hedge(library: ModuleType, run: Any) -> None:
    def breaks() -> Any:
        raise library.ReadError("it broke")

    async def main() -> None:
        breaking = ending_as_a_pair(library, breaks, breaks)
        transport = ResilientTransport(breaking, hedge=True, retry=RetryPolicy(attempts=1))
        for _ in range(LEAST):
            await transport.handle_async_request(library.Request("GET", "http://host.test/"))
        gc.collect()
        gc.disable()
        try:
            request = library.Request("GET", "http://host.test/")
            gone = weakref.ref(request)
            with pytest.raises(library.ReadError) as caught:
                await transport.handle_async_request(request)
            assert caught.value.attempts[0].hedged
            del request, caught
            await anyio.lowlevel.checkpoint()
            assert gone() is None
        finally:
            gc.enable()

    run(main)


# The clients


async def test_a_client_of_ours_is_the_library_s_with_the_transport_in_it() -> None:
    with listening(script(reply(503), reply())) as host:
        async with AsyncClient(base_url=host.url, retry=AT_ONCE, deadline=9.0, headers={"A": "b"}) as client:
            assert isinstance(client, httpx2.AsyncClient)
            answer = await client.get("/path")
            assert (answer.status_code, answer.http_version) == (200, "HTTP/1.1")
            assert client.statistics()[host.url]["in_flight"] == 0
        assert client.is_closed
        assert {heard.path for heard in host.heard} == {"/path"}
        assert [heard.headers["a"] for heard in host.heard] == ["b", "b"]
        assert int(host.heard[0].headers["x-request-timeout-ms"]) <= 8_990


def test_so_is_the_one_that_blocks() -> None:
    with listening(script(reply(503), reply())) as host:
        with Client(base_url=host.url, retry=AT_ONCE, deadline=9.0) as client:
            assert isinstance(client, httpx2.Client)
            assert client.get("/path").status_code == 200
            assert client.statistics()[host.url]["tokens"] == 50
        assert client.is_closed


async def test_redirects_and_logins_are_calls_of_their_own() -> None:
    digest = 'Digest realm="r", nonce="n", qop="auth", algorithm=MD5'

    async def answer(heard: Heard) -> bytes | None:
        if heard.path == "/old":
            return reply(302, b"", location="/new")
        if "authorization" not in heard.headers:
            return reply(401, b"", www_authenticate=digest)
        return reply(503) if "x-retry-attempt" not in heard.headers else reply()

    with listening(answer) as host:
        client = AsyncClient(
            base_url=host.url, retry=AT_ONCE, follow_redirects=True, auth=httpx2.DigestAuth("user", "foo")
        )
        async with client:
            answered = await client.get("/old")
        assert answered.status_code == 200
        assert [redirect.status_code for redirect in answered.history if redirect.is_redirect] == [302]
        assert [attempt.status for attempt in answered.extensions["attempts"]] == [503, 200]
        assert host.connections == 1


async def test_proxies_and_mounts_know_the_same_of_a_host() -> None:
    with listening(script(reply(503), reply())) as proxy:
        mounts = {"all://direct.test": None, "all://mounted.test": httpx2.MockTransport(lambda _: httpx2.Response(204))}
        async with AsyncClient(proxy=proxy.url, mounts=mounts, retry=AT_ONCE) as client:
            assert (await client.get("http://far.test/page")).status_code == 200
            assert (await client.get("http://mounted.test/")).status_code == 204
            assert set(client.statistics()) == {"http://far.test", "http://mounted.test"}
            assert client._mounts[httpx2._utils.URLPattern("all://direct.test")] is None
        assert [heard.path for heard in proxy.heard] == ["http://far.test/page"] * 2


def test_closing_a_client_closes_its_connections() -> None:
    with listening(script(reply())) as host:
        client = Client()
        client.get(host.url)
        transport: Any = client._transport
        assert len(pool_of(transport).connections) == 1
        client.close()
        assert pool_of(transport).connections == []


async def test_a_transport_alone_is_entered_and_closed() -> None:
    with listening(script(reply())) as host:
        async with ResilientTransport() as transport:
            answer = await transport.handle_async_request(httpx2.Request("GET", host.url))
            assert await answer.aread() == b"hello"
            assert len(pool_of(transport).connections) == 1
        assert pool_of(transport).connections == []
        transport = ResilientTransport()
        await transport.aclose()
        with SyncResilientTransport() as blocking:
            assert blocking.handle_request(httpx2.Request("GET", host.url)).read() == b"hello"
        assert pool_of(blocking).connections == []


def test_two_around_each_other_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="the transport is resilient already"):
        ResilientTransport(ResilientTransport())
    with pytest.raises(ValueError, match="the transport is resilient already"):
        Client(transport=SyncResilientTransport())
    with pytest.raises(ValueError, match="the transport is resilient already"):
        Client(mounts={"all://host.test": SyncResilientTransport()})


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"timeout": 0}, {"timeout": float("nan")}, {"connect": -1}])
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ResilientTransport(**options)


def test_it_says_what_it_is_around() -> None:
    transport = ResilientTransport(httpx.MockTransport(lambda _: httpx.Response(200)))
    assert repr(transport).startswith("<ResilientTransport around <httpx.MockTransport object")


@libraries
async def test_an_answer_that_was_never_a_stream_holds_no_place(library: ModuleType) -> None:
    transport = ResilientTransport(library.MockTransport(lambda _: library.Response(200, text="hello")))
    answer = await transport.handle_async_request(library.Request("GET", "http://host.test/"))
    assert answer.text == "hello"
    assert transport.statistics()["http://host.test"]["in_flight"] == 0


@libraries
async def test_an_answer_that_is_closed_twice_gives_its_place_back_once(library: ModuleType) -> None:
    inner = library.MockTransport(lambda _: library.Response(200, stream=library.ByteStream(b"hello")))
    waiting, blocking = ResilientTransport(inner), SyncResilientTransport(inner)
    request = library.Request("GET", "http://host.test/")
    stream = (await waiting.handle_async_request(request)).stream
    await stream.aclose()
    await stream.aclose()
    other = blocking.handle_request(request).stream
    other.close()
    other.close()
    assert [kind.statistics()["http://host.test"]["in_flight"] for kind in (waiting, blocking)] == [0, 0]


@libraries
@pytest.mark.parametrize("seconds", [None, 5.0])
@pytest.mark.parametrize("mistake", [KeyError("a bug"), TimeoutError("a bug")])
async def test_a_mistake_in_a_transport_gives_everything_back(
    library: ModuleType, mistake: Exception, seconds: float | None
) -> None:
    def answer(request: Any) -> Any:
        raise mistake

    inner = library.MockTransport(answer)
    waiting, blocking = ResilientTransport(inner, timeout=seconds), SyncResilientTransport(inner, timeout=seconds)
    request = library.Request("GET", "http://host.test/")
    with pytest.raises(type(mistake), match="a bug"):
        await waiting.handle_async_request(request)
    with pytest.raises(type(mistake), match="a bug"):
        blocking.handle_request(request)
    assert [kind.statistics()["http://host.test"]["in_flight"] for kind in (waiting, blocking)] == [0, 0]


@libraries
async def test_an_answer_that_cannot_even_be_closed_is_tried_again(library: ModuleType) -> None:
    class Broken(library.AsyncByteStream, library.SyncByteStream):  # type: ignore[misc, name-defined]
        def __iter__(self) -> Any:
            yield b"body"

        async def __aiter__(self) -> Any:
            yield b"body"

        def close(self) -> None:
            raise library.ReadError("it broke")

        async def aclose(self) -> None:
            self.close()

    def inner() -> Any:
        answers = iter([library.Response(503, headers={"content-length": "4"}, stream=Broken()), library.Response(200)])
        return library.MockTransport(lambda _: next(answers))

    async with library.AsyncClient(transport=ResilientTransport(inner(), retry=AT_ONCE)) as client:
        assert (await client.get("http://host.test/")).status_code == 200
    with library.Client(transport=SyncResilientTransport(inner(), retry=AT_ONCE)) as client:
        assert client.get("http://host.test/").status_code == 200


@libraries
def test_a_closed_answer_can_still_be_given(library: ModuleType) -> None:
    inner = library.MockTransport(lambda _: library.Response(500, text="sorry"))
    for kind, client in ((SyncResilientTransport, library.Client),):
        transport = kind(inner, retry=AT_ONCE, breaker=lambda: CircuitBreaker(calls=1))
        answer = client(transport=transport).get("http://host.test/")
        assert (answer.text, answer.extensions["retries_ended"]) == ("sorry", "circuit_open")
