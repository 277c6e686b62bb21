"""One process of callers: calls leave when a Poisson schedule says so, through one client of httpx as people set it up.

All are clients of httpx, with 500 ms for each attempt. What is compared is what stands around that: nothing, or
something that tries again, three times at most. Below is a network of few lines, the same for all, which notes every
attempt: httpx's own pool takes 2 to 3 ms of processor time for an attempt that times out among a hundred others, so
that the callers would be what is measured.

``python -m benchmarks.clientbench.callers CORE`` takes a `Plan` as JSON on stdin, says when it is ready, takes the
instant to begin (monotonic seconds, the same for all processes of a machine), and answers with a `record`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import sys
import time
from array import array
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from benchmarks import apps, harness, load
from benchmarks.overload.generator import Phase, arrivals

ATTEMPTS = 4
"""Of each call, at most: three retries."""
TIMEOUT = 0.5
"""Seconds for each attempt: to connect, and between two reads."""
FAILED = 0
"""What stands for a status where a call ended with an error."""

BARE, TENACITY, RETRIES, STAMINA, OURS = "bare", "tenacity", "httpx-retries", "stamina", "seawall"
SUBJECTS: Mapping[str, str] = {
    BARE: "httpx alone, no retries",
    TENACITY: "httpx with tenacity",
    RETRIES: "httpx-retries",
    STAMINA: "httpx with stamina",
    OURS: "seawall.client",
}
"""What is compared, and what tables call it."""

Call = Callable[[int], Awaitable[int]]
"""Makes the call of this number; its final status."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one process does."""

    subject: str
    port: int
    phases: list[Phase]
    seed: int
    limit: float
    """Seconds after which it ends, whatever has become of its parent."""


class Connection(asyncio.Protocol):
    """One connection, with at most one request on it."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.is_lost = False
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none, but behaves as one

    def send(self, request: bytes) -> asyncio.Future[bytes]:
        """What will be the answer."""
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.answer

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if load.complete(self._buffer) and not self.answer.done():
            self.answer.set_result(self._buffer)
            self._buffer = b""

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        if not self.answer.done():
            self.answer.set_exception(error or ConnectionResetError("closed without an answer"))
            self.answer.exception()  # nobody may be waiting any more


def network(note: Callable[[int], None]) -> Any:
    """A transport for httpx, with the errors of its own. ``note`` hears the number of a call at each attempt."""
    import httpx

    class Network(httpx.AsyncBaseTransport):
        def __init__(self) -> None:
            self.idle: list[Connection] = []

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            note(request.extensions["call"])
            connection = await self.connection(request)
            lines = [b"%b %b HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
            lines += [name + b": " + value for name, value in request.headers.raw]
            try:
                async with asyncio.timeout(request.extensions["timeout"]["read"]):
                    data = await connection.send(b"\r\n".join(lines) + b"\r\n\r\n")
            except BaseException as error:
                connection.transport.abort()
                if isinstance(error, TimeoutError):
                    raise httpx.ReadTimeout("", request=request) from None
                if isinstance(error, OSError):
                    raise httpx.ReadError(str(error), request=request) from None
                raise
            self.idle.append(connection)
            head, _, body = data.partition(b"\r\n\r\n")
            pairs = [line.split(b": ", 1) for line in head.split(b"\r\n")[1:]]
            return httpx.Response(int(head[9:12]), headers=[(name, value) for name, value in pairs], content=body)

        async def connection(self, request: httpx.Request) -> Connection:
            """An idle one, the last first, or a new one."""
            while self.idle:
                connection = self.idle.pop()
                if not connection.is_lost:
                    return connection
            loop, url = asyncio.get_running_loop(), request.url
            try:
                async with asyncio.timeout(request.extensions["timeout"]["connect"]):
                    return (await loop.create_connection(Connection, url.host, url.port))[1]
            except TimeoutError:
                raise httpx.ConnectTimeout("", request=request) from None
            except OSError as error:
                raise httpx.ConnectError(f"cannot connect: {error}", request=request) from None

        async def aclose(self) -> None:
            for connection in self.idle:
                connection.transport.abort()

    return Network()


def calling(subject: str, url: str, note: Callable[[int], None]) -> tuple[Call, Any]:
    """How ``subject`` calls ``url``, and the client to close. ``note`` hears the number of a call at each attempt."""
    import httpx

    transport = network(note)
    if subject == RETRIES:
        from httpx_retries import Retry, RetryTransport

        transport = RetryTransport(transport=transport, retry=Retry(total=ATTEMPTS - 1, backoff_factor=0.5))
    elif subject == OURS:
        from seawall.client import ResilientTransport, RetryPolicy

        transport = ResilientTransport(transport, retry=RetryPolicy(attempts=ATTEMPTS))
    headers = {"X-API-Key": apps.API_KEY.decode()}
    client = httpx.AsyncClient(transport=transport, timeout=TIMEOUT, headers=headers)

    async def once(number: int) -> int:
        return (await client.get(url, extensions={"call": number})).status_code

    async def checked(number: int) -> int:
        answer = await client.get(url, extensions={"call": number})
        answer.raise_for_status()
        return answer.status_code

    def is_worth_it(error: BaseException) -> bool:
        if isinstance(error, httpx.HTTPStatusError):
            return error.response.status_code == 429 or error.response.status_code >= 500
        return isinstance(error, httpx.TransportError)

    call: Call = once
    if subject == TENACITY:
        import tenacity

        call = tenacity.retry(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=20),  # the pace of seawall.client
            retry=tenacity.retry_if_exception(is_worth_it),
            reraise=True,
        )(checked)
    elif subject == STAMINA:
        import stamina

        call = stamina.retry(on=is_worth_it, attempts=ATTEMPTS)(checked)  # type: ignore[arg-type,unused-ignore]
    return call, client


class OpenLoop:
    """All calls of one process, as columns with an entry for each."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        times, _ = arrivals(plan.phases, ["call"], plan.seed)
        self.at = array("d", times)
        self.status = array("h", bytes(2 * len(times)))
        self.took = array("d", bytes(8 * len(times)))
        self.late = array("d", bytes(8 * len(times)))
        self.errors: dict[str, int] = {}
        self.attempts = array("d")
        """When each attempt was made."""
        self.of = array("L")
        """The call that it was made for."""
        self._start = 0.0

    def note(self, number: int) -> None:
        """An attempt is made."""
        self.attempts.append(self._now())
        self.of.append(number)

    def _now(self) -> float:
        return time.monotonic() - self._start

    async def run(self, call: Call, start: float) -> None:
        """Make every call when it is due, and wait for the last one."""
        self._start = start
        running: set[asyncio.Task[None]] = set()
        for number, at in enumerate(self.at):
            ahead = at - self._now()
            if ahead > 0:
                await asyncio.sleep(ahead)
            task = asyncio.create_task(self._one(call, number))
            running.add(task)
            task.add_done_callback(running.discard)
        while running:
            await asyncio.wait(running)

    async def _one(self, call: Call, number: int) -> None:
        self.late[number] = self._now() - self.at[number]
        try:
            self.status[number] = await call(number)
        except Exception as error:
            # tenacity and stamina raise what a client that asks for it raises for an answer that is a refusal.
            answer = getattr(error, "response", None)
            self.status[number] = FAILED if answer is None else answer.status_code
            name = type(error).__name__
            self.errors[name] = self.errors.get(name, 0) + 1
        self.took[number] = self._now() - self.at[number]

    def record(self) -> dict[str, Any]:
        """The columns, times in whole microseconds."""
        return {
            "at": harness.micros(self.at),
            "status": self.status.tolist(),
            "took": harness.micros(self.took),
            "late": harness.micros(self.late),
            "attempts": harness.micros(self.attempts),
            "of": self.of.tolist(),
            "errors": self.errors,
        }


def say(what: Any) -> None:
    print(json.dumps(what, separators=(",", ":")), flush=True)


async def serve(plan: Plan) -> None:
    """Take the instant to begin from stdin, and answer with the record."""
    loop = OpenLoop(plan)
    call, client = calling(plan.subject, f"http://127.0.0.1:{plan.port}{apps.PATH}", loop.note)
    async with client:
        say({"ready": True})
        start = json.loads(await asyncio.to_thread(sys.stdin.readline))["start"]
        gc.freeze()
        await loop.run(call, start)
        record = loop.record()
        if plan.subject == OURS:
            record["statistics"] = client._transport.statistics()
        say(record)


def main() -> None:
    """Serve one plan."""
    logging.getLogger().addHandler(logging.NullHandler())  # what clients log goes nowhere, at the cost of writing it
    harness.pin(int(sys.argv[1]))
    plan = Plan(**json.loads(sys.stdin.readline()))
    signal.alarm(max(1, round(plan.limit)))
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(plan))


if __name__ == "__main__":
    main()
