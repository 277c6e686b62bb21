"""`seawall explain`: what a configuration makes of one request, and why."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

import typer
from rich.text import Text

from seawall.cli.explanation import Caller, Explanation, Limit, Overload, Rule, explain
from seawall.cli.terminal import CONFIG_HELP, console, fail, policy_of, quiet, say
from seawall.config.diagnostics import printable
from seawall.identity import parse_address
from seawall.policy import Policy
from seawall.responses import EXPOSE_HEADERS

NOBODY_IN_PARTICULAR = "192.0.2.1"
"""The address of a request for which none is given (RFC 5737: nobody's)."""

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_COLOURS = {"allowed": "green", "exempt": "green", "passed": "green"}
"""Of outcomes; whatever else becomes of a request is a refusal."""
_LAWS = {
    "adaptive": "as many at once as the event loop and the latency of each rule allow",
    "gradient2": "as many at once as the latency of all requests allows",
    "aimd": "as many at once as cause no drops and no lag",
}


def run(
    request: Annotated[
        list[str], typer.Argument(metavar="[METHOD] PATH", help="Such as POST /login; GET if left out.")
    ],
    config: Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help=CONFIG_HELP)] = Path("seawall.yaml"),
    key: Annotated[
        str | None, typer.Option("--key", metavar="KEY", help="The caller's API key; - reads it from stdin.")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option("--tenant", metavar="ID", help="The caller is this tenant; no proof needed.")
    ] = None,
    ip: Annotated[str | None, typer.Option("--ip", metavar="ADDR", help="The client's address.")] = None,
    peer: Annotated[
        str | None, typer.Option("--peer", metavar="ADDR", help="The direct peer, such as your load balancer.")
    ] = None,
    forwarded_for: Annotated[
        str | None,
        typer.Option("--forwarded-for", metavar="HOPS", help="The forwarding header as the peer sends it: 'a, b'."),
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option("--header", "-H", metavar="'N: V'", help="Another header; may be repeated.")
    ] = None,
    websocket: Annotated[bool, typer.Option("--websocket", help="A WebSocket connection.")] = False,
    form: Annotated[Literal["text", "json"], typer.Option("--format", help="text for people, or json.")] = "text",
) -> None:
    """Say what holds for a request, and why: rule, caller, mode, priority, limits, overload, headers.

    The request is driven through Seawall itself, in this process and with nothing used yet. Limits in the application's
    code (seawall.limit, identify=) are not in the file and so not here.

    Exit codes: 0 explained, also where the answer is a refusal; 1 mistakes in the file; 2 unreadable or unusable.

    \b
    Examples:
      seawall explain /v1/items/7
      seawall explain POST /login --ip 203.0.113.7
      seawall explain /v1/search --tenant acme --format json
      seawall explain / --peer 10.0.0.5 --forwarded-for '203.0.113.7, 10.0.0.9'
      seawall explain / -H 'X-Request-Timeout-Ms: 250' -H 'X-Request-Priority: low'
    """
    if key is not None and tenant is not None:
        fail("give --key or --tenant, not both")
    method, path = _request(request, websocket=websocket)
    policy = policy_of(config)
    scope: dict[str, Any] = {
        "type": "websocket" if websocket else "http",
        "method": method,
        **_target(path),
        "client": (_address("--peer", peer) or _address("--ip", ip) or NOBODY_IN_PARTICULAR, 50_000),
        "headers": [
            *_key_headers(policy, key),
            *_forwarding(policy, ip, peer, forwarded_for),
            *map(_header, header or ()),
        ],
    }
    with quiet():
        told = asyncio.run(explain(policy, scope, tenant=tenant))
    if form == "json":
        print(json.dumps(as_json(told), indent=2))
    else:
        console().print(as_text(told))


def _request(words: list[str], *, websocket: bool) -> tuple[str, str]:
    """The method and the path of ``[METHOD] PATH``."""
    if len(words) > 2:
        fail("explain takes one request: [METHOD] PATH")
    method = words[0].upper() if len(words) == 2 else "GET"
    path = words[-1]
    if not _TOKEN.fullmatch(method) or len(method) > 32:
        fail(f"'{method[:32]}' is not a method such as GET or POST")
    if websocket and method != "GET":
        fail("a WebSocket connection begins with GET")
    if re.match(r"https?://", path):
        try:
            url = urlsplit(path)
        except ValueError as error:
            fail(f"'{path[:64]}' is not an address: {error}")
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    if not path.startswith("/"):
        fail(f"a path begins with '/'; did you mean '/{path[:64]}'?")
    return method, path


def _target(path: str) -> dict[str, Any]:
    """The path as a server hands it over."""
    raw, _, query = path.partition("?")
    try:
        return {"path": unquote(raw), "raw_path": raw.encode(), "query_string": query.encode()}
    except UnicodeEncodeError:
        fail("the path is not UTF-8 text")


def _address(option: str, value: str | None) -> str | None:
    if value is not None and parse_address(value) is None:
        fail(f"{option} '{value[:64]}' is not an address such as 203.0.113.7 or 2001:db8::1")
    return value


def _key_headers(policy: Policy, key: str | None) -> list[tuple[bytes, bytes]]:
    if key is None:
        return []
    if key == "-":
        key = sys.stdin.readline().rstrip("\r\n")
    names = [name for kind, name in policy.identity.tenant if kind == "api_key"]
    if not names:
        say("this configuration reads no API keys (identity.tenant), so the key changes nothing")
        return []
    return [(names[0].encode(), _value("--key", key))]


def _forwarding(
    policy: Policy, ip: str | None, peer: str | None, forwarded_for: str | None
) -> list[tuple[bytes, bytes]]:
    """What the peer forwards: ``--forwarded-for`` as it is, else the client's address where a peer is in front."""
    if ip is not None and peer is not None:
        if forwarded_for is not None:
            fail("with --peer, give either --ip (the client that it names) or --forwarded-for")
        _address("--ip", ip)
        forwarded_for = ip
        if policy.identity.header == "forwarded":
            forwarded_for = f'for="[{ip}]"' if ":" in ip else f"for={ip}"
    if forwarded_for is None:
        return []
    return [(policy.identity.header.encode(), _value("--forwarded-for", forwarded_for))]


def _header(text: str) -> tuple[bytes, bytes]:
    name, colon, value = text.partition(":")
    # Neither is quoted: it may be a secret.
    if not colon or not _TOKEN.fullmatch(name):
        fail("--header is 'Name: value'")
    return name.lower().encode(), _value("--header", value.strip())


def _value(option: str, value: str) -> bytes:
    try:
        raw = value.encode("latin-1")
    except UnicodeEncodeError:
        fail(f"{option}: a header is Latin-1 text")
    if re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", raw):
        fail(f"{option}: a header has no control characters")
    return raw


def as_json(told: Explanation) -> dict[str, Any]:
    """An explanation as JSON has it. Periods are in seconds."""
    whole = asdict(told)
    whole["headers"] = dict(told.headers)
    whole["body"] = json.loads(told.body) if told.body.startswith("{") else told.body or None
    whole["rule"]["skipped"] = [{"rule": rule, "because": reason} for rule, reason in told.rule.skipped]
    for limit in whole["limits"]:
        limit["period"] = limit.pop("period_ns") / 1e9
    return whole


def as_text(told: Explanation) -> Text:
    """An explanation as people read it."""
    text = Text()
    what = "WebSocket" if told.websocket else told.method
    text.append(f"{what} {printable(told.path[:200])}: ")
    status = f" {told.status}" if told.status else ""
    text.append(f"{told.outcome}{status}", style=f"bold {_COLOURS.get(told.outcome, 'red')}")
    text.append(f", {told.because}\n\n")
    for title, lines in _sections(told):
        for number, line in enumerate(lines):
            text.append(f"{'' if number else title:<10}", style="bold")
            text.append(f"{line}\n")
    text.rstrip()
    return text


def _sections(told: Explanation) -> Iterator[tuple[str, Iterable[str]]]:
    yield "rule", _rule_lines(told.rule)
    yield "caller", _caller_lines(told.caller)
    yield "mode", [told.mode + (f", because of the {' and the '.join(told.lowered_by)}" if told.lowered_by else "")]
    if told.priority != "none":
        yield "priority", list(_priority_lines(told))
        if told.deadline is not None:
            yield "deadline", [f"{told.deadline:g} s after its arrival ({told.deadline_from})"]
        yield "limits", list(_limit_lines(told))
        if told.overload is None:
            yield "overload", ["nothing is shed: shedding.algorithm is off"]
        else:
            yield "overload", list(_overload_lines(told.overload))
    if told.headers:
        yield "headers", [f"{_spelled(name)}: {value}" for name, value in told.headers]
    if told.body:
        yield "body", [told.body]
    if told.notes:
        yield "note", told.notes


def _rule_lines(rule: Rule) -> Iterator[str]:
    if rule.position:
        yield f"{rule.name}, number {rule.position}: {', '.join(map(printable, rule.paths))}"
    else:
        yield "default: no rule matches, so the caller's plan holds alone"
    for reason in dict.fromkeys(reason for _, reason in rule.skipped):
        yield f"  not {', '.join(name for name, other in rule.skipped if other == reason)}: {reason}"
    if rule.hidden:
        yield f"  before {', '.join(rule.hidden)}, which would match too: the first wins"


def _caller_lines(caller: Caller) -> Iterator[str]:
    if caller.kind == "tenant":
        unlisted = "" if caller.listed else ", which the file does not list"
        overrides = " with overrides" if caller.overridden else ""
        yield f"tenant {printable(str(caller.tenant))}{unlisted}, on plan {caller.plan}{overrides}"
    elif caller.kind == "anonymous":
        yield f"anonymous, on plan {caller.plan}"
    elif caller.kind == "unidentified":
        yield "nobody"
    else:
        yield "not asked for: decided before"
    for source in caller.sources:
        yield f"  {printable(source)}"
    shared = "" if caller.bucket == caller.address else f", one of {caller.bucket}"
    yield f"  address {caller.address}{shared} ({caller.address_from})"


def _priority_lines(told: Explanation) -> Iterator[str]:
    yield f"{told.priority} ({told.priority_from})"
    if told.overload is None:
        return
    classes, share = told.overload.classes, told.overload.min_share
    at = classes.index(told.priority)
    order = [
        f"{word} {_list(names)}" for word, names in (("after", classes[:at]), ("before", classes[at + 1 :])) if names
    ]
    if share is not None:
        order.append(f"but at least {share * 100:.3g} % of what is admitted")
    if order:
        yield f"  {', '.join(order)}"


def _list(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _overload_lines(overload: Overload) -> Iterator[str]:
    if overload.algorithm == "fixed":
        yield f"fixed: {overload.initial} at once"
    else:
        bounds = f"{overload.min} to {overload.max}, from {overload.initial}"
        yield f"{overload.algorithm}: {_LAWS[overload.algorithm]} ({bounds})"
    streaming = overload.streaming
    if streaming is not None:
        each = "" if streaming.max_per_tenant is None else f", {streaming.max_per_tenant} of one caller"
        yield f"  streams: {streaming.max} open on this rule{each}"
    if overload.enforced:
        yield f"  without room it waits {overload.waits * 1e3:g} ms at most, then {overload.status} with Retry-After"
    else:
        yield "  counted, never refused: the mode of the file or the rule"


def _limit_lines(told: Explanation) -> Iterator[str]:
    rows = [_limit_row(limit) for limit in told.limits]
    if told.concurrency is not None:
        rows.append(("concurrency", f"{told.concurrency} requests at once", "", "", ""))
    if not rows:
        yield "none"
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(5)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _limit_row(limit: Limit) -> tuple[str, str, str, str, str]:
    cost = f"costs {limit.cost}" if limit.fits else f"costs {limit.cost}: never fits"
    return limit.name, limit.allowance, printable(limit.whose), cost, f"{limit.remaining} left"


_SPELLINGS = {name.lower(): name for name in EXPOSE_HEADERS}


def _spelled(name: str) -> str:
    """A header's name as documents have it."""
    return _SPELLINGS.get(name, name.title())
