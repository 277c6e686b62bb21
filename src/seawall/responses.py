"""What callers read: the RateLimit headers of every limited answer, and refusals as literal bytes.

Headers follow draft-ietf-httpapi-ratelimit-headers-11: ``RateLimit-Policy`` names every policy that limits the request,
``RateLimit`` the one that is closest to exhaustion. Bodies are problem details (RFC 9457). Everything of a refusal but
its numbers is formatted once for each combination of policies that refuse, and a few hundred bytes long.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, TypeAlias, final
from urllib.parse import quote

from seawall.admission import SERVICE, SHED, Closest, Denied, Entry
from seawall.backends import Verdict
from seawall.decision import Refusal
from seawall.policy import Responses
from seawall.rate import SECOND, Quota

Header: TypeAlias = tuple[bytes, bytes]
Message: TypeAlias = dict[str, Any]
Spent: TypeAlias = tuple[Sequence[Entry], Verdict]

EXPOSE_HEADERS = [
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    "X-RateLimit-Limit",
    "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
    "Link",
]
"""For ``CORSMiddleware(expose_headers=...)``: without it a browser shows a script none of these."""

MAX_BODY = 500
MAX_PREPARED = 4_096
MAX_FILLED = 128
MAX_JITTER = 30 * SECOND
CALLER_TYPE = "https://iana.org/assignments/http-problem-types#quota-exceeded"
SERVICE_TYPE = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"

_TITLES = {
    400: ("about:blank", "Bad Request"),
    401: ("about:blank", "Unauthorized"),
    403: ("about:blank", "Forbidden"),
    408: ("about:blank", "Request Timeout"),
    429: (CALLER_TYPE, "Quota Exceeded"),
    504: ("about:blank", "Gateway Timeout"),
}
_SERVICE_TITLE = (SERVICE_TYPE, "Temporary Reduced Capacity")
"""Of every other status: it says what the service is short of, whatever number the policy gives it."""
_SECONDS = "@seconds@"
_JSON = (b"content-type", b"application/problem+json")
_HTML = (b"content-type", b"text/html; charset=utf-8")
_GRPC = {400: 3, 401: 16, 403: 7, 408: 4, 429: 8, 504: 4}
_UNAVAILABLE = 14

_PERIODS = (
    (86_400 * SECOND, "day"),
    (3_600 * SECOND, "hour"),
    (60 * SECOND, "minute"),
    (SECOND, "second"),
    (SECOND // 1_000, "millisecond"),
)


def seconds_up(nanoseconds: int) -> int:
    """Whole seconds, rounded up: who waits that long has waited long enough."""
    return -(-nanoseconds // SECOND)


def retry_after(wait: int, grows: int, random: Callable[[], float]) -> int:
    """Seconds to announce for a wait of ``wait`` nanoseconds: with a jitter upwards of a fifth (at most 30 s), so that
    callers refused together do not come back together, at least 1, and never less than ``grows``, the announced ``t``.
    """
    spread = wait // 5
    if spread > MAX_JITTER:
        spread = MAX_JITTER
    seconds = -(-(wait + int(random() * spread)) // SECOND)
    return (max(grows, seconds)) or 1


def at_once(denied: Denied) -> tuple[str, int]:
    """The policy of a refusal for too much at once, and how many it allows."""
    terms = denied.terms
    if terms is not None and denied.waits and denied.waits[0][0] == "streams":
        return "streams", (terms.route.streaming and terms.route.streaming.max_per_tenant) or 0
    return "concurrency", (terms.concurrency if terms else None) or 0


def period_text(period_ns: int) -> str:
    """A period as people say it: ``second``, ``15 minutes``."""
    for unit, name in _PERIODS:
        if period_ns % unit == 0:
            count = period_ns // unit
            return name if count == 1 else f"{count} {name}s"
    return f"{period_ns / SECOND:g} seconds"


def requests(count: int) -> str:
    """A number of requests, in words."""
    return "1 request" if count == 1 else f"{count} requests"


def allowance(entry: Entry) -> str:
    """What an entry allows, in words."""
    rate = entry.rate
    if isinstance(rate, Quota):
        return f"{requests(rate.limit)} per {rate.span}"
    burst = f" with a burst of {rate.burst}" if rate.burst != rate.amount else ""
    return f"{requests(rate.amount)} per {period_text(rate.period_ns)}{burst}"


def policy_header(entries: Iterable[Entry], concurrency: int | None, streams: int | None = None) -> bytes:
    """The value of ``RateLimit-Policy``. Quotas have their current window entered before."""
    items = [f'"{entry.name}";q={entry.q};w={entry.rate.window_s}' for entry in entries]
    if concurrency is not None:
        items.append(f'"concurrency";q={concurrency};qu="concurrent-requests"')
    if streams is not None:
        items.append(f'"streams";q={streams};qu="concurrent-requests"')
    return ", ".join(items).encode()


def grows(entry: Entry, at: int, verdict: Verdict) -> int:
    """The ``t`` of ``RateLimit``: whole seconds until one more unit than now is left, 0 when it is full."""
    rate, left = entry.rate, verdict.left[at]
    if left >= entry.limit:
        return 0
    if isinstance(rate, Quota):
        return seconds_up(rate.end_ns - verdict.wall)
    units = verdict.states[at] - verdict.now * rate.scale - rate.capacity + (left + 1) * rate.interval
    return -(-units // (rate.scale * SECOND))


def closest(spent: Iterable[Spent]) -> Closest | None:
    """The entry with the least of its advertised quota left; of equals the one that takes longest to grow."""
    best: Closest | None = None
    lowest = 2.0
    for entries, verdict in spent:
        for at, entry in enumerate(entries):
            share = verdict.left[at] / entry.q
            if share > lowest or (share == lowest and best and grows(*best) >= grows(entry, at, verdict)):
                continue
            lowest, best = share, (entry, at, verdict)
    return best


@final
class Answers:
    """The bytes of one policy's answers.

    ``random`` draws the jitter, from 0 to 1.
    """

    def __init__(self, settings: Responses, random: Callable[[], float], *, challenge: bytes = b"ApiKey") -> None:
        self._draft = settings.headers in ("draft-11", "both")
        self._draft_alone = settings.headers == "draft-11"
        self._legacy = settings.headers in ("legacy", "both")
        self._detail = settings.detail
        self._link = f'<{settings.docs_url}>; rel="help"'.encode() if settings.docs_url else b""
        self._random = random
        self._challenge = challenge
        self._prepared: dict[tuple[Any, ...], Prepared] = {}
        self._plain: dict[tuple[str, int | None, bool, bool], tuple[list[Header], bytes]] = {}

    def limit_headers(self, policies: bytes, about: Closest, wait: int, status: int) -> list[Header]:
        """The headers of a limited answer; ``policies`` is the value of ``RateLimit-Policy``, ``wait`` that of t."""
        entry, at, verdict = about
        left = verdict.left[at]
        item = entry.item % (left, wait) if wait else entry.full_item % left
        # A redirect with nothing left would make clients wait before they follow it.
        silent = not left and 300 <= status < 400
        if self._draft_alone and not silent:
            return [(b"ratelimit-policy", policies), (b"ratelimit", item)]
        headers: list[Header] = []
        if self._draft:
            headers.append((b"ratelimit-policy", policies))
            if not silent:
                headers.append((b"ratelimit", item))
        if self._legacy:
            # Rounded once, or it would lie up to a second before the next unit is there.
            free = entry.wait(verdict.states[at], verdict, left + 1) if wait else 0
            headers += self._legacy_headers(entry.limit, left, seconds_up(verdict.wall + free))
        return headers

    def policies_only(self, policies: bytes) -> list[Header]:
        """The headers where there is nothing to count down: no limits, or one of requests at once."""
        return [(b"ratelimit-policy", policies)] if self._draft and policies else []

    def concurrency_headers(self, policies: bytes, denied: Denied, wall: int) -> list[Header]:
        """The headers of a refusal for too many requests, or streams, at once."""
        name, limit = at_once(denied)
        headers: list[Header] = []
        if self._draft:
            headers += [(b"ratelimit-policy", policies), (b"ratelimit", f'"{name}";r=0;t=1'.encode())]
        if self._legacy:
            headers += self._legacy_headers(limit, 0, wall // SECOND + 1)
        return headers

    def _legacy_headers(self, limit: int, left: int, reset: int) -> list[Header]:
        return [
            (b"x-ratelimit-limit", b"%d" % limit),
            (b"x-ratelimit-remaining", b"%d" % left),
            (b"x-ratelimit-reset", b"%d" % reset),
        ]

    def delay(self, denied: Denied, wait: int) -> int | None:
        """The seconds to announce for a denial, drawn anew each time; ``None`` where waiting does not help."""
        if denied.after is not None:
            return denied.after
        if denied.timed and denied.first is not None:
            return retry_after(denied.waits[0][1], wait, self._random)
        # Nobody knows when one of the caller's own requests ends: 1 or 2 s, so that they do not all come at once.
        return 1 + int(self._random() * 2) if denied.timed else None

    def prepare(self, denied: Denied) -> Prepared:
        """Everything of a refusal that does not change from one to the next."""
        waits = denied.waits
        names: Any = waits[0][0] if len(waits) == 1 else tuple([name for name, _ in waits])
        # By the entry and not only its name: endpoints' limits may be called the same.
        key = (denied.terms, denied.first and denied.first[0], denied.status, denied.reason, denied.timed, names)
        prepared = self._prepared.get(key)
        if prepared is None:
            if len(self._prepared) >= MAX_PREPARED:
                self._prepared.clear()
            prepared = self._prepared[key] = Prepared(denied, detail=self._detail)
        return prepared

    def plain(self, denied: Denied, scope: Mapping[str, Any]) -> tuple[list[Header], bytes] | None:
        """The headers and the body of a shed HTTP request, kept whole; ``None`` where its caller wants another form."""
        if scope["type"] != "http":
            return None
        for name, value in scope["headers"]:
            if (name == b"accept" and b"html" in value.lower()) or (name == b"content-type" and b"grpc" in value):
                return None
        head = scope["method"] == "HEAD"
        key = (denied.reason, denied.after, bool(denied.waits), head)
        kept = self._plain.get(key)
        if kept is None:
            body, headers = self.fill(self.prepare(denied), denied.after, html=False)
            kept = self._plain[key] = headers, b"" if head else body
        return kept

    def fill(self, prepared: Prepared, after: int | None, *, html: bool) -> tuple[bytes, list[Header]]:
        """The body of a refusal and its headers but those of limits; kept, for the same few waits come again."""
        key = (after, html)
        filled = prepared.filled.get(key)
        if filled is None:
            if len(prepared.filled) >= MAX_FILLED:
                prepared.filled.clear()
            template, form = (prepared.html, _HTML) if html else (prepared.json, _JSON)
            body = template if after is None else template.replace(_SECONDS.encode(), b"%d" % after)
            # A shared cache that stored a refusal would refuse others with it.
            headers = [form, (b"content-length", b"%d" % len(body)), (b"cache-control", b"no-store")]
            if after is not None:
                headers.append((b"retry-after", b"%d" % after))
            if prepared.status == 401:
                headers.append((b"www-authenticate", self._challenge))
            if self._link:
                headers.append((b"link", self._link))
            filled = prepared.filled[key] = (body, headers)
        return filled


@final
class Prepared:
    """One refusal as bytes, but for the seconds. ``timed`` is whether there are any to announce."""

    __slots__ = (
        "detail",
        "filled",
        "grpc_status",
        "html",
        "json",
        "names",
        "plan",
        "priority",
        "reason",
        "shown",
        "status",
    )

    def __init__(self, denied: Denied, *, detail: bool) -> None:
        terms, timed = denied.terms, denied.timed
        names = tuple(name for name, _ in denied.waits)
        self.filled: dict[tuple[int | None, bool], tuple[bytes, list[Header]]] = {}
        self.status = denied.status
        self.reason = denied.reason
        self.grpc_status = _UNAVAILABLE if denied.reason in SHED else _GRPC.get(denied.status, _UNAVAILABLE)
        self.plan = terms.plan if terms else ""
        self.priority = terms.priority if terms else "none"
        self.names = names
        words = _words(denied)
        self.detail = f"{words} Retry in {_SECONDS} s." if timed else words
        shown = (self.detail, names) if detail else ("", ())
        self.shown = shown[0]
        self.json = _problem(denied, *shown).encode()
        self.html = _page(_title(denied)[1], shown[0]).encode()

    def refusal(self, after: int | None) -> Refusal:
        """As a value, for those who want to answer themselves."""
        detail = self.detail.replace(_SECONDS, str(after))
        return Refusal(self.status, self.reason, self.names, after, detail, self.plan, self.priority)


def _title(denied: Denied) -> tuple[str, str]:
    """The type and the title of a refusal: 429 may mean either, if the policy says that it sheds with it."""
    if denied.reason in SHED:
        return _SERVICE_TITLE
    return _TITLES.get(denied.status, _SERVICE_TITLE)


def _problem(denied: Denied, detail: str, names: tuple[str, ...]) -> str:
    """A problem document (RFC 9457). Where it would be too long, the words go first and then the last names."""
    kind, title = _title(denied)
    text = ""
    for words, listed in ((detail, names), ("", names), ("", names[:3]), ("", names[:1])):
        problem: dict[str, object] = {"type": kind, "title": title, "status": denied.status}
        if words:
            problem["detail"] = words
        if listed:
            problem["violated-policies"] = listed
        problem["reason"] = denied.reason
        if denied.timed:
            problem["retry_after"] = _SECONDS
        # Numbers are not quoted, and ten digits is more than any wait has.
        text = json.dumps(problem, separators=(",", ":")).replace(f'"{_SECONDS}"', _SECONDS)
        if len(text) + 2 * 10 <= MAX_BODY:
            break
    return text


def _page(title: str, detail: str) -> str:
    """A small page for people."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<h1>{title}</h1><p>{escape(detail, quote=False)}</p></html>"
    )


_SERVICE_WORDS = {
    "overload": "The service is overloaded.",
    "queue_full": "The service is overloaded, and too many wait already.",
    "queue_timeout": "The service is overloaded, and this request has waited for too long.",
    "expired": "The request's deadline has passed.",
    "body": "The request's body took too long to arrive.",
}


def _words(denied: Denied) -> str:
    """Why, in a sentence."""
    if denied.reason == "unidentified":
        return "This service wants to know who is calling."
    if denied.reason == "backend_unavailable":
        return "The limits that hold for this request cannot be checked at the moment."
    if denied.reason == "denied":
        return "The path has a control character." if denied.status == 400 else "Access from here is not allowed."
    if denied.reason in SERVICE:
        if denied.waits:
            return "All streams that this endpoint may have are taken (policy 'streams')."
        return _SERVICE_WORDS["body" if denied.status == 408 else denied.reason]
    plan = denied.terms.plan if denied.terms else ""
    if denied.first is None:
        name, most = at_once(denied)
        if name == "streams":
            return f"This endpoint allows {most} streams of one caller at once (policy 'streams')."
        return f"Plan '{plan}' allows {requests(most)} at once (policy 'concurrency')."
    entry = denied.first[0]
    who = f"Plan '{plan}'" if entry.of_plan else "This endpoint"
    if not denied.timed:
        return f"{who} holds at most {entry.limit} (policy '{entry.name}'), and this request costs {entry.cost}."
    return f"{who} allows {allowance(entry)} (policy '{entry.name}')."


def wants_html(accept: bytes) -> bool:
    """Whether a page is welcome: text/html is named, with a q at least that of JSON. Only its first 1 KB is read."""
    qs: dict[str, float] = {}
    for item in accept[:1_024].decode("latin-1").lower().split(","):
        media, *parameters = (part.strip() for part in item.split(";"))
        q = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    q = float(parameter[2:])
                except ValueError:
                    q = 0.0
        qs[media] = q
    page = qs.get("text/html", 0.0)
    exact = [qs[media] for media in ("application/problem+json", "application/json") if media in qs]
    problem = max(exact) if exact else qs.get("application/*", qs.get("*/*", 0.0))
    return page > 0 and page >= problem


def grpc_headers(prepared: Prepared, after: int | None) -> list[Header]:
    """A trailers-only answer, as gRPC clients read it: the status is in the headers, and there is no body."""
    words = prepared.shown.replace(_SECONDS, str(after)) or prepared.reason
    headers = [
        (b"content-type", b"application/grpc"),
        (b"grpc-status", b"%d" % prepared.grpc_status),
        (b"grpc-message", quote(words, safe=" '()").encode()),
        (b"cache-control", b"no-store"),
    ]
    if after is not None:
        headers.append((b"grpc-retry-pushback-ms", b"%d" % (after * 1_000)))
    return headers
