"""Documents of the status page as they are in production, and as strangers would like them to be."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from seawall.config import loads
from seawall.metrics import INFLIGHT, POLICY_CHECKS, REJECTIONS, REQUESTS, SHADOW_REJECTIONS
from seawall.policy import Policy
from seawall.status import Count, Document, document

CONFIG = """\
version: 1
{more}
identity:
  tenant: [{{api_key: {{header: X-API-Key}}}}]
defaults: {{plan: free, anonymous_plan: anonymous}}
plans:
  anonymous: {{rate: 30/minute, priority: low}}
  free: {{rate: 10/second, quota: 10_000/day, concurrency: 5, priority: low}}
  pro:
    rate: {{limit: 100/second, burst: 300}}
    quota: {{limit: 1_000_000/month, zone: Europe/Berlin}}
    concurrency: 50
  internal: {{rate: unlimited, priority: critical}}
tenants:
  acme: {{plan: pro}}
  globex: {{plan: free}}
  batch-jobs: {{plan: internal, priority: low}}
routes:
  - name: login
    match: {{path: /login, methods: [POST]}}
    limits: {{login-ip: {{rate: 5/minute, per: client_ip}}}}
  - name: events
    match: {{path: "/v1/events/**"}}
    streaming: {{max: 500}}
"""

DIAGNOSTIC = """\
/etc/seawall/seawall.yaml:11:16: error[E020]: unknown time unit 'dya' in '10_000/dya'; did you mean 'day'?
   11 |   free: {rate: 10_000/dya, concurency: 5}
      |                ^ plans.free.rate
/etc/seawall/seawall.yaml:11:28: error[E010]: unknown key 'concurency'; did you mean 'concurrency'?"""

COUNTS: tuple[Count, ...] = (
    (REQUESTS.name, ("allowed", "critical"), 18_211),
    (REQUESTS.name, ("allowed", "normal"), 402_554),
    (REQUESTS.name, ("allowed", "low"), 93_120),
    (REQUESTS.name, ("limited", "low"), 12_044),
    (REQUESTS.name, ("limited", "normal"), 310),
    (REQUESTS.name, ("shed", "low"), 2_204),
    (REQUESTS.name, ("shed", "normal"), 12),
    (REQUESTS.name, ("denied", "none"), 48),
    (REQUESTS.name, ("exempt", "none"), 8_640),
    (REJECTIONS.name, ("rate", "rate", "free", "low"), 11_400),
    (REJECTIONS.name, ("rate", "login-ip", "anonymous", "low"), 644),
    (REJECTIONS.name, ("quota", "quota", "pro", "normal"), 310),
    (REJECTIONS.name, ("overload", "", "free", "low"), 2_216),
    (REJECTIONS.name, ("denied", "", "", "none"), 48),
    (SHADOW_REJECTIONS.name, ("rate", "rate", "free", "low"), 77),
    (INFLIGHT.name, ("critical",), 2),
    (INFLIGHT.name, ("normal",), 21),
    (INFLIGHT.name, ("low",), 4),
    (POLICY_CHECKS.name, ("rate", "free", "deny"), 11_400),
)

HELD: dict[str, Any] = {
    "backend": {
        "address": {"keys": 1_820, "evicted": 91_233, "overflowed": 0},
        "tenant": {"keys": 3, "evicted": 0, "overflowed": 0},
    },
    "concurrency": {"callers": 2, "in_flight": 9},
    "overload": {
        "limit": 31,
        "reason": "lag",
        "in_flight": 27,
        "waiting": {"critical": 0, "normal": 2, "low": 9},
        "lag": 0.0123,
        "utilization": 1.18,
        "shed_from": 2,
        "refused": 2_216,
    },
    "streams": {"events": 41},
}

CALM: dict[str, Any] = {**HELD, "overload": {**HELD["overload"], "shed_from": None, "waiting": {"normal": 0}}}
"""Held by a process that sheds nothing, whose requests are all of one class."""

REFUSED: tuple[dict[str, Any], ...] = (
    {
        "caller": "globex",
        "kind": "tenant",
        "count": 9_310,
        "reasons": {"rate": 8_900, "overload": 410},
        "policies": {"rate": 8_900},
    },
    {
        "caller": "203.0.113.7",
        "kind": "address",
        "count": 2_144,
        "reasons": {"rate": 2_144},
        "policies": {"login-ip": 644, "rate": 1_500},
    },
    {"caller": "acme", "kind": "tenant", "count": 310, "reasons": {"quota": 310}, "policies": {"quota": 310}},
)

BLOCKED = ({"tenant": "initech", "until": "2026-03-04T12:10:00Z", "reason": "credential stuffing, ticket 4711"},)

HISTORY = (
    {"seq": 6, "time": "2026-03-03T09:12:44Z", "diff": ["plan pro: quota 500_000/month -> 1_000_000/month"]},
    {"seq": 7, "time": "2026-03-04T08:30:01Z", "diff": ["acme: plan free -> pro", "tenant batch-jobs added"]},
)

HOSTILE = (
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "'; window.hacked = 1; '",
    "</main></script><svg onload=window.hacked=1>",
    "line\nfeed\r\ndata: {}\r\n\r\nevent: page",
    "nul\x00 bell\x07 escape\x1b[2J",
    "\u202egnp.exe\u2066",
    "\ud800 lone surrogate",
    "{{7*7}} ${7*7} {0.__class__}",
    "&lt;b&gt; &amp;amp;",
    "a" * 256,
)
"""Names that a tenant, a header or a file may have."""


@dataclass(frozen=True, slots=True)
class Reloads:
    """`seawall.status.Reloading`, as a value."""

    applied: int = 4
    failed: int = 0
    loaded_at: float = datetime.fromisoformat("2026-03-04T08:30:01Z").timestamp()
    error: str | None = None
    error_at: float | None = None


FAILED = Reloads(failed=2, error=DIAGNOSTIC, error_at=datetime.fromisoformat("2026-03-04T11:58:20Z").timestamp())
NOON = datetime.fromisoformat("2026-03-04T12:00:00Z").timestamp()


def policy(more: str = "") -> Policy:
    """The policy of the samples, with further sections."""
    return loads(CONFIG.format(more=more))


def sample(more: str = "", **changes: Any) -> Document:
    """A document of a service that has something to say, with other arguments of `document`."""
    arguments: dict[str, Any] = {
        "now": NOON,
        "started": NOON - 12_345,
        "counts": COUNTS,
        "held": HELD,
        "reload": Reloads(),
        "files": ("/etc/seawall/seawall.yaml", "/etc/seawall/tenants.d/sales.yaml"),
        "refused": REFUSED,
        "blocked": BLOCKED,
        "history": HISTORY,
        **changes,
    }
    return document(policy(more), **arguments)


def hostile() -> Document:
    """A document in which everything that comes from outside is one of `HOSTILE`."""
    said = sample(
        files=HOSTILE,
        reload=Reloads(failed=1, error="\n".join(HOSTILE)),
        refused=[
            {"caller": name, "kind": name, "count": 1, "reasons": {name: 1}, "policies": {name: 1}} for name in HOSTILE
        ],
        blocked=[{"tenant": name, "until": name, "reason": name} for name in HOSTILE],
        history=[{"seq": at, "time": name, "diff": [name, name]} for at, name in enumerate(HOSTILE)],
        held={**HELD, "streams": dict.fromkeys(HOSTILE, 1), "backend": {name: {"keys": 1} for name in HOSTILE}},
    )
    said["policy"]["warnings"] = list(HOSTILE)
    return said
