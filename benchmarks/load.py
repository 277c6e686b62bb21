"""A small closed-loop HTTP/1.1 load generator: fixed connections, keep-alive, one request in flight on each.

It parses no more of an answer than where it ends, so that it stays well ahead of a Python server. Run as a process of
its own (``python -m benchmarks.load CORE``) it takes one JSON command a line on stdin and answers one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import cast

from benchmarks import apps, harness

LENGTH = b"content-length:"


@dataclass(slots=True)
class Counts:
    """What came back in one slot."""

    requests: int = 0
    seconds: float = 0.0
    statuses: dict[str, int] | None = None
    errors: int = 0


class Caller(asyncio.Protocol):
    """One connection: sends a request, waits for the whole answer, sends the next, until it is stopped."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.answers: dict[bytes, int] = {}
        self.running = False
        self.lost = False
        self.idle = asyncio.get_running_loop().create_future()
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none, but behaves as one

    def start(self) -> None:
        """Send the first request; each answer sends the next."""
        self.running = True
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data if self._buffer else data
        if not complete(data):
            self._buffer = data
            return
        self._buffer = b""
        status = data[9:12]
        self.answers[status] = self.answers.get(status, 0) + 1
        if self.running:
            self.transport.write(self.request)
        elif not self.idle.done():
            self.idle.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if not self.idle.done():
            self.idle.set_result(None)


def complete(data: bytes) -> bool:
    """Whether ``data`` holds a whole answer with a content-length (which all measured applications send)."""
    head = data.find(b"\r\n\r\n")
    if head < 0:
        return False
    lowered = data[:head].lower()
    at = lowered.find(LENGTH)
    if at < 0:
        return True
    end = lowered.find(b"\r", at)
    length = int(lowered[at + len(LENGTH) : end if end > 0 else head])
    return len(data) >= head + 4 + length


def request_bytes(port: int) -> bytes:
    """The measured request as it goes over the wire."""
    lines = [b"GET %b HTTP/1.1" % apps.PATH.encode()]
    lines += [name + b": " + value for name, value in apps.HEADERS if name != b"host"]
    lines.append(b"host: 127.0.0.1:%d" % port)
    return b"\r\n".join(lines) + b"\r\n\r\n"


async def run(port: int, connections: int, seconds: float) -> Counts:
    """Load one server for ``seconds``; what came back."""
    loop = asyncio.get_running_loop()
    request = request_bytes(port)
    callers = [
        (await loop.create_connection(lambda: Caller(request), "127.0.0.1", port))[1] for _ in range(connections)
    ]
    try:
        began = time.perf_counter()
        for caller in callers:
            caller.start()
        await asyncio.sleep(seconds)
        for caller in callers:
            caller.running = False
        await asyncio.wait([caller.idle for caller in callers], timeout=5)
        taken = time.perf_counter() - began
        lost = sum(caller.lost for caller in callers)
    finally:
        for caller in callers:
            caller.transport.close()
    statuses: dict[str, int] = {}
    for caller in callers:
        for status, count in caller.answers.items():
            statuses[status.decode()] = statuses.get(status.decode(), 0) + count
    return Counts(sum(statuses.values()), taken, statuses, lost)


def main() -> None:
    """Serve commands from stdin until it ends."""
    harness.pin(int(sys.argv[1]))
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for line in sys.stdin:
            counts = runner.run(run(**json.loads(line)))
            print(json.dumps(asdict(counts)), flush=True)


if __name__ == "__main__":
    main()
