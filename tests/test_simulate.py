"""`seawall simulate`: it decides as Seawall does, reads what servers write, and says who, what, when and how often."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from harness import hash_of
from pages import DOCS, blocks, commands
from seawall import Seawall
from seawall.cli import simulate
from seawall.cli.simulate import chart
from seawall.config import load_mapping
from seawall.metrics import REJECTIONS, REQUESTS, SHADOW_REJECTIONS
from seawall.policy import Policy
from seawall.rate import SECOND
from seawall.replay import logs
from seawall.replay.engine import ALLOWED, EXEMPT, REFUSED, SHADOW, Replay, shown, wanted, without_unknown
from seawall.replay.fields import Field, Misnamed, Wanted, parse_field
from seawall.replay.instants import Instants, read_duration
from seawall.replay.logs import AccessLog, LogError, Request, merged
from seawall.replay.plot import Box, Words, bars, png, svg
from seawall.replay.simulation import BYS, Simulation
from seawall.replay.tally import ELSEWHERE, MOST_COLUMNS, Timeline, shape_of
from seawall.testing import ManualClock
from test_cli import environment, invoke

NOON = "2026-06-15T12:00:00Z"
START = int(datetime(2026, 6, 15, 12, tzinfo=UTC).timestamp()) * SECOND
SECRET = "a-key-that-nobody-may-see"


def request(at: float = 0.0, path: str = "/", **said: Any) -> Request:
    """A request ``at`` seconds after noon."""
    values = {"took": -1, "method": "GET", "ip": "192.0.2.1", "status": 200, "forwarded": None, "tenant": None}
    return Request(**{**values, "at": START + round(at * SECOND), "path": path, "key": None, "states": (), **said})


def policy(**sections: Any) -> Policy:
    return load_mapping({"version": 1, "plans": {"default": {"rate": "unlimited"}}, **sections})


# It decides as Seawall does


class Original:
    """The real middleware, with a clock that is turned to each request and an application that is as slow as the log
    says. No event loop: a request that is being served is a coroutine that stands still."""

    def __init__(self, policy: Policy) -> None:
        self.clock = ManualClock(NOON)
        self.shell = Seawall(self.serve, policy, clock=self.clock, registry=CollectorRegistry())
        self.ends: list[tuple[int, int, Any]] = []
        self.took = 0
        self.number = itertools.count()

    async def serve(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if self.took > 0:
            await _Standstill()
        await send({"type": "http.response.body", "body": b""})

    def turn(self, at: int) -> None:
        self.clock.advance_ns(at - self.clock.wall_ns())

    def counts(self) -> dict[tuple[str, tuple[str, ...]], int]:
        kept = (REQUESTS, REJECTIONS, SHADOW_REJECTIONS)
        cells = self.shell.gate.cells
        return {(spec.name, labels): cells.values[at] for spec, labels, at in cells.series() if spec in kept}

    def end(self, now: int) -> None:
        while self.ends and min(self.ends)[0] <= now:
            first = min(self.ends)
            self.ends.remove(first)
            self.turn(first[0])
            _finish(first[2])

    def decide(self, asked: Request) -> tuple[int, int, str]:
        self.end(asked.at)
        self.turn(asked.at)
        self.took = asked.took
        headers: list[tuple[bytes, bytes]] = []
        if asked.key is not None:
            headers.append((b"x-api-key", asked.key.encode()))
        if asked.forwarded is not None:
            headers.append((b"x-forwarded-for", asked.forwarded.encode()))
        if asked.method == "OPTIONS":
            headers += [(b"origin", b"https://example.com"), (b"access-control-request-method", b"GET")]
        state: dict[str, str] = {"region": asked.states[0]} if asked.states and asked.states[0] is not None else {}
        if asked.tenant is not None:
            state["tenant_id"] = asked.tenant
        scope = {
            "type": "http",
            "method": asked.method,
            "path": asked.path,
            "headers": headers,
            "client": (asked.ip, 1),
            "state": state,
            "root_path": "",
        }
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        before = self.counts()
        coroutine = self.shell(scope, receive, send)
        try:
            coroutine.send(None)
        except StopIteration:
            pass
        else:
            self.ends.append((asked.at + asked.took, next(self.number), coroutine))
        counted = [series for series, count in self.counts().items() if count > before.get(series, 0)]
        rejected = [(name, labels) for name, labels in counted if name != REQUESTS.name]
        if not rejected:
            allowed = any(name == REQUESTS.name and labels[0] == "allowed" for name, labels in counted)
            return ALLOWED if allowed else EXEMPT, 0, ""
        [(name, (reason, limit, _, _))] = rejected
        if name == SHADOW_REJECTIONS.name:
            return SHADOW, 0, limit or reason
        return REFUSED, sent[0]["status"], limit or reason

    def close(self) -> None:
        for _, _, coroutine in self.ends:
            _finish(coroutine)


class _Standstill:
    def __await__(self) -> Iterator[None]:
        yield


def _finish(coroutine: Any) -> None:
    with pytest.raises(StopIteration):
        coroutine.send(None)


MODES = st.sampled_from(["enforce", "enforce", "enforce", "shadow", "off"])
RATES = st.sampled_from(["unlimited", "1/second", "2/second", "3/minute", {"limit": "1/second", "burst": 3}])
QUOTAS = st.sampled_from([None, "2/day", "3/day", {"limit": "4/day", "zone": "Europe/Berlin"}])
PERS = st.sampled_from(["client_ip", "tenant", "global", ["client_ip", "tenant"], "state:region"])


@st.composite
def _plans(draw: st.DrawFn) -> dict[str, Any]:
    plan: dict[str, Any] = {"rate": draw(RATES), "mode": draw(MODES)}
    quota, concurrency = draw(QUOTAS), draw(st.sampled_from([None, 1, 2]))
    if quota is not None:
        plan["quota"] = quota
    if concurrency is not None:
        plan["concurrency"] = concurrency
    return plan


@st.composite
def _limits(draw: st.DrawFn, name: str) -> dict[str, Any]:
    limit: dict[str, Any] = {"rate": draw(RATES.filter(lambda rate: rate != "unlimited")), "per": draw(PERS)}
    quota = draw(QUOTAS)
    if quota is not None:
        limit["quota"] = quota
    return {name: limit}


@st.composite
def _policies(draw: st.DrawFn) -> Policy:
    overrides = draw(st.sampled_from([{}, {"overrides": {"rate": "1/second"}}]))
    return load_mapping(
        {
            "version": 1,
            "mode": draw(MODES),
            "identity": {
                "tenant": [{"api_key": {"header": "X-API-Key"}}, {"state": "tenant_id"}],
                "anonymous": draw(st.sampled_from(["per-ip", "shared", "deny"])),
                "client_ip": {"trusted_proxies": ["10.0.0.0/8"]},
            },
            "defaults": {"plan": "free", "anonymous_plan": "anonymous"},
            "plans": {name: draw(_plans()) for name in ("anonymous", "free", "pro")},
            "tenants": {
                "acme": {"plan": "pro", "mode": draw(MODES), "keys": [hash_of("foo")], **overrides},
                "globex": {"plan": "free", "keys": [{"hash": hash_of("bar"), "expires": "2026-06-16"}]},
            },
            "access": {"deny": ["198.51.100.0/24"], "exempt": ["10.1.0.0/16"]},
            "routes": [
                {"name": "probes", "match": {"path": "/healthz"}, "exempt": True},
                {"name": "login", "match": {"path": "/login", "methods": ["POST"]}, "limits": draw(_limits("login"))},
                {"name": "search", "match": {"path": "/v1/search"}, "cost": draw(st.integers(1, 2))},
                {
                    "name": "items",
                    "match": {"path": "/v1/items/{id}"},
                    "mode": draw(MODES),
                    "limits": draw(_limits("i")),
                },
                {
                    "name": "events",
                    "match": {"path": "/v1/events/**"},
                    "streaming": {"max": draw(st.integers(1, 3)), "max_per_tenant": 1},
                },
            ],
            "shedding": {"algorithm": "off"},
            "metrics": {"path": "/metrics"},
        }
    )


@st.composite
def _requests(draw: st.DrawFn) -> list[Request]:
    at = START
    asked = []
    for _ in range(draw(st.integers(1, 30))):
        pause = st.sampled_from([0, 1, 1_000_000, 100_000_000, 333_333_333, SECOND, 2 * SECOND, 43_200 * SECOND])
        at += draw(pause)
        who: dict[str, Any] = draw(
            st.sampled_from(
                [{}, {}, {"key": "foo"}, {"key": "bar"}, {"key": "no"}, {"tenant": "acme"}, {"tenant": "x"}]
            )
        )
        asked.append(
            Request(
                at=at,
                took=draw(st.sampled_from([-1, 0, 1, 500_000_000, SECOND, 3 * SECOND])),
                method=draw(st.sampled_from(["GET", "GET", "POST", "HEAD", "OPTIONS"])),
                path=draw(
                    st.sampled_from(
                        [
                            *("/", "/healthz", "/healthz/", "/login", "//Login/", "/v1/search", "/v1/items/1"),
                            *("/v1/items/2/", "/v1/events", "/v1/events/a/b", "/metrics", "/x\n", "/elsewhere"),
                        ]
                    )
                ),
                ip=draw(
                    st.sampled_from(
                        [
                            "192.0.2.1",
                            "192.0.2.2",
                            "2001:db8::1",
                            "2001:db8::2",
                            "198.51.100.7",
                            "10.0.0.1",
                            "10.1.0.9",
                            "",
                        ]
                    )
                ),
                status=200,
                forwarded=draw(st.sampled_from([None, None, "192.0.2.1", "203.0.113.5, 10.0.0.2", "nonsense"])),
                tenant=who.get("tenant"),
                key=who.get("key"),
                states=(draw(st.sampled_from([None, "eu", "us"])),),
            )
        )
    return asked


CAUSES = {"control character in the path": "denied", "access.deny": "denied", "nobody is identified": "unidentified"}


@given(policy=_policies(), requests=_requests())
def test_a_replay_decides_what_the_middleware_decides(policy: Policy, requests: list[Request]) -> None:
    original, replay = Original(policy), Replay(policy, ("region",))
    for asked in requests:
        outcome, _, _, status, cause = replay.decide(asked)
        answered = status if outcome == REFUSED else 0
        assert (outcome, answered, CAUSES.get(cause, cause)) == original.decide(asked), asked
    original.close()


@given(requests=_requests())
def test_shedding_is_no_part_of_a_replay(requests: list[Request]) -> None:
    tight = policy(shedding={"algorithm": "fixed", "limit": {"initial": 1, "min": 1, "max": 1}})
    replay = Replay(tight, ("region",))
    assert {replay.decide(asked)[0] for asked in requests if asked.path.isprintable()} <= {ALLOWED, EXEMPT}


def test_concurrency_counts_who_is_still_being_served() -> None:
    replay = Replay(policy(plans={"default": {"concurrency": 1}}))
    asked = [request(0, took=2 * SECOND), request(1), request(2, took=0), request(2)]
    assert [replay.decide(each)[0] for each in asked] == [ALLOWED, REFUSED, ALLOWED, ALLOWED]


def test_without_durations_concurrency_refuses_nobody() -> None:
    replay = Replay(policy(plans={"default": {"concurrency": 1}}))
    assert [replay.decide(request(0))[0] for _ in range(3)] == [ALLOWED] * 3


def test_who_is_not_limited_still_takes_a_place_among_the_streams() -> None:
    routes = [{"name": "events", "match": {"path": "/events"}, "streaming": {"max": 1}}]
    one = policy(plans={"default": {"rate": "1/second", "mode": "off"}}, routes=routes)
    asked = [request(at, "/events", took=2 * SECOND, ip=f"192.0.2.{at}") for at in range(4)]
    replay, original = Replay(one), Original(one)
    assert [replay.decide(each)[0] for each in asked] == [EXEMPT, REFUSED, EXEMPT, REFUSED]
    assert [original.decide(each)[0] for each in asked] == [EXEMPT, REFUSED, EXEMPT, REFUSED]
    original.close()


def test_a_key_is_known_by_itself_and_by_its_hash_until_it_expires() -> None:
    identity = {"tenant": [{"api_key": {"header": "X-API-Key"}}]}
    tenants = {"acme": {"keys": [hash_of("foo"), {"hash": hash_of("bar"), "expires": "2026-06-16"}]}}
    replay = Replay(policy(identity=identity, tenants=tenants))

    def caller(at: float, key: str) -> object:
        return replay.decide(request(at, key=key))[1]

    anonymous = bytes([192, 0, 2, 1])
    assert [caller(0, key) for key in ("foo", hash_of("foo"), "bar", hash_of("bar"))] == ["acme"] * 4
    nonsense = ("no", hash_of("no"), "sha256:" + "x" * 64, "sha256:")
    assert [caller(0, key) for key in nonsense] == [anonymous] * 4
    assert [caller(2 * 86_400, key) for key in ("foo", "bar", hash_of("bar"))] == ["acme", anonymous, anonymous]


def test_a_tenant_that_a_line_names_is_believed_whatever_its_key_is() -> None:
    identity = {"tenant": [{"api_key": {"header": "X-API-Key"}}]}
    replay = Replay(policy(identity=identity, tenants={"acme": {"keys": [hash_of("foo")]}}))
    callers = [replay.decide(request(tenant="globex", key=key))[1] for key in ("foo", hash_of("foo"))]
    assert callers == ["globex", "globex"]


def test_a_clock_that_goes_back_is_counted_and_not_followed() -> None:
    replay = Replay(policy(plans={"default": {"rate": "1/second"}}))
    outcomes = [replay.decide(request(at))[0] for at in (10, 5, 10.5, 11)]
    assert (outcomes, replay.late) == ([ALLOWED, REFUSED, REFUSED, ALLOWED], 1)


def test_a_shared_store_is_neither_asked_nor_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    backend = {
        "type": "redis",
        "url": "${REDIS_URL}",
        "secret": "of the tests",
        "on_failure": "deny",
        "max_keys": 1_000,
    }
    replay = Replay(policy(plans={"default": {"rate": "1/hour"}}, backend=backend))
    asked = [request(ip=f"192.0.{host >> 8}.{host & 255}") for host in range(2_000)]
    assert {replay.decide(each)[0] for each in asked} == {ALLOWED}
    assert {replay.decide(each)[0] for each in asked} == {REFUSED}


def test_limits_per_a_state_that_no_log_tells_are_left_out() -> None:
    limits = {"by-region": {"rate": "1/hour", "per": "state:region"}, "all": {"rate": "2/hour", "per": "global"}}
    routes = [{"name": "r", "match": {"path": "/**"}, "limits": limits}]
    kept, dropped = without_unknown(policy(routes=routes), ())
    assert (dropped, [limit.name for limit in kept.routes[0].limits]) == (["by-region"], ["all"])
    kept, dropped = without_unknown(policy(routes=routes), ("region",))
    assert (dropped, len(kept.routes[0].limits)) == ([], 2)


def test_callers_are_shown_as_people_know_them() -> None:
    narrow = policy(identity={"client_ip": {"ipv6_prefix": 128}})
    address = bytes.fromhex("20010db8000000000000000000000000")
    assert shown("acme", narrow) == ("acme", "tenant")
    assert shown(b"\xc0\x00\x02\x01", narrow) == ("192.0.2.1", "address")
    assert shown(address, policy()) == ("2001:db8::/64", "address")
    assert shown(address, narrow) == ("2001:db8::", "address")
    assert shown(b"anonymous", narrow) == ("all anonymous callers", "anonymous")
    assert shown(None, narrow) == ("nobody asked", "unasked")


# It reads what servers write

AT = int(datetime(2026, 3, 2, 9, 0, 1, tzinfo=UTC).timestamp()) * SECOND
MS = 1_000_000
PLAIN = '203.0.113.7 - - [02/Mar/2026:10:00:01 +0100] "GET /v1/search?q=1 HTTP/1.1" 200 612'
COMBINED = f'{PLAIN} "-" "curl/8.5"'
SEARCH = Request(AT, -1, "GET", "/v1/search", "203.0.113.7", 200, None, None, None, ())
CADDY = {
    "level": "info",
    "ts": AT / SECOND + 0.25,
    "logger": "http.log.access.log0",
    "msg": "handled request",
    "request": {
        "remote_ip": "10.0.0.9",
        "client_ip": "203.0.113.7",
        "method": "GET",
        "host": "example.com",
        "uri": "/v1/search?q=1",
        "headers": {"User-Agent": ["curl/8.5"], "X-Api-Key": [SECRET], "X-Tenant": ["acme"]},
    },
    "duration": 0.25,
    "status": 200,
}
ENVOY = {
    "start_time": "2026-03-02T09:00:01.000Z",
    "method": "GET",
    "path": "/v1/search?q=1",
    "response_code": 200,
    "duration": 12,
    "x_forwarded_for": "203.0.113.7",
    "downstream_remote_address": "10.0.0.9:55012",
    "authority": "example.com",
}
TRAEFIK = {
    "ClientHost": "203.0.113.7",
    "DownstreamStatus": 200,
    "Duration": 12_000_000,
    "RequestMethod": "GET",
    "RequestPath": "/v1/search?q=1",
    "StartUTC": "2026-03-02T09:00:01.000000000Z",
    "time": "2026-03-02T10:00:01+01:00",
    "request_X-Forwarded-For": "203.0.113.7",
}
NGINX = {
    "time_iso8601": "2026-03-02T10:00:01+01:00",
    "remote_addr": "203.0.113.7",
    "request_method": "GET",
    "request_uri": "/v1/search?q=1",
    "status": "200",
    "request_time": "0.250",
    "http_x_forwarded_for": "",
    "http_x_api_key": "-",
}
ALB = {
    "type": "h2",
    "time": "2026-03-02T09:00:01.012000Z",
    "client:port": "203.0.113.7:46532",
    "target_processing_time": "0.012",
    "elb_status_code": 200,
    "request_verb": "GET",
    "request_url": "https://api.example.com:443/v1/search?q=1",
    "request_creation_time": "2026-03-02T09:00:01.000000Z",
}
UVICORN = {
    "asctime": "2026-03-02 09:00:01,250",
    "levelname": "INFO",
    "client_addr": "203.0.113.7:50312",
    "request_line": "GET /v1/search?q=1 HTTP/1.1",
    "status_code": 200,
}
ECS = {
    "@timestamp": "2026-03-02T09:00:01.000Z",
    "source": {"ip": "203.0.113.7"},
    "url": {"path": "/v1/search", "query": "q=1"},
    "http": {"request": {"method": "GET"}, "response": {"status_code": 200}},
    "event": {"duration": 12_000_000},
}
GATEWAY = {
    "requestId": "c6af9ac6",
    "ip": "203.0.113.7",
    "requestTimeEpoch": AT // MS,
    "httpMethod": "get",
    "path": "/v1/search",
    "status": "200",
    "responseLatency": 12,
}
INNER = {"host": "web-1", "nginx": NGINX}


def wants(**more: Any) -> Wanted:
    return Wanted(key_headers=("x-api-key",), **more)


def read(tmp_path: Path, text: str | bytes, fields: Sequence[str] = (), **more: Any) -> list[Request]:
    file = tmp_path / "access.log"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with AccessLog(str(file), wants(fields=dict(map(parse_field, fields)), **more)) as log:
        return list(log.requests())


FORMATS: dict[str, tuple[str | Mapping[str, Any], Request]] = {
    "common": (PLAIN, SEARCH),
    "combined": (COMBINED, SEARCH),
    "nginx-main": (f'{COMBINED} "-"', SEARCH),
    "nginx-forwarded": (f'{COMBINED} "192.0.2.9, 10.0.0.1"', SEARCH._replace(forwarded="192.0.2.9, 10.0.0.1")),
    "nginx-request-time": (f"{COMBINED} 0.250", SEARCH._replace(at=AT - 250 * MS, took=250 * MS)),
    "nginx-named": (f'{COMBINED} rt=0.250 uct="0.000"', SEARCH._replace(at=AT - 250 * MS, took=250 * MS)),
    "traefik-common": (f'{COMBINED} 7 "web@docker" "http://10.0.0.2:80" 12ms', SEARCH._replace(took=12 * MS)),
    "user": (PLAIN.replace(" - - ", " - Frank Müller "), SEARCH),
    "caddy": (CADDY, SEARCH._replace(took=250 * MS, key=SECRET)),
    "envoy": (ENVOY, SEARCH._replace(took=12 * MS, ip="10.0.0.9:55012", forwarded="203.0.113.7")),
    "traefik": (TRAEFIK, SEARCH._replace(took=12 * MS, forwarded="203.0.113.7")),
    "nginx-json": (NGINX, SEARCH._replace(at=AT - 250 * MS, took=250 * MS)),
    "nginx-json-inside": (INNER, SEARCH._replace(at=AT - 250 * MS, took=250 * MS)),
    "alb": (ALB, SEARCH._replace(took=12 * MS, ip="203.0.113.7:46532")),
    "uvicorn": (UVICORN, SEARCH._replace(at=AT + 250 * MS, ip="203.0.113.7:50312")),
    "ecs": (ECS, SEARCH._replace(at=AT - 12 * MS, took=12 * MS)),
    "api-gateway": (GATEWAY, SEARCH._replace(at=AT - 12 * MS, took=12 * MS)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_found_out(name: str, tmp_path: Path) -> None:
    line, expected = FORMATS[name]
    assert read(tmp_path, (line if isinstance(line, str) else json.dumps(line)) + "\n") == [expected]


def test_carriage_returns_blank_lines_and_a_byte_order_mark_are_nothing(tmp_path: Path) -> None:
    text = f"\ufeff{COMBINED}\r\n\r\n\n  \n{COMBINED}"
    assert [(asked.path, asked.ip) for asked in read(tmp_path, text)] == [("/v1/search", "203.0.113.7")] * 2


@pytest.mark.parametrize(
    ("line", "fields", "changes"),
    [
        (
            f"{COMBINED} 12 acme",
            ["duration=10:ms", "tenant=11"],
            {"at": AT - 12 * MS, "took": 12 * MS, "tenant": "acme"},
        ),
        (f"{COMBINED} 1200 acme", ["start=4", "duration=10:us"], {"took": 1_200_000}),
        (f"{COMBINED} t=acme", ["tenant=t"], {"tenant": "acme"}),
        (f"{COMBINED} t=acme", ["tenant=12"], {}),
        (COMBINED, ["tenant=user_agent~^(\\w+)/"], {"tenant": "curl"}),
        (COMBINED, ["tenant=user_agent~^(x+)/"], {}),
        (COMBINED, ["path=request~ (/v1)", "method=request~^(\\w+)"], {"path": "/v1"}),
        (CADDY, ["tenant=request.headers.X-Tenant"], {"took": 250 * MS, "key": SECRET, "tenant": "acme"}),
        (CADDY, ["ip=request.remote_ip"], {"took": 250 * MS, "key": SECRET, "ip": "10.0.0.9"}),
        (CADDY, ["key=nothing.at.all", "time=ts"], {"took": 250 * MS}),
        (
            TRAEFIK,
            ["time=time", "duration=Duration:ns"],
            {"at": AT - 12 * MS, "took": 12 * MS, "forwarded": "203.0.113.7"},
        ),
        ({**ECS, "a.b": {"c.d": "acme"}}, ["tenant=a.b.c.d"], {"at": AT - 12 * MS, "took": 12 * MS}),
        ({**ECS, "a": {"b.c": "acme"}}, ["tenant=a.b.c"], {"at": AT - 12 * MS, "took": 12 * MS, "tenant": "acme"}),
        ({**ECS, "a.b": "acme"}, ["tenant=a.b"], {"at": AT - 12 * MS, "took": 12 * MS, "tenant": "acme"}),
        ({**ECS, "a": ["acme", "b"]}, ["tenant=a"], {"at": AT - 12 * MS, "took": 12 * MS, "tenant": "acme"}),
        (
            {**UVICORN, "r": "POST /x"},
            ["request=r"],
            {"at": AT + 250 * MS, "ip": "203.0.113.7:50312", "method": "POST", "path": "/x"},
        ),
        ({**ECS, "tenant_id": 4711}, [], {"at": AT - 12 * MS, "took": 12 * MS, "tenant": "4711"}),
    ],
)
def test_a_field_may_be_named(line: Any, fields: list[str], changes: dict[str, Any], tmp_path: Path) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    assert read(tmp_path, text, fields) == [SEARCH._replace(**changes)]


def test_states_and_the_headers_of_a_policy_are_looked_for() -> None:
    one = policy(
        identity={
            "tenant": [{"api_key": {"header": "Authorization"}}, {"state": "customer"}],
            "client_ip": {"trusted_hops": 1, "header": "forwarded"},
        },
        routes=[{"name": "r", "match": {"path": "/"}, "limits": {"l": {"rate": "1/s", "per": "state:region"}}}],
    )
    asked = wanted(one, {"state:zone": Field("z")}, policy())
    assert asked.key_headers == ("authorization",)
    assert asked.states == ("region", "zone")
    assert asked.roles[-2:] == ("state:region", "state:zone")
    assert [name for name, _ in asked.guesses("tenant")] == ["customer", "tenant_id", "tenant"]
    assert "request.headers.Forwarded" in [name for name, _ in asked.guesses("forwarded")]
    assert [name for name, _ in asked.guesses("key")][:3] == [
        "http_authorization",
        "authorization",
        "request.headers.Authorization",
    ]


def test_a_state_is_read_where_it_is(tmp_path: Path) -> None:
    [asked] = read(tmp_path, json.dumps({**ECS, "region": "eu"}), states=("region", "zone"))
    assert asked.states == ("eu", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time", "--field is ROLE=NAME, such as time=ts, not 'time'"),
        ("time=", "--field is ROLE=NAME, such as time=ts, not 'time='"),
        ("color=red", "--field color: a line says time, start, ip,"),
        ("state:=x", "--field state:: a line says time, start, ip,"),
        ("tenant=a~(", "--field tenant: '(' is no regular expression: "),
        ("tenant=a~b", "--field tenant: 'b' has no group, such as (.+), around what counts"),
    ],
)
def test_a_field_that_is_no_field_is_told_so(text: str, message: str) -> None:
    with pytest.raises(Misnamed) as caught:
        parse_field(text)
    assert str(caught.value).startswith(message)


def test_units_belong_to_durations_only() -> None:
    assert parse_field("duration=a:b:ms") == ("duration", Field("a:b", MS))
    assert parse_field("ip=client:ms") == ("ip", Field("client:ms"))
    assert str(parse_field("tenant=a~(b)")[1]) == "a~(b)"


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/a%20b?c=%20", "/a b"),
        ("/a\\x22b", '/a"b'),
        ('/a\\"b', '/a"b'),
        ("/a\\\\b", "/a\\b"),
        ("/\\xC3\\xA4", "/ä"),
        ("http://example.com/a?b", "/a"),
        ("http://example.com", "/"),
        ("*", "*"),
        ("/a b", "/a b"),
        ("//x//", "//x//"),
    ],
)
def test_a_path_is_what_a_server_makes_of_its_target(target: str, path: str, tmp_path: Path) -> None:
    [asked] = read(tmp_path, PLAIN.replace("/v1/search?q=1", target))
    assert asked.path == path


def test_a_request_line_may_have_no_version_and_any_method(tmp_path: Path) -> None:
    text = "\n".join(PLAIN.replace("GET /v1/search?q=1 HTTP/1.1", line) for line in ("GET /a", "purge /b HTTP/2.0"))
    assert [(asked.method, asked.path) for asked in read(tmp_path, text)] == [("GET", "/a"), ("PURGE", "/b")]


@pytest.mark.parametrize(
    ("value", "at", "whole"),
    [
        ("02/Mar/2026:10:00:01 +0100", AT, True),
        ("02/Mar/2026:10:00:01.250 +0100", AT + 250 * MS, False),
        ("2026-03-02T09:00:01Z", AT, True),
        ("2026-03-02T09:00:01.25Z", AT + 250 * MS, False),
        ("2026-03-02T04:30:01-04:30", AT, True),
        ("2026-03-02 09:00:01,250", AT + 250 * MS, False),
        ("2026/03/02 09:00:01", AT, True),
        ("2026-03-02T09:00:01.123456789123Z", AT + 123_456_789, False),
        ("2026-03-02 10:00:01 +0100", AT, True),
        (AT // SECOND, AT, True),
        (AT // SECOND + 0.5, AT + 500 * MS, False),
        (str(AT // SECOND), AT, True),
        (f"{AT // SECOND}.250", AT + 250 * MS, False),
        (AT // MS, AT, False),
        (str(AT // MS), AT, False),
        (AT // 1_000, AT, False),
        (AT, AT, False),
        (0, 0, True),
        ("0.5", 500 * MS, False),
    ],
)
def test_times_are_read_as_they_are_written(value: object, at: int, whole: bool) -> None:
    instants = Instants()
    assert instants.read(value) == (at, whole)
    assert instants.read(value) == (at, whole)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, "", "-", "yesterday", [], {}, -1, math.nan, math.inf, 1e300, 10**40, "9" * 19, "-5"),
        *("2026-02-30T09:00:01Z", "2026-03-02T25:00:01Z", "02/Foo/2026:10:00:01 +0100", "0000-00-00 00:00:00"),
        *("1969-12-31T23:59:59Z", "2300-01-01T00:00:00Z", "1970-01-01T00:00:00+02:00", "\uff12026-03-02T09:00:01Z"),
    ],
)
def test_nonsense_is_no_time(value: object) -> None:
    with pytest.raises(ValueError, match=r"no time|not between|out of range|must be in"):
        Instants().read(value)


def test_a_zone_that_is_missing_is_noticed() -> None:
    instants = Instants()
    instants.read("2026-03-02T09:00:01Z")
    assert not instants.zoneless
    instants.read("2026-03-02T09:00:01")
    assert instants.zoneless


def test_many_different_seconds_are_not_remembered_for_ever() -> None:
    instants = Instants()
    for second in range(10_000):
        text = f"{datetime.fromtimestamp(second, UTC):%Y-%m-%dT%H:%M:%SZ}"
        assert instants.read(text) == (second * SECOND, True)
    assert len(instants._seconds) <= 4_096


@pytest.mark.parametrize(
    ("value", "unit", "took"),
    [
        ("0.250", SECOND, 250 * MS),
        ("0.250", None, 250 * MS),
        (0.25, None, 250 * MS),
        (250, None, 250 * MS),
        ("250", None, 250 * MS),
        (250, 1_000, 250_000),
        ("12ms", SECOND, 12 * MS),
        ("1.5s", None, 1_500 * MS),
        ("7 us", None, 7_000),
        ("7µs", None, 7_000),
        ("7ns", None, 7),
        ("1e-3", SECOND, MS),
        (0, None, 0),
        ("-", None, -1),
        ("", None, -1),
        ("0.1, 0.2", SECOND, -1),
        (-1, SECOND, -1),
        ("-1", SECOND, -1),
        (None, SECOND, -1),
        (True, SECOND, -1),
        (math.nan, SECOND, -1),
        (math.inf, SECOND, -1),
        (10**20, SECOND, -1),
        (10**9, SECOND, -1),
        ("9" * 18, SECOND, -1),
        ("1e99", SECOND, -1),
    ],
)
def test_durations_are_read_as_they_are_written(value: object, unit: int | None, took: int) -> None:
    assert read_duration(value, unit) == took


def python(program: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment(), **streams)


# In the order of time


def line(at: float, path: str = "/", *, took: float | None = None, ip: str = "192.0.2.1", **more: Any) -> str:
    """A line of JSON that was written ``at`` seconds after noon, with a fraction."""
    moment = {"ts": f"{datetime.fromtimestamp(START // SECOND + at, UTC):%Y-%m-%dT%H:%M:%S.%fZ}"}
    lasted = {} if took is None else {"request_time": took}
    return json.dumps({**moment, "ip": ip, "method": "GET", "path": path, "status": 200, **lasted, **more})


def test_requests_are_timed_from_their_start(tmp_path: Path) -> None:
    text = "\n".join([line(1, "/a", took=0.1), line(2, "/b", took=1.5), line(3, "/c", took=3)])
    asked = read(tmp_path, text)
    assert [each.path for each in asked] == ["/c", "/b", "/a"]
    assert [(each.at - START) / SECOND for each in asked] == [0.0, 0.5, 0.9]


def test_the_lines_of_one_second_are_spread_over_it(tmp_path: Path) -> None:
    second = [f"2026-06-15T12:00:0{number}Z" for number in (1, 1, 2, 1, 1, 3)]
    text = "\n".join(json.dumps({"ts": at, "path": "/", "ip": "::1"}) for at in second)
    asked = read(tmp_path, f"{text}\n{line(1.3)}")
    assert [(each.at - START) / SECOND for each in asked] == [1.0, 1.25, 1.3, 1.5, 1.75, 2.0, 3.0]


def test_seconds_that_come_in_any_order_are_held_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_SECOND_AT_ONCE", 2)
    times = [f"2026-06-15T12:00:{number:02}Z" for number in (9, 9, 9, 8, 7, 6, 5, 4, 3)]
    asked = read(tmp_path, "\n".join(json.dumps({"ts": at, "path": "/", "ip": "::1"}) for at in times))
    assert [(each.at - START) / SECOND for each in asked] == [3, 4, 5, 6, 7, 8, 9, 9, 9.5]


def test_what_stands_too_far_from_its_place_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "WINDOW", 3)
    file = tmp_path / "access.log"
    file.write_text("\n".join(line(at) for at in (5, 4, 6, 7, 8, 9, 10, 11, 12, 1, 13)))
    with AccessLog(str(file), wants()) as log:
        simulation = Simulation(policy(), [log])
        simulation.run()
    assert (simulation.tally.requests, simulation.replay.late) == (11, 1)
    assert any(note.startswith("1 requests stand more than") for note in simulation.notes())


def test_files_that_follow_each_other_and_that_stand_beside_each_other_are_merged(tmp_path: Path) -> None:
    times = {"old": (0, 1, 2), "new": (7_200, 7_201), "other": (0.5, 1.5, 7_200.5, 90_000), "empty": ()}
    opened: list[AccessLog] = []
    for name, instants in times.items():
        (tmp_path / name).write_text("".join(line(at, f"/{name}") + "\n" for at in instants))
        opened.append(AccessLog(str(tmp_path / name), wants()))
    asked = list(merged(opened))
    for each in opened:
        each.close()
    assert [(each.at - START) / SECOND for each in asked] == sorted(at for each in times.values() for at in each)
    assert [each.path for each in asked[:4]] == ["/old", "/other", "/old", "/other"]


# What cannot be read


def told(*arguments: str | Path, stdin: bytes | None = None) -> tuple[int, str, str]:
    result = invoke("simulate", *arguments, stdin=stdin)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a policy of two a minute."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seawall.yaml").write_text("version: 1\nplans: {default: {rate: 2/minute}}\n")
    return tmp_path


GOOD = (line(1) + "\n").encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "seawall: no request in access.log\n"),
        (b"\n\n \n", "seawall: no request in access.log\n"),
        (b"hello\nworld\n", "  line 1: neither common nor combined format: hello\n"),
        (bytes(range(256)) * 40, "  line 1: neither common nor combined format: \\x00\\x01"),
        (b"\x00" * 1_000_000, "  line 1: longer than 262,144 bytes\n"),
        (b'{"a": 1}\n' * 5, "no field looks like the time or start; there are a; --field time=NAME says which it is"),
        (b'{"ts": 1}\n' * 5, "no field looks like the path or request; there are ts; --field path=NAME"),
        (b'{"ts": \n{"ts"\n{', "  line 1: not JSON (Expecting value, column 7)\n"),
        (b"{" * 100_000 + b"\n", "  line 1: not JSON"),
        (b'{"a":' * 50_000 + b"\n", "  line 1: JSON that is nested too deeply"),
        (b'[{"ts": 1, "path": "/"}]\n', "a JSON array? It has to be one object a line, as by jq -c '.[]'\n"),
        (b"[" + GOOD.strip() + b",\n" + GOOD, "1 of 2 lines"),
        (gzip.compress(GOOD, mtime=0)[:10], "access.log cannot be read: Compressed file ended before"),
        (b"\x1f\x8bnonsense", "access.log cannot be read: "),
        (b'"' * 300 + b"\n", '""...\n'),
    ],
)
def test_a_log_of_nothing_useful_ends_with_2(content: bytes, message: str, small: Path) -> None:
    (small / "access.log").write_bytes(content)
    code, out, err = told("--log", "access.log")
    if "1 of 2 lines" in message:  # half is not most
        assert (code, out[:13]) == (0, "access.log: 1")
        return
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_the_first_bad_lines_are_shown_with_their_numbers(small: Path) -> None:
    (small / "access.log").write_text(f"\none\n{COMBINED}\ntwo\n{'x' * 100}\nfour\n")
    code, _, err = told("--log", "access.log")
    assert (code, err.splitlines()) == (
        2,
        [
            "seawall: access.log: 4 of 5 lines are no lines of an access log in common, combined or JSON format",
            "  line 2: neither common nor combined format: one",
            "  line 4: neither common nor combined format: two",
            f"  line 5: neither common nor combined format: {'x' * 80}...",
        ],
    )


ANYTHING = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    st.sampled_from(
        ["GET", "/v1/items/1", NOON, "192.0.2.1", "::1", 200, "-", "http://[/", "\ud800", "GET / HTTP/1.1"]
    ),
    st.lists(st.text(max_size=3), max_size=2),
)
NAMES = ("ts", "start_time", "method", "path", "request", "ip", "status", "duration", "tenant", "xff", "request.uri")
OBJECTS = st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, ANYTHING)).map(json.dumps)
PARTS = ("192.0.2.1", " ", " - ", "[", "]", '"', "\\", f"[{NOON}]", '"GET / HTTP/1.1"', " 200 5", "\t", "\x00", "é")
TEXTS = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)
USEFUL = st.sampled_from([line(0), line(1, took=0.5), COMBINED, PLAIN])


@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.lists(st.one_of(OBJECTS, TEXTS, USEFUL, USEFUL), max_size=12).map(lambda lines: "\n".join(lines).encode()),
    )
)
def test_no_content_of_a_log_is_a_traceback(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.log"
    one = load_mapping({"version": 1, "plans": {"default": {"rate": "1/hour", "concurrency": 1}}})
    for packed in (content, gzip.compress(content)[:-4]):
        file.write_bytes(packed)
        try:
            with AccessLog(str(file), wants()) as log:
                simulation = Simulation(one, [log], against=one)
                simulation.run()
        except LogError:
            continue
        simulation.document(10)
        simulation.csv("policy", 10).encode()
        for by in BYS:
            simulate.report(simulation, file, file, by, 10)
        assert simulation.tally.requests == simulation.logs[0].lines - simulation.logs[0].unreadable


def test_fewer_than_half_are_counted_and_said(small: Path) -> None:
    (small / "access.log").write_text(f"{COMBINED}\n{COMBINED}\nnonsense\n{PLAIN.replace('GET /v1', 'GE/T /v1')}\n")
    code, out, _ = told("--log", "access.log")
    assert code == 0
    assert out.startswith("access.log: 2 requests from ")
    examples = (
        "line 3: neither common nor combined format: nonsense; "
        f"line 4: no request: {PLAIN.replace('GET /v1', 'GE/T /v1')[:80]}..."
    )
    assert f"note  access.log: 2 of 4 lines are unreadable ({examples})\n" in out


def test_where_most_is_nonsense_the_rest_is_not_read(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "ENOUGH", 10)
    (small / "access.log").write_text("nonsense\n" * 1_000)
    _, _, err = told("--log", "access.log")
    assert "access.log: 11 of 11 lines are no lines" in err


def test_an_enormous_line_is_one_unreadable_line(small: Path) -> None:
    for huge in (b"x" * 3_000_000, b"x" * (logs.BLOCK + 1), b'{"a": "' + b"x" * 800_000 + b'"}'):
        (small / "access.log").write_bytes(GOOD + huge + b"\n" + GOOD + GOOD)
        with AccessLog("access.log", wants()) as log:
            assert len(list(log.requests())) == 3
        assert (log.lines, log.unreadable) == (4, 1)
        [(number, reason)] = log.examples
        assert number == 2
        assert reason in ("longer than 262,144 bytes", "no time", "not JSON (Expecting value, column 1)")


def test_compressed_logs_are_read_whatever_they_are_called(small: Path) -> None:
    packed = gzip.compress(GOOD * 50_000) + gzip.compress(GOOD)
    (small / "access.log").write_bytes(packed)
    assert told("--log", "access.log")[1].startswith("access.log: 50,001 requests from ")


def test_a_compressed_log_that_is_cut_off_is_used_and_said(small: Path) -> None:
    content = "".join(line(at / 10, f"/{random.Random(at).random()}") + "\n" for at in range(20_000))
    packed = gzip.compress(content.encode())
    (small / "access.log.gz").write_bytes(packed[: len(packed) // 2])
    code, out, _ = told("--log", "access.log.gz")
    assert code == 0
    said = re.search(r"note  access\.log\.gz ends too early \((.+?)\); what was there is counted", out)
    assert said is not None
    assert "end-of-stream" in said[1]
    found = re.search(r": ([\d,]+) requests", out)
    assert found is not None
    assert 5_000 < int(found[1].replace(",", "")) < 15_000


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", "seawall: . cannot be read: Is a directory\n"),
        ("no.log", "seawall: no.log cannot be read: No such file or directory\n"),
        ("a\0b", "seawall: a\\x00b cannot be read: embedded null byte\n"),
    ],
)
def test_a_log_that_is_no_file_ends_with_2(path: str, message: str, small: Path) -> None:
    assert told("--log", path) == (2, "", message)


def test_stdin_is_read_also_compressed_and_left_open(small: Path) -> None:
    for content in (GOOD, gzip.compress(GOOD)):
        (small / "input").write_bytes(content)
        with (small / "input").open("rb") as file:
            command = "import sys; from seawall.cli import main; sys.argv = ['seawall', 'simulate', '--log', '-']\n"
            program = f"{command}try: main()\nfinally: sys.stdin.buffer.seek(0)"
            done = python(program, stdin=file)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("stdin: 1 request from ")


def test_stdin_that_is_closed_ends_with_2(small: Path) -> None:
    program = "import sys; sys.stdin = None; sys.argv = ['seawall', 'simulate', '--log', '-']\n"
    done = python(f"{program}from seawall.cli import main\nmain()")
    assert (done.returncode, done.stderr) == (2, "seawall: stdin cannot be read: it is closed\n")


def test_a_key_is_never_shown(small: Path) -> None:
    """Neither of a known nor of an unknown caller, nor of a line that cannot be read."""
    tenants = {"acme": {"keys": [hash_of(SECRET)]}}
    settings = {
        "version": 1,
        "identity": {"tenant": [{"api_key": {"header": "X-API-Key"}}]},
        "plans": {"default": {"rate": "1/minute"}},
        "tenants": tenants,
    }
    (small / "seawall.yaml").write_text(json.dumps(settings))
    lines = [json.dumps({**CADDY, "ts": AT / SECOND + at}) for at in range(5)]
    other = json.loads(lines[0])
    other["request"]["headers"]["X-Api-Key"] = [SECRET + "2"]
    broken = [line[:-1] for line in lines[:3]]
    (small / "a.log").write_text("\n".join([*lines, *([json.dumps(other)] * 3), *broken]))
    (small / "b.log").write_text("\n".join([f'{COMBINED} "{SECRET}"'] * 5 + [f"{SECRET} {COMBINED[:60]}"] * 4))
    (small / "c.log").write_text("\n".join([f"{SECRET} nonsense"] * 4 + [f'{COMBINED} "{SECRET}"']))
    for log, more in (("a.log", ()), ("b.log", ("--field", "key=10")), ("c.log", ("--field", "key=10"))):
        for form in ("text", "json", "csv"):
            code, out, err = told("--log", log, "--format", form, "--by", "tenant", *more, "--plot", "p.svg")
            assert SECRET not in out + err
            assert code == (2 if log == "c.log" else 0)
            assert ("acme" in out) == (code == 0)
    assert SECRET not in (small / "p.svg").read_text()


# What it says


FILE = """\
version: 1
identity:
  tenant:
    - api_key: {header: X-API-Key}
    - state: tenant_id
  anonymous: per-ip
defaults: {plan: free, anonymous_plan: anonymous}
plans:
  anonymous: {rate: 3/minute}
  free: {rate: 5/minute, quota: 8/day, concurrency: 2}
tenants:
  acme: {plan: free}
  globex: {plan: free, mode: shadow}
access:
  deny: [198.51.100.0/24]
routes:
  - name: probes
    match: {path: /healthz}
    exempt: true
  - name: login
    match: {path: /login, methods: [POST]}
    limits:
      login-ip: {rate: 1/minute, per: client_ip}
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A policy and an hour of a log of which every number can be counted by hand."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seawall.yaml").write_text(FILE)
    lines = [line(at, f"/v1/items/{at}", took=0.5, tenant_id="acme") for at in range(7)]  # 2 by rate
    lines += [line(20 + at, "/v1/search", took=0.5, tenant_id="globex") for at in range(6)]  # 1 by rate, in shadow mode
    lines += [line(30 + at / 100, "/login", method="POST", ip="203.0.113.9") for at in range(3)]  # 2 by login-ip
    lines += [line(40, "/healthz", took=0.5), line(41, "/x", ip="198.51.100.7"), line(42, "/x\x01", ip="192.0.2.5")]
    lines += [line(3_000, "/v1/slow", took=9.5, tenant_id="acme") for _ in range(3)]  # 1 by concurrency
    lines += [line(3_600 + at, "/old", status=429, ip="2001:db8::1") for at in range(2)]
    (tmp_path / "access.log").write_text("".join(f"{each}\n" for each in lines))
    return tmp_path


def test_the_report_says_who_by_what_where_and_when(shop: Path) -> None:
    assert told("--log", "access.log") == (
        0,
        """\
access.log: 24 requests from 2026-06-15 11:59:59Z to 2026-06-15 13:00:01Z
seawall.yaml refuses 7 of them (29.2 %): 1 with 400, 1 with 403, 5 with 429
and would refuse 1 more (4.2 %) but for its shadow mode
1 is exempt
2 were answered 429 at the time

limit                          refused  shadow  of   share  first                 last
rate (plan free)                     2       1  16  18.8 %  2026-06-15 12:00:04Z  2026-06-15 12:00:24Z
login-ip                             2       0   3  66.7 %  2026-06-15 12:00:30Z  2026-06-15 12:00:30Z
access.deny                          1       0  24   4.2 %  2026-06-15 12:00:41Z  2026-06-15 12:00:41Z
control character in the path        1       0  24   4.2 %  2026-06-15 12:00:42Z  2026-06-15 12:00:42Z
concurrency (plan free)              1       0  16   6.2 %  2026-06-15 12:49:50Z  2026-06-15 12:49:50Z
quota (plan free)                    0       0  16   0.0 %
rate (plan anonymous)                0       0   5   0.0 %

caller        refused  shadow  of    share  by                                             on
acme                3       0  10   30.0 %  rate (plan free) 2, concurrency (plan free) 1  /v1/items/{} 2, /v1/slow 1
203.0.113.9         2       0   3   66.7 %  login-ip                                       /login
198.51.100.7        1       0   1  100.0 %  access.deny                                    /x
nobody asked        1       0   1  100.0 %  control character in the path                  /x\\x01
globex              0       1   6   16.7 %  rate (plan free)                               /v1/search

note  overload, deadlines and priorities are no part of this: a log does not tell what the service could do
""",
        "",
    )


def test_one_table_is_shown_alone(shop: Path) -> None:
    by_route = told("--log", "access.log", "--by", "route")[1].split("\n\n")[1]
    assert by_route.splitlines() == [
        "rule             refused  shadow  of    share  by",
        "default                3       1  18   22.2 %  rate (plan free) 3, concurrency (plan free) 1",
        "login                  2       0   3   66.7 %  login-ip",
        "before any rule        2       0   2  100.0 %  access.deny 1, control character in the path 1",
    ]
    by_hour = told("--log", "access.log", "--by", "hour")[1].split("\n\n")[1]
    assert [line.split()[:6] for line in by_hour.splitlines()[1:]] == [
        ["2026-06-15", "11:00:00Z", "0", "0", "1", "0.0"],
        ["2026-06-15", "12:00:00Z", "7", "1", "21", "38.1"],
        ["2026-06-15", "13:00:00Z", "0", "0", "2", "0.0"],
    ]
    assert "login-ip 2, 3 more" in by_hour
    by_caller = told("--log", "access.log", "--by", "tenant", "--top", "2")[1].split("\n\n")[1]
    assert [line.split()[0] for line in by_caller.splitlines()] == ["caller", "acme", "203.0.113.9"]


def test_json_has_everything(shop: Path) -> None:
    code, out, err = told("--log", "access.log", "--format", "json")
    found = json.loads(out)
    assert (code, err) == (0, f"note: {found['notes'][0]}\n")
    assert found["requests"] == 24
    assert (found["from"], found["to"]) == ("2026-06-15T11:59:59Z", "2026-06-15T13:00:01Z")
    assert (found["refused"], found["shadow"], found["exempt"]) == (7, 1, 1)
    assert found["refused_by_status"] == {"400": 1, "403": 1, "429": 5}
    assert found["refused_at_the_time"] == 2
    assert found["limits"][0] == {
        "name": "rate (plan free)",
        "kind": "limit",
        "requests": 16,
        "refused": 2,
        "shadow": 1,
        "share": 0.1875,
        "first": "2026-06-15T12:00:04Z",
        "last": "2026-06-15T12:00:24Z",
        "by": {"rate (plan free)": 3},
        "on": {"/v1/items/{}": 2, "/v1/search": 1},
    }
    assert [(row["name"], row["kind"]) for row in found["callers"]] == [
        ("acme", "tenant"),
        ("203.0.113.9", "address"),
        ("198.51.100.7", "address"),
        ("nobody asked", "unasked"),
        ("globex", "tenant"),
    ]
    assert [row["name"] for row in found["hours"]] == [f"2026-06-15T{hour}:00:00Z" for hour in (11, 12, 13)]
    assert found["hours"][0]["first"] is None
    assert found["logs"] == [
        {
            "name": "access.log",
            "format": "JSON",
            "fields": {
                "time": "ts",
                "ip": "ip",
                "method": "method",
                "path": "path",
                "status": "status",
                "duration": "request_time",
                "tenant": "tenant_id",
            },
            "lines": 24,
            "unreadable": 0,
        }
    ]


def test_csv_is_one_table_and_no_formula(shop: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(told("--log", "access.log", "--format", "csv")[1])))
    assert [row["name"] for row in rows][:2] == ["rate (plan free)", "login-ip"]
    assert (rows[0]["refused"], rows[0]["share"], rows[0]["on"]) == ("2", "0.1875", "/v1/items/{} 2; /v1/search 1")
    assert (rows[-1]["first"], rows[-1]["by"]) == ("", "")
    (shop / "access.log").write_text("".join(line(at, tenant_id="=cmd()") + "\n" for at in range(9)))
    out = told("--log", "access.log", "--format", "csv", "--by", "tenant", "--output", "out.csv")[1]
    [row] = csv.DictReader(io.StringIO((shop / "out.csv").read_text()))
    assert (out, row["name"], row["refused"]) == ("", "'=cmd()", "4")
    (shop / "access.log").write_text(line(0))
    assert told("--log", "access.log", "--format", "csv", "--by", "tenant")[1] == "name\n"


def test_an_output_file_has_what_the_terminal_would_show(shop: Path) -> None:
    shown = told("--log", "access.log")[1]
    assert told("--log", "access.log", "-o", "report.txt") == (0, "", "")
    assert (shop / "report.txt").read_text() == shown
    assert told("--log", "access.log", "-o", "report.json", "--format", "json")[0] == 0
    assert json.loads((shop / "report.json").read_text())["refused"] == 7
    code, _, err = told("--log", "access.log", "-o", "no/where.txt")
    assert (code, err) == (2, "seawall: no/where.txt cannot be written: No such file or directory\n")


def test_what_is_before_the_window_is_used_and_not_counted(shop: Path) -> None:
    since = told("--log", "access.log", "--since", "2026-06-15T12:00:04", "--format", "json")[1]
    found = json.loads(since)
    assert found["from"] == "2026-06-15T12:00:04Z"
    assert [(row["name"], row["requests"], row["refused"]) for row in found["callers"]][:1] == [("acme", 5, 3)]
    until = told("--log", "access.log", "--until", "2026-06-15T14:00:30+02:00", "--format", "json")[1]
    assert json.loads(until)["to"] == "2026-06-15T12:00:24Z"
    assert json.loads(told("--log", "access.log", "--since", "2026-06-15", "--format", "json")[1])["requests"] == 24


def test_one_tenant_can_be_looked_at(shop: Path) -> None:
    found = json.loads(told("--log", "access.log", "--tenant", "acme", "--format", "json")[1])
    assert (found["requests"], found["refused"], [row["name"] for row in found["callers"]]) == (10, 3, ["acme"])


def test_nothing_within_the_restrictions_says_so(shop: Path) -> None:
    code, _, err = told("--log", "access.log", "--tenant", "no", "--until", "2027-01-01")
    assert (code, err) == (2, "seawall: no request in access.log with --until 2027-01-01, --tenant no\n")


OLD = FILE.replace("free: {rate: 5/minute", "free: {rate: 6/minute").replace("{rate: 1/minute", "{rate: 2/minute")


def test_a_comparison_says_for_whom_what_changes(shop: Path) -> None:
    (shop / "old.yaml").write_text(OLD.replace("  anonymous: {rate: 3/minute}", "  anonymous: {rate: 1/minute}"))
    _, out, _ = told("--log", "access.log", "--compare", "old.yaml")
    assert "against old.yaml, which refuses 7: 1 newly refused, 1 no longer refused\n" in out
    table = out.split("\n\n")[3].splitlines()
    assert table == [
        "caller         newly refused  no longer  by                by before",
        "2001:db8::/64              0          1                    rate (plan anonymous)",
        "acme                       1          0  rate (plan free)",
    ]


def test_a_comparison_with_itself_changes_nothing(shop: Path) -> None:
    for form in ("text", "json", "csv"):
        _, out, _ = told("--log", "access.log", "--compare", "seawall.yaml", "--format", form)
        if form == "json":
            expected = {"refused_before": 7, "newly_refused": 0, "no_longer_refused": 0, "changes": []}
            assert json.loads(out)["comparison"] == expected
        elif form == "csv":
            assert out == "name\n"
        else:
            assert "against seawall.yaml, which refuses 7: 0 newly refused, 0 no longer refused\n" in out
            assert "by before" not in out


def test_who_is_exempt_now_is_known_by_the_policy_before(small: Path) -> None:
    route = "routes: [{name: all, match: {path: /**}, exempt: true}]\n"
    (small / "new.yaml").write_text((small / "seawall.yaml").read_text() + route)
    (small / "access.log").write_text("".join(line(at) + "\n" for at in range(5)))
    out = told("new.yaml", "--log", "access.log", "--compare", "seawall.yaml", "--format", "csv")[1]
    assert out.splitlines()[1] == "192.0.2.1,address,0,3,,rate (plan default) 3"


def test_a_comparison_looks_where_the_count_looks(shop: Path) -> None:
    (shop / "old.yaml").write_text(OLD)
    out = told("--log", "access.log", "--compare", "old.yaml", "--tenant", "acme", "--format", "csv")[1]
    assert (
        out == "name,kind,newly_refused,no_longer_refused,newly_by,no_longer_by\nacme,tenant,1,0,rate (plan free) 1,\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "seawall: which log? --log access.log\n"),
        (["--log", "access.log", "--plot", "a.pdf"], "seawall: --plot is a file that ends in .svg or .png\n"),
        (["--log", "access.log", "--since", "monday"], "seawall: --since is a date or a time, such as 2026-03-01 or"),
        (["--log", "access.log", "--field", "x"], "seawall: --field is ROLE=NAME, such as time=ts, not 'x'\n"),
        (["--log", "access.log", "--top", "0"], "Invalid value for '--top'"),
        (["--log", "access.log", "--by", "day"], "Invalid value for '--by'"),
        (["no.yaml", "--log", "access.log"], "no.yaml: error[E000]: "),
        (["--log", "access.log", "--compare", "no.yaml"], "no.yaml: error[E000]: "),
        (["--log", "access.log", "--plot", "no/where.svg"], "seawall: no/where.svg cannot be written: "),
        (["--log", "access.log", "--plot", "no/where.png"], "seawall: no/where.png cannot be written: "),
    ],
)
def test_what_cannot_be_done_ends_with_2(arguments: list[str], message: str, shop: Path) -> None:
    code, out, err = told(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_bad_policy_is_shown_with_its_mistakes_and_ends_with_1(shop: Path) -> None:
    (shop / "bad.yaml").write_text("version: 1\nplans: {default: {rate: 1/fortnight}}\n")
    for arguments in (["bad.yaml", "--log", "access.log"], ["--log", "access.log", "--compare", "bad.yaml"]):
        code, out, err = told(*arguments)
        assert (code, out) == (1, "")
        assert "bad.yaml:2:25: error[E020]: " in err


@pytest.mark.parametrize(
    ("yaml", "text", "note"),
    [
        (FILE, line(0), "no log names a tenant, so all callers are anonymous: --field tenant=NAME or --field key=NAME"),
        (
            FILE,
            line(0),
            "no log says how long requests took, so concurrency and streams refuse nobody: --field duration=NAME",
        ),
        (
            FILE,
            json.dumps({"ts": NOON, "path": "/"}),
            "no log names an address, so anonymous callers are all one: --field ip=NAME",
        ),
        (FILE, json.dumps({"ts": NOON[:-1], "path": "/"}), "access.log: times without a zone are taken as UTC"),
        (
            FILE.replace("per: client_ip", "per: state:region"),
            line(0),
            "left out, for no log tells the state that they are per: login-ip",
        ),
        (
            FILE,
            line(0),
            "access.log: none of the first lines has the field 'kex' of --field key",
        ),
        (
            "version: 1\nplans: {default: {rate: 1/minute}}",
            line(0),
            "this policy reads no API keys (identity.tenant), so those of the log change nothing",
        ),
    ],
)
def test_what_a_reader_should_know_is_noted(yaml: str, text: str, note: str, shop: Path) -> None:
    (shop / "seawall.yaml").write_text(yaml)
    (shop / "access.log").write_text(text)
    more = ["--field", "key=kex"] if "key" in note and "tenant=NAME" not in note else []
    assert f"note  {note}\n" in told("--log", "access.log", *more)[1]


def test_nothing_is_noted_where_there_is_nothing_to_note(small: Path) -> None:
    (small / "seawall.yaml").write_text("version: 1\nplans: {default: {rate: 2/minute}}\nshedding: {algorithm: off}\n")
    (small / "access.log").write_text(line(0))
    assert "note" not in told("--log", "access.log")[1]


def test_what_a_path_has_in_common_with_others() -> None:
    shapes = {
        "/": "/",
        "/v1/items/4711": "/v1/items/{}",
        "/v1/items/4711/": "/v1/items/{}/",
        "/a/0a1b2c3d-0000-4000-8000-000000000000/b": "/a/{}/b",
        "/feedface/decade": "/feedface/decade",
        "/deadbeef0": "/{}",
        "/users/cus_NffrFeUfNV2Hib": "/users/{}",
        f"/token/{'x' * 40}": "/token/{}",
        "": "",
    }
    assert {path: shape_of(path) for path in shapes} == shapes


def test_paths_of_no_rule_are_told_apart_up_to_a_number(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seawall.replay.tally.MOST_SHAPES", 2)
    (small / "access.log").write_text("".join(line(at / 10, f"/{'abcdefg'[at]}") + "\n" for at in range(7)))
    [row] = json.loads(told("--log", "access.log", "--format", "json")[1])["callers"]
    assert row["on"] == {ELSEWHERE: 3, "/c": 1, "/d": 1}


# Over time


def timeline(*events: tuple[int, str]) -> Timeline:
    made = Timeline()
    for second, series in events:
        made.add(second, series)
    return made


@given(
    st.lists(st.tuples(st.integers(0, 10**8), st.sampled_from(["", "rate", "login"])), min_size=1), st.integers(1, 50)
)
def test_columns_are_few_and_without_gaps_and_lose_nothing(events: list[tuple[int, str]], most: int) -> None:
    made = timeline(*events)
    width, columns = made.columns(most)
    assert len(columns) <= most
    begins = [begin for begin, _ in columns]
    assert begins == [begins[0] + at * width for at in range(len(begins))]
    for begin, counts in columns:
        for series in ("", "rate", "login"):
            expected = sum(1 for second, each in events if each == series and begin <= second < begin + width)
            assert counts.get(series, 0) == expected


def test_columns_become_wider_as_they_become_too_many() -> None:
    made = timeline(*((second, "") for second in range(10 * MOST_COLUMNS)))
    assert made.width == 10
    assert sum(counts[""] for _, counts in made.columns(100)[1]) == 10 * MOST_COLUMNS


def test_nothing_has_no_columns() -> None:
    assert timeline().columns(10) == (1, [])


def test_a_chart_has_a_line_for_each_limit() -> None:
    made = timeline(*[(0, "")] * 7, (0, "rate (plan free)"), (60, ""), *[(240, "rate (plan free)")] * 4, (240, "login"))
    assert chart(made, 50).plain.splitlines() == [
        "",
        "requests          █ ▁     ▅  at most 8",
        "rate (plan free)  ▂       █  at most 4",
        "login                     █  at most 1",
        "                  1970-01-01 00:00:00Z, 30 seconds a column",
    ]


def test_a_chart_is_as_wide_as_it_may_be_and_says_how_wide_a_column_is() -> None:
    for seconds, said in ((19, "2 seconds"), (86_400 * 30, "7 days"), (3_600 * 12, "2 hours"), (9, "1 second")):
        text = chart(timeline((0, ""), (seconds, "")), 20).plain
        assert text.endswith(f"{said} a column")
        assert len(text.splitlines()[1]) <= 10 + 10 + 12


# Pictures


def test_an_svg_stacks_what_was_refused_on_what_was_admitted() -> None:
    columns = [(0, {"": 3, "a<b": 1}), (60, {}), (120, {"a<b": 2, "other": 1})]
    drawing = bars(columns, 60)
    titled = {item.title: item for item in drawing if isinstance(item, Box) and item.title}
    assert list(titled) == [
        "1970-01-01 00:00:00Z: 3 admitted",
        "1970-01-01 00:00:00Z: 1 a<b",
        "1970-01-01 00:02:00Z: 2 a<b",
        "1970-01-01 00:02:00Z: 1 other",
    ]
    admitted, refused, *_ = titled.values()
    assert refused.y + refused.height == pytest.approx(admitted.y)
    assert admitted.height == pytest.approx(3 * refused.height)
    picture = ElementTree.fromstring(svg(drawing))
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"admitted", "a<b", "other", "0", "4", "01-01 00:00", "requests in 1 min, times in UTC"} <= set(texts)
    assert len(picture.findall("{http://www.w3.org/2000/svg}rect/{http://www.w3.org/2000/svg}title")) == 4


def test_many_limits_share_the_last_colour() -> None:
    drawing = bars([(0, {f"limit-with-a-long-name-{at}": 20 - at for at in range(9)})], 86_400)
    legend = [item.text for item in drawing if isinstance(item, Words) and not item.text[0].isdecimal()]
    assert legend == ["admitted", *(f"limit-with-a-long-name-{at}" for at in range(5)), "requests in 1 d, times in UTC"]
    assert "4 others" in [item.text for item in drawing if isinstance(item, Words)]
    assert len({item.y for item in drawing if isinstance(item, Words) and item.text.startswith("limit")}) == 2


@pytest.mark.parametrize(
    ("most", "top"), [(0, 4), (4, 4), (5, 8), (9, 12), (29, 40), (2_500, 2_800), (10**7, 12_000_000)]
)
def test_the_scale_has_quarters(most: int, top: int) -> None:
    labels = [item.text for item in bars([(0, {"": most})], 1) if isinstance(item, Words) and item.anchor == "end"]
    assert labels[:5] == [f"{top * part // 4:,}" for part in range(5)]
    assert labels[5] == "requests in 1 s, times in UTC"


def pixels(content: bytes) -> list[bytes]:
    """The rows of a PNG, after its checksums were checked."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (rest, list(chunks)) == ([8, 2, 0, 0, 0], [b"IHDR", b"IDAT", b"IEND"])
    raw = zlib.decompress(chunks[b"IDAT"])
    rows = [raw[at : at + 1 + 3 * width] for at in range(0, len(raw), 1 + 3 * width)]
    assert (len(rows), {row[0] for row in rows}) == (height, {0})
    return [row[1:] for row in rows]


def test_a_png_shows_the_same_boxes_and_letters() -> None:
    rows = pixels(png([Box(0, 0, 960, 360, "#ffffff"), Box(10, 20, 30, 5, "#c0392b"), Words(100, 100, "l")]))
    red, white, ink = bytes.fromhex("c0392b"), b"\xff\xff\xff", bytes.fromhex("333333")
    counted = {
        colour: sum(row[at : at + 3] == colour for row in rows for at in range(0, len(row), 3)) for colour in (red, ink)
    }
    assert counted[red] == 60 * 10
    assert [rows[y][60:63] for y in (39, 40, 49, 50)] == [white, red, red, white]
    # A stroke of seven dots, with feet to both sides and a serif: of four pixels each.
    assert counted[ink] == 10 * 4


def test_letters_that_a_png_does_not_have_are_boxes() -> None:
    paper = Box(0, 0, 960, 360, "#ffffff")
    assert png([paper, Words(100, 100, "é")]) == png([paper, Words(100, 100, "ü")])
    assert png([paper, Words(100, 100, "e")]) != png([paper, Words(100, 100, "c")])
    assert png([paper, Words(106, 100, "e", "end")]) == png([paper, Words(103, 100, "e", "middle")])


def test_a_plot_is_written_beside_the_report(shop: Path) -> None:
    for name in ("week.svg", "week.png"):
        code, out, _ = told("--log", "access.log", "--plot", name)
        assert (code, out[:23]) == (0, "access.log: 24 requests")
    ElementTree.fromstring((shop / "week.svg").read_text())
    assert len(pixels((shop / "week.png").read_bytes())) == 720


def test_the_picture_of_the_page_is_what_its_command_draws(small: Path) -> None:
    page = DOCS / "simulate.md"
    for block in blocks(page, "python", "yaml"):
        (small / str(block.file)).write_text(block.text)
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), {})
    [first] = [block for block in blocks(page, "console") if "--plot" in block.text]
    [command] = [each for each in commands(first) if each.line.startswith("seawall simulate new.yaml")]
    code, out, err = told(*command.line.split()[2:])
    assert (code, out, err) == (0, command.shown, "")
    assert (small / "week.svg").read_text() == (DOCS / "images" / "simulate.svg").read_text()


# On a terminal, and in time


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pty")
def test_a_terminal_sees_a_bar_and_a_chart(shop: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "seawall", "simulate", "--log", "access.log", "--log", "/dev/stdin"]
    settings = environment(TERM="xterm-256color", COLUMNS="100", PYTHONIOENCODING="utf-8")
    settings.pop("NO_COLOR", None)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, env=settings) as process:
        os.close(theirs)
        assert process.stdin is not None
        process.stdin.write((line(0) + "\n").encode())
        process.stdin.close()
        seen = b""
        while True:
            try:
                block = os.read(ours, 65_536)
            except OSError:  # Linux: nobody holds the other end any more
                break
            if not block:
                break
            seen += block
        assert process.wait(60) == 0
    os.close(ours)
    text = seen.decode()
    assert "replaying" in text
    assert "█" in text
    assert "a column" in text


def test_a_terminal_without_the_letters_gets_no_chart(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("NO_COLOR", "1")
    for encoding, charts in (("ascii", False), ("utf-8", True)):
        stream = Terminal(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        simulate.run(shop / "seawall.yaml", [str(shop / "access.log")], form="text", top=10)
        stream.flush()
        shown = stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
        assert ("a column" in shown) == charts
        assert "limit" in shown


def traffic(count: int) -> Iterator[str]:
    """A combined log of ``count`` lines: 40 requests a second of 1,000 addresses."""
    draw = random.Random(7)
    at = START / SECOND
    rest = '200 512 "-" "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/125.0.0.0"'
    for _ in range(count):
        at += draw.expovariate(40)
        moment = f"{datetime.fromtimestamp(at, UTC):%d/%b/%Y:%H:%M:%S +0000}"
        path = draw.choice(["/v1/search?q=x%20y", f"/v1/items/{draw.randrange(10**6)}", "/login", "/healthz"])
        yield f'203.0.{draw.randrange(4)}.{draw.randrange(250)} - - [{moment}] "GET {path} HTTP/1.1" {rest}\n'


@pytest.mark.slow
def test_a_hundred_thousand_lines_take_less_than_a_minute(shop: Path) -> None:
    """It is 2 to 5 s; a machine that is twenty times as busy may still run this."""
    with (shop / "access.log").open("w") as file:
        file.writelines(traffic(100_000))
    began = time.process_time()
    code, out, _ = told("--log", "access.log")
    assert time.process_time() - began < 60
    assert (code, out[:28]) == (0, "access.log: 100,000 requests")
