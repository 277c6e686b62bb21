"""`seawall status`: what a running service says of itself, and whether somebody should look at it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from http.client import HTTPException
from typing import Annotated, Any, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, urlsplit, urlunsplit
from urllib.request import ProxyHandler, Request, build_opener

import typer
from rich.text import Text

from seawall.cli.terminal import FOUND, console, fail
from seawall.config.diagnostics import printable

DEFAULT_PATH = "/-/seawall"
URL_HELP = "Of the status page, such as http://10.0.0.7:8000/-/seawall; a host alone has it at the default path."
TIMEOUT = 5.0
_MOST_BYTES = 4 << 20

_COUNTS = {"*": 0}
_SHAPE: Mapping[str, Any] = {
    "version": "",
    "time": "",
    "pid": 0,
    "workers": 0,
    "uptime": 0.0,
    "attention": [{"level": "", "text": ""}],
    "policy": {"mode": "", "digest": "", "files": [""], "tenants": 0, "plans": 0, "routes": 0},
    "reload": {"applied": 0, "failed": 0, "loaded": ""},
    "requests": _COUNTS,
    "rejections": _COUNTS,
    "inflight": _COUNTS,
    "queued": _COUNTS,
    "shed": _COUNTS,
    "overload": {},
    "backend": {"type": "", "up": True, "on_failure": ""},
    "refused": [{"caller": "", "kind": "", "count": 0, "reasons": _COUNTS}],
    "blocked": [{"tenant": "", "until": ""}],
}
"""What this reads of a document, with a value of the type of each; ``*`` is any name. A service may say more."""


class Unreachable(Exception):
    """Why there is no document, in words."""


def run(
    url: Annotated[str, typer.Argument(metavar="URL", help=URL_HELP)],
    form: Annotated[Literal["text", "json"], typer.Option("--format", help="text for people, or json.")] = "text",
) -> None:
    """Print what a running service says of itself: policy, reloads, requests, overload, backend, who was refused.

    It is asked at `status.path`, and answers the machines of `status.allow` alone.

    Exit codes: 0 all is well; 1 something needs attention: a reload has failed, the backend is away, it is shedding;
    2 it cannot be asked.

    \b
    Examples:
      seawall status localhost:8000
      seawall status https://10.0.0.7:8443/-/seawall --format json
    """
    address = address_of(url)
    try:
        document = fetch(address)
    except Unreachable as error:
        fail(str(error))
    if form == "json":
        print(json.dumps(document, indent=2))
    else:
        console().print(as_text(address, document))
    if any(one["level"] == "alert" for one in document["attention"]):
        raise typer.Exit(FOUND)


def address_of(url: str) -> str:
    """The address that is meant by a URL, a host or a host with a port, or the end of the verb."""
    whole = url if "://" in url else f"http://{url}"
    parts = _split(whole)
    if parts is None or re.search(r"[\x00-\x20\x7f-\U0010ffff]", whole):
        fail(f"'{url[:200]}' is not an address such as http://localhost:8000{DEFAULT_PATH}")
    if parts.username is not None or parts.password is not None:
        fail("an address has no name and no password; status.allow says who is answered")
    path = parts.path if parts.path not in ("", "/") else DEFAULT_PATH
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def _split(url: str) -> SplitResult | None:
    """The parts of an address that can be asked."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return None
    return parts if usable else None


def fetch(address: str) -> dict[str, Any]:
    """The document at ``address``. Raises `Unreachable`."""
    status, body = ask(Request(address, headers={"Accept": "application/json", "User-Agent": "seawall"}))
    if status == 404:
        raise Unreachable(
            f"{address} answers 404: nothing is there (status.path), or this machine is not one of status.allow"
        )
    if status != 200:
        raise Unreachable(f"{address} answers {status}, which a status page does not")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not _fits(document, _SHAPE):
        raise Unreachable(f"{address} is something else than the status page of Seawall, or of another version")
    found: dict[str, Any] = document
    return found


def ask(request: Request) -> tuple[int, bytes]:
    """The status and the body of the answer to ``request``. Raises `Unreachable` where there is none."""
    address = request.full_url
    direct = build_opener(ProxyHandler({}))  # a service judges by the machine that asks, so no proxy does
    try:
        try:
            answer = direct.open(request, timeout=TIMEOUT)
        except HTTPError as error:
            answer = error
        with answer:
            return answer.status, answer.read(_MOST_BYTES + 1)
    except TimeoutError:
        raise Unreachable(f"{address} does not answer within {TIMEOUT:g} s") from None
    except URLError as error:
        raise Unreachable(f"{address} cannot be reached: {_reason(error)}") from None
    except (OSError, HTTPException) as error:
        raise Unreachable(f"{address} does not speak HTTP: {error or type(error).__name__}") from None


def _reason(error: URLError) -> str:
    reason = error.reason
    if isinstance(reason, TimeoutError):
        return f"no answer within {TIMEOUT:g} s"
    return (reason.strerror if isinstance(reason, OSError) else None) or str(reason)


def _fits(value: Any, shape: Any) -> bool:
    """Whether ``value`` is made as ``shape`` is, as far as that goes."""
    match shape:
        case {"*": inner}:
            return isinstance(value, dict) and all(_fits(one, inner) for one in value.values())
        case dict():
            return isinstance(value, dict) and all(_fits(value.get(name), inner) for name, inner in shape.items())
        case [inner]:
            return isinstance(value, list) and all(_fits(one, inner) for one in value)
        case bool():
            return isinstance(value, bool)
        case int() | float():
            return isinstance(value, int | float) and not isinstance(value, bool)
        case _:
            return isinstance(value, type(shape))


def as_text(address: str, document: Mapping[str, Any]) -> Text:
    """A document as people read it."""
    alerts = sum(one["level"] == "alert" for one in document["attention"])
    text = Text()
    text.append(f"{address}: ")
    if alerts:
        text.append("1 thing needs attention" if alerts == 1 else f"{alerts} things need attention", style="bold red")
    else:
        text.append("all is well", style="bold green")
    text.append("\n\n")
    for title, lines in _sections(document):
        for number, line in enumerate(lines):
            text.append(f"{'' if number else title:<10}", style="bold")
            text.append(f"{line}\n", style=_STYLES.get(line[:2], "none") if title == "attention" else "none")
    text.rstrip()
    return text


_STYLES = {"! ": "bold red", "- ": "yellow"}


def _sections(document: Mapping[str, Any]) -> Iterator[tuple[str, Iterable[str]]]:
    policy, reload, backend = document["policy"], document["reload"], document["backend"]
    yield (
        "attention",
        [f"{'!' if one['level'] == 'alert' else '-'} {printable(one['text'])}" for one in document["attention"]],
    )
    yield "policy", list(_policy_lines(policy))
    yield "reload", list(_reload_lines(reload))
    yield "requests", [counts(document["requests"])]
    yield "refused", list(_refused_lines(document))
    yield "blocked", [f"{printable(one['tenant'])} until {printable(one['until'])}" for one in document["blocked"]]
    yield "overload", list(_overload_lines(document))
    state = "" if backend["type"] == "memory" else f", {'up' if backend['up'] else 'away'}"
    yield "backend", [printable(backend["type"]) + state]
    workers = document["workers"]
    together = "" if workers == 1 else f", counts are of {workers} processes"
    yield (
        "process",
        [f"{document['pid']}, version {printable(document['version'])}, up for {document['uptime']:,.0f} s{together}"],
    )


def _policy_lines(policy: Mapping[str, Any]) -> Iterator[str]:
    numbers = ", ".join(f"{policy[what]:,} {what}" for what in ("tenants", "plans", "routes"))
    yield f"{printable(policy['mode'])}, {printable(policy['digest'])}, {numbers}"
    for file in policy["files"]:
        yield f"  {printable(file)}"


def _reload_lines(reload: Mapping[str, Any]) -> Iterator[str]:
    yield f"{reload['applied']:,} applied, {reload['failed']:,} failed, in force since {printable(reload['loaded'])}"
    error = reload.get("error")
    if error is not None:
        for line in str(error.get("text") if isinstance(error, dict) else error).split("\n"):
            yield f"  {printable(line)}"


def _refused_lines(document: Mapping[str, Any]) -> Iterator[str]:
    yield counts(document["rejections"]) or "nobody"
    for one in document["refused"]:
        yield f"  {printable(one['caller'])} ({printable(one['kind'])}) {one['count']:,}: {counts(one['reasons'])}"


def _overload_lines(document: Mapping[str, Any]) -> Iterator[str]:
    yield limit_text(document["overload"])
    for title in ("inflight", "queued", "shed"):
        if document[title]:
            yield f"  {_TITLES[title]}: {counts(document[title])}"


_TITLES = {"inflight": "in flight", "queued": "queued", "shed": "shed"}


def limit_text(overload: Mapping[str, Any]) -> str:
    """How much the service takes at once, in words."""
    limit, lag, utilization = (_number(overload, name) for name in ("limit", "lag", "utilization"))
    if limit is None:
        return "nothing is shed"
    why = f" ({printable(str(overload['reason']))})" if overload.get("reason") else ""
    return f"limit {limit:,.0f}{why}, lag {(lag or 0) * 1e3:.1f} ms, utilization {(utilization or 0) * 100:.0f} %"


def _number(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    return value if isinstance(value, int | float) else None


def counts(values: Mapping[str, Any]) -> str:
    """``rate 12, quota 3``, in the order that it has; without what there is none of."""
    return ", ".join(f"{printable(str(name))} {value:,}" for name, value in values.items() if value)
