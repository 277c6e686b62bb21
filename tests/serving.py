"""A server process for as long as a block lasts, and clients of one connection, for tests of what people run."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT = 60.0
STOP_TIMEOUT = 10.0
ANSWER_TIMEOUT = 15.0

UVICORN = ("-m", "uvicorn", "{app}", "--host", "127.0.0.1", "--port", "{{port}}", "--log-level", "warning")
ASGI_SERVERS = {
    "uvicorn-h11": (*UVICORN, "--http", "h11", "--loop", "asyncio"),
    "uvicorn-httptools": (*UVICORN, "--http", "httptools", "--loop", "asyncio"),
    "uvicorn-uvloop": (*UVICORN, "--http", "httptools", "--loop", "uvloop"),
    "hypercorn": ("-m", "hypercorn", "{app}", "--bind", "127.0.0.1:{{port}}"),
    "granian": (
        *("-m", "granian", "{app}", "--interface", "asgi", "--host", "127.0.0.1", "--port", "{{port}}"),
        *("--log-level", "warning"),
    ),
}
if sys.platform == "win32":  # which uvloop does not run on
    del ASGI_SERVERS["uvicorn-uvloop"]


def asgi_server(name: str, app: str) -> list[str]:
    """The arguments of Python that serve ``app`` (``module:name``) with one of `ASGI_SERVERS`."""
    return [argument.format(app=app) for argument in ASGI_SERVERS[name]]


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that has been read."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Served:
    """A server that listens on 127.0.0.1."""

    process: subprocess.Popen[bytes]
    port: int
    _connection: http.client.HTTPConnection | None = field(default=None, init=False)

    def ask(self, path: str = "/", method: str = "GET", headers: Mapping[str, str] | None = None) -> Reply:
        """One request, over a connection that is kept: refusals must not close it."""
        if self._connection is None:
            self._connection = self.connect()
        self._connection.request(method, path, headers=dict(headers or {}))
        answer = self._connection.getresponse()
        fields = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, fields, answer.read())

    def statuses(self, count: int, path: str = "/", **how: str) -> list[int]:
        return [self.ask(path, **how).status for _ in range(count)]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            _kill(self.process)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def serving(arguments: Sequence[str], log: Path, cwd: Path = ROOT, attempts: int = 3) -> Iterator[Served]:
    """Run ``python ARGUMENTS`` with a free PORT in its environment (and for ``{port}``) until the block ends."""
    served = None
    while served is None:
        attempts -= 1
        port = free_port()
        command = [sys.executable, *(argument.format(port=port) for argument in arguments)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, "PORT": str(port)},
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C at the tests is not for it
            )
        if _is_up(process, port):
            served = Served(process, port)
        else:  # somebody else was quicker to take the port, or it is broken
            _kill(process)
            assert attempts, f"{command} does not serve:\n{log.read_text(errors='replace')}"
    try:
        yield served
    finally:
        served.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a server with its workers, which share its session with nobody else."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _is_up(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            # Whoever took the port before it lets it end now.
            time.sleep(0.2)
            return process.poll() is None
        time.sleep(0.02)
    return False


def most(burst: int, per_second: float, seconds: float) -> int:
    """What a bucket of ``burst`` and ``per_second`` admits at most in ``seconds``: B + r * t."""
    return burst + int(per_second * seconds)


class Caller:
    """One connection, for tests with many at once: what is sent and what is read are told apart."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int) -> Caller:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(
        self, path: str, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Reply:
        await self.send(path, method, headers, body)
        return await self.reply()

    async def send(
        self, path: str, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> None:
        """A request, with its length where it has a body, unless ``headers`` says otherwise: then that is all of it."""
        fields = {"Host": "127.0.0.1", **(headers or {})}
        if body or (method == "POST" and not {"Transfer-Encoding", "Content-Length"} & fields.keys()):
            fields["Content-Length"] = str(len(body))
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.writer.write(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body)
        await self.writer.drain()

    async def send_chunks(self, chunks: Iterable[bytes]) -> None:
        for chunk in chunks:
            self.writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            await self.writer.drain()
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()

    async def start(self) -> Reply:
        """The head of an answer, whatever its status is."""
        async with asyncio.timeout(ANSWER_TIMEOUT):
            head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").strip().split("\r\n")
        pairs = (line.split(":", 1) for line in lines)
        return Reply(int(first.split()[1]), {name.lower(): value.strip() for name, value in pairs}, b"")

    async def reply(self) -> Reply:
        """The next answer that is final."""
        while (head := await self.start()).status < 200:
            pass
        async with asyncio.timeout(ANSWER_TIMEOUT):
            if head.headers.get("transfer-encoding") == "chunked":
                body = b""
                while chunk := await self.chunk():
                    body += chunk
            else:
                body = await self.reader.readexactly(int(head.headers.get("content-length", 0)))
        return Reply(head.status, head.headers, body)

    async def chunk(self) -> bytes:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            return (await self.reader.readexactly(size + 2))[:-2]

    def leave(self) -> None:
        """Close the connection, as a client does that has had enough."""
        self.writer.close()

    def abort(self) -> None:
        """Reset the connection, as a client does that has crashed."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def closed(self) -> None:
        """Close it, and wait until that is done."""
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()
