"""What an operator asks, in the order in which it is asked: an overview, the callers, the shared store, the calls."""

from __future__ import annotations

from seawall.metrics import (
    ALLOWED,
    BACKEND_DURATION,
    BACKEND_REQUESTS,
    BACKEND_UP,
    BUILD_INFO,
    CLIENT_ATTEMPTS,
    CLIENT_BUDGET,
    CLIENT_CIRCUITS,
    CLIENT_HEDGES,
    CLIENT_REFUSALS,
    CLIENT_RETRIES,
    CONCURRENCY_LIMIT,
    CONFIG_INFO,
    CONFIG_RELOADS,
    DECISION_DURATION,
    DENIED,
    EVICTED_KEYS,
    EXPIRED,
    FALLBACKS,
    IGNORED_HEADERS,
    INFLIGHT,
    LAST_RELOAD,
    LIMIT_CHANGES,
    LIMITED,
    LOOP_LAG,
    OUTCOMES,
    POLICY_CHECKS,
    QUEUE_WAIT,
    QUEUED,
    REJECTIONS,
    REQUEST_DURATION,
    REQUESTS,
    SHADOW_REJECTIONS,
    SHED,
    STREAMS,
    TENANT_REQUESTS,
    TRACKED_KEYS,
    UTILIZATION,
)
from seawall.monitoring.grafana import SEEN, Dashboard, Panel, Query, Variable
from seawall.monitoring.promql import Scope, Unlike, total

REFUSED = tuple(OUTCOMES[at] for at in (LIMITED, SHED, EXPIRED, DENIED))
DECIDED = (OUTCOMES[ALLOWED], *REFUSED)
"""Outcomes that somebody decided on: not of exempt requests, nor of callers who left."""
OFFERED = (OUTCOMES[ALLOWED], OUTCOMES[SHED])
"""What a service was asked for that was within its caller's plan."""


def _share(of: str, among: str) -> str:
    return f"{of}\n/\n{among}"


def _share_of(outcomes: tuple[str, ...], among: tuple[str, ...]) -> str:
    return _share(SEEN.rate(REQUESTS, where={"outcome": outcomes}), SEEN.rate(REQUESTS, where={"outcome": among}))


def overview() -> Dashboard:
    """Is it up, is it refusing, whom and why."""
    waited = SEEN.quantile(0.99, QUEUE_WAIT, "priority", where={"result": "admitted"})
    now = [
        Panel(
            "Requests",
            "All requests that were answered, refused and exempt ones included.",
            "reqps",
            [Query(SEEN.rate(REQUESTS))],
            "stat",
            width=4,
            height=4,
        ),
        Panel(
            "Refused",
            "Share of requests that were refused, for whatever reason. Callers over their plan are no fault of the "
            "service; the next number is.",
            "percentunit",
            [Query(_share_of(REFUSED, DECIDED))],
            "stat",
            width=4,
            height=4,
            steps=((0.05, "yellow"), (0.5, "orange")),
        ),
        Panel(
            "Shed",
            "Share of requests within their caller's plan that were refused because the service was overloaded. This "
            "is what burns the budget of the alerts.",
            "percentunit",
            [Query(_share_of((OUTCOMES[SHED],), OFFERED))],
            "stat",
            width=4,
            height=4,
            steps=((0.001, "yellow"), (0.01, "red")),
        ),
        Panel(
            "Utilization",
            "Demand by capacity of the busiest instance. At 1 it is full; at 2 twice as many instances are right.",
            "percentunit",
            [Query(SEEN.gauge("max", UTILIZATION))],
            "stat",
            width=4,
            height=4,
            steps=((0.7, "yellow"), (1, "red")),
        ),
        Panel(
            "Shared store",
            "Whether every instance asks its store. While one does not, it decides by its own share.",
            "none",
            [Query(SEEN.gauge("min", BACKEND_UP))],
            "stat",
            width=4,
            height=4,
            words={"0": ("away", "red"), "1": ("up", "green")},
            nothing="in memory",
        ),
        Panel(
            "Policies in force",
            "Different configurations among the instances of one job. More than one for longer than a rollout takes "
            "means that somebody is held to what is no longer written.",
            "none",
            [Query(f"max({total(SEEN.gauge('max', CONFIG_INFO, 'job', 'hash'), 'job', function='count')})")],
            "stat",
            width=4,
            height=4,
            steps=((2, "yellow"),),
        ),
    ]
    answers = [
        Panel(
            "Requests by outcome",
            "allowed; limited: over a plan (429); shed: overload (503); expired: too late (504); denied: not let in "
            "at all; exempt; cancelled: the caller left.",
            "reqps",
            [Query(SEEN.rate(REQUESTS, "outcome"), "{{outcome}}")],
            width=12,
            stacked=True,
        ),
        Panel(
            "Refused, by reason",
            "rate, quota and concurrency are the caller's. overload, queue_full, queue_timeout and expired are the "
            "service's, backend_unavailable is the store's.",
            "reqps",
            [Query(SEEN.rate(REJECTIONS, "reason"), "{{reason}}")],
            width=12,
            stacked=True,
        ),
        Panel(
            "Refused, by plan and policy",
            "The ten that refuse most. The policy is the one with the longest wait.",
            "reqps",
            [Query(f"topk(10, {SEEN.rate(REJECTIONS, 'plan', 'policy')})", "{{plan}} {{policy}}")],
            width=12,
        ),
        Panel(
            "What shadow mode would refuse",
            "What would happen if what is in shadow mode were enforced. These requests were served.",
            "reqps",
            [Query(SEEN.rate(SHADOW_REJECTIONS, "plan", "policy", "reason"), "{{plan}} {{policy}} ({{reason}})")],
            width=12,
        ),
    ]
    overload = [
        Panel(
            "Utilization, by instance",
            "Demand by capacity of each instance: what an autoscaler should follow.",
            "percentunit",
            [Query(SEEN.gauge("max", UTILIZATION, "instance"), "{{instance}}")],
            steps=((1, "red"),),
        ),
        Panel(
            "In flight, and how many may be",
            "The limit follows the lag of the loop. It grows only where it is used, so a limit far above what is in "
            "flight means nothing.",
            "short",
            [
                Query(SEEN.gauge("sum", INFLIGHT), "in flight"),
                Query(SEEN.gauge("sum", CONCURRENCY_LIMIT), "limit"),
                Query(SEEN.gauge("sum", QUEUED), "waiting"),
            ],
        ),
        Panel(
            "Shed, by class",
            "Whom the overload costs. The last class should be first here, and the first one never.",
            "reqps",
            [Query(SEEN.rate(REQUESTS, "priority", where={"outcome": OUTCOMES[SHED]}), "{{priority}}")],
            stacked=True,
        ),
        Panel(
            "Loop lag",
            "How late the event loop of each instance runs what is due. The target is 10 ms unless the file has "
            "another.",
            "s",
            [Query(SEEN.gauge("max", LOOP_LAG, "instance"), "{{instance}}")],
            steps=((0.01, "red"),),
        ),
        Panel(
            "Wait in the queue (p99)",
            "Of those that were admitted after waiting, and only of those: who does not wait is not in it.",
            "s",
            [Query(waited, "{{priority}}")],
        ),
        Panel(
            "What became of those who waited",
            "queue_timeout and queue_full waited in vain.",
            "reqps",
            [Query(SEEN.rate(QUEUE_WAIT, "result", part="count"), "{{result}}")],
            stacked=True,
        ),
        Panel(
            "In flight, by class",
            "Admitted requests that have not ended.",
            "short",
            [Query(SEEN.gauge("sum", INFLIGHT, "priority"), "{{priority}}")],
            stacked=True,
        ),
        Panel(
            "Waiting, by class",
            "Requests in the queue, at the moment of the scrape.",
            "short",
            [Query(SEEN.gauge("sum", QUEUED, "priority"), "{{priority}}")],
            stacked=True,
        ),
        Panel(
            "Changes of the limit",
            "How often a limit was changed, by why. A service that is well sees few.",
            "ops",
            [Query(SEEN.rate(LIMIT_CHANGES, "reason"), "{{reason}}")],
        ),
    ]
    latency = [
        Panel(
            "Latency of admitted requests",
            "Time in the application, of requests that were let in. Refusals are not in it.",
            "s",
            [Query(SEEN.rate(REQUEST_DURATION, "le", part="bucket"), "{{le}}")],
            "heatmap",
            width=12,
        ),
        Panel(
            "Latency of admitted requests, by class",
            "Half of the requests, and 99 of 100, were faster than this.",
            "s",
            [
                Query(SEEN.quantile(0.5, REQUEST_DURATION, "priority"), "{{priority}} p50"),
                Query(SEEN.quantile(0.99, REQUEST_DURATION, "priority"), "{{priority}} p99"),
            ],
            width=12,
        ),
        Panel(
            "Deadlines missed",
            "Requests whose deadline had passed before they could begin (504).",
            "reqps",
            [Query(SEEN.rate(REQUESTS, "priority", where={"outcome": OUTCOMES[EXPIRED]}), "{{priority}}")],
        ),
        Panel(
            "Headers that made no sense",
            "Deadlines and priorities of callers that were ignored, because nobody could read them.",
            "ops",
            [Query(SEEN.rate(IGNORED_HEADERS, "header"), "{{header}}")],
        ),
        Panel(
            "Open streams",
            "By the rule in whose budget they are. They are in no latency.",
            "short",
            [Query(SEEN.gauge("sum", STREAMS, "rule"), "{{rule}}")],
        ),
    ]
    configuration = [
        Panel(
            "Reloads",
            "Times that a changed configuration was read. After a failed one the last good one stays in force.",
            "short",
            [Query(SEEN.increase(CONFIG_RELOADS, "result"), "{{result}}")],
        ),
        Panel(
            "Policies and versions",
            "Which policy and which version each instance runs.",
            "none",
            [
                Query(SEEN.gauge("max", CONFIG_INFO, "instance", "hash", "mode")),
                Query(SEEN.gauge("max", BUILD_INFO, "instance", "version")),
            ],
            "table",
            width=10,
        ),
        Panel(
            "Since the policy was loaded",
            "By instance. A rollout is over when all lines are low.",
            "s",
            [Query(f"time() - {SEEN.gauge('max', LAST_RELOAD, 'instance')}", "{{instance}}")],
            width=6,
        ),
    ]
    return Dashboard(
        "overview",
        "Seawall / Overview",
        "How requests are answered, how much is refused and why, and whether the service is overloaded.",
        {
            "Now": now,
            "How requests are answered": answers,
            "Overload": overload,
            "Latency and deadlines": latency,
            "Configuration": configuration,
        },
    )


def tenants() -> Dashboard:
    """Who is refused, who will be, and who would be."""
    limited, served = {"outcome": OUTCOMES[LIMITED]}, {"outcome": OUTCOMES[ALLOWED]}
    plan = Scope((*SEEN.matchers, 'plan=~"$plan"'), SEEN.window)
    tenant = Scope((*SEEN.matchers, 'tenant=~"$tenant"'), SEEN.window)
    shown = Scope(tenant.matchers, "$__range")
    checks = plan.rate(POLICY_CHECKS, "plan", "policy")
    who = [
        Panel(
            "Requests by tenant",
            "The busiest tenants by name, all others as 'other'; metrics.tenant_label says how many have one.",
            "reqps",
            [Query(tenant.rate(TENANT_REQUESTS, "tenant"), "{{tenant}}")],
            width=12,
            stacked=True,
        ),
        Panel(
            "Refused, by tenant",
            "Requests over the tenant's own plan.",
            "reqps",
            [Query(tenant.rate(TENANT_REQUESTS, "tenant", where=limited), "{{tenant}}")],
            width=12,
            stacked=True,
        ),
        Panel(
            "Who was refused",
            "In the time that is shown. limited is over the tenant's own plan; shed is overload, which meets first "
            "who uses most in the last class.",
            "short",
            [
                Query(shown.increase(TENANT_REQUESTS, "tenant", where=limited), "limited"),
                Query(shown.increase(TENANT_REQUESTS, "tenant", where={"outcome": OUTCOMES[SHED]}), "shed"),
                Query(shown.increase(TENANT_REQUESTS, "tenant"), "all"),
                Query(
                    _share(
                        shown.increase(TENANT_REQUESTS, "tenant", where=limited),
                        shown.increase(TENANT_REQUESTS, "tenant"),
                    ),
                    "share limited",
                ),
            ],
            "table",
            width=12,
            units={"share limited": "percentunit"},
        ),
        Panel(
            "Share refused, by tenant",
            "A tenant that is refused half of the time for hours has the wrong plan, or a client that does not back "
            "off.",
            "percentunit",
            [
                Query(
                    _share(
                        tenant.rate(TENANT_REQUESTS, "tenant", where=limited),
                        tenant.rate(TENANT_REQUESTS, "tenant"),
                    ),
                    "{{tenant}}",
                )
            ],
            width=12,
            steps=((0.5, "orange"),),
        ),
    ]
    plans = [
        Panel(
            "Refused, by plan and policy",
            "The policy is the limit that refused; of several, the one with the longest wait.",
            "reqps",
            [Query(plan.rate(REJECTIONS, "plan", "policy", "reason"), "{{plan}} {{policy}} ({{reason}})")],
            width=12,
        ),
        Panel(
            "Near the limit",
            "Share of decisions with 80 % or more used, refusals included: who will be refused next.",
            "percentunit",
            [
                Query(
                    _share(plan.rate(POLICY_CHECKS, "plan", "policy", where={"decision": ("near", "deny")}), checks),
                    "{{plan}} {{policy}}",
                )
            ],
            width=12,
            steps=((0.5, "orange"),),
        ),
        Panel(
            "Decisions of single policies",
            "Each limit of a request decides; a request has one outcome and as many decisions as it has limits.",
            "ops",
            [Query(plan.rate(POLICY_CHECKS, "policy", "decision"), "{{policy}} {{decision}}")],
            width=12,
        ),
        Panel(
            "Refused, by class",
            "All refusals of the plan's callers, overload included.",
            "reqps",
            [Query(plan.rate(REJECTIONS, "plan", "priority"), "{{plan}} {{priority}}")],
            width=12,
        ),
    ]
    shadow = [
        Panel(
            "What shadow mode would refuse",
            "What would happen if it were enforced, by plan and policy. These requests were served.",
            "reqps",
            [Query(plan.rate(SHADOW_REJECTIONS, "plan", "policy", "reason"), "{{plan}} {{policy}} ({{reason}})")],
            width=12,
        ),
        Panel(
            "What enforcing it would change",
            "Would-be refusals by plan, as a share of all requests that were served. Enforce when this is what you "
            "meant.",
            "percentunit",
            [
                Query(
                    f"{plan.rate(SHADOW_REJECTIONS, 'plan')}\n/ ignoring (plan) group_left\n"
                    f"{SEEN.rate(REQUESTS, where=served)}",
                    "{{plan}}",
                )
            ],
            width=12,
        ),
    ]
    return Dashboard(
        "tenants",
        "Seawall / Tenants",
        "Who is refused and by which limit, who is near one, and what shadow mode would refuse.",
        {"Who": who, "Plans and policies": plans, "Shadow mode": shadow},
        (
            Variable("tenant", "Tenant", TENANT_REQUESTS, within=("namespace", "job")),
            # Who is turned away before a plan is known has none.
            Variable("plan", "Plan", POLICY_CHECKS, every=".*", within=("namespace", "job")),
        ),
    )


def backend() -> Dashboard:
    """Is the shared store there, how fast is it, and what happens while it is not."""
    away = {"reason": "backend_unavailable"}
    calls, decisions = SEEN.rate(BACKEND_REQUESTS), SEEN.rate(DECISION_DURATION, part="count")
    store = [
        Panel(
            "Instances that ask their store",
            "1 for each that does, 0 while it is known to be away. Nothing here: the counts are kept in memory.",
            "short",
            [Query(SEEN.gauge("min", BACKEND_UP, "instance", "backend"), "{{instance}} {{backend}}")],
        ),
        Panel(
            "Calls, by how they ended",
            "ok; timeout: not within backend.timeout; connection: none; error: the server refused; mismatch: an "
            "answer that is none.",
            "ops",
            [Query(SEEN.rate(BACKEND_REQUESTS, "result"), "{{result}}")],
            stacked=True,
        ),
        Panel(
            "Calls that failed",
            "Share of all calls.",
            "percentunit",
            [Query(_share(SEEN.rate(BACKEND_REQUESTS, where={"result": Unlike("ok")}), calls), "failed")],
            steps=((0.01, "red"),),
        ),
        Panel(
            "Latency of calls",
            "Well below 1 ms in a local network. What is slower than backend.timeout is given up.",
            "s",
            [Query(SEEN.rate(BACKEND_DURATION, "le", part="bucket"), "{{le}}")],
            "heatmap",
            width=12,
        ),
        Panel(
            "Latency of calls (p50, p99, p99.9)",
            "By store.",
            "s",
            [
                Query(SEEN.quantile(share, BACKEND_DURATION, "backend"), f"{{{{backend}}}} p{share * 100:g}")
                for share in (0.5, 0.99, 0.999)
            ],
            width=12,
            steps=((0.025, "red"),),
        ),
    ]
    decided = [
        Panel(
            "Time to decide",
            "What callers wait for the decision, the store included. In memory it is some microseconds.",
            "s",
            [
                Query(SEEN.quantile(share, DECISION_DURATION, "backend"), f"{{{{backend}}}} p{share * 100:g}")
                for share in (0.5, 0.99)
            ],
        ),
        Panel(
            "Calls per decision",
            "Below 1 where leases, the deny cache and calls for several requests save some. Near 1 each decision is a "
            "call.",
            "short",
            [Query(_share(calls, decisions), "calls per decision")],
        ),
        Panel(
            "Decided without the store",
            "local: by this process's share; allow: let in unchecked; deny: refused with 503.",
            "ops",
            [Query(SEEN.rate(FALLBACKS, "action"), "{{action}}")],
            stacked=True,
        ),
        Panel(
            "Refused because the store is away",
            "Requests of rules with on_backend_failure: deny.",
            "reqps",
            [
                Query(
                    SEEN.rate(REJECTIONS, "plan", "policy", where=away),
                    "{{plan}} {{policy}}",
                )
            ],
        ),
        Panel(
            "Buckets and counters in memory",
            "By store. At max_keys new callers begin to share buckets. With a shared store these are of the share "
            "that decides while it is away.",
            "short",
            [Query(SEEN.gauge("sum", TRACKED_KEYS, "store"), "{{store}}")],
        ),
        Panel(
            "Buckets forgotten",
            "After they were full again, which loses nothing. Many a second are many callers who come once.",
            "ops",
            [Query(SEEN.rate(EVICTED_KEYS, "store"), "{{store}}")],
        ),
    ]
    return Dashboard(
        "backend",
        "Seawall / Backend",
        "The store that processes share: whether it is asked, how long it takes, and who decides without it.",
        {"The store": store, "Decisions": decided},
    )


def client() -> Dashboard:
    """What this service asks of others: are they well, and does it make their bad day worse."""
    host = Scope((*SEEN.matchers, 'host=~"$host"'), SEEN.window)
    attempts = host.rate(CLIENT_ATTEMPTS, "host")
    calls = [
        Panel(
            "Attempts, by result",
            "Requests that were sent to other services, retries as well. error: no answer.",
            "reqps",
            [Query(host.rate(CLIENT_ATTEMPTS, "host", "result"), "{{host}} {{result}}")],
            width=12,
            stacked=True,
        ),
        Panel(
            "Not sent",
            "circuit_open and throttled protect the other service, deadline_exceeded is work for nobody.",
            "reqps",
            [Query(host.rate(CLIENT_REFUSALS, "host", "reason"), "{{host}} {{reason}}")],
            width=12,
            stacked=True,
        ),
        Panel(
            "Share of retries",
            "Of all attempts. The budget keeps it near a tenth, however many calls fail.",
            "percentunit",
            [Query(_share(host.rate(CLIENT_RETRIES, "host"), attempts), "{{host}}")],
            steps=((0.1, "orange"),),
        ),
        Panel(
            "Retries, by why",
            "unsent: no connection; transient: a broken one, or 500, 502, 503, 504; throttled: 429, or told when.",
            "ops",
            [Query(host.rate(CLIENT_RETRIES, "reason"), "{{reason}}")],
            stacked=True,
        ),
        Panel(
            "Sent twice",
            "Requests that took longer than 95 of 100 did, of which a second one was sent beside the first.",
            "ops",
            [Query(host.rate(CLIENT_HEDGES, "host"), "{{host}}")],
        ),
        Panel(
            "Open circuits",
            "Hosts to which nothing, or only a part, is sent, because too much of it failed.",
            "short",
            [Query(host.gauge("sum", CLIENT_CIRCUITS, "host"), "{{host}}")],
            width=12,
        ),
        Panel(
            "Tokens left for retries",
            "Of the instance that has fewest. At 0 nothing is tried again: the other service is away, and not unlucky.",
            "short",
            [Query(host.gauge("min", CLIENT_BUDGET, "host"), "{{host}}")],
            width=12,
        ),
    ]
    return Dashboard(
        "client",
        "Seawall / Client",
        "What a service that uses seawall.client asks of others: retries and their budget, circuits, what is not sent.",
        {"Calls to other services": calls},
        (Variable("host", "Host", CLIENT_ATTEMPTS, within=("namespace", "job")),),
    )


def dashboards() -> tuple[Dashboard, ...]:
    """All of them."""
    return overview(), tenants(), backend(), client()
