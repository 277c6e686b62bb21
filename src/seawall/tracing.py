"""What became of a request, on the span that its server has for it: OpenTelemetry, where it is installed.

    seawall.outcome     as in seawall_requests_total: allowed, limited, shed, expired, denied, exempt, cancelled
    seawall.reason      of a refusal: rate, quota, concurrency, overload, queue_full, ...
    seawall.policy      the policy with the longest wait, of a refusal by one
    seawall.tenant      the tenant's id; anonymous callers have none, and addresses are not written
    seawall.plan        whose limits hold
    seawall.priority    the class

Seawall makes no spans. It writes on the one that is current where it is called, so whatever makes the server's spans
(`opentelemetry-instrument`, `FastAPIInstrumentor`, `OpenTelemetryMiddleware`) stands outside of it, as it does by
itself. Where OpenTelemetry is not installed, or `OTEL_SDK_DISABLED` is true, a request costs nothing more.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_trace: Any = None


def begin() -> bool:
    """Whether there may be spans to write on. Asked as a middleware is built, for imports take their time."""
    global _trace
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    try:
        from opentelemetry import trace
    except ImportError:
        return False
    _trace = trace
    return True


def current() -> Span | None:
    """The span of the server, as a request comes in; ``None`` if none is recorded. After `begin` has said yes."""
    span: Span = _trace.get_current_span()
    return span if span.is_recording() else None


def note(
    span: Span,
    outcome: str,
    *,
    tenant: str | None = None,
    plan: str = "",
    priority: str = "",
    reason: str = "",
    policy: str = "",
) -> None:
    """Write what became of a request. What is empty is left out."""
    attributes = {
        "seawall.outcome": outcome,
        "seawall.tenant": tenant,
        "seawall.plan": plan,
        "seawall.priority": priority,
        "seawall.reason": reason,
        "seawall.policy": policy,
    }
    span.set_attributes({name: value for name, value in attributes.items() if value})
