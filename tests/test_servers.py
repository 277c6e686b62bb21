"""Behind the servers that people run: what only a server and a socket can show."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from time import monotonic, sleep
from typing import Any

import granian.server.embed
import hypercorn.asyncio
import hypercorn.config
import pytest
import uvicorn
from granian.constants import Interfaces
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import WS_PROTOCOLS
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from harness import answering, hello, in_flight, outcomes, plan
from seawall import Seawall
from seawall.testing import reset
from serving import free_port

pytestmark = pytest.mark.slow

TIMEOUT = 10.0
ALL_WELCOME: dict[str, Any] = {"shedding": {"algorithm": "off"}}
"""Twenty at once on a machine that is busy with other things are an overload indeed."""
WS: Any = "websockets-sansio" if "websockets-sansio" in WS_PROTOCOLS else "websockets"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


SERVERS = ["uvicorn-h11", "uvicorn-httptools", "uvicorn-uvloop", "hypercorn", "granian"]
if sys.platform == "win32":  # which uvloop does not run on
    SERVERS.remove("uvicorn-uvloop")


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def serving(app: ASGIApp, server: str) -> Iterator[int]:
    """A server on a free port of the loopback, which is gone when the block ends."""
    name, _, variant = server.partition("-")
    with {"uvicorn": uvicorn_serving, "hypercorn": hypercorn_serving, "granian": granian_serving}[name](
        app, variant
    ) as port:
        yield port


@contextmanager
def uvicorn_serving(app: ASGIApp, variant: str) -> Iterator[int]:
    """``variant`` is a parser on asyncio, or uvloop with the parser that people run with it."""
    config = uvicorn.Config(
        app,
        http="h11" if variant == "h11" else "httptools",
        ws=WS,
        loop="uvloop" if variant == "uvloop" else "asyncio",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    running = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        until(lambda: running.started)
        yield port
    finally:
        running.should_exit = True
        thread.join(TIMEOUT)
        listener.close()
        assert not thread.is_alive()


@contextmanager
def hypercorn_serving(app: ASGIApp, _: str) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    config = hypercorn.config.Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.errorlog = None
    config.graceful_timeout = 5

    async def run(stop: asyncio.Event) -> None:
        await hypercorn.asyncio.serve(app, config, shutdown_trigger=stop.wait)  # type: ignore[arg-type]

    with in_thread(run):
        yield port


@contextmanager
def granian_serving(app: ASGIApp, _: str) -> Iterator[int]:
    """In this process, as far as Python goes: requests are read and answers are written by threads of its own."""
    port = free_port()

    async def run(stop: asyncio.Event) -> None:
        running = granian.server.embed.Server(app, port=port, interface=Interfaces.ASGINL, log_enabled=False)
        serving = asyncio.create_task(running.serve())
        await stop.wait()
        running.stop()  # type: ignore[no-untyped-call]
        await serving

    with in_thread(run):
        until(lambda: listens(port))
        yield port


@contextmanager
def in_thread(run: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> Iterator[None]:
    """An event loop in a thread; ``run`` ends when its event is set."""
    ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    ended: Future[None] = Future()

    async def main() -> None:
        stop = asyncio.Event()
        ready.set_result((asyncio.get_running_loop(), stop))
        await run(stop)

    def target() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            ended.set_exception(error)
        else:
            ended.set_result(None)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    loop, stop = ready.result(TIMEOUT)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        ended.result(TIMEOUT)
        thread.join(TIMEOUT)


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), TIMEOUT):
        return True
    return False


def until(condition: Any) -> None:
    """Wait for something that another thread does."""
    deadline = monotonic() + TIMEOUT
    while not condition():
        assert monotonic() < deadline, "it did not happen"
        sleep(0.005)


@contextmanager
def client(port: int) -> Iterator[http.client.HTTPConnection]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)) as connection:
        yield connection


def ask(connection: http.client.HTTPConnection, method: str = "GET", path: str = "/", **rest: Any) -> tuple[int, bytes]:
    connection.request(method, path, **rest)
    response = connection.getresponse()
    return response.status, response.read()


def own_socket(connection: http.client.HTTPConnection) -> Any:
    return connection.sock


def ask_raw(connection: socket.socket, raw: bytes) -> http.client.HTTPResponse:
    """The head of the answer to what is sent at once."""
    connection.sendall(raw)
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response


def post(size: int) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size


def test_a_connection_survives_refusals(server: str, registry: CollectorRegistry) -> None:
    app = Seawall(hello, default="1/hour", registry=registry)
    with serving(app, server) as port, client(port) as connection:
        assert ask(connection)[0] == 200
        first = own_socket(connection)
        for size in (0, 10, 1_000):
            response = ask_raw(first, post(size) + b"x" * size)
            document = json.loads(response.read())
            assert (response.status, document["reason"]) == (429, "rate")
            assert response.headers["Retry-After"] == str(document["retry_after"])
            assert response.headers.get("Connection", "keep-alive") == "keep-alive"
        assert ask(connection, "HEAD") == (429, b"")
        assert ask(connection)[0] == 429
        assert own_socket(connection) is first
    assert outcomes(registry) == {"allowed": 1, "limited": 5}


@pytest.mark.parametrize("size", [1_000, 100_000, 1_000_000])
def test_a_refused_body_that_is_still_on_its_way_is_read_by_uvicorn_alone(
    size: int, server: str, registry: CollectorRegistry
) -> None:
    """The others close the connection behind their answer, for nobody has read the body."""
    app = Seawall(answering(204), default="1/hour", registry=registry)
    with serving(app, server) as port:
        with client(port) as connection:
            assert ask(connection)[0] == 204
        with socket.create_connection(("127.0.0.1", port), TIMEOUT) as sender:
            response = ask_raw(sender, post(size) + b"x" * (size // 2))
            assert (response.status, json.loads(response.read())["reason"]) == (429, "rate")
            if server.startswith("uvicorn"):
                assert ask_raw(sender, b"x" * (size - size // 2) + post(0)).status == 429
            else:
                with suppress(ConnectionResetError):  # where there was more than was read
                    assert sender.recv(65_536) == b""
        with client(port) as connection:
            assert ask(connection)[0] == 429


def test_a_refusal_does_not_wait_for_the_body(server: str, registry: CollectorRegistry) -> None:
    app = Seawall(hello, default="1/hour", registry=registry)
    with serving(app, server) as port, client(port) as connection:
        assert ask(connection)[0] == 200
        with socket.create_connection(("127.0.0.1", port), TIMEOUT) as slow:
            slow.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nonly the beginning")
            assert slow.recv(65_536).startswith(b"HTTP/1.1 429 ")


def test_pipelined_requests_are_answered_in_their_order(server: str, registry: CollectorRegistry) -> None:
    app = Seawall(answering(204), default="2/hour", registry=registry)
    with serving(app, server) as port, socket.create_connection(("127.0.0.1", port), TIMEOUT) as connection:
        connection.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3 + b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        received = b""
        while chunk := connection.recv(65_536):
            received += chunk
    assert re.findall(rb"HTTP/1\.1 ([0-9]+) ", received) == [b"204", b"204", b"429", b"429"]


@pytest.mark.parametrize("size", [30_000, 60_000, 64 * 1024, 70_000])
def test_a_header_of_64_kb_breaks_nothing(size: int, server: str, registry: CollectorRegistry) -> None:
    """A parser may refuse it before anybody sees it, and before all of it is sent; what passes is answered as ever."""
    app = Seawall(hello, default="3/hour", registry=registry)
    with serving(app, server) as port:
        for name in ("X-API-Key", "X-Forwarded-For", "Accept"):
            with client(port) as connection, suppress(ConnectionError):
                assert ask(connection, headers={name: "1.2.3.4, " * (size // 9)})[0] in (200, 400, 431)
        with client(port) as connection:
            assert ask(connection)[0] in (200, 429)


@pytest.mark.parametrize(
    "raw", [b"/%ff%fe", b"/%00", b"/login%0a", b"//", b"/%", b"*", b"/?%ff=\xc3\xa9", b"/%E2%98%83"]
)
def test_odd_targets_are_answered(raw: bytes, server: str, registry: CollectorRegistry) -> None:
    app = Seawall(hello, default="9/hour", registry=registry)
    with serving(app, server) as port, socket.create_connection(("127.0.0.1", port), TIMEOUT) as connection:
        connection.sendall(b"GET " + raw + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        status = connection.recv(65_536).split()[1]
    assert status in ((b"400",) if raw in (b"/%00", b"/login%0a") else (b"200", b"400"))


def test_a_client_that_leaves_a_stream_keeps_its_permit_until_the_handler_ends(
    server: str, registry: CollectorRegistry
) -> None:
    end = threading.Event()
    noticed = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/stream":
            return await hello(scope, receive, send)
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"chunk", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        noticed.set()
        await asyncio.to_thread(end.wait, TIMEOUT)

    shell = Seawall(app, config=plan(concurrency=1), registry=registry)
    with serving(shell, server) as port, client(port) as other:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT) as stream:
            stream.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b""
            while b"chunk" not in received:
                received += stream.recv(65_536)
        assert noticed.wait(TIMEOUT)
        assert ask(other)[0] == 429
        assert in_flight(registry) == 1
        end.set()
        until(lambda: in_flight(registry) == 0)
        assert ask(other)[0] == 200
    assert outcomes(registry) == {"allowed": 2, "limited": 1}
    assert shell.statistics()["concurrency"] == {"callers": 0, "in_flight": 0}


def test_twenty_at_once_are_admitted_to_the_burst_exactly(server: str, registry: CollectorRegistry) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)
        await hello(scope, receive, send)

    with serving(Seawall(app, config=plan(rate="37/hour") | ALL_WELCOME, registry=registry), server) as port:
        barrier = threading.Barrier(20)

        def worker(_: int) -> list[int]:
            with client(port) as connection:
                connection.connect()
                barrier.wait(TIMEOUT)
                return [ask(connection)[0] for _ in range(5)]

        with ThreadPoolExecutor(20) as pool:
            found = [status for statuses in pool.map(worker, range(20)) for status in statuses]
    assert (found.count(200), found.count(429)) == (37, 63)
    assert outcomes(registry) == {"allowed": 37, "limited": 63}


def test_twenty_at_once_hold_no_more_permits_than_there_are(server: str, registry: CollectorRegistry) -> None:
    running = peak = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.02)
        running -= 1
        await hello(scope, receive, send)

    with serving(Seawall(app, config=plan(concurrency=3) | ALL_WELCOME, registry=registry), server) as port:

        def worker(_: int) -> list[int]:
            with client(port) as connection:
                return [ask(connection)[0] for _ in range(5)]

        with ThreadPoolExecutor(20) as pool:
            found = [status for statuses in pool.map(worker, range(20)) for status in statuses]
    assert peak == 3
    assert set(found) == {200, 429}
    assert in_flight(registry) == 0


def test_a_websocket_is_refused_with_a_real_429(server: str, registry: CollectorRegistry) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        message = await receive()
        await send({"type": "websocket.send", "text": message["text"].upper()})
        await send({"type": "websocket.close", "code": 1000})

    with serving(Seawall(app, default="1/hour", registry=registry), server) as port:
        address = f"ws://127.0.0.1:{port}/chat"
        with connect(address, open_timeout=TIMEOUT, close_timeout=TIMEOUT) as socket_:
            socket_.send("hi")
            assert socket_.recv(TIMEOUT) == "HI"
            assert socket_.response is not None
            if server != "granian":  # which sends no headers of an application with the handshake
                assert socket_.response.headers["RateLimit"].startswith('"rate";r=0;t=36')
        with pytest.raises(InvalidStatus) as caught, connect(address, open_timeout=TIMEOUT):
            pass
    response = caught.value.response
    assert response.status_code == 429
    assert response.headers["Content-Type"] == "application/problem+json"
    assert json.loads(response.body or b"")["violated-policies"] == ["rate"]
    assert int(response.headers["Retry-After"]) >= 3_590


def test_metrics_are_served_and_agree_with_what_was_answered(server: str, registry: CollectorRegistry) -> None:
    settings = plan(rate="2/hour") | {"metrics": {"path": "/metrics", "allow": ["127.0.0.1"]}}
    with serving(Seawall(hello, config=settings, registry=registry), server) as port, client(port) as connection:
        assert [ask(connection)[0] for _ in range(4)] == [200, 200, 429, 429]
        status, body = ask(connection, path="/metrics")
        assert status == 200
        assert b'seawall_requests_total{outcome="allowed",priority="normal"} 2.0' in body
        assert b'seawall_requests_total{outcome="limited",priority="normal"} 2.0' in body
        assert ask(connection, "HEAD", "/metrics") == (200, b"")
        assert ask(connection, path="/metrics", headers={"X-Forwarded-For": "127.0.0.1"})[0] == 404


def test_an_error_of_the_application_closes_nothing_else(server: str, registry: CollectorRegistry) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/boom":
            raise LookupError("a bug")
        await hello(scope, receive, send)

    with serving(Seawall(app, config=plan(rate="9/hour", concurrency=1), registry=registry), server) as port:
        for path, status in (("/boom", 500), ("/", 200), ("/boom", 500), ("/", 200)):
            with client(port) as connection:
                assert ask(connection, path=path)[0] == status
    assert outcomes(registry) == {"allowed": 4}
