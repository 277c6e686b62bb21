"""A TCP proxy that does to a connection what networks do, while the client and the server are the real ones."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from stores import HOST, free_port

CHUNK = 65_536
ANSWER_TIMEOUT = 10.0

_Pieces = asyncio.Queue[tuple[float, bytes]]  # when they arrived, by time.monotonic(); an empty one is the end


@dataclass(frozen=True, slots=True, eq=False)
class _Behaviour:
    """What happens to bytes. Held ones keep their order, and go on when the behaviour changes: nothing is lost."""

    delay: float = 0.0  # seconds; infinite for never
    reply_only: bool = False
    drip: tuple[int, float] | None = None
    reset_after: int | None = None
    garbage: bytes | None = None
    refuse: bool = False


class Proxy:
    """A port before the server at ``target``, served by a thread of its own; at first it passes everything on.

    Each method that changes its behaviour holds for the connections that are open and for those that come, and is in
    force when it returns. A connection whose server goes away ends as well.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.port = free_port()
        self.connections = 0
        """How many were accepted so far."""
        self.open = 0
        """How many the clients have neither closed nor lost."""
        self._behaviour = _Behaviour()
        self._listener: socket.socket | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._errors: list[Exception] = []
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._change(self._behaviour)

    @property
    def address(self) -> tuple[str, int]:
        return (HOST, self.port)

    @property
    def url(self) -> str:
        """Where a Redis client connects to."""
        return f"redis://{HOST}:{self.port}"

    def passing(self) -> None:
        """Pass everything on at once, and what was held before."""
        self._change(_Behaviour())

    def delayed(self, seconds: float, *, reply_only: bool = False) -> None:
        """Hold what comes for so long, in each direction: a round trip takes it twice, or once if ``reply_only``."""
        self._change(_Behaviour(delay=seconds, reply_only=reply_only))

    def silent(self, *, reply_only: bool = False) -> None:
        """Accept and read, and never answer. With ``reply_only`` the server gets and does what it is asked."""
        self._change(_Behaviour(delay=float("inf"), reply_only=reply_only))

    def dripping(self, bytes_per: int = 1, every: float = 0.1) -> None:
        """Send replies in so many bytes at a time, and wait so many seconds after each."""
        self._change(_Behaviour(drip=(bytes_per, every)))

    def resetting(self, after_bytes: int) -> None:
        """Reset each connection once it got so many bytes of replies from now on; 0: where a reply would begin."""
        self._change(_Behaviour(reset_after=after_bytes))

    def refusing(self) -> None:
        """Reset what is open and listen no more, until another behaviour is asked for."""
        self._change(_Behaviour(refuse=True))

    def garbage(self, answer: bytes) -> None:
        """Let the server do what it is asked, and send this instead of each piece of its replies."""
        self._change(_Behaviour(garbage=answer))

    def close(self) -> None:
        """Reset what is open, and end the thread."""
        if self._loop.is_closed():
            return
        self.refusing()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(ANSWER_TIMEOUT)
        self._loop.close()
        if self._errors:
            raise ExceptionGroup("the proxy is broken", self._errors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _change(self, behaviour: _Behaviour) -> None:
        asyncio.run_coroutine_threadsafe(self._become(behaviour), self._loop).result(ANSWER_TIMEOUT)

    async def _become(self, behaviour: _Behaviour) -> None:
        self._behaviour = behaviour
        self._changed.set()
        self._changed = asyncio.Event()
        if not behaviour.refuse:
            if self._listener is None:
                self._listener = socket.create_server(self.address, backlog=1024)
                self._listener.setblocking(False)
                self._loop.add_reader(self._listener, self._accept, self._listener)
            return
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving)

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # it has left again
            return
        self.connections += 1
        self.open += 1
        connection = _Connection(self, client)
        task = self._loop.create_task(connection.serve())
        self._serving.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            # Here and not in the task: one that is cancelled before its first step runs none of its code.
            self._serving.discard(task)
            connection.close()
            if not task.cancelled() and isinstance(error := task.exception(), Exception):
                self._errors.append(error)

        task.add_done_callback(ended)

    async def until_due(self, arrived: float, *, reply: bool) -> _Behaviour:
        """Wait for as long as what came at ``arrived`` is to be held; what is to be done with it then."""
        while True:
            behaviour = self._behaviour
            left = arrived + behaviour.delay - time.monotonic()
            if left <= 0 or (behaviour.reply_only and not reply):
                return behaviour
            await self.pause(left)

    async def pause(self, seconds: float) -> None:
        """Wait so long, or until the behaviour changes."""
        with suppress(TimeoutError):
            async with asyncio.timeout(None if seconds == float("inf") else seconds):
                await self._changed.wait()


class _Connection:
    """One of a client, with the one to the server behind it."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._server = socket.socket()
        for each in (self._client, self._server):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Until both sides have ended in order, closing is a reset.
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._counts_as_open = True
        self._behaviour: _Behaviour | None = None
        self._answered = 0  # bytes of replies since it is this behaviour

    async def serve(self) -> None:
        """Carry both directions until both have ended, or one has failed."""
        try:
            await self._loop.sock_connect(self._server, self._proxy.target)
            async with asyncio.TaskGroup() as group:
                requests: _Pieces = asyncio.Queue()
                replies: _Pieces = asyncio.Queue()
                group.create_task(self._read(self._client, requests))
                group.create_task(self._ask(requests))
                group.create_task(self._read(self._server, replies))
                group.create_task(self._answer(replies))
            for each in (self._client, self._server):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        except* OSError:
            pass  # the server refused, or one side was reset: so will the other be

    def close(self) -> None:
        self._client.close()
        self._server.close()
        self._left()

    def _left(self) -> None:
        self._proxy.open -= self._counts_as_open
        self._counts_as_open = False

    async def _read(self, source: socket.socket, pieces: _Pieces) -> None:
        while piece := await self._loop.sock_recv(source, CHUNK):
            pieces.put_nowait((time.monotonic(), piece))
        pieces.put_nowait((time.monotonic(), b""))
        if source is self._client:
            self._left()

    async def _ask(self, requests: _Pieces) -> None:
        while True:
            arrived, piece = await requests.get()
            await self._proxy.until_due(arrived, reply=False)
            if not piece:
                self._server.shutdown(socket.SHUT_WR)
                return
            await self._loop.sock_sendall(self._server, piece)

    async def _answer(self, replies: _Pieces) -> None:
        while True:
            arrived, piece = await replies.get()
            await self._proxy.until_due(arrived, reply=True)
            if not piece:
                self._client.shutdown(socket.SHUT_WR)
                return
            while piece:
                piece = piece[await self._send(piece, await self._proxy.until_due(arrived, reply=True)) :]

    async def _send(self, piece: bytes, behaviour: _Behaviour) -> int:
        """Do with a piece of a reply what the behaviour says; how many of its bytes that has used up."""
        if behaviour.garbage is not None:
            await self._loop.sock_sendall(self._client, behaviour.garbage)
            return len(piece)
        if behaviour.drip is not None:
            size, every = behaviour.drip
            await self._loop.sock_sendall(self._client, piece[:size])
            await self._proxy.pause(every)
            return size
        if behaviour.reset_after is not None:
            if self._behaviour is not behaviour:
                self._behaviour, self._answered = behaviour, 0
            piece = piece[: behaviour.reset_after - self._answered]
            self._answered += len(piece)
            await self._loop.sock_sendall(self._client, piece)
            if self._answered == behaviour.reset_after:
                raise ConnectionResetError
            return len(piece)
        await self._loop.sock_sendall(self._client, piece)
        return len(piece)
