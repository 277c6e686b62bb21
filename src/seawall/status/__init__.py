"""The status page as an ASGI app: JSON, one HTML page, server-sent events, and what a token may do.

The shell decides who may ask (`Policy.status`); this answers whoever is let in. One address, and the ``Accept`` header
says in which form: ``text/html``, ``text/event-stream``, and JSON for all others.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from hmac import compare_digest
from time import monotonic
from typing import Any, TypeAlias, final

from seawall.status.document import Count, Document, Reloading, counted, document
from seawall.status.page import content_security_policy, main, page

__all__ = ["ActionError", "Count", "Document", "Reloading", "StatusPage", "counted", "document"]

Scope: TypeAlias = Any
Receive: TypeAlias = Callable[[], Awaitable[Any]]
Send: TypeAlias = Callable[[Any], Awaitable[None]]
Header: TypeAlias = tuple[bytes, bytes]
Act: TypeAlias = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
"""What does an action of a tenant: its name, its arguments, checked; and what there is to answer."""

MOST_BODY = 4_096
LEAST_TOKEN = 16
LIFETIME = 30.0
"""Seconds after which a stream ends, and its listener has to ask again: whether it may is the shell's to say anew."""
_STUCK = 10.0
"""Seconds after which a listener that does not read is given up."""
_READS = frozenset({"GET", "HEAD"})
_JSON = "application/json"
_HTML = "text/html"
_EVENTS = "text/event-stream"
_LONGEST_BLOCK = 366 * 86_400
_ARGUMENTS = {
    "block": frozenset({"tenant", "seconds", "reason"}),
    "unblock": frozenset({"tenant"}),
    "reset": frozenset({"tenant"}),
    "show": frozenset({"tenant"}),
}
"""What each action takes beside its name."""

_HEADERS: list[Header] = [
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class ActionError(Exception):
    """Why an action cannot be done, in words for whoever asked; ``status`` is a 4xx or 5xx."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@final
class StatusPage:
    """Answers requests for the status path, once it is decided that their peer may see it.

    ``document`` makes the document of now, on the event loop. ``token`` and ``act`` are what POSTs need: without both
    there are none. ``interval`` is the seconds between two events of a stream, ``listeners`` how many streams there may
    be at once.
    """

    def __init__(
        self,
        document: Callable[[], Document],
        *,
        token: str | None = None,
        act: Act | None = None,
        interval: float = 1.0,
        listeners: int = 16,
    ) -> None:
        if token is not None and len(token) < LEAST_TOKEN:
            raise ValueError(f"a token is at least {LEAST_TOKEN} characters")
        self._document = document
        self._token = None if token is None else token.encode()
        self._act = act
        self._interval = interval
        self._most_listeners = listeners
        self._listeners = 0
        self._event = (b"", b"")
        self._event_at = -interval

    def __repr__(self) -> str:
        return f"<StatusPage with {self._listeners} listeners>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]
        if _is_foreign(scope["headers"]):
            await _fail(send, 403, "not for scripts of other origins", headless=method == "HEAD")
        elif method in _READS:
            await self._show(scope, receive, send)
        elif method != "POST":
            allowed = b"GET, HEAD" if self._token is None else b"GET, HEAD, POST"
            await _fail(send, 405, f"{method} is not for this address", [(b"allow", allowed)])
        elif self._token is None or self._act is None:
            await _fail(send, 404, "no token is configured (status.token), so nothing can be done here")
        elif not self._is_authorized(scope["headers"], self._token):
            await _fail(send, 401, "the token is missing or wrong", [(b"www-authenticate", b"Bearer")])
        else:
            await self._do(self._act, receive, send)

    async def _show(self, scope: Scope, receive: Receive, send: Send) -> None:
        form = preferred(value for name, value in scope["headers"] if name == b"accept")
        if form == _EVENTS:
            return await self._stream(scope, receive, send)
        if form == _HTML:
            body = page(self._document()).encode("utf-8", "backslashreplace")
            more = [(b"content-security-policy", content_security_policy().encode())]
        else:
            body = json.dumps(self._document(), indent=1).encode() + b"\n"
            more = []
        await _answer(send, 200, form, body, more, headless=scope["method"] == "HEAD")

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the document again and again: as data of each event, and before it as HTML to who asks for ``?page``."""
        if scope["method"] == "HEAD":
            return await _answer(send, 200, _EVENTS, b"", headless=True)
        if self._listeners >= self._most_listeners:
            return await _fail(send, 503, "too many listen already", [(b"retry-after", b"5")])
        # nginx would keep events until it has a few kilobytes of them.
        headers = [*_HEADERS, (b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        self._listeners += 1
        left = asyncio.ensure_future(_left(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for events in self._events(left, rendered=scope.get("query_string") == b"page"):
                async with asyncio.timeout(_STUCK):
                    await send(_chunk(events))
            async with asyncio.timeout(_STUCK):
                await send(_chunk(b"", more=False))
        except TimeoutError:
            pass  # the server closes what is left without an end
        finally:
            self._listeners -= 1
            left.cancel()

    async def _events(self, left: asyncio.Future[None], *, rendered: bool) -> AsyncIterator[bytes]:
        """What a stream sends, until its listener has left, its time is over or the server ends."""
        until = monotonic() + LIFETIME
        yield b"retry: 1000\n\n"
        while not left.done() and monotonic() < until and not _is_stopping():
            data, html = self._latest()
            yield html + data if rendered else data
            await asyncio.wait((left,), timeout=self._interval)

    def _latest(self) -> tuple[bytes, bytes]:
        """An event with the document, and one with its HTML; the same ones for all who listen."""
        now = monotonic()
        if now - self._event_at >= self._interval / 2:
            latest = self._document()
            html = main(latest).encode("utf-8", "backslashreplace").replace(b"\n", b"\ndata: ")
            self._event = b"data: " + json.dumps(latest).encode() + b"\n\n", b"event: page\ndata: " + html + b"\n\n"
            self._event_at = now
        return self._event

    def _is_authorized(self, headers: Iterable[Header], token: bytes) -> bool:
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, credentials = (given[0] if len(given) == 1 else b"").partition(b" ")
        return compare_digest(credentials.strip(), token) and scheme.lower() == b"bearer"

    async def _do(self, act: Act, receive: Receive, send: Send) -> None:
        try:
            action, arguments = _asked(await _body(receive))
            answer = await act(action, arguments)
        except ActionError as error:
            return await _fail(send, error.status, str(error))
        await _answer(send, 200, _JSON, json.dumps(answer).encode() + b"\n")


def preferred(accepts: Iterable[bytes]) -> str:
    """The form that an ``Accept`` asks for most, of several the first. JSON for who does not care."""
    best, most = _JSON, 0.0
    for item in b",".join(accepts)[:1_024].decode("latin-1").lower().split(","):
        media, *parameters = (part.strip() for part in item.split(";"))
        if media not in (_JSON, _HTML, _EVENTS):
            continue
        q = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    q = float(parameter[2:])
                except ValueError:
                    q = 0.0
        if q > most:
            best, most = media, q
    return best


def _is_foreign(headers: Iterable[Header]) -> bool:
    """Whether a script of another origin asks, in a browser whose machine may see what that origin may not.

    An application's CORS middleware may let every origin read every answer; this one is not the application's.
    """
    fetch = {name: value for name, value in headers if name.startswith(b"sec-fetch-")}
    site = fetch.get(b"sec-fetch-site", b"none")
    return site not in (b"none", b"same-origin") and fetch.get(b"sec-fetch-mode") != b"navigate"


def _asked(body: bytes) -> tuple[str, dict[str, Any]]:
    """The action and its arguments, or what is wrong with them."""
    try:
        asked = json.loads(body)
    except ValueError:
        raise ActionError("the body is not JSON") from None
    except RecursionError:
        raise ActionError("the body is nested too deeply") from None
    if not isinstance(asked, dict):
        raise ActionError('the body is an object such as {"action": "block", "tenant": "acme", "seconds": 600}')
    action = asked.pop("action", None)
    if not isinstance(action, str) or action not in _ARGUMENTS:
        raise ActionError(f"action is one of {', '.join(_ARGUMENTS)}")
    if unknown := sorted(asked.keys() - _ARGUMENTS[action]):
        raise ActionError(f"{action} takes {', '.join(sorted(_ARGUMENTS[action]))}, not {unknown[0][:64]!r}")
    tenant = asked.get("tenant")
    if not isinstance(tenant, str) or not tenant.strip() or len(tenant) > 256:
        raise ActionError("tenant is the id of one, 1 to 256 characters")
    if action == "block":
        seconds = asked.get("seconds")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 1 <= seconds <= _LONGEST_BLOCK:
            raise ActionError(f"seconds is how long to block, 1 to {_LONGEST_BLOCK}")
        if not isinstance(asked.get("reason", ""), str) or len(asked.get("reason", "")) > 200:
            raise ActionError("reason is at most 200 characters")
    return action, asked


async def _body(receive: Receive) -> bytes:
    body = b""
    while True:
        message: Any = await receive()
        if message["type"] != "http.request":
            raise ActionError("the request has no end")
        body += bytes(message.get("body", b""))
        if len(body) > MOST_BODY:
            raise ActionError(f"the body is longer than {MOST_BODY} bytes", 413)
        if not message.get("more_body"):
            return body


async def _answer(
    send: Send, status: int, form: str, body: bytes, more: Iterable[Header] = (), *, headless: bool = False
) -> None:
    charset = "" if form == _JSON else "; charset=utf-8"
    headers = [*_HEADERS, (b"content-type", f"{form}{charset}".encode()), *more]
    if form != _EVENTS:
        headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send(_chunk(b"" if headless else body, more=False))


async def _fail(send: Send, status: int, message: str, more: Iterable[Header] = (), *, headless: bool = False) -> None:
    """An answer that says what is wrong, as JSON."""
    await _answer(send, status, _JSON, json.dumps({"error": message}).encode() + b"\n", more, headless=headless)


def _chunk(body: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def _left(receive: Receive) -> None:
    """Return when the client has left, or the server has it leave."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _is_stopping() -> bool:
    """Whether the server has been told to end.

    Servers wait for answers that are under way, for which a stream has no end. Not all say so: uvicorn's signal handler
    is a method of the server, which knows.
    """
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return bool(getattr(server, "should_exit", False))
