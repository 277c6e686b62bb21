"""One connection: replies come in the order of the calls, and each is given to whoever made its call.

Nobody waits on the socket, so nobody who gives up leaves it in a state in which the next one reads somebody else's
reply; a connection on which anything is not as it should be is closed, and never used again. Reading is hiredis's.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from ssl import SSLContext, SSLError
from typing import Any, TypeAlias, cast, final

import hiredis

from seawall.backends.redis.address import Address, Endpoint

Answer: TypeAlias = Callable[[Any], None]
"""Is given a reply, an error of the server among them (`hiredis.ReplyError`), or `LOST` where none will come."""

CONNECT_TIMEOUT = 1.0
"""Seconds for a connection and its handshake. More than a call has, or a slow server would cost one a call."""
MOST_UNREAD = 1 << 20
"""Bytes without a complete reply after which it is none: ours are a few kilobytes."""
_ENORMOUS = re.compile(rb"\*[0-9]{6}")
"""An array of so many that the parser, which believes it, would be busy for seconds to make room; ours are short."""
LOST = object()
_INCOMPLETE = object()


class LinkError(Exception):
    """Why there is no connection, without anything that is secret. ``reached``: there was one, for a moment."""

    reached = True


class UnreachedError(LinkError):
    """Nobody listens there."""

    reached = False


@final
class Link(asyncio.Protocol):
    """A connection that is ready for calls, until it is `lost`.

    ``release`` is what the server calls its version, ``modern`` whether it knows the flags of scripts (Redis 7,
    Valkey).
    """

    def __init__(self) -> None:
        self.lost: str | None = None
        self.on_lost: Callable[[Link, str], None] | None = None
        self.release = ""
        self.modern = False
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE, encoding=None)
        self._unread = 0
        self._end = b""
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[tuple[Answer, float]] = deque()

    def __repr__(self) -> str:
        return f"<Link to {self.release or 'nobody yet'}, {self.lost or f'{len(self._waiting)} calls open'}>"

    @property
    def oldest(self) -> float | None:
        """When the oldest call was made that has no reply, by the loop's clock."""
        return self._waiting[0][1] if self._waiting else None

    def call(self, command: tuple[Any, ...], answer: Answer) -> None:
        """Send one command. Its reply, or `LOST`, goes to ``answer``."""
        if self._transport is None or self.lost is not None:
            answer(LOST)
            return
        self._waiting.append((answer, self._loop.time()))
        self._transport.write(hiredis.pack_command(command))

    async def reply(self, *command: Any) -> Any:
        """The reply to one command, or `LOST` (not for requests)."""
        reply: asyncio.Future[Any] = self._loop.create_future()

        def answer(value: Any) -> None:
            if not reply.done():
                reply.set_result(value)

        self.call(command, answer)
        return await reply

    async def ask(self, *command: Any) -> Any:
        """The same; raises `LinkError` for errors, nothing, and lost connections."""
        value = await self.reply(*command)
        if value is LOST or value is None or isinstance(value, Exception):
            raise LinkError(self.lost or str(value or "it says nothing"))
        return value

    def drop(self, reason: str) -> None:
        """Close it, and tell everybody who waits."""
        if self.lost is not None:
            return
        self.lost = reason
        if self._transport is not None:
            self._transport.abort()
        waiting, self._waiting = self._waiting, deque()
        for answer, _ in waiting:
            answer(LOST)
        if self.on_lost is not None:
            self.on_lost(self, reason)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.drop("connection")

    def data_received(self, data: bytes) -> None:
        try:
            if _ENORMOUS.search(self._end + data):
                self.drop("mismatch")
                return
            self._end = data[-8:]
            self._reader.feed(data)
            self._unread += len(data)
            while self.lost is None:
                reply = self._reader.gets()
                if reply is _INCOMPLETE:
                    if self._unread > MOST_UNREAD:
                        self.drop("mismatch")
                    return
                self._unread = 0
                if not self._waiting:
                    self.drop("mismatch")  # a reply to nothing
                    return
                self._waiting.popleft()[0](reply)
        except hiredis.ProtocolError:
            self.drop("mismatch")


async def connect(
    address: Address, endpoint: Endpoint, context: SSLContext | None = None, *, sentinel: bool = False
) -> Link:
    """A connection that has introduced itself. Raises `LinkError`, or `TimeoutError` after `CONNECT_TIMEOUT`.

    ``context`` is made once, for it reads files and takes 20 ms.
    """
    loop = asyncio.get_running_loop()
    link: Link | None = None
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            if endpoint.path:
                _, link = await loop.create_unix_connection(Link, endpoint.path)
            else:
                _, link = await loop.create_connection(Link, endpoint.host, endpoint.port, ssl=context)
            await _introduce(link, address, sentinel=sentinel)
            return link
    except TimeoutError:
        raise
    except (SSLError, ConnectionResetError) as error:
        raise LinkError(f"{endpoint}: {error.strerror or type(error).__name__}") from None
    except (OSError, UnicodeError) as error:  # the latter of names that are none
        told = error.strerror if isinstance(error, OSError) else None
        raise UnreachedError(f"{endpoint}: {told or type(error).__name__}") from None
    finally:
        if link is not None and not link.release:
            link.drop("connection")


async def _introduce(link: Link, address: Address, *, sentinel: bool) -> None:
    username, password = address.username, address.password
    if sentinel:
        username, password = address.sentinel_username, address.sentinel_password
    hello: list[Any] = ["HELLO", "2"]
    if username is not None or password is not None:
        hello += ["AUTH", username or "default", password or ""]
    told = await link.ask(*hello, "SETNAME", "seawall")
    about = dict(zip(told[::2], told[1::2], strict=False)) if isinstance(told, list) else {}
    version = about.get(b"version", b"0")
    server = about.get(b"server", b"redis")
    if not isinstance(version, bytes) or not isinstance(server, bytes):
        raise LinkError("the server does not say what it is")
    if address.db and not sentinel:
        await link.ask("SELECT", str(address.db))
    link.modern = server == b"valkey" or int(version.split(b".")[0]) >= 7
    link.release = f"{server.decode('ascii', 'replace')} {version.decode('ascii', 'replace')}"
