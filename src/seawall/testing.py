"""For tests of applications that use Seawall: a clock to turn, an app to call, limits to switch off or forget.

>>> clock = ManualClock()
>>> clock.advance(1.5)
>>> clock()
1500000000
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, final
from urllib.parse import unquote

from seawall import asgi
from seawall.rate import SECOND

__all__ = ["Answer", "ManualClock", "disabled", "drive", "reset"]


@final
class ManualClock:
    """A clock that stands until it is told: ``Seawall(app, ..., clock=ManualClock())``.

    ``at`` is the wall-clock time at which it starts, in ISO 8601 (``"2028-02-28T23:59:59Z"``); calendar quotas follow
    it. Monotonic time starts at 0 and both advance together.
    """

    def __init__(self, at: str = "2026-01-01T00:00:00Z") -> None:
        moment = datetime.fromisoformat(at)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        elapsed = moment - datetime(1970, 1, 1, tzinfo=UTC)
        self._now = 0
        self._epoch = (elapsed.days * 86_400 + elapsed.seconds) * SECOND + elapsed.microseconds * 1_000

    def __call__(self) -> int:
        """Monotonic nanoseconds."""
        return self._now

    def __repr__(self) -> str:
        return f"<ManualClock {datetime.fromtimestamp(self.wall_ns() / SECOND, UTC).isoformat()}>"

    def wall_ns(self) -> int:
        """Nanoseconds since the Unix epoch."""
        return self._epoch + self._now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass; negative ones are a clock that was set back."""
        self._now += round(seconds * SECOND)

    def advance_ns(self, nanoseconds: int) -> None:
        """Let exactly ``nanoseconds`` pass."""
        self._now += nanoseconds


@final
@dataclass(slots=True)
class Answer:
    """What an app sent: ``status`` (or the close code of a WebSocket), ``headers`` by lower-case name, ``body``."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    messages: list[Mapping[str, Any]] = field(default_factory=list)


@final
class _Inbox:
    """What a caller sends: a request, then its leaving to whoever asks for more. As uvicorn's cycle it tells that it
    has not left, so that a request that has waited for admission is served."""

    disconnected = False

    def __init__(self, *messages: dict[str, Any]) -> None:
        self._messages = messages
        self._asked = 0

    async def receive(self) -> dict[str, Any]:
        self._asked += 1
        if self._asked == 1:
            return self._messages[0]
        await asyncio.sleep(0)
        return self._messages[1]


async def drive(app: Any, scope: str | Mapping[str, Any] = "/", **changes: Any) -> Answer:
    """Call an ASGI app once, without a server, and return its answer.

    ``scope`` is a path (``"/search?q=1"``) or a scope; ``changes`` are put into it: ``method="POST"``,
    ``headers={"X-API-Key": "foo"}``, ``client=("192.0.2.1", 1234)``, ``type="websocket"``.
    """
    if isinstance(scope, str):
        raw, _, query = scope.partition("?")
        scope = {"path": unquote(raw), "raw_path": raw.encode(), "query_string": query.encode()}
    whole: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": ("192.0.2.1", 50_000),
        "server": ("testserver", 80),
        **scope,
        **changes,
    }
    if isinstance(whole["headers"], Mapping):
        whole["headers"] = [
            (str(name).lower().encode("latin-1"), str(value).encode("latin-1"))
            for name, value in whole["headers"].items()
        ]
    websocket = whole["type"] == "websocket"
    if websocket:
        del whole["method"]
        whole["scheme"] = "ws"
    first = {"type": "websocket.connect"} if websocket else {"type": "http.request", "body": b"", "more_body": False}
    last = {"type": "websocket.disconnect", "code": 1000} if websocket else {"type": "http.disconnect"}
    answer = Answer()

    async def send(message: Mapping[str, Any]) -> None:
        answer.messages.append(message)
        kind = message["type"]
        if kind.endswith("response.start"):
            answer.status = message["status"]
        elif kind == "websocket.accept":
            answer.status = 101
        elif kind == "websocket.close" and not answer.status:
            answer.status = message.get("code", 1000)
        for name, value in message.get("headers") or ():
            answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        answer.body += message.get("body", b"")

    await app(whole, _Inbox(first, last).receive, send)
    return answer


@contextmanager
def disabled() -> Iterator[None]:
    """Within the block, every Seawall in this process lets everything pass and counts nothing."""
    asgi.switch_off(True)
    try:
        yield
    finally:
        asgi.switch_off(False)


def reset() -> None:
    """Forget what callers have used, what was counted and what was warned about, everywhere in this process.

    A shared store keeps what it counts: give each test a ``key_prefix`` of its own.
    """
    asgi.reset_all()
