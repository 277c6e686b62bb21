"""What a real browser makes of the status page, and of a refusal by a service of another origin."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

import chromium
from chromium import Browser, Page
from harness import KEY, answering, config, hash_of, hello
from seawall import EXPOSE_HEADERS, Seawall
from seawall.status import StatusPage
from status_app import served
from status_sample import CALM, DIAGNOSTIC, FAILED, HOSTILE, hostile, sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.find() is None, reason="no Chromium is installed"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium.running(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def tab(browser: Browser) -> Iterator[Page]:
    with browser.page() as page:
        yield page


class Service:
    """A document that changes with each look at it."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes
        self.seconds = count()

    def __call__(self) -> dict[str, Any]:
        passed = next(self.seconds)
        said = sample(**self.changes)
        said["time"] = f"2026-03-04T12:{passed // 60:02}:{passed % 60:02}.000Z"
        said["requests"]["allowed"] += 40 * passed
        if "overload" in said:
            said["overload"]["limit"] = 20 + passed % 7
        return said


def test_the_page_is_whole_without_scripts(tab: Page) -> None:
    with served(StatusPage(lambda: sample(reload=FAILED))) as origin:
        tab.without_scripts()
        tab.go(origin)
        text = tab.text
        for fact in (
            "The last reload failed at 2026-03-04 11:58:20 UTC",
            "Shedding now: some of class low.",
            " ".join(DIAGNOSTIC.split()),
            "allowed 513,885",
            "globex tenant 9,310 rate 8,900, overload 410 rate 8,900",
            "initech 2026-03-04 12:10:00 UTC credential stuffing, ticket 4711",
            "acme: plan free -> pro",
        ):
            assert fact in text
        # And so it is loaded again: the browser has been told when.
        asked = tab.requested()
        assert asked == [f"{origin}/"]
        scheduled = [event for method, event in tab.events if method == "Page.frameScheduledNavigation"]
        assert [(event["reason"], event["delay"]) for event in scheduled] == [("metaTagRefresh", 10)]
        assert tab.complaints() == []


def test_with_scripts_the_page_is_not_loaded_again(tab: Page) -> None:
    with served(StatusPage(sample)) as origin:
        tab.go(origin)
        tab.until("document.querySelector('#state').textContent === 'Live.'")
        assert [method for method, _ in tab.events if method == "Page.frameScheduledNavigation"] == []


def test_what_changes_is_put_in_place_as_it_happens(tab: Page) -> None:
    service = Service(held=CALM)
    with served(StatusPage(service, interval=0.05)) as origin:
        tab.go(origin)
        tab.until("document.querySelector('#state').textContent === 'Live.'")
        assert "Nothing needs attention." in tab.text
        # What is selected stays so while numbers change.
        tab.evaluate("getSelection().selectAllChildren(document.querySelector('#policy code'))")
        digest = tab.evaluate("getSelection().toString()")
        assert len(digest) == 12
        tab.evaluate("window.kept = document.querySelector('#requests tbody tr')")
        before = tab.evaluate("document.querySelector('#requests tbody td').textContent")
        tab.until(f"document.querySelector('#requests tbody td').textContent !== {before!r}")
        assert tab.evaluate("document.querySelector('#requests tbody tr') === window.kept")
        assert tab.evaluate("getSelection().toString()") == digest
        # 40 more with each second of the documents' own time.
        tab.until("document.querySelector('[data-rate=allowed]').textContent === '40.0'")
        assert tab.evaluate("document.querySelector('[data-rate=shed]').textContent") == "0.0"

        service.changes = {"held": CALM, "reload": FAILED, "refused": (), "blocked": ()}
        tab.until("document.title === '(1) Seawall'")
        assert " ".join(DIAGNOSTIC.split()) in tab.text
        assert "Nobody, lately." in tab.text
        service.changes = {"held": CALM}
        tab.until("document.title === 'Seawall'")
        assert "globex tenant 9,310" in tab.text
        assert tab.complaints() == []


def test_a_refusal_is_seen_within_seconds(tab: Page) -> None:
    settings = config(
        plans={"default": {"rate": "1/hour"}},
        identity={"tenant": [{"api_key": {"header": "X-API-Key"}}]},
        tenants={HOSTILE[0]: {"keys": [hash_of(KEY)]}},
        status={"path": "/-/seawall", "allow": ["127.0.0.1"]},
    )
    with served(Seawall(hello, settings, registry=CollectorRegistry())) as origin:
        tab.go(f"{origin}/-/seawall")
        tab.until("document.querySelector('#state').textContent === 'Live.'")
        assert "Nobody, lately." in tab.text
        connection = http.client.HTTPConnection(urlsplit(origin).netloc)
        for status in (200, 429, 429):
            connection.request("GET", "/", headers={"X-API-Key": KEY})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
        connection.close()
        tab.until("document.querySelector('#refused tbody th')?.textContent.includes('window.hacked')")
        assert f"{HOSTILE[0]} tenant 2 rate 2 rate 2" in tab.text
        assert "limited 2" in tab.text
        assert tab.evaluate("typeof window.hacked") == "undefined"
        assert tab.complaints() == []


def test_a_chart_is_drawn_of_the_limit_and_what_is_in_flight(tab: Page) -> None:
    with served(StatusPage(Service(), interval=0.05)) as origin:
        tab.go(origin)
        tab.until("document.querySelector('polyline.limit')?.points.numberOfItems >= 5")
        drawn = tab.evaluate(
            "[...document.querySelectorAll('polyline')].map(line => [...line.points].map(({x, y}) => [x, y]))"
        )
        assert len(drawn) == 2
        for line in drawn:
            assert all(0 <= x <= 120 and 0 <= y <= 40 for x, y in line)
            assert line[-1][0] == 120
            assert [x for x, _ in line] == sorted(x for x, _ in line)
        assert len({y for _, y in drawn[0]}) > 1


def test_counts_that_begin_anew_are_no_negative_rates(tab: Page) -> None:
    service = Service()
    with served(StatusPage(service, interval=0.05)) as origin:
        tab.go(origin)
        tab.until("document.querySelector('[data-rate=allowed]').textContent === '40.0'")
        tab.evaluate("""window.rates = new Set(); new MutationObserver(() => window.rates.add(
            document.querySelector('[data-rate=allowed]').textContent)).observe(
            document.querySelector('[data-rate=allowed]'), {childList: true, characterData: true, subtree: true})""")
        service.changes = {"counts": ()}
        tab.until("window.rates.has('') && document.querySelector('[data-rate=allowed]').textContent === '40.0'")
        assert not [rate for rate in tab.evaluate("[...window.rates]") if rate.startswith("-")]


def test_the_page_says_that_it_is_old_when_the_service_is_gone(tab: Page) -> None:
    tab.do("Page.addScriptToEvaluateOnNewDocument", source=_HASTE)
    with served(StatusPage(sample)) as origin:
        tab.go(origin)
        tab.until("document.querySelector('#state').textContent === 'Live.'")
    tab.until("document.querySelector('#state').textContent.startsWith('Not connected')")


_HASTE = "const wait = setTimeout; window.setTimeout = (run, time, ...more) => wait(run, time / 25, ...more);"
"""Has the page's own waits of five seconds take a fifth of one."""


def test_who_finds_no_room_to_listen_tries_again(browser: Browser) -> None:
    with served(StatusPage(sample, listeners=1)) as origin, browser.page() as second:
        with browser.page() as first:
            first.go(origin)
            first.until("document.querySelector('#state').textContent === 'Live.'")
            second.do("Page.addScriptToEvaluateOnNewDocument", source=_HASTE)
            second.go(origin)
            second.until(lambda: 503 in statuses_of(second))
            assert "allowed 513,885" in second.text
        second.until("document.querySelector('#state').textContent === 'Live.'")


def statuses_of(page: Page) -> list[int]:
    return [event["response"]["status"] for method, event in page.events if method == "Network.responseReceived"]


def test_names_that_strangers_choose_are_shown_and_do_nothing(tab: Page) -> None:
    with served(StatusPage(hostile, interval=0.05)) as origin:
        tab.go(origin)
        tab.until("document.querySelector('#state').textContent === 'Live.'")
        # Twice as they came, and again out of a document that the script has parsed.
        tab.evaluate("document.querySelector('main').replaceChildren()")
        tab.until("document.querySelector('#history') !== null")
        assert tab.evaluate("typeof window.hacked") == "undefined"
        assert (
            tab.evaluate("document.querySelectorAll('img, main script, main svg:not([data-own]), iframe').length") == 0
        )
        assert HOSTILE[0] in tab.text
        assert {urlsplit(url).netloc for url in tab.requested()} == {urlsplit(origin).netloc}
        assert tab.complaints() == []


def test_nothing_is_asked_of_anybody_else_and_no_policy_is_violated(tab: Page) -> None:
    with served(StatusPage(Service(), interval=0.05)) as origin:
        tab.go(origin)
        tab.until("document.querySelector('[data-rate=allowed]').textContent === '40.0'")
        assert sorted(set(tab.requested())) == [f"{origin}/", f"{origin}/?page"]
        assert tab.complaints() == []
        # The browser would have complained: of a script, a style and an image of somebody else.
        tab.evaluate("""document.body.insertAdjacentHTML('beforeend', '<p style="color: red" onclick="x()">');
            document.body.append(Object.assign(document.createElement('img'), {src: 'http://127.0.0.2:1/'}))""")
        tab.until(lambda: len(tab.complaints()) >= 3)
        assert all("Content Security Policy" in complaint for complaint in tab.complaints())


def test_another_origin_can_neither_frame_the_page_nor_read_it(tab: Page) -> None:
    with served(StatusPage(sample)) as origin, served(answering(body=b"<p>elsewhere")) as other:
        tab.go(other.replace("127.0.0.1", "localhost"))
        assert tab.evaluate(f"fetch('{origin}').then(() => 'read', error => error.name)") == "TypeError"
        assert tab.evaluate(f"fetch('{origin}', {{mode: 'no-cors'}}).then(() => 'read', error => error.name)") == (
            "TypeError"
        )
        tab.evaluate(f"document.body.append(Object.assign(document.createElement('iframe'), {{src: '{origin}'}}))")
        tab.until(lambda: any("frame-ancestors" in one or "X-Frame-Options" in one for one in tab.complaints()))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_a_phone_and_a_desk_in_both_schemes(tab: Page, width: int, dark: bool) -> None:
    tab.look(width, 800, dark=dark)
    with served(StatusPage(lambda: sample(reload=FAILED))) as origin:
        tab.go(origin)
        tab.until("document.querySelector('#state').textContent === 'Live.'")
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        back, text = tab.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        assert (lightness(back) < lightness(text)) == dark
        assert tab.screenshot().startswith(b"\x89PNG")


def lightness(colour: str) -> int:
    """Of ``rgb(1, 2, 3)``."""
    return sum(int(part) for part in colour[4:-1].split(","))


# Refusals


@pytest.mark.parametrize("exposed", [True, False])
def test_a_browser_on_another_origin_can_read_a_refusal(tab: Page, exposed: bool) -> None:
    headers = EXPOSE_HEADERS if exposed else []
    app = Starlette(
        middleware=[
            Middleware(CORSMiddleware, allow_origins=["*"], expose_headers=headers),
            Middleware(Seawall, config=config(plans={"default": {"rate": "1/hour"}})),
        ]
    )
    app.mount("/", hello)
    with served(app) as service, served(answering(body=b"<p>elsewhere")) as other:
        tab.go(other)
        asked = f"""fetch('{service}/', {{headers: {{'X-Asks-For': 'a preflight'}}}}).catch(error => error.name)"""
        assert tab.evaluate(f"fetch('{service}/').then(answer => answer.status)") == 200
        status, after, limit, body = tab.evaluate(
            f"""fetch('{service}/').then(async answer => [answer.status, answer.headers.get('retry-after'),
            answer.headers.get('ratelimit'), await answer.json()])"""
        )
        assert status == 429
        assert body["reason"] == "rate"
        if exposed:
            assert int(after) == body["retry_after"] >= 3_590
            assert limit.startswith('"rate";r=0;t=')
        else:  # so it is the list that does it
            assert (after, limit) == (None, None)
        assert tab.evaluate(asked) == "TypeError"  # this header is not allowed, so it is CORS that is at work
