"""What is said at start-up and at run time: each thing once, and with what to do about it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from harness import call, config, hello, plan, statuses
from seawall import EXPOSE_HEADERS, QuotaMiddleware, RateLimitMiddleware, Seawall
from seawall.testing import ManualClock, drive, reset

CORS = (
    "CORSMiddleware is inside Seawall, so browsers cannot read a refusal: add it after Seawall (the last one added is "
    "the outermost), with expose_headers=seawall.EXPOSE_HEADERS"
)
TWICE = "Seawall is installed twice with one policy; the inner one does nothing"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    reset()
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)
    monkeypatch.setattr(sys, "argv", ["uvicorn", "app:app"])


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    def messages() -> list[str]:
        assert {record.name for record in caplog.records} <= {"seawall"}
        return [record.getMessage() for record in caplog.records]

    return messages


def test_a_plain_set_up_says_nothing(said: Any) -> None:
    app = Seawall(hello, default="100/minute")
    statuses(app, 3)
    assert said() == []


# CORS


def test_cors_inside_is_warned_about_once(said: Any) -> None:
    for _ in range(2):
        Seawall(CORSMiddleware(hello, allow_origins=["*"]), default="100/minute")
    assert said() == [CORS]


def test_cors_further_inside_is_found(said: Any) -> None:
    Seawall(GZipMiddleware(CORSMiddleware(hello)), default="100/minute")
    assert said() == [CORS]


@pytest.mark.parametrize("kind", [FastAPI, Starlette])
async def test_cors_added_before_seawall_is_inside(kind: Any, said: Any) -> None:
    app = kind()
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    app.add_middleware(Seawall, default="100/minute")
    await drive(app)
    assert said() == [CORS]


@pytest.mark.parametrize("kind", [FastAPI, Starlette])
async def test_cors_added_after_seawall_is_outside(kind: Any, said: Any) -> None:
    app = kind()
    app.add_middleware(Seawall, default="100/minute")
    app.add_middleware(CORSMiddleware, allow_origins=["*"], expose_headers=EXPOSE_HEADERS)
    await drive(app)
    assert said() == []


def test_cors_in_an_application_that_is_wrapped_whole_is_found(said: Any) -> None:
    app = Starlette(middleware=[Middleware(CORSMiddleware, allow_origins=["*"])])
    Seawall(app, default="100/minute")
    assert said() == [CORS]


# Twice


def test_twice_is_said_of_each_kind(said: Any) -> None:
    RateLimitMiddleware(RateLimitMiddleware(hello, limit="1/second"), limit="1/second")
    assert said() == ["RateLimitMiddleware is installed twice with one policy; the inner one does nothing"]


def test_two_policies_are_not_one_installed_twice(said: Any) -> None:
    Seawall(Seawall(hello, default="1/second"), default="2/second")
    QuotaMiddleware(RateLimitMiddleware(hello, config=plan(rate="1/second")), config=plan(rate="1/second"))
    assert said() == []


async def test_twice_is_said_of_an_application_that_is_wrapped_whole(said: Any) -> None:
    app = Starlette()
    app.add_middleware(Seawall, default="2/minute")
    shell = Seawall(app, default="2/minute")
    assert [(await drive(shell)).status for _ in range(3)] == [404, 404, 429]
    assert said() == [TWICE]


async def test_below_a_mount_the_same_policy_is_about_other_paths(said: Any) -> None:
    """Its rules name paths as the mounted application sees them, so both shells decide."""
    inner = Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok"))])
    inner.add_middleware(Seawall, default="2/minute")
    app = Starlette(routes=[Mount("/inner", inner)])
    app.add_middleware(Seawall, default="2/minute")
    assert [(await drive(app, "/inner/")).status for _ in range(3)] == [200, 200, 429]
    assert said() == []


# Proxies


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded"])
def test_an_untrusted_proxy_is_warned_about_once(header: str, said: Any) -> None:
    app = Seawall(hello, default="100/minute")
    call(app)
    for _ in range(3):
        call(app, headers={header: "203.0.113.1"})
    assert said() == [
        (
            f"requests carry {header.lower()}, and no proxy is trusted, so all clients of one proxy share its limits: "
            "set identity.client_ip.trusted_proxies to the proxy's addresses"
        )
    ]


def test_a_trusted_proxy_is_not_warned_about(said: Any) -> None:
    settings = plan(rate="9/minute") | {"identity": {"client_ip": {"trusted_proxies": ["192.0.2.0/24"]}}}
    call(Seawall(hello, config=settings), headers={"X-Forwarded-For": "203.0.113.1"})
    assert said() == []


def test_only_the_first_hundreds_of_requests_are_looked_at(said: Any) -> None:
    app = Seawall(hello, default="1000000/second")
    statuses(app, 300)
    call(app, headers={"X-Forwarded-For": "203.0.113.1"})
    assert said() == []


# Workers


WORKERS = (
    "4 workers, and each counts for itself in memory: callers get up to 4 times their plan. Let them share what they "
    "count, with backend: {type: redis, url: ...}, or divide the limits by 4"
)


@pytest.mark.parametrize(
    "arguments",
    [
        ["uvicorn", "app:app", "--workers", "4"],
        ["uvicorn", "app:app", "--workers=4"],
        ["gunicorn", "app:app", "-w", "4"],
        ["gunicorn", "app:app", "-w4"],
        ["gunicorn", "-w=4", "app:app"],
        ["hypercorn", "--workers", "4", "app:app"],
    ],
)
def test_several_workers_are_warned_about(arguments: list[str], said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    for _ in range(2):
        Seawall(hello, default="100/minute")
    assert said() == [WORKERS]


def test_workers_of_the_environment_are_warned_about(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "4")
    Seawall(hello, default="100/minute")
    assert said() == [WORKERS]


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["uvicorn", "--workers", "1"], "1"),
        (["uvicorn", "--workers"], ""),
        (["uvicorn", "--workers", "many"], "auto"),
        (["uvicorn", "--workers=-3"], "-2"),
        (["uvicorn", "--worker-class", "4"], "²"),
        (["uvicorn"], "9" * 5_000),
    ],
)
def test_one_worker_and_nonsense_are_not_warned_about(
    arguments: list[str], environment: str, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setenv("WEB_CONCURRENCY", environment)
    Seawall(hello, default="100/minute")
    assert said() == []


# The policy's own


def test_a_policy_s_warnings_are_said_once_each(said: Any) -> None:
    settings = config(plans={"default": {"quota": "5/day"}, "unused": {"rate": "1/second"}})
    for _ in range(3):
        Seawall(hello, config=settings, registry=CollectorRegistry())
    messages = said()
    assert len(messages) == len(set(messages)) >= 1
    assert all("warning" in message for message in messages)


def test_messages_are_one_line_each_whatever_the_request_holds(said: Any) -> None:
    """D10: nothing that a caller sends reaches a log line."""
    app = Seawall(hello, default="1/minute", clock=ManualClock())
    for path in ("/login\nINFO forged", "/\x1b[2J", "/" + "a" * 100_000):
        call(app, {"path": path}, headers={"X-Forwarded-For": "1.2.3.4\\nforged", "User-Agent": "x" * 70_000})
    assert len(said()) == 1
    assert not any("\n" in message or "forged" in message or len(message) > 500 for message in said())
