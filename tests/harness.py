"""What the tests of the outer half share: apps, calls without an event loop, headers and metrics as values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping
from hashlib import sha256
from typing import Any, TypeAlias, TypeVar

from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Receive, Scope, Send

from seawall.asgi import QUOTA_PARTS, RATE_PARTS, Middleware
from seawall.config import load_mapping
from seawall.testing import Answer, ManualClock, drive

T = TypeVar("T")
Items: TypeAlias = list[tuple[str, dict[str, int | str]]]

KEY = "foo"
OTHER_KEY = "bar"


def hash_of(key: str) -> str:
    """As a configuration lists an API key."""
    return "sha256:" + sha256(key.encode()).hexdigest()


def config(**sections: Any) -> dict[str, Any]:
    """A mapping of the shape of the YAML: a default plan that limits nothing, and what is given."""
    return {"version": 1, "plans": {"default": {"rate": "unlimited"}}, **sections}


def plan(**values: Any) -> dict[str, Any]:
    """The configuration with one plan for everybody."""
    return config(plans={"default": values})


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    """The application: 200, or an accepted WebSocket."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": 1000})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"hello"})


def answering(status: int = 200, headers: Iterable[tuple[bytes, bytes]] = (), body: bytes = b"") -> ASGIApp:
    """An application with one answer."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": body})

    return app


class Seen:
    """An application that notes whom it served."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []

    @property
    def paths(self) -> list[str]:
        return [scope["path"] for scope in self.scopes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        await hello(scope, receive, send)


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits: the request path must not need an event loop to turn."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    coroutine.close()
    raise AssertionError("it waited for something")


def call(app: Any, scope: str | Mapping[str, Any] = "/", **changes: Any) -> Answer:
    """One request, answered at once."""
    return at_once(drive(app, scope, **changes))


def statuses(app: Any, count: int, scope: str | Mapping[str, Any] = "/", **changes: Any) -> list[int]:
    return [call(app, scope, **changes).status for _ in range(count)]


class Seeded(Middleware):
    """`Seawall` with a source of jitter of our own: 0.0 draws none, nearly 1.0 all of it."""

    parts = RATE_PARTS | QUOTA_PARTS


def seeded(app: ASGIApp, settings: Mapping[str, Any], random: Callable[[], float], clock: ManualClock) -> Seeded:
    return Seeded(app, load_mapping(settings), clock=clock, random=random, registry=CollectorRegistry())


def metric(registry: CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    """The samples of a metric that are not zero, by the values of their labels in the order of the declaration."""
    found: dict[tuple[str, ...], float] = {}
    for family in registry.collect():
        for sample in family.samples:
            if sample.name == name and sample.value:
                found[tuple(sample.labels.values())] = sample.value
    return found


def outcomes(registry: CollectorRegistry) -> dict[str, int]:
    """How many requests were answered how, over all priorities."""
    total: dict[str, int] = {}
    for (outcome, _), value in metric(registry, "seawall_requests_total").items():
        total[outcome] = total.get(outcome, 0) + int(value)
    return total


def in_flight(registry: CollectorRegistry) -> int:
    return int(sum(metric(registry, "seawall_inflight_requests").values()))


_STRING = r'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"'
_PARAMETER = rf"; *([a-z*][a-z0-9_.*-]*)=(-?[0-9]{{1,15}}|{_STRING})"
_ITEM = re.compile(rf"{_STRING}((?:{_PARAMETER})*)")


def structured(value: str) -> Items:
    """A List of String Items with integer or string parameters (RFC 9651), parsed strictly."""
    items: Items = []
    rest = value
    while True:
        match = _ITEM.match(rest)
        assert match is not None, f"not a structured field: {value!r}"
        parameters: dict[str, int | str] = {}
        for name, raw, text in re.findall(_PARAMETER, match[2]):
            assert name not in parameters, f"{name} is there twice: {value!r}"
            parameters[name] = text if raw.startswith('"') else int(raw)
        items.append((match[1], parameters))
        rest = rest[match.end() :]
        if not rest:
            return items
        comma = re.match(r"[ \t]*,[ \t]*", rest)
        assert comma is not None, f"not a list: {value!r}"
        rest = rest[comma.end() :]


def limit_headers(answer: Answer) -> tuple[Items | None, Items | None]:
    """``RateLimit-Policy`` and ``RateLimit`` of an answer."""
    policies, current = answer.headers.get("ratelimit-policy"), answer.headers.get("ratelimit")
    return structured(policies) if policies is not None else None, structured(current) if current is not None else None


def problem(answer: Answer) -> dict[str, Any]:
    """The problem document of a refusal."""
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["content-length"]) == len(answer.body)
    document: dict[str, Any] = json.loads(answer.body)
    return document
