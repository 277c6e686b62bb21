"""`seawall explain`: it agrees with what Seawall does, says why, and shows no key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from seawall import Seawall
from seawall.cli.explain import as_json, as_text
from seawall.cli.explanation import Explanation, explain
from seawall.config import load, loads
from seawall.exchange import Exchange
from seawall.overload.limiter import ADMITTED, QUEUE_TIMEOUT, WAITS, Limiter, Settings
from seawall.overload.queue import DONE, Claim
from seawall.policy import PriorityHeader
from seawall.testing import Answer, ManualClock, drive
from seawall.turnstile import settings_of
from test_cli import REFERENCE, invoke

REFERENCE_POLICY = load(REFERENCE)
NOON = "2026-06-15T12:00:00Z"


def explained(yaml: str, path: str = "/", *, tenant: str | None = None, **scope: Any) -> Explanation:
    whole = {"type": "http", "method": "GET", "path": path, "client": ("192.0.2.1", 1), "headers": [], **scope}
    return asyncio.run(explain(loads(yaml), whole, tenant=tenant))


class Application:
    """Keeps the exchange that a request came with."""

    def __init__(self) -> None:
        self.exchange: Any = None
        self.called = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.called = True
        visit = scope.get("seawall")
        self.exchange = visit if isinstance(visit, Exchange) else None
        if scope["type"] == "websocket":
            return await send({"type": "websocket.accept", "headers": []})
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def really(scope: Mapping[str, Any]) -> tuple[Answer, Application, str]:
    """What a Seawall of its own, with its own registry, makes of ``scope``."""
    registry = CollectorRegistry()
    app = Application()
    answer = await drive(Seawall(app, REFERENCE_POLICY, registry=registry, clock=ManualClock(NOON)), scope)
    counted = [
        (sample.labels["outcome"], sample.value)
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "seawall_requests_total" and sample.value
    ]
    [(outcome, _)] = counted or [("passed", 1.0)]
    return answer, app, outcome


PATHS = st.sampled_from(
    [
        "/",
        "/healthz",
        "/HEALTHZ",
        "/healthz/",
        "/metrics",
        "/login",
        "//Login/",
        "/login\n",
        "/v1/search",
        "/v1//SEARCH",
        "/v1/items/7",
        "/v1/items/7/8",
        "/v1/items",
        "/v1/events",
        "/v1/events/a/b/c",
        "/-/seawall",
        "/zoë",
    ]
)
ADDRESSES = st.sampled_from(
    ["192.0.2.1", "198.51.100.9", "10.1.2.3", "10.0.0.1", "2001:db8::1", "::ffff:198.51.100.9", "fd00::1", "127.0.0.1"]
)
HEADERS = st.lists(
    st.one_of(
        st.sampled_from([b"foo", b"bar", b"unknown", b""]).map(lambda key: (b"x-api-key", key)),
        st.lists(ADDRESSES | st.sampled_from(["nonsense", ""]), min_size=1, max_size=3).map(
            lambda hops: (b"x-forwarded-for", ", ".join(hops).encode())
        ),
        st.sampled_from(
            [
                (b"accept", b"text/html"),
                (b"content-type", b"application/grpc"),
                (b"origin", b"https://example.com"),
                (b"access-control-request-method", b"PUT"),
            ]
        ),
        st.sampled_from([b"0", b"250", b"soon"]).map(lambda timeout: (b"x-request-timeout-ms", timeout)),
        st.sampled_from([b"critical", b"low", b"background", b"mauve"]).map(lambda word: (b"x-request-priority", word)),
        st.sampled_from([b"criticality=BULK", b"criticality=?"]).map(lambda value: (b"baggage", value)),
    ),
    max_size=4,
)
SCOPES = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["http", "http", "http", "websocket"]),
        "method": st.sampled_from(["GET", "HEAD", "POST", "OPTIONS", "DELETE"]),
        "path": PATHS,
        "root_path": st.sampled_from(["", "", "/v1"]),
        "client": ADDRESSES.map(lambda address: (address, 1)),
        "headers": HEADERS,
    },
    optional={
        "state": st.sampled_from(["globex", "batch-jobs", "acme", "unlisted", "", None]).map(lambda t: {"tenant_id": t})
    },
)


@given(scope=SCOPES)
def test_it_agrees_with_what_happens(scope: dict[str, Any]) -> None:
    """Over the reference file: outcome, answer, rule, caller, mode, priority, and what each limit has left."""
    told = asyncio.run(explain(REFERENCE_POLICY, scope, at=NOON))
    if scope["type"] == "websocket":
        scope["extensions"] = {"websocket.http.response": {}}
    answer, app, outcome = asyncio.run(really(scope))
    assert told.outcome == outcome
    assert (told.status is None) is app.called
    if not app.called:
        assert told.status == answer.status
    if outcome != "exempt":
        assert dict(told.headers) == answer.headers
        assert told.body.encode() == (b"" if app.called else answer.body)
    if app.exchange is None:
        # What has expired is told its limits, and has spent nothing of them.
        assert all(limit.remaining == (limit.burst or limit.amount) for limit in told.limits)
        assert told.limits == () or outcome == "expired"
    else:
        terms, verdict = app.exchange.terms, app.exchange.verdict
        assert told.rule.name == terms.route.name
        assert told.caller.tenant == app.exchange.tenant
        assert told.caller.plan == terms.plan
        assert told.mode == terms.mode.name.lower()
        assert told.priority == terms.priority
        assert told.overload is not None
        assert told.overload.classes.index(told.priority) == terms.klass
        assert told.overload.streaming == terms.route.streaming
        assert (told.deadline is None) is (app.exchange.deadline == 0)
        assert told.concurrency == terms.concurrency
        assert [(limit.name, limit.remaining, limit.cost) for limit in told.limits] == [
            (entry.name, left, entry.cost)
            for entry, left in zip(terms.entries, verdict.left if verdict else (), strict=True)
        ]
    json.dumps(as_json(told))
    assert "\n " in as_text(told).plain


@given(scope=SCOPES)
def test_the_rule_is_the_first_that_matches_and_every_earlier_one_says_why_not(scope: dict[str, Any]) -> None:
    told = asyncio.run(explain(REFERENCE_POLICY, scope))
    names = [route.name for route in REFERENCE_POLICY.routes]
    at = told.rule.position - 1
    assert [name for name, _ in told.rule.skipped] == (names if at < 0 else names[:at])
    assert told.rule.name == ("default" if at < 0 else names[at])


# Why


TINY = "version: 1\nplans: {default: {rate: 10/s}}\n"

CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "within its limits": (TINY, {}, "allowed", "within its limits"),
    "nothing limits it": ("version: 1\nplans: {default: {rate: unlimited}}\n", {}, "allowed", "nothing limits it"),
    "concurrency alone": ("version: 1\nplans: {default: {concurrency: 3}}\n", {}, "allowed", "within its limits"),
    "file off": (TINY + "mode: 'off'\n", {}, "exempt", "the mode is off"),
    "route off": (
        TINY + "routes: [{name: all, match: {path: '/**'}, mode: 'off'}]\n",
        {},
        "exempt",
        "the mode is off",
    ),
    "plan off": (
        "version: 1\nplans: {default: {rate: 10/s, mode: 'off'}}\n",
        {},
        "exempt",
        "a mode of off holds for this caller",
    ),
    "never fits": (
        TINY + "routes: [{name: all, match: {path: '/**'}, cost: 11}]\n",
        {},
        "limited",
        "it costs more than can ever be saved up",
    ),
    "never fits, in shadow": (
        TINY + "mode: shadow\nroutes: [{name: all, match: {path: '/**'}, cost: 11}]\n",
        {},
        "allowed",
        "shadow: would be refused",
    ),
    "shadow": (TINY + "mode: shadow\n", {}, "allowed", "shadow: counted, never refused"),
    "nobody": (
        TINY + "identity: {anonymous: deny, tenant: [{api_key: {header: X-Key}}]}\n",
        {},
        "denied",
        "nobody is identified, and the policy wants to know who is calling",
    ),
    "nobody, over gRPC": (
        TINY + "identity: {anonymous: deny, tenant: [{api_key: {header: X-Key}}]}\n",
        {"headers": [(b"content-type", b"application/grpc")]},
        "denied",
        "nobody is identified, and the policy wants to know who is calling",
    ),
    "preflight": (
        TINY,
        {"method": "OPTIONS", "headers": [(b"origin", b"x"), (b"access-control-request-method", b"PUT")]},
        "passed",
        "a CORS preflight is never limited and never counted",
    ),
    "denied address": (TINY + "access: {deny: [192.0.2.0/24]}\n", {}, "denied", "the address is in access.deny"),
    "exempt address": (TINY + "access: {exempt: [192.0.2.0/24]}\n", {}, "exempt", "the address is in access.exempt"),
    "exempt rule": (
        TINY + "routes: [{name: root, match: {path: /}, exempt: true}]\n",
        {},
        "exempt",
        "the rule is exempt",
    ),
    "metrics": (
        TINY + "metrics: {path: /, allow: [192.0.2.1]}\n",
        {},
        "exempt",
        "Seawall serves metrics on this path",
    ),
    "expired": (
        TINY,
        {"headers": [(b"x-request-timeout-ms", b"0")]},
        "expired",
        "its deadline has passed before it came",
    ),
    "control character": (TINY, {"path": "/login\n"}, "denied", "the path has a control character"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_decision_in_a_few_words(name: str) -> None:
    yaml, scope, outcome, because = CASES[name]
    told = explained(yaml, **scope)
    assert (told.outcome, told.because) == (outcome, because)
    assert because in as_text(told).plain


def test_why_earlier_rules_do_not_match() -> None:
    told = explained(
        TINY
        + """
routes:
  - {name: posts, match: {path: /a, methods: [POST, PUT]}}
  - {name: probe, match: {path: /A}, exempt: true}
  - {name: other, match: {path: /b}}
  - {name: mine, match: {path: /a}}
  - {name: rest, match: {path: "/{any}"}}
  - {name: far, match: {path: /c}}
""",
        "/a",
    )
    assert told.rule.name == "mine"
    assert told.rule.skipped == (
        ("posts", "the method is GET, not POST or PUT"),
        ("probe", "an exempt rule frees the exact spelling only"),
        ("other", "the path is another"),
    )
    assert told.rule.hidden == ("rest",)
    assert "before rest, which would match too" in as_text(told).plain


@pytest.mark.parametrize(
    ("mode", "plan", "tenant", "route", "effective", "lowered"),
    [
        ("enforce", "enforce", "enforce", "enforce", "enforce", ()),
        ("enforce", "shadow", "enforce", "enforce", "shadow", ("plan",)),
        ("shadow", "enforce", "shadow", "enforce", "shadow", ("file", "tenant")),
        ("enforce", "shadow", "'off'", "shadow", "off", ("tenant",)),
        ("enforce", "enforce", "enforce", "shadow", "shadow", ("route",)),
    ],
)
def test_the_level_that_lowered_the_mode(
    mode: str, plan: str, tenant: str, route: str, effective: str, lowered: tuple[str, ...]
) -> None:
    told = explained(
        f"""
version: 1
mode: {mode}
plans: {{default: {{rate: 10/s, mode: {plan}}}}}
tenants: {{acme: {{mode: {tenant}}}}}
routes: [{{name: all, match: {{path: "/**"}}, mode: {route}}}]
""",
        tenant="acme",
    )
    assert (told.mode, told.lowered_by) == (effective, lowered)


PRIORITIES = """
version: 1
plans: {default: {rate: 10/s}, low: {rate: 10/s, priority: low}}
tenants:
  own: {plan: low, priority: critical}
  over: {plan: low, overrides: {priority: critical, rate: 20/s}}
  plain: {plan: low}
  none: {plan: default}
routes: [{name: search, match: {path: /search}, priority: normal}]
"""


@pytest.mark.parametrize(
    ("tenant", "path", "priority", "source"),
    [
        ("own", "/search", "critical", "the tenant"),
        ("plain", "/search", "normal", "the route"),
        ("plain", "/", "low", "the plan"),
        ("over", "/", "critical", "the tenant"),
        ("none", "/", "normal", "nobody sets one"),
    ],
)
def test_where_the_priority_came_from(tenant: str, path: str, priority: str, source: str) -> None:
    told = explained(PRIORITIES, path, tenant=tenant)
    assert (told.priority, told.priority_from) == (priority, source)
    assert told.caller.overridden is (tenant == "over")


RAISING = PRIORITIES + "priority_header: {name: X-Class, raise_from: [10.2.0.0/16]}\n"


@pytest.mark.parametrize(
    ("headers", "peer", "priority", "source"),
    [
        ([], "192.0.2.1", "normal", "nobody sets one"),
        (
            [(b"x-class", b"low")],
            "192.0.2.1",
            "low",
            "asked for by the x-class header; its own is normal, nobody sets one",
        ),
        (
            [(b"x-class", b"normal"), (b"baggage", b"criticality=BULK")],
            "192.0.2.1",
            "low",
            "asked for by the baggage header; its own is normal, nobody sets one",
        ),
        ([(b"x-class", b"critical")], "192.0.2.1", "normal", "nobody sets one"),
        (
            [(b"x-class", b"critical")],
            "10.2.0.1",
            "critical",
            "asked for by the x-class header; its own is normal, nobody sets one",
        ),
        ([(b"x-class", b"critical"), (b"via", b"x")], "10.2.0.1", "normal", "nobody sets one"),
    ],
)
def test_what_a_header_makes_of_the_priority(
    headers: list[tuple[bytes, bytes]], peer: str, priority: str, source: str
) -> None:
    told = explained(RAISING, headers=headers, client=(peer, 1))
    assert (told.priority, told.priority_from) == (priority, source)
    in_vain = headers[:1] == [(b"x-class", b"critical")] and priority == "normal"
    words = "the x-class header asks for critical, which is above its own: only a peer in priority_header.raise_from"
    assert (words in as_text(told).plain) is in_vain


def test_the_deadline_and_the_headers_that_made_it() -> None:
    wait = [(b"x-request-timeout-ms", b"250"), (b"grpc-timeout", b"2S"), (b"accept", b"*/*")]
    told = explained(TINY, headers=wait)
    assert (told.deadline, told.deadline_from) == (0.25, "x-request-timeout-ms")
    assert "deadline  0.25 s after its arrival (x-request-timeout-ms)" in as_text(told).plain
    whole = {"type": "http", "method": "GET", "path": "/", "client": ("192.0.2.1", 1)}
    started = [*wait, (b"x-request-start", b"t=1781524799.900")]
    told = asyncio.run(explain(loads(TINY), {**whole, "headers": started}, at=NOON))
    assert (told.deadline, told.deadline_from) == (0.15, "x-request-timeout-ms and x-request-start")
    assert explained(TINY, headers=[(b"x-request-timeout-ms", b"0")]).deadline == 0
    assert "deadline" not in as_text(explained(TINY)).plain


def test_a_header_that_makes_no_sense_is_noted() -> None:
    told = explained(TINY, headers=[(b"x-request-timeout-ms", b"soon"), (b"baggage", b"criticality=mauve")])
    assert set(told.notes) == {
        "the x-request-timeout-ms header makes no sense and is ignored",
        "the baggage header makes no sense and is ignored",
    }


OVERLOAD = """
version: 1
plans: {default: {rate: 10/s}, bulk: {rate: 10/s, priority: low}}
tenants: {acme: {plan: bulk}}
priorities: {critical: {}, normal: {queue: {timeout: 250ms}}, low: {min_share: 2.5%}}
routes: [{name: feed, match: {path: /feed}, streaming: {max: 500, max_per_tenant: 10}}]
"""


def test_what_becomes_of_it_when_there_is_no_room() -> None:
    told = explained(OVERLOAD)
    assert told.overload is not None
    assert (told.overload.algorithm, told.overload.initial, told.overload.min, told.overload.max) == (
        "adaptive",
        20,
        2,
        1000,
    )
    assert (told.overload.waits, told.overload.min_share, told.overload.status) == (0.25, None, 503)
    text = as_text(told).plain
    assert "priority  normal (nobody sets one)\n            after critical, before low\n" in text
    assert "without room it waits 250 ms at most, then 503 with Retry-After" in text
    text = as_text(explained(OVERLOAD, tenant="acme")).plain
    assert "after critical and normal, but at least 2.5 % of what is admitted" in text
    assert "streams" not in text
    assert "streams: 500 open on this rule, 10 of one caller" in as_text(explained(OVERLOAD, "/feed")).plain


async def test_it_says_how_long_a_request_really_waits() -> None:
    """A place is never free; the limiter's own clock and timers say when it gives up."""
    raising = PriorityHeader("x-class", (ip_network("192.0.2.1"),))
    for extra in ("", "shedding: {loop_lag_target: 5ms}\n"):
        policy = replace(loads(OVERLOAD + extra), priority_header=raising)
        settings = settings_of(policy, priorities=True)
        assert settings is not None
        for klass, name in enumerate(("critical", "normal", "low")):
            headers = [(b"x-class", name.encode())]
            scope = {"type": "http", "method": "GET", "path": "/", "client": ("192.0.2.1", 1), "headers": headers}
            told = await explain(policy, scope)
            assert told.priority == name
            assert told.overload is not None
            assert waited(settings, klass) == pytest.approx(told.overload.waits, abs=0.011)  # a beat


def waited(settings: Settings, klass: int) -> float:
    """How long a lone claim of a class waits for a place that never comes, in seconds, by beats of 10 ms."""
    clock, told = ManualClock(), []
    timers = Beats()
    limiter = Limiter(replace(settings, algorithm="fixed", initial=1, least=1), clock=clock, timers=timers)
    running, waiting = claim(0), claim(klass)
    waiting.wake = told.append
    assert limiter.enter(running, clock()) == ADMITTED
    assert limiter.enter(waiting, clock()) == WAITS
    while not told:
        clock.advance(0.01)
        timers.beat()
    assert told == [QUEUE_TIMEOUT]
    return (clock() - waiting.since) / 1e9


class Beats:
    """An event loop of which nothing runs but the timer that is due."""

    def __init__(self) -> None:
        self.due: Callable[[], None] = self.beat

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        pass

    def call_later(self, delay: float, callback: Callable[..., None], *args: Any) -> None:
        self.due = callback

    def beat(self) -> None:
        self.due()


def claim(klass: int) -> Claim:
    made = Claim()
    made.klass, made.owner, made.group, made.deadline, made.state, made.since = klass, "acme", 0, 0, DONE, 0
    return made


@pytest.mark.parametrize(
    ("shedding", "words"),
    [
        ("{algorithm: fixed, limit: {initial: 40}}", "fixed: 40 at once"),
        ("{algorithm: aimd}", "aimd: as many at once as cause no drops and no lag (2 to 1000, from 20)"),
        ("{algorithm: gradient2, status: 529}", "then 529 with Retry-After"),
        ("{algorithm: 'off'}", "nothing is shed: shedding.algorithm is off"),
    ],
)
def test_the_law_is_named(shedding: str, words: str) -> None:
    assert words in as_text(explained(f"{TINY}shedding: {shedding}\n")).plain


def test_a_rule_that_only_watches_sheds_nobody() -> None:
    text = as_text(explained(TINY + "routes: [{name: all, match: {path: '/**'}, mode: shadow}]\n")).plain
    assert "counted, never refused: the mode of the file or the rule" in text
    assert "503" not in text


KEYS = """
version: 1
plans: {default: {rate: 10/s}}
identity:
  tenant:
    - api_key: {header: X-API-Key}
    - api_key: {header: Authorization}
    - state: who
tenants:
  acme:
    keys:
      - "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
      - {hash: "sha256:fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9", expires: 2020-01-01}
"""


@pytest.mark.parametrize(
    ("headers", "state", "sources"),
    [
        ([(b"x-api-key", b"foo")], {}, ("header x-api-key: a key of acme",)),
        (
            [(b"authorization", b"Bearer foo")],
            {},
            ("header x-api-key: no key", "header authorization: a key of acme"),
        ),
        (
            [(b"x-api-key", b"bar"), (b"authorization", b"baz")],
            {"who": "somebody"},
            (
                "header x-api-key: a key of acme that has expired",
                "header authorization: a key that is not listed",
                "state who: somebody",
            ),
        ),
        ([], {}, ("header x-api-key: no key", "header authorization: no key", "state who: nothing")),
    ],
)
def test_what_each_source_of_identity_said(
    headers: list[tuple[bytes, bytes]], state: dict[str, str], sources: tuple[str, ...]
) -> None:
    assert explained(KEYS, headers=headers, state=state).caller.sources == sources


WHOSE = """
version: 1
identity: {anonymous: %s}
plans: {default: {rate: 10/s}}
routes:
  - name: all
    match: {path: "/**"}
    limits:
      a: {rate: 10/s, per: global}
      b: {rate: 10/s, quota: 100/day, per: [client_ip, tenant]}
      c: {quota: 100/month, per: "state:team"}
      d: {rate: 1/s; 100/min, per: client_ip}
"""


def test_whose_bucket_each_limit_is() -> None:
    yaml = WHOSE % "per-ip"
    told = explained(yaml, client=("2001:db8::7", 1), state={"team": "red"})
    net = "address 2001:db8::/64"
    assert {limit.name: limit.whose for limit in told.limits} == {
        "rate": net,
        "a": "everybody",
        "b": net,
        "b-quota": net,
        "c": "state:team red",
        "d": net,
        "d-2": net,
    }
    assert told.caller.bucket == "2001:db8::/64"
    known = explained(yaml, tenant="acme")
    assert {limit.name: limit.whose for limit in known.limits}["b"] == "address 192.0.2.1 and tenant acme"
    shared = explained(WHOSE % "shared")
    assert {limit.name: limit.whose for limit in shared.limits}["rate"] == "all anonymous callers"


def test_limits_have_their_numbers() -> None:
    told = explained("version: 1\nplans: {default: {rate: {limit: 100/min, burst: 7}, quota: 50/day}}\n")
    rate, quota = told.limits
    assert (rate.amount, rate.period_ns, rate.burst, rate.cost, rate.remaining) == (100, 60 * 10**9, 7, 1, 6)
    assert (quota.amount, quota.period_ns, quota.burst, quota.remaining) == (50, 86_400 * 10**9, None, 49)


def test_a_tenant_that_nothing_can_serve_is_said() -> None:
    yaml = """
version: 1
identity: {tenant: [{api_key: {header: X-Key}}], anonymous: deny}
plans: {a: {rate: 1/s}, b: {rate: 1/s}}
tenants: {acme: {plan: a}, globex: {plan: b}}
"""
    told = explained(yaml, tenant="initech")
    assert told.outcome == "denied"
    assert "no plan for such" in as_text(told).plain


@pytest.mark.parametrize(
    ("peer", "header", "address", "source"),
    [
        ("10.0.0.1", None, "10.0.0.1", "the direct peer"),
        ("10.0.0.1", "203.0.113.7", "203.0.113.7", "the x-forwarded-for header of the trusted proxy 10.0.0.1"),
        ("10.0.0.1", "nonsense", "10.0.0.1", "the direct peer; its x-forwarded-for header names nobody"),
        (
            "192.0.2.9",
            "203.0.113.7",
            "192.0.2.9",
            "the direct peer; it is no trusted proxy, so its x-forwarded-for header is ignored",
        ),
    ],
)
def test_where_the_address_came_from(peer: str, header: str | None, address: str, source: str) -> None:
    yaml = TINY + "identity: {client_ip: {trusted_proxies: [10.0.0.0/8]}}\n"
    headers = [] if header is None else [(b"x-forwarded-for", header.encode())]
    told = explained(yaml, client=(peer, 1), headers=headers)
    assert (told.caller.address, told.caller.address_from) == (address, source)


def test_an_untrusted_proxy_is_noted() -> None:
    assert explained(TINY, headers=[(b"x-forwarded-for", b"1.2.3.4")]).notes
    assert not explained(TINY).notes


# The verb


@pytest.fixture
def config(tmp_path: Path) -> list[str]:
    (tmp_path / "seawall.yaml").write_bytes(REFERENCE.read_bytes())
    return ["explain", "--config", str(tmp_path / "seawall.yaml")]


def told_by(config: list[str], *arguments: str, stdin: str | None = None) -> dict[str, Any]:
    result = invoke(*config, "--format", "json", *arguments, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def test_a_path_alone_is_a_get(config: list[str]) -> None:
    assert told_by(config, "/login")["rule"]["name"] == "default"
    assert told_by(config, "post", "/login")["rule"]["name"] == "login"


def test_spellings_of_a_path_are_decoded(config: list[str]) -> None:
    assert told_by(config, "POST", "/log%69n?next=%2F")["rule"]["name"] == "login"
    assert told_by(config, "POST", "https://example.com/login?x=1")["rule"]["name"] == "login"
    assert told_by(config, "https://example.com")["path"] == "/"
    assert told_by(config, "/login%0A")["status"] == 400


def test_a_key_finds_its_tenant_and_is_not_shown(config: list[str]) -> None:
    for form in ("text", "json"):
        result = invoke(*config, "/v1/search", "--key", "a-key-nobody-listed", "--format", form)
        assert "a-key-nobody-listed" not in result.stdout + result.stderr
    assert told_by(config, "/", "--key", "foo")["caller"]["tenant"] == "acme"
    assert told_by(config, "/", "--key", "-", stdin="foo\n")["caller"]["tenant"] == "acme"
    assert told_by(config, "/", "-H", "x-api-key: foo")["caller"]["tenant"] == "acme"


def test_a_key_that_nothing_reads_is_said(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    result = invoke("explain", "/", "--key", "foo", "--config", str(tmp_path / "tiny.yaml"))
    assert result.exit_code == 0
    assert "reads no API keys" in result.stderr


def test_a_tenant_needs_no_proof(config: list[str]) -> None:
    caller = told_by(config, "/", "--tenant", "globex")["caller"]
    assert (caller["tenant"], caller["listed"], caller["plan"]) == ("globex", True, "free")
    caller = told_by(config, "/", "--tenant", "unheard-of")["caller"]
    assert (caller["listed"], caller["plan"]) == (False, "free")
    assert "which the file does not list" in invoke(*config, "/", "--tenant", "unheard-of").stdout


def test_an_address_is_the_peer_or_what_the_peer_says(config: list[str]) -> None:
    assert told_by(config, "/", "--ip", "203.0.113.7")["caller"]["address"] == "203.0.113.7"
    behind = told_by(config, "/", "--ip", "203.0.113.7", "--peer", "10.0.0.1")["caller"]
    assert behind["address"] == "203.0.113.7"
    assert told_by(config, "/", "--ip", "203.0.113.7", "--peer", "192.0.2.9")["caller"]["address"] == "192.0.2.9"
    hops = ("--peer", "10.0.0.1", "--forwarded-for", "1.2.3.4, 203.0.113.7, 10.0.0.2")
    assert told_by(config, "/", *hops)["caller"]["address"] == "203.0.113.7"


@pytest.mark.parametrize("address", ["203.0.113.7", "2001:db8::7"])
def test_the_forwarded_header_is_written_as_it_is_read(address: str, tmp_path: Path) -> None:
    path = tmp_path / "forwarded.yaml"
    path.write_text(TINY + "identity: {client_ip: {trusted_proxies: [10.0.0.0/8], header: forwarded}}\n")
    told = told_by(["explain", "--config", str(path)], "/", "--ip", address, "--peer", "10.0.0.1")
    assert told["caller"]["address"] == address


def test_a_websocket_is_refused_with_a_status(config: list[str]) -> None:
    told = told_by(config, "/v1/events/x", "--websocket", "--ip", "198.51.100.1")
    assert (told["websocket"], told["status"], told["body"]["status"]) == (True, 403, 403)
    assert told_by(config, "/v1/events/x", "--websocket")["rule"]["name"] == "events"
    assert "WebSocket /v1/events/x" in invoke(*config, "/v1/events/x", "--websocket").stdout


def test_a_page_is_not_taken_for_json(config: list[str]) -> None:
    told = told_by(config, "/", "--ip", "198.51.100.1", "-H", "Accept: text/html")
    assert told["body"].startswith("<!doctype html>")


def test_a_backend_of_later_needs_no_server(tmp_path: Path) -> None:
    path = tmp_path / "redis.yaml"
    path.write_text(TINY + "backend: {type: redis, url: 'redis://localhost:1'}\n")
    assert told_by(["explain", "--config", str(path)], "/")["outcome"] == "allowed"


def test_text_says_the_same_as_json(config: list[str]) -> None:
    text = invoke(*config, "POST", "/login", "--key", "foo").stdout
    told = told_by(config, "POST", "/login", "--key", "foo")
    for limit in told["limits"]:
        assert limit["allowance"] in text
        assert f"{limit['remaining']} left" in text
    assert f"RateLimit: {told['headers']['ratelimit']}" in text
    assert "concurrency  50 requests at once" in text
    assert "\x1b" not in text


def test_a_limit_that_can_never_be_paid_is_marked(tmp_path: Path) -> None:
    path = tmp_path / "seawall.yaml"
    path.write_text(TINY + "routes: [{name: all, match: {path: '/**'}, cost: 11}]\n")
    text = invoke("explain", "/", "--config", str(path)).stdout
    assert "costs 11: never fits" in text
    assert '"status":429' in text


def test_a_large_header_is_no_trouble(config: list[str]) -> None:
    for header in ("X-Api-Key", "X-Forwarded-For", "Accept", "X-Anything"):
        assert told_by(config, "/", "--peer", "10.0.0.1", "-H", f"{header}: {'9,' * 32_768}")["outcome"] == "allowed"


@pytest.mark.parametrize(
    "arguments",
    [
        ["GET", "/", "/"],
        ["login"],
        [""],
        ["GE T", "/"],
        ["G" * 100, "/"],
        ["http://[", ""],
        ["http://[/x"],
        ["/\udcff"],
        ["/", "--ip", "1.2.3"],
        ["/", "--ip", "nonsense" * 1_000],
        ["/", "--ip", ""],
        ["/", "--peer", "10.0.0.0/8"],
        ["/", "--peer", "10.0.0.1", "--ip", "x"],
        ["/", "--peer", "10.0.0.1", "--ip", "1.2.3.4", "--forwarded-for", "1.2.3.4"],
        ["/", "--forwarded-for", "1.2.3.4\r\nX-API-Key: foo"],
        ["/", "--header", "no colon"],
        ["/", "--header", ": no name"],
        ["/", "--header", "two words: x"],
        ["/", "--header", "X-A: a\nb"],
        ["/", "--header", "X-A: \u20ac"],
        ["/", "--key", "a\0b"],
        ["/", "--key", "foo", "--tenant", "acme"],
        ["POST", "/", "--websocket"],
        ["/", "--format", "yaml"],
    ],
)
def test_what_makes_no_sense_ends_with_2(arguments: list[str], config: list[str]) -> None:
    result = invoke(*config, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr
    assert len(result.stderr) < 500
