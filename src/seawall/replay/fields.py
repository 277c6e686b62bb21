"""Which field of a line says what: given by the user, or guessed from the names that servers use.

The names are those of nginx, Apache, Caddy, Envoy (Istio), Traefik, uvicorn behind a JSON formatter, AWS load balancers
and API gateways, and the Elastic Common Schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

from seawall.identity import parse_address
from seawall.rate import SECOND
from seawall.replay.instants import UNITS

Document: TypeAlias = Any
"""A line that was taken apart: a mapping, or the fields of a text in their order."""
Getter: TypeAlias = Callable[[Document], object]

ROLES = ("time", "start", "ip", "method", "path", "request", "status", "duration", "tenant", "key", "forwarded")
"""What a line may say. ``time`` is when it was written, ``start`` when the request came, ``request`` the whole request
line, ``forwarded`` the header in which proxies name the client. ``state:NAME`` stands for any state."""

_MS = 1_000_000
_GUESSES: Mapping[str, tuple[str, ...]] = {
    "time": (
        *("ts", "time", "timestamp", "@timestamp", "time_local", "time_iso8601", "msec", "asctime", "datetime", "date"),
        *("requestTimeEpoch", "time_unix_nano", "logged_at"),
    ),
    "start": ("start_time", "StartUTC", "StartLocal", "request_creation_time", "started_at", "event.start"),
    "ip": (
        *("request.client_ip", "request.remote_ip", "request.remote_addr", "remote_addr", "client_ip", "remote_ip"),
        *("ClientHost", "ClientAddr", "client_addr", "client:port", "downstream_remote_address_without_port"),
        *("downstream_remote_address", "remote_address", "source.ip", "client.ip", "client.address", "sourceIp"),
        *("source_ip", "ip", "client", "remote", "peer"),
    ),
    "method": (
        *("request_method", "method", "RequestMethod", "request_verb", "http.request.method", "http_method"),
        *("httpMethod", "http.method", "verb"),
    ),
    "path": (
        *("request_uri", "request.uri", "RequestPath", "path", "uri", "url.original", "url.path", "full_path"),
        *("request_path", "http.target", "http.url", "url", "request_url", "target"),
    ),
    "request": ("request", "request_line", "requestLine"),
    "status": (
        *("status", "status_code", "response_code", "DownstreamStatus", "elb_status_code", "statusCode"),
        *("http.response.status_code", "http.status_code", "response.status", "code"),
    ),
    "tenant": ("tenant_id", "tenant"),
    "forwarded": ("http_x_forwarded_for", "x_forwarded_for", "xff", "request_X-Forwarded-For"),
}
_DURATIONS: tuple[tuple[str, int | None], ...] = (
    ("request_time", SECOND),
    ("rt", SECOND),
    ("Duration", 1),
    ("duration_ms", _MS),
    ("request_time_ms", _MS),
    ("elapsed_ms", _MS),
    ("took_ms", _MS),
    ("latency_ms", _MS),
    ("response_time_ms", _MS),
    ("duration_s", SECOND),
    ("duration_seconds", SECOND),
    ("target_processing_time", SECOND),
    ("event.duration", 1),
    ("duration", None),
    ("latency", None),
    ("responseLatency", _MS),
    ("response_time", None),
    ("process_time", None),
    ("elapsed", None),
)

_IN_ORDER = ("ip", "ident", "user", "time", "request", "status", "bytes", "referer", "user_agent")
_TEXT_NAMES: Mapping[str, int] = {name: at for at, name in enumerate(_IN_ORDER, 1)}
_TRAEFIK_TIME = re.compile(r"[0-9]+ms")
_NGINX_TIME = re.compile(r"[0-9]+\.[0-9]{3}")


class Misnamed(ValueError):
    """A field that is not written as fields are, or that no line has."""


@final
@dataclass(frozen=True, slots=True)
class Field:
    """Where something is: the name of a field or its number, the ``unit`` (ns) of a duration, and the part of it that
    counts: the first group of ``pattern``."""

    name: str
    unit: int | None = None
    pattern: re.Pattern[str] | None = None

    def __str__(self) -> str:
        return self.name + (f"~{self.pattern.pattern}" if self.pattern else "")


@final
@dataclass(frozen=True, slots=True)
class Wanted:
    """What a policy would like to know: the headers of its API keys, the header of its proxies, names of states.

    ``fields`` are those that the user has named.
    """

    fields: Mapping[str, Field] = field(default_factory=dict)
    key_headers: tuple[str, ...] = ()
    forwarded: str = "x-forwarded-for"
    tenant_states: tuple[str, ...] = ()
    states: tuple[str, ...] = ()

    def guesses(self, role: str) -> Iterable[tuple[str, int | None]]:
        """The names under which a log may have it, the likeliest first."""
        if role == "duration":
            return _DURATIONS
        if role == "key":
            names: Iterable[str] = (name for header in self.key_headers for name in _header_names(header))
        elif role == "forwarded":
            names = (*_header_names(self.forwarded), *_GUESSES[role])
        elif role == "tenant":
            names = (*self.tenant_states, *_GUESSES[role])
        elif role.startswith("state:"):
            names = (role.removeprefix("state:"),)
        else:
            names = _GUESSES[role]
        return ((name, None) for name in names)

    @property
    def roles(self) -> tuple[str, ...]:
        return (*ROLES, *(f"state:{name}" for name in self.states))


def parse_field(text: str) -> tuple[str, Field]:
    """``ROLE=NAME``, ``duration=NAME:ms`` or ``ROLE=NAME~PATTERN`` as the user writes it."""
    role, equals, source = text.partition("=")
    if not equals or not source:
        raise Misnamed(f"--field is ROLE=NAME, such as time=ts, not '{text[:64]}'")
    if role not in ROLES and not (role.startswith("state:") and len(role) > 6):
        raise Misnamed(f"--field {role[:32]}: a line says {', '.join(ROLES)} or state:NAME")
    name, tilde, expression = source.partition("~")
    pattern = None
    if tilde:
        try:
            pattern = re.compile(expression)
        except (re.error, RecursionError) as error:
            raise Misnamed(f"--field {role}: '{expression[:64]}' is no regular expression: {error}") from None
        if not pattern.groups:
            raise Misnamed(f"--field {role}: '{expression[:64]}' has no group, such as (.+), around what counts")
    unit = None
    head, colon, suffix = name.rpartition(":")
    if role == "duration" and colon and suffix in UNITS:
        name, unit = head, UNITS[suffix]
    return role, Field(name, unit, pattern)


def of_documents(sample: Sequence[Mapping[str, Any]], wanted: Wanted) -> tuple[dict[str, Field], list[str]]:
    """The fields of a JSON log by their roles, and the names of all fields that it has."""
    counts: dict[str, int] = {}
    texts: set[str] = set()
    for document in sample:
        for name, value in _flat(document):
            counts[name] = counts.get(name, 0) + 1
            if isinstance(value, str):
                texts.add(name)
    found: dict[str, Field] = {}
    for role in wanted.roles:
        given = wanted.fields.get(role)
        if given is not None:
            found[role] = given
            continue
        known = {name: number for name, number in counts.items() if role != "request" or name in texts}
        guessed = _guess(wanted.guesses(role), known)
        if guessed is not None:
            found[role] = guessed
    if "time" in wanted.fields and "start" not in wanted.fields:
        found.pop("start", None)
    if "path" in wanted.fields or ("path" in found and "method" in found and "request" not in wanted.fields):
        found.pop("request", None)
    return found, sorted(counts)


def of_text(sample: Sequence[Sequence[str]], named: Sequence[Mapping[str, str]], wanted: Wanted) -> dict[str, Field]:
    """The fields of a log in the common or the combined format, with whatever stands behind it."""
    found = {role: Field(role) for role in ("time", "ip", "request", "status")}
    duration = _guess(_DURATIONS, dict.fromkeys((name for line in named for name in line), 1))
    for at in range(len(_TEXT_NAMES), min(map(len, sample), default=0)):
        column = [line[at] for line in sample]
        if duration is None and all(map(_NGINX_TIME.fullmatch, column)):
            duration = Field(str(at + 1), SECOND)
        elif at == 9 and all(value == "-" or parse_address(value.partition(",")[0]) for value in column):
            found["forwarded"] = Field("10")  # as nginx.conf has it by default
        elif at == 12 and all(map(_TRAEFIK_TIME.fullmatch, column)):
            # Traefik dates by the start.
            duration, found["start"] = Field("13", _MS), found.pop("time")
    if duration is not None:
        found["duration"] = duration
    given = wanted.fields
    if "start" in given:
        found.pop("time", None)
    if "path" in given:
        found.pop("request", None)
    return {**found, **given}


def getter(where: Field, sample: Sequence[Mapping[str, Any]] | None) -> Getter:
    """What fetches a field, ``None`` where there is none. ``sample``: some objects of JSON, or ``None`` for a text."""
    fetch = _of_text(where.name) if sample is None else _of_mapping(where.name, sample)
    pattern = where.pattern
    if pattern is None:
        return fetch

    def part(document: Document) -> object:
        value = fetch(document)
        match = pattern.search(value) if isinstance(value, str) else None
        return match[1] if match else None

    return part


def _of_text(name: str) -> Getter:
    at = _TEXT_NAMES.get(name, int(name) if name.isascii() and name.isdecimal() and len(name) < 4 else 0) - 1
    if at < 0:

        def fetch_named(document: Document) -> object:
            return document[1].get(name)

        return fetch_named

    def fetch(document: Document) -> object:
        values = document[0]
        return values[at] if at < len(values) else None

    return fetch


def _of_mapping(name: str, sample: Sequence[Mapping[str, Any]]) -> Getter:
    """A field by its name, or by its way through mappings: ``request.headers.X-Api-Key``. Of a list, the first."""
    parts = name.split(".")
    # Each dot goes a level down, but for those of the last name, as in ``headers.example.com-key``.
    ways = [[*parts[:at], ".".join(parts[at:])] for at in range(len(parts))]
    way = next((way for way in ways if any(_along(way, document) is not None for document in sample)), ways[-1])
    if len(way) > 1:
        return lambda document: _along(way, document)

    def fetch(document: Document) -> object:
        value = document.get(name)
        return value[0] if type(value) is list and value else value

    return fetch


def _along(way: Sequence[str], document: Document) -> object:
    value = document
    for step in way:
        if type(value) is not dict:
            return None
        value = value.get(step)
    return value[0] if type(value) is list and value else value


def _flat(document: Mapping[str, Any], before: str = "", depth: int = 4) -> Iterable[tuple[str, Any]]:
    for name, value in document.items():
        if isinstance(value, dict) and depth:
            yield from _flat(value, f"{before}{name}.", depth - 1)
        elif value is not None:
            yield before + name, value


def _guess(guesses: Iterable[tuple[str, int | None]], counts: Mapping[str, int]) -> Field | None:
    """The first of ``guesses`` that occurs, or that occurs inside of another field: then the most frequent such."""
    guesses = tuple(guesses)
    for name, unit in guesses:
        if name in counts:
            return Field(name, unit)
    for guess, unit in guesses:
        inner = [name for name in counts if name.endswith(f".{guess}")]
        if inner:
            return Field(max(inner, key=counts.__getitem__), unit)
    return None


def _header_names(header: str) -> tuple[str, ...]:
    """A request header as nginx, Envoy, Caddy and Traefik name it in their logs."""
    titled = header.title()
    plain = header.replace("-", "_")
    return (f"http_{plain}", plain, f"request.headers.{titled}", f"request_{titled}", header, titled)
