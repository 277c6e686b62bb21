"""Spans: what became of a request is on the span of its server, and nothing is where there is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Tracer, use_span
from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send

from harness import call, hello, statuses
from seawall import Seawall, tracing
from seawall.testing import ManualClock


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracer]:
    """A tracer of no process-wide provider, of which there can be only one."""
    monkeypatch.delenv("OTEL_SDK_DISABLED", raising=False)
    monkeypatch.setattr(tracing, "_trace", None)
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider.get_tracer("tests")
    provider.shutdown()


def test_the_span_that_is_current_is_written_on(tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    assert tracing.begin()
    with tracer.start_as_current_span("GET /", kind=SpanKind.SERVER) as server:
        span = tracing.current()
        assert span is server
        with tracer.start_as_current_span("inside"):
            tracing.note(
                span, "limited", tenant="acme", plan="free", priority="low", reason="rate", policy="per-second"
            )
    inside, outside = exporter.get_finished_spans()
    assert dict(outside.attributes or {}) == {
        "seawall.outcome": "limited",
        "seawall.tenant": "acme",
        "seawall.plan": "free",
        "seawall.priority": "low",
        "seawall.reason": "rate",
        "seawall.policy": "per-second",
    }
    assert dict(inside.attributes or {}) == {}


def test_what_is_empty_is_left_out(tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    assert tracing.begin()
    with tracer.start_as_current_span("GET /"):
        span = tracing.current()
        assert span is not None
        tracing.note(span, "exempt", tenant=None)
    (found,) = exporter.get_finished_spans()
    assert dict(found.attributes or {}) == {"seawall.outcome": "exempt"}


@pytest.mark.usefixtures("tracer")
def test_where_nothing_is_recorded_there_is_no_span() -> None:
    assert tracing.begin()
    assert tracing.current() is None
    with use_span(NonRecordingSpan(SpanContext(1, 2, is_remote=False))):
        assert tracing.current() is None


@pytest.mark.usefixtures("tracer")
@pytest.mark.parametrize(("value", "expected"), [("true", False), (" True ", False), ("false", True), ("", True)])
def test_the_switch_of_opentelemetry_is_followed(value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", value)
    assert tracing.begin() is expected


def test_without_opentelemetry_there_are_no_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert tracing.begin() is False


@pytest.mark.slow
def test_importing_seawall_does_not_import_opentelemetry() -> None:
    code = "import sys, seawall, seawall.tracing; print([name for name in sys.modules if name.startswith('opentel')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def outside(app: Any, tracer: Tracer) -> Any:
    """What makes the server's spans, around an application."""

    async def traced(scope: Scope, receive: Receive, send: Send) -> None:
        with tracer.start_as_current_span("request", kind=SpanKind.SERVER):
            await app(scope, receive, send)

    return traced


CONFIG = {
    "version": 1,
    "plans": {"default": {"rate": "2/minute"}},
    "access": {"deny": ["198.51.100.0/24"]},
    "routes": [{"name": "probes", "match": {"path": "/healthz"}, "exempt": True}],
    "shedding": {"algorithm": "off"},
}


def told(exporter: InMemorySpanExporter) -> list[dict[str, Any]]:
    found = [
        {name.removeprefix("seawall."): value for name, value in (span.attributes or {}).items()}
        for span in exporter.get_finished_spans()
        if span.kind is SpanKind.SERVER
    ]
    exporter.clear()
    return found


def test_every_request_says_what_became_of_it(
    tracer: Tracer, exporter: InMemorySpanExporter, registry: CollectorRegistry, clock: ManualClock
) -> None:
    def tenant(scope: Scope) -> str | None:
        return "acme" if scope["path"] == "/acme" else None

    app = outside(Seawall(hello, CONFIG, identify=tenant, registry=registry, clock=clock), tracer)
    statuses(app, 3)
    assert told(exporter) == [
        {"outcome": "allowed", "plan": "default", "priority": "normal"},
        {"outcome": "allowed", "plan": "default", "priority": "normal"},
        {"outcome": "limited", "plan": "default", "priority": "normal", "reason": "rate", "policy": "rate"},
    ]
    call(app, "/acme")
    call(app, "/healthz")
    call(app, client=("198.51.100.9", 1))
    assert told(exporter) == [
        {"outcome": "allowed", "plan": "default", "priority": "normal", "tenant": "acme"},
        {"outcome": "exempt"},
        {"outcome": "denied", "reason": "denied"},
    ]


def test_it_is_the_server_s_span_whatever_is_current_in_the_application(
    tracer: Tracer, exporter: InMemorySpanExporter, registry: CollectorRegistry, clock: ManualClock
) -> None:
    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        with tracer.start_as_current_span("work"):
            await hello(scope, receive, send)

    call(outside(Seawall(inner, CONFIG, registry=registry, clock=clock), tracer))
    work, server = exporter.get_finished_spans()
    assert (server.attributes or {})["seawall.outcome"] == "allowed"
    assert dict(work.attributes or {}) == {}


def test_stacked_middlewares_write_once_and_what_is_switched_off_writes_nothing(
    tracer: Tracer,
    exporter: InMemorySpanExporter,
    registry: CollectorRegistry,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inner = Seawall(hello, CONFIG, registry=registry, clock=clock)
    call(outside(Seawall(inner, CONFIG, registry=registry, clock=clock), tracer))
    assert told(exporter) == [{"outcome": "allowed", "plan": "default", "priority": "normal"}]
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    call(outside(Seawall(hello, CONFIG, registry=registry, clock=clock), tracer))
    assert told(exporter) == [{}]
