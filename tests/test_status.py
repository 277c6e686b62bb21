"""The status page: what the document says, in which form it is answered, and what nobody can do with it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import signal
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from harness import KEY, OTHER_KEY, call, hash_of, hello, statuses
from seawall import Seawall, reload, status
from seawall.cells import METRICS_DIR, Cells
from seawall.config import ConfigError
from seawall.metrics import REQUESTS, SPECS
from seawall.status import ActionError, Document, StatusPage, counted
from seawall.status.page import asset, main, page
from seawall.testing import Answer, drive
from serving import Caller, serving
from status_sample import CALM, COUNTS, DIAGNOSTIC, FAILED, HELD, HOSTILE, NOON, Reloads, hostile, sample

TOKEN = "correct-horse-battery-staple"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
PAGE = {"Accept": "text/html"}
EVENTS = {"Accept": "text/event-stream"}
REDIS = "backend: {type: redis, url: redis://localhost:6379/0, secret: 0123456789abcdef0123456789abcdef}"


class Acts:
    """What is done for POSTs: noted, and refused for `nobody`."""

    def __init__(self) -> None:
        self.done: list[tuple[str, dict[str, Any]]] = []

    async def __call__(self, action: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments["tenant"] == "nobody":
            raise ActionError("no tenant 'nobody'", 404)
        self.done.append((action, arguments))
        return {"tenant": arguments["tenant"]}


@pytest.fixture
def acts() -> Acts:
    return Acts()


@pytest.fixture
def app(acts: Acts) -> StatusPage:
    return StatusPage(sample, token=TOKEN, act=acts)


def post(app: StatusPage, body: bytes | str | dict[str, Any], **headers: str) -> Answer:
    """A POST, with the token unless `headers` say something else."""
    raw = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    return asyncio.run(_post(app, [raw], headers or AUTHORIZED))


async def _post(app: StatusPage, parts: Iterable[bytes], headers: dict[str, str]) -> Answer:
    messages = iter([{"type": "http.request", "body": part, "more_body": True} for part in parts])
    answer = Answer()

    async def receive() -> dict[str, Any]:
        return next(messages, {"type": "http.request", "body": b"", "more_body": False})

    async def send(message: Any) -> None:
        answer.status = message.get("status", answer.status)
        answer.body += message.get("body", b"")
        answer.headers.update({name.decode(): value.decode() for name, value in message.get("headers", ())})

    fields = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await app({"type": "http", "method": "POST", "headers": fields, "query_string": b""}, receive, send)
    return answer


def error(answer: Answer) -> str:
    return str(json.loads(answer.body)["error"])


# The document


def test_counts_are_added_up_over_what_the_document_does_not_tell_apart() -> None:
    said = sample()
    assert said["requests"] == {
        "allowed": 513_885,
        "limited": 12_354,
        "shed": 2_216,
        "expired": 0,
        "denied": 48,
        "exempt": 8_640,
        "cancelled": 0,
    }
    assert said["rejections"] == {"rate": 12_044, "quota": 310, "overload": 2_216, "denied": 48}
    assert said["shadow"] == {"rate": 77}
    assert said["shed"] == {"critical": 0, "normal": 12, "low": 2_204}
    assert said["inflight"] == {"critical": 2, "normal": 21, "low": 4}
    assert said["queued"] == {"critical": 0, "normal": 2, "low": 9}


def test_the_document_says_what_policy_is_in_force() -> None:
    said = sample("mode: shadow\nreload: 5s")
    assert said["policy"]["mode"] == "shadow"
    assert re.fullmatch("[0-9a-f]{12}", said["policy"]["digest"])
    assert (said["policy"]["tenants"], said["policy"]["plans"], said["policy"]["routes"]) == (3, 4, 2)
    assert said["limits"][2] == {
        "plan": "pro",
        "rate": "100/second (burst 300)",
        "quota": "1_000_000/month (Europe/Berlin)",
        "concurrency": 50,
        "priority": None,
        "mode": "enforce",
    }
    assert said["limits"][3]["rate"] == said["limits"][3]["quota"] == "unlimited"
    assert said["reload"] == {
        "every": 5.0,
        "applied": 4,
        "failed": 0,
        "loaded": "2026-03-04T08:30:01.000Z",
        "error": None,
    }
    assert (said["time"], said["uptime"]) == ("2026-03-04T12:00:00.000Z", 12_345.0)


def test_a_policy_that_is_not_of_a_file_is_never_looked_for() -> None:
    assert sample(reload=None)["reload"] == {
        "every": None,
        "applied": 0,
        "failed": 0,
        "loaded": "2026-03-04T08:34:15.000Z",
        "error": None,
    }


def attention(more: str = "", **changes: Any) -> list[tuple[str, str]]:
    """What is said first, without the warnings that a file of quotas in memory has."""
    said = sample(more, **{"held": CALM, **changes})["attention"]
    return [(one["level"], one["text"]) for one in said if "warning" not in one["text"]]


def test_nothing_needs_attention_while_all_is_well() -> None:
    assert attention() == []


def test_a_reload_that_failed_needs_attention() -> None:
    assert attention(reload=FAILED) == [
        ("alert", "The last reload failed at 2026-03-04 11:58:20 UTC; what was loaded before is in force.")
    ]


@pytest.mark.parametrize(
    ("on_failure", "consequence"),
    [
        ("local", "each process holds its share of the limits"),
        ("allow", "everybody is let in, unchecked"),
        ("deny", "whoever has a limit is refused"),
    ],
)
def test_a_backend_that_is_away_needs_attention(on_failure: str, consequence: str) -> None:
    more = REDIS.replace("type:", f"on_failure: {on_failure}, type:")
    assert attention(more, up=False) == [("alert", f"The redis backend is away: {consequence}.")]
    assert attention(more, up=True) == []


@pytest.mark.parametrize(
    ("cut", "text"),
    [
        (0, "Shedding now: some of class critical, and all of normal, low."),
        (1, "Shedding now: some of class normal, and all of low."),
        (2, "Shedding now: some of class low."),
    ],
)
def test_shedding_needs_attention(cut: int, text: str) -> None:
    held = {**HELD, "overload": {**HELD["overload"], "shed_from": cut}}
    assert attention(held=held) == [("alert", text)]


@pytest.mark.parametrize(("mode", "word"), [("shadow", "Shadow mode"), ("off", "Switched off")])
def test_a_mode_that_refuses_nobody_is_said_first(mode: str, word: str) -> None:
    ((level, text),) = attention(f"mode: {mode}")
    assert (level, text.partition(":")[0]) == ("note", word)


def test_warnings_are_counted_first_and_listed_below() -> None:
    (one,) = sample(held=CALM)["attention"]
    assert one == {"level": "note", "text": "The configuration has 1 warning."}
    many = sample(held=CALM, more="backend: {max_keys: 1_000_000}\nmetrics: {path: /metrics}")
    assert many["attention"] == [{"level": "note", "text": "The configuration has 2 warnings."}]
    assert len(many["policy"]["warnings"]) == 2


def test_a_document_is_bounded_whatever_there_is_to_say() -> None:
    one = {"caller": "x", "kind": "tenant", "count": 1, "reasons": {}, "policies": {}}
    said = sample(
        refused=[one] * 1_000,
        blocked=[{"tenant": "x", "until": "", "reason": ""}] * 1_000,
        history=[{"seq": seq, "time": "", "diff": ["plan x added"] * 1_000} for seq in range(1_000)],
        files=["seawall.yaml"] * 1_000,
        reload=Reloads(error="x" * 1_000_000),
    )
    assert len(said["refused"]) == 20
    assert [one["seq"] for one in said["history"]] == list(range(990, 1_000))
    assert said["history"][0]["diff"][-2:] == ["plan x added", "and 980 more"]
    assert len(json.dumps(said)) < 40_000


def test_a_service_without_overload_control_says_nothing_of_it() -> None:
    said = sample(held={"backend": {}, "overload": {}, "streams": {}})
    assert (said["overload"], said["queued"]) == ({}, {})
    assert "concurrency limit" not in main(said)


# Forms


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("application/json, text/html", "application/json"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8", "text/html"),
        ("TEXT/HTML ; Q=0.5", "text/html"),
        ("text/html;q=0.4, application/json;q=0.5", "application/json"),
        ("text/html;q=0", "application/json"),
        ("text/html;q=high", "application/json"),
        ("text/event-stream", "text/event-stream"),
        ("text/plain", "application/json"),
        ("\xff\x00,;q=;;,", "application/json"),
        ("," * 100_000, "application/json"),
    ],
)
def test_the_accept_header_says_in_which_form(accept: str | None, form: str) -> None:
    headers = {} if accept is None else {"Accept": accept}
    answer = call(StatusPage(sample), method="HEAD", headers=headers)
    assert answer.status == 200
    assert answer.headers["content-type"].partition(";")[0] == form


def test_json_is_the_document() -> None:
    answer = call(StatusPage(sample))
    assert json.loads(answer.body) == sample()
    assert answer.headers["content-length"] == str(len(answer.body))


@pytest.mark.parametrize("headers", [{}, PAGE, EVENTS, AUTHORIZED])
def test_every_answer_is_neither_kept_nor_framed_nor_guessed_at(app: StatusPage, headers: dict[str, str]) -> None:
    for method in ("GET", "POST", "PUT"):
        answer = asyncio.run(drive(app, method=method, headers=headers))
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("headers", [{}, PAGE])
def test_head_is_answered_as_get_is_without_a_body(headers: dict[str, str]) -> None:
    app = StatusPage(sample)
    get, head = call(app, headers=headers), call(app, method="HEAD", headers=headers)
    assert (head.status, head.headers, head.body) == (get.status, get.headers, b"")


def test_the_policy_of_the_page_allows_its_own_style_and_script_alone() -> None:
    answer = call(StatusPage(sample), headers=PAGE)
    html = answer.body.decode()
    directives = dict(
        directive.strip().split(" ", 1) for directive in answer.headers["content-security-policy"].split(";")
    )
    for directive, tag in (("style-src", "style"), ("script-src", "script")):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert directives.pop(directive) == f"'sha256-{digest}'"
    assert directives == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "<b>"])
def test_other_methods_are_not_allowed(app: StatusPage, method: str) -> None:
    answer = call(app, method=method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD, POST")
    assert call(StatusPage(sample), method=method).headers["allow"] == "GET, HEAD"


def test_a_script_of_another_origin_is_told_nothing(app: StatusPage, acts: Acts) -> None:
    # Whatever a CORS middleware of the application would allow.
    for site in ("cross-site", "same-site"):
        fetch = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "cors"}
        for method in ("GET", "HEAD", "POST"):
            answer = call(app, method=method, headers={**fetch, **AUTHORIZED})
            assert answer.status == 403
            assert b"policy" not in answer.body
            assert (answer.body == b"") == (method == "HEAD")
    assert acts.done == []
    link = {**PAGE, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert call(app, headers=link).status == 200
    own = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}
    assert call(app, headers=own).status == 200


# The page


class Outline(HTMLParser):
    """The elements of a page with the names of their attributes, its text, and whether every element is closed."""

    VOID = frozenset({"meta", "link", "br", "polyline"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_says_everything_without_its_script() -> None:
    outline = Outline(page(sample(REDIS, reload=FAILED, up=False)))
    for fact in (
        "The last reload failed at 2026-03-04 11:58:20 UTC",
        "The redis backend is away",
        "Shedding now: some of class low.",
        "unknown time unit 'dya' in '10_000/dya'; did you mean 'day'?",
        "allowed 513,885",
        "limited 12,354",
        "concurrency limit 31 (lag)",
        "event loop lag 12.3 ms",
        "utilization 118 %",
        "low 4 9 2,204",
        "events 41",
        "globex tenant 9,310 rate 8,900, overload 410 rate 8,900",
        "203.0.113.7 address 2,144 rate 2,144 rate 1,500, login-ip 644",
        "initech 2026-03-04 12:10:00 UTC credential stuffing, ticket 4711",
        "mode enforce",
        "/etc/seawall/tenants.d/sales.yaml",
        "pro 100/second (burst 300) 1_000_000/month (Europe/Berlin) 50 - enforce",
        "looks for changes every 2 s applied 4 failed 2 in force since 2026-03-04 08:30:01 UTC",
        "type redis state away when it is away local",
        "address 1,820 91,233 0",
        "2026-03-04 08:30:01 UTC acme: plan free -> pro tenant batch-jobs added",
        "up for 12,345 s counts are of this process alone",
    ):
        assert fact in outline.text
    assert "Nothing needs attention." not in outline.text
    assert ("meta", ("http-equiv", "content")) in outline.elements  # in a noscript


def test_the_page_says_that_nothing_needs_attention() -> None:
    text = Outline(page(sample(held=CALM, refused=(), blocked=(), history=(), workers=4))).text
    assert "Nothing needs attention." in text
    assert "Who was refused Nobody, lately." in text
    assert "Last changes None on record." in text
    assert "counts are of 4 processes together" in text


def test_diagnostics_keep_their_shape() -> None:
    html = page(sample(reload=FAILED))
    (shown,) = re.findall("<pre>(.*?)</pre>", html[: html.index('id="requests"')], re.DOTALL)
    parser = Outline(f"<pre>{shown}</pre>")
    assert "".join(parser.words) == DIAGNOSTIC


def test_what_strangers_choose_is_shown_and_never_markup() -> None:
    evil = page(hostile())
    tame = evil
    tame_document = json.loads(json.dumps(hostile()))
    replaced = {name: f"name{at}" for at, name in enumerate(HOSTILE)}

    def tamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {tamed(key): tamed(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [tamed(inner) for inner in value]
        if isinstance(value, str):
            for name, other in replaced.items():
                value = value.replace(name, other)
        return value

    tame = page(tamed(tame_document))
    assert Outline(evil).elements == Outline(tame).elements
    assert Outline(evil).ids == Outline(tame).ids
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", evil)
    shown = Outline(evil).text
    for visible in (
        "<script>window.hacked = 1</script>",
        "&lt;b&gt; &amp;amp;",
        r"escape\x1b[2J",
        r"\u202egnp.exe\u2066",
        r"\ud800 lone surrogate",
        "{{7*7}} ${7*7} {0.__class__}",
        "a" * 256,
    ):
        assert visible in shown


def test_the_page_loads_nothing_and_is_small() -> None:
    html = call(StatusPage(sample), headers=PAGE).body.decode()
    assert len(html) < 30_000
    assert re.findall(r"""(?:href|src|action|url\()\s*=?\s*["']?([^"'> )]*)""", html) == ["data:,"]
    assert not re.search(r"https?:|//[a-z]|@import|innerHTML|eval|document\.write", html)


def test_what_is_longer_than_a_line_is_cut() -> None:
    outline = Outline(main(sample(files=["/" + "x" * 5_000])))
    assert max(map(len, outline.words)) < 400
    assert "x..." in outline.text


def test_the_page_can_be_read_aloud_and_by_keyboard() -> None:
    html = page(sample())
    outline = Outline(html)
    assert html.startswith('<!doctype html>\n<html lang="en">')
    assert len(set(outline.ids)) == len(outline.ids)
    assert set(re.findall('aria-labelledby="([^"]*)"', html)) <= set(outline.ids)
    assert [tag for tag, _ in outline.elements if tag in ("h1", "h2")][:2] == ["h1", "h2"]
    assert all(("scope" in attributes) for tag, attributes in outline.elements if tag == "th")
    assert ("section", ("id", "class", "aria-live", "aria-labelledby")) in outline.elements
    assert '<p id="state" role="status">' in html


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    digits = colour.lstrip("#")
    digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
    channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(scheme: str) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", asset("page.css"), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", light if scheme == "light" else dark))
    pairs = [(name, back) for name in ("text", "quiet", "limit", "flight") for back in ("back", "card")]
    pairs += [(name, f"{name}-back") for name in ("alert", "note", "well")]
    for front, back in pairs:
        bright, dim = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (front, back)


# Events


def events(body: bytes) -> list[tuple[str, str]]:
    """What a browser makes of a stream (HTML, 9.2.6): the type and the data of each event."""
    found = []
    for block in re.split(r"\n\n", re.sub("\r\n?", "\n", body.decode("utf-8"))):
        fields = [line.split(":", 1) for line in block.split("\n") if ":" in line]
        data = [value.removeprefix(" ") for name, value in fields if name == "data"]
        kinds = [value.removeprefix(" ") for name, value in fields if name == "event"]
        if data:
            found.append((kinds[-1] if kinds else "message", "\n".join(data)))
    return found


class Listener:
    """A stream that is read as it comes. `leave` closes the connection."""

    def __init__(self, app: StatusPage, query: bytes = b"", *, reads: bool = True) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.ended = False
        self.left = asyncio.Event()
        self.arrived = asyncio.Event()
        self._reads = reads
        scope = {
            "type": "http",
            "method": "GET",
            "headers": [(b"accept", b"text/event-stream")],
            "query_string": query,
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        if not self._reads:
            await asyncio.Event().wait()
        self.body += message["body"]
        self.ended = not message["more_body"]
        self.arrived.set()

    async def until(self, count: int) -> list[tuple[str, str]]:
        """The events, once there are as many."""
        async with asyncio.timeout(10):
            while len(found := events(self.body)) < count:
                self.arrived.clear()
                await self.arrived.wait()
        return found

    async def end(self) -> None:
        """Wait until the stream has ended by itself."""
        async with asyncio.timeout(10):
            await self.task


async def test_a_stream_sends_the_document_again_and_again() -> None:
    numbers = iter(range(100))
    app = StatusPage(lambda: {**sample(), "pid": next(numbers)}, interval=0.01)
    listener = Listener(app)
    found = await listener.until(3)
    assert (listener.status, listener.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert {kind for kind, _ in found} == {"message"}
    assert [json.loads(data)["pid"] for _, data in found[:3]] == [0, 1, 2]
    assert {**json.loads(found[0][1]), "pid": 0} == {**sample(), "pid": 0}
    listener.left.set()
    await listener.end()
    assert listener.ended


async def test_a_stream_for_the_page_has_its_html_first() -> None:
    listener = Listener(StatusPage(sample), b"page")
    (kind, html), (other, data) = (await listener.until(2))[:2]
    assert (kind, html) == ("page", main(sample()))
    assert (other, json.loads(data)) == ("message", sample())
    listener.left.set()
    await listener.end()


async def test_nothing_that_strangers_choose_begins_an_event() -> None:
    listener = Listener(StatusPage(hostile), b"page")
    found = await listener.until(2)
    assert [kind for kind, _ in found] == ["page", "message"]
    assert found[0][1] == main(hostile())
    assert json.loads(found[1][1]) == hostile()
    listener.left.set()
    await listener.end()


async def test_all_listeners_are_sent_one_rendering() -> None:
    made = 0

    def count() -> Document:
        nonlocal made
        made += 1
        return sample()

    app = StatusPage(count, interval=60)
    listeners = [Listener(app) for _ in range(8)]
    for listener in listeners:
        await listener.until(1)
        listener.left.set()
        await listener.end()
    assert made == 1


async def test_only_so_many_listen_and_one_that_leaves_makes_room() -> None:
    app = StatusPage(sample, listeners=2)
    first, second = Listener(app), Listener(app)
    await first.until(1)
    await second.until(1)
    third = Listener(app)
    await third.end()
    assert (third.status, third.headers["retry-after"]) == (503, "5")
    assert repr(app) == "<StatusPage with 2 listeners>"
    first.left.set()
    await first.end()
    fourth = Listener(app)
    await fourth.until(1)
    for listener in (second, fourth):
        listener.left.set()
        await listener.end()
    assert repr(app) == "<StatusPage with 0 listeners>"


async def test_a_stream_that_is_cancelled_makes_room() -> None:
    app = StatusPage(sample, listeners=1)
    listener = Listener(app)
    await listener.until(1)
    listener.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await listener.task
    assert repr(app) == "<StatusPage with 0 listeners>"


async def test_a_document_that_fails_ends_the_stream_and_makes_room() -> None:
    def broken() -> Document:
        raise RuntimeError("no document")

    app = StatusPage(broken, listeners=1)
    with pytest.raises(RuntimeError, match="no document"):
        await Listener(app).end()
    assert repr(app) == "<StatusPage with 0 listeners>"


async def test_a_stream_ends_so_that_its_listener_has_to_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "LIFETIME", 0.02)
    listener = Listener(StatusPage(sample, interval=0.01))
    await listener.end()
    assert listener.ended
    assert b"retry: 1000\n" in listener.body


async def test_a_listener_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_STUCK", 0.01)
    app = StatusPage(sample)
    await Listener(app, reads=False).end()
    assert repr(app) == "<StatusPage with 0 listeners>"


class Stopping:
    """A server whose signal handler is one of its methods, as uvicorn's."""

    should_exit = False

    def handle_exit(self, *_: Any) -> None:
        self.should_exit = True


@contextmanager
def handling(handler: Callable[..., None]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_a_stream_ends_when_the_server_is_told_to() -> None:
    server = Stopping()
    with handling(server.handle_exit):
        listener = Listener(StatusPage(sample, interval=0.01))
        await listener.until(2)
        assert not listener.ended
        server.handle_exit()
        await listener.end()
    assert listener.ended


@pytest.mark.slow
async def test_uvicorn_stops_although_somebody_listens(tmp_path: Path) -> None:
    arguments = ("-m", "uvicorn", "status_app:app", "--app-dir", "tests", "--host", "127.0.0.1", "--port", "{port}")
    with serving(arguments, tmp_path / "log") as server:
        caller = await Caller.connect(server.port)
        await caller.send("/-/seawall", headers=EVENTS)
        assert (await caller.start()).status == 200
        assert b"data: {" in await caller.chunk() + await caller.chunk()
        server.process.terminate()
        assert await asyncio.to_thread(server.process.wait, 10) in (0, -signal.SIGTERM)
        await caller.closed()
    assert "Traceback" not in (tmp_path / "log").read_text()


# Actions


@pytest.mark.parametrize(
    "body",
    [
        {"action": "block", "tenant": "acme", "seconds": 600},
        {"action": "block", "tenant": "acme", "seconds": 0x1E13380, "reason": "ticket 4711"},
        {"action": "block", "tenant": "acme", "seconds": 1.5},
        {"action": "unblock", "tenant": HOSTILE[0]},
        {"action": "reset", "tenant": "\u05d0\u05d1\u05d2"},
        {"action": "show", "tenant": "acme"},
    ],
)
def test_an_action_is_done_for_who_has_the_token(app: StatusPage, acts: Acts, body: dict[str, Any]) -> None:
    answer = post(app, body)
    assert (answer.status, json.loads(answer.body)) == (200, {"tenant": body["tenant"]})
    assert acts.done == [(body["action"], {name: value for name, value in body.items() if name != "action"})]
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Nothing": ""},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"Authorization": f"Bearer {TOKEN.upper()}"},
        {"Authorization": "Bearer \xff\xfe"},
        {"Cookie": f"token={TOKEN}"},
    ],
)
def test_nothing_is_done_without_the_token(app: StatusPage, acts: Acts, headers: dict[str, str]) -> None:
    answer = post(app, {"action": "reset", "tenant": "acme"}, **headers)
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert acts.done == []
    assert TOKEN not in answer.body.decode()


def test_two_tokens_are_none(app: StatusPage, acts: Acts) -> None:
    right, wrong = (b"authorization", f"Bearer {TOKEN}".encode()), (b"authorization", b"Bearer x")
    for fields in ([right, wrong], [wrong, right], [right, right]):
        assert call(app, method="POST", headers=fields).status == 401


def test_the_scheme_is_of_any_case(app: StatusPage) -> None:
    assert post(app, {"action": "reset", "tenant": "acme"}, Authorization=f"bearer  {TOKEN}").status == 200


def test_there_are_no_actions_without_a_token_of_the_configuration(acts: Acts) -> None:
    for app in (StatusPage(sample, act=acts), StatusPage(sample, token=TOKEN)):
        answer = post(app, {"action": "reset", "tenant": "acme"})
        assert answer.status == 404
        assert "status.token" in error(answer)
    assert acts.done == []


def test_a_token_that_can_be_guessed_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        StatusPage(sample, token="x" * 15)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b"[" * 4_000, "JSON|nested"),
        ('{"action": "block", "tenant": "acme", "seconds": 600} x', "not JSON"),
        ("[]", "is an object"),
        ('"block"', "is an object"),
        ({}, "action is one of block, unblock, reset, show"),
        ({"action": "explode", "tenant": "acme"}, "action is one of"),
        ({"action": ["block"], "tenant": "acme"}, "action is one of"),
        ({"action": "reset"}, "tenant is the id"),
        ({"action": "reset", "tenant": 7}, "tenant is the id"),
        ({"action": "reset", "tenant": " "}, "tenant is the id"),
        ({"action": "reset", "tenant": "x" * 257}, "tenant is the id"),
        ({"action": "reset", "tenant": "acme", "seconds": 600}, "reset takes tenant, not 'seconds'"),
        ({"action": "block", "tenant": "acme"}, "seconds is how long"),
        ({"action": "block", "tenant": "acme", "seconds": "600"}, "seconds is how long"),
        ({"action": "block", "tenant": "acme", "seconds": True}, "seconds is how long"),
        ({"action": "block", "tenant": "acme", "seconds": 0}, "seconds is how long"),
        ({"action": "block", "tenant": "acme", "seconds": -600}, "seconds is how long"),
        ({"action": "block", "tenant": "acme", "seconds": 1e300}, "seconds is how long"),
        ('{"action": "block", "tenant": "acme", "seconds": NaN}', "seconds is how long"),
        ('{"action": "block", "tenant": "acme", "seconds": Infinity}', "seconds is how long"),
        ({"action": "block", "tenant": "acme", "seconds": 600, "reason": 7}, "reason is at most 200"),
        ({"action": "block", "tenant": "acme", "seconds": 600, "reason": "x" * 201}, "reason is at most 200"),
    ],
)
def test_bad_input_is_told_what_is_wrong_with_it(app: StatusPage, acts: Acts, body: Any, message: str) -> None:
    answer = post(app, body)
    assert answer.status == 400
    assert re.search(message, error(answer))
    assert acts.done == []


def test_what_cannot_be_done_is_said_in_the_words_of_who_would_do_it(app: StatusPage) -> None:
    answer = post(app, {"action": "show", "tenant": "nobody"})
    assert (answer.status, error(answer)) == (404, "no tenant 'nobody'")


async def test_a_body_that_is_too_large_is_not_read_to_its_end(app: StatusPage, acts: Acts) -> None:
    read = 0

    def parts() -> Iterator[bytes]:
        nonlocal read
        while True:
            read += 1_024
            yield b" " * 1_024

    answer = Answer()
    received = parts()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": next(received), "more_body": True}

    async def send(message: Any) -> None:
        answer.status = message.get("status", answer.status)

    scope = {"type": "http", "method": "POST", "headers": [(b"authorization", f"Bearer {TOKEN}".encode())]}
    await app(scope, receive, send)
    assert answer.status == 413
    assert read == 5 * 1_024
    assert acts.done == []


async def test_a_body_comes_in_parts(app: StatusPage, acts: Acts) -> None:
    body = json.dumps({"action": "reset", "tenant": "acme"}).encode()
    assert (await _post(app, [body[:7], b"", body[7:]], AUTHORIZED)).status == 200
    assert acts.done == [("reset", {"tenant": "acme"})]


async def test_nothing_is_done_for_who_leaves_before_the_end(app: StatusPage, acts: Acts) -> None:
    left = iter(
        [
            {"type": "http.request", "body": b'{"action": "reset", "tenant": "acme"}', "more_body": True},
            {"type": "http.disconnect"},
        ]
    )

    async def receive() -> dict[str, Any]:
        return next(left)

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "headers": [(b"authorization", f"Bearer {TOKEN}".encode())]}
    await app(scope, receive, send)
    assert acts.done == []


# In front of an application

STATUS = {"path": "/-/seawall", "allow": ["192.0.2.0/24", "127.0.0.1"], "token": TOKEN}
OUTSIDE = ("198.51.100.7", 1)


def protected(**sections: Any) -> Seawall:
    """An application with one request an hour for each tenant, and a status page."""
    identity = {"tenant": [{"api_key": {"header": "X-API-Key"}}]}
    tenants = {"acme": {"keys": [hash_of(KEY)]}, "globex": {"keys": [hash_of(OTHER_KEY)]}}
    plans = {"default": {"rate": "1/hour"}}
    settings = {"version": 1, "identity": identity, "plans": plans, "tenants": tenants, "status": STATUS, **sections}
    return Seawall(hello, settings, registry=CollectorRegistry())


def shown(app: Seawall) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(call(app, "/-/seawall").body)
    return said


def act(app: Seawall, **body: Any) -> Answer:
    return asyncio.run(_act(app, body))


async def _act(app: Seawall, body: dict[str, Any]) -> Answer:
    answer = Answer()
    messages = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def send(message: Any) -> None:
        answer.status = message.get("status", answer.status)
        answer.body += message.get("body", b"")

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/-/seawall",
        "client": ("192.0.2.1", 1),
        "headers": [(b"authorization", f"Bearer {TOKEN}".encode())],
    }
    await app(scope, receive, send)
    return answer


def test_the_page_of_an_application_says_what_has_happened() -> None:
    app = protected()
    assert statuses(app, 3, headers={"X-API-Key": KEY}) == [200, 429, 429]
    assert statuses(app, 2) == [200, 429]
    said = shown(app)
    assert (said["requests"]["allowed"], said["requests"]["limited"]) == (2, 3)
    assert said["rejections"] == {"rate": 3}
    assert [(one["caller"], one["kind"], one["count"], one["reasons"]) for one in said["refused"]] == [
        ("acme", "tenant", 2, {"rate": 2}),
        ("192.0.2.1", "address", 1, {"rate": 1}),
    ]
    assert (said["workers"], said["backend"]["type"], said["backend"]["up"]) == (1, "memory", True)
    assert call(app, "/-/seawall", headers=PAGE).headers["content-type"] == "text/html; charset=utf-8"
    assert shown(app)["requests"]["exempt"] == 3


def shape(value: Any) -> Any:
    """The names in a document, of which those that a configuration chooses are left out."""
    if isinstance(value, dict):
        named = {"requests", "rejections", "shadow", "inflight", "queued", "shed", "streams", "stores"}
        return {name: None if name in named else shape(inner) for name, inner in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value and isinstance(value[0], dict) else None


def test_the_sample_is_as_the_documents_of_an_application_are() -> None:
    app = protected()
    statuses(app, 2, headers={"X-API-Key": KEY})
    assert act(app, action="block", tenant="globex", seconds=600, reason="too much").status == 200
    real, made = shape(shown(app)), shape(sample())
    for part in ("refused", "blocked"):
        one, other = real.pop(part), made.pop(part)
        assert (part, set(one[0])) == (part, set(other[0]))
    for part in ("attention", "history"):
        del real[part], made[part]
    assert real == made


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_who_is_not_allowed_finds_nothing_whatever_it_has(method: str) -> None:
    app = protected()
    for given in (
        {"client": OUTSIDE, "headers": AUTHORIZED},
        {"client": ("127.0.0.1", 1), "headers": {**AUTHORIZED, "X-Forwarded-For": "127.0.0.1"}},
        {"client": None, "headers": AUTHORIZED},
    ):
        answer = call(app, "/-/seawall", method=method, **given)
        assert answer.status == 404
        assert b"seawall" not in answer.body
        assert "content-security-policy" not in answer.headers


def test_the_page_is_at_its_path_and_no_other() -> None:
    app = protected()
    for path in ("/-/seawall/", "//-/seawall", "/-/SEAWALL", "/-/seawall%0A"):
        assert b"digest" not in call(app, path).body


def test_an_operator_keeps_a_tenant_out_and_lets_it_in_again() -> None:
    app = protected()
    headers = {"X-API-Key": KEY}
    assert act(app, action="block", tenant="acme", seconds=600, reason="ticket 4711").status == 200
    assert call(app, headers=headers).status == 403
    (one,) = shown(app)["blocked"]
    assert (one["tenant"], one["reason"]) == ("acme", "ticket 4711")
    assert "ticket 4711" in Outline(call(app, "/-/seawall", headers=PAGE).body.decode()).text
    assert act(app, action="unblock", tenant="acme").status == 200
    assert shown(app)["blocked"] == []
    assert statuses(app, 2, headers=headers) == [200, 429]
    assert act(app, action="reset", tenant="acme").status == 200
    assert call(app, headers=headers).status == 200


def test_without_a_token_there_is_nothing_to_post_to() -> None:
    app = protected(status={"path": "/-/seawall", "allow": ["192.0.2.0/24"]})
    assert act(app, action="block", tenant="acme", seconds=600).status == 404
    assert call(app, headers={"X-API-Key": KEY}).status == 200


def test_no_secret_is_on_the_page() -> None:
    app = protected()
    statuses(app, 2, headers={"X-API-Key": KEY})
    for headers in ({}, PAGE):
        body = call(app, "/-/seawall", headers=headers).body.decode()
        assert TOKEN not in body
        assert hash_of(KEY) not in body
    assert TOKEN not in repr(app)


def test_a_broken_file_is_shown_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "seawall.yaml"
    good = (
        f"""version: 1\nplans: {{default: {{rate: 100/minute}}}}\nstatus: {{allow: [192.0.2.0/24], token: {TOKEN}}}\n"""
    )
    file.write_text(good)
    app = Seawall(hello, file, registry=CollectorRegistry())
    assert shown(app)["policy"]["files"] == [str(file)]
    assert shown(app)["reload"]["error"] is None
    file.write_text(good.replace("100/minute", "100/minit"))
    with pytest.raises(ConfigError):
        reload()
    said = shown(app)
    assert said["attention"][0]["level"] == "alert"
    assert said["attention"][0]["text"].startswith("The last reload failed at ")
    assert f"{file}:2:" in said["reload"]["error"]["text"]
    assert "unknown time unit" in said["reload"]["error"]["text"]
    assert (said["reload"]["failed"], said["limits"][0]["rate"]) == (1, "100/minute")
    file.write_text(good.replace("100/minute", "200/minute"))
    reload()
    said = shown(app)
    assert (said["reload"]["error"], said["reload"]["applied"], said["limits"][0]["rate"]) == (None, 1, "200/minute")


def test_a_path_that_moves_with_a_reload_takes_the_page_along(tmp_path: Path) -> None:
    file = tmp_path / "seawall.yaml"
    text = "version: 1\nplans: {default: {rate: 100/minute}}\nstatus: {path: %s, allow: [192.0.2.0/24]}\n"
    file.write_text(text % "/before")
    app = Seawall(hello, file, registry=CollectorRegistry())
    assert json.loads(call(app, "/before").body)["policy"]["plans"] == 1
    file.write_text(text % "/after")
    reload()
    assert call(app, "/before").body == b"hello"
    assert json.loads(call(app, "/after").body)["policy"]["plans"] == 1


def test_the_counts_of_one_process_are_its_own() -> None:
    cells = Cells()
    cells.values[cells.index(REQUESTS, "allowed", "normal")] += 7
    assert counted(cells) == ([(REQUESTS.name, ("allowed", "normal"), 7)], 1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="workers share no counters there")
def test_any_worker_says_what_all_have_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(METRICS_DIR, str(tmp_path / "metrics"))
    (tmp_path / "shop.py").write_text(SHOP)
    arguments = ("-m", "uvicorn", "shop:app", "--app-dir", str(tmp_path), "--port", "{port}", "--workers", "2")
    with serving(arguments, tmp_path / "log") as server:

        def ask(path: str) -> bytes:
            connection = server.connect()  # a new one, for whichever worker is quicker
            try:
                connection.request("GET", path)
                return connection.getresponse().read()
            finally:
                connection.close()

        for _ in range(60):
            ask("/")
        deadline = time.monotonic() + 60
        seen = set()
        while len(seen) < 2:
            assert time.monotonic() < deadline, seen
            said = json.loads(ask("/-/seawall"))
            assert said["requests"]["allowed"] + said["requests"]["limited"] == 60
            # Each says once a second that it is there.
            if said["workers"] == 2:
                seen.add(said["pid"])


SHOP = """\
from starlette.applications import Starlette
from seawall import Seawall
app = Starlette()
app.add_middleware(Seawall, config={
    "version": 1,
    "plans": {"default": {"rate": "10/hour"}},
    "status": {"path": "/-/seawall", "allow": ["127.0.0.1"]},
})
"""


def test_the_sample_is_what_the_middleware_counts() -> None:
    # Or these tests would be about metrics that there are not.
    labels = {spec.name: len(spec.labels) for spec in SPECS}
    assert all(labels[name] == len(values) for name, values, _ in COUNTS)
    assert NOON == 1_772_625_600
