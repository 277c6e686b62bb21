"""As much of an HTTP/1.1 client as a demo needs: one connection that is kept, one request at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

TIMEOUT = 5.0


@final
@dataclass(frozen=True, slots=True)
class Response:
    """An answer. ``headers`` are in the order and spelling of the wire."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for field, value in self.headers if field.lower() == name.lower()), None)


@final
class Connection:
    """A connection to ``port`` of 127.0.0.1, opened with the first request and again after an error."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self, method: str, target: str, headers: Mapping[str, str]) -> Response:
        """Send a request without a body and read its answer. OSError, also for an answer that makes no sense."""
        try:
            async with asyncio.timeout(TIMEOUT):
                return await self._exchange(method, target, headers)
        except (OSError, EOFError, ValueError, IndexError, asyncio.LimitOverrunError) as error:
            self.close()
            raise error if isinstance(error, OSError) else OSError(str(error)) from error

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect, if it is not connected."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        return self._streams

    async def _exchange(self, method: str, target: str, headers: Mapping[str, str]) -> Response:
        reader, writer = await self.open()
        lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{self._port}", "Content-Length: 0"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        pairs = tuple((name, value.strip()) for name, _, value in (field.partition(":") for field in fields))
        response = Response(int(status.split(" ", 2)[1]), pairs, b"")
        return Response(response.status, pairs, await _read_body(reader, response))

    def close(self) -> None:
        """Drop the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _read_body(reader: asyncio.StreamReader, head: Response) -> bytes:
    if (head.header("transfer-encoding") or "").lower() != "chunked":
        return await reader.readexactly(int(head.header("content-length") or 0))
    body = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readline()
    return body
