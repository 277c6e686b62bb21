"""Checked models as the `Policy` that a running middleware works with: numbers for notations, one plan for a tenant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from seawall.config import schema, values
from seawall.decision import Mode
from seawall.notation import parse_duration, parse_quota
from seawall.policy import (
    Access,
    BackendSettings,
    Identity,
    Key,
    Metrics,
    Network,
    Plan,
    Policy,
    Priority,
    PriorityHeader,
    Responses,
    Route,
    RouteLimit,
    Shedding,
    Status,
    Streaming,
    Tenant,
)
from seawall.rate import Quota

_MODES = {"off": Mode.OFF, "shadow": Mode.SHADOW, "enforce": Mode.ENFORCE, None: Mode.ENFORCE}


def compile_policy(file: schema.File, tenants: Sequence[dict[str, schema.Tenant]], digest: str) -> Policy:
    """The policy that ``file`` and all its ``tenants`` mean. Whatever they refer to is there."""
    plans = {name: _plan(name, written) for name, written in file.plans.items()}
    default = default_plan(file.defaults.plan, plans)
    compiled, keys = _tenants(tenants, plans, default)
    policy = Policy(
        mode=_MODES[file.mode],
        identity=_identity(file.identity),
        plans=plans,
        default_plan=default,
        anonymous_plan=file.defaults.anonymous_plan or ("anonymous" if "anonymous" in plans else default),
        tenants=compiled,
        keys=keys,
        access=Access(_networks(file.access.deny), _networks(file.access.exempt)),
        routes=tuple(_route(route) for route in file.routes),
        priority_header=_priority_header(file.priority_header),
        shedding=_shedding(file.shedding),
        backend=_backend(file.backend),
        responses=Responses(file.responses.headers, file.responses.detail, file.responses.docs_url),
        reload_ns=None if file.reload == "off" else parse_duration(file.reload),
        metrics=_metrics(file.metrics),
        status=None
        if file.status is None
        else Status(file.status.path, _networks(file.status.allow), file.status.token),
        history=file.history,
        digest=digest,
    )
    if file.priorities is None:
        return policy
    return replace(policy, priorities=tuple(_priority(name, written) for name, written in file.priorities.items()))


def default_plan(written: str | None, plans: Any) -> str | None:
    """The plan of whoever has none: the one that is named, else ``default``, else the only one."""
    if written is not None:
        return written
    if "default" in plans:
        return "default"
    return next(iter(plans)) if len(plans) == 1 else None


def quota(written: schema.Quotas | None) -> Quota | None:
    if written is None:
        return None
    return parse_quota(written) if isinstance(written, str) else parse_quota(written.limit, written.zone)


def _plan(name: str, written: schema.Plan) -> Plan:
    return Plan(
        name,
        schema.rates(written.rate),
        quota(written.quota),
        written.concurrency,
        written.priority,
        _MODES[written.mode],
    )


def _tenants(
    groups: Sequence[dict[str, schema.Tenant]], plans: dict[str, Plan], default: str | None
) -> tuple[dict[str, Tenant], dict[bytes, Key]]:
    tenants: dict[str, Tenant] = {}
    keys: dict[bytes, Key] = {}
    for group in groups:
        for name, written in group.items():
            tenants[name] = tenant_of(name, written, plans, default)
            for key in written.keys:
                if isinstance(key, str):
                    keys[values.key_digest(key)] = Key(name)
                else:
                    expires = None if key.expires is None else values.expiry(key.expires)
                    keys[values.key_digest(key.hash)] = Key(name, expires)
    return tenants, keys


def tenant_of(name: str, written: schema.Terms, plans: Mapping[str, Plan], default: str | None) -> Tenant:
    plan = plans[written.plan or default or ""]
    if written.overrides is not None:
        plan = _overridden(plan, written.overrides)
    priority = written.priority or (written.overrides.priority if written.overrides is not None else None)
    return Tenant(name, plan, priority, _MODES[written.mode])


def _overridden(plan: Plan, written: schema.Overrides) -> Plan:
    return Plan(
        plan.name,
        plan.rates if written.rate is None else schema.rates(written.rate),
        plan.quota if written.quota is None else quota(written.quota),
        plan.concurrency if written.concurrency is None else written.concurrency,
        plan.priority if written.priority is None else written.priority,
        plan.mode,
    )


def _identity(written: schema.Identity) -> Identity:
    sources: list[tuple[Literal["api_key", "state"], str]] = []
    for source in written.tenant:
        if source.api_key is not None:
            sources.append(("api_key", source.api_key.header.lower()))
        elif source.state is not None:
            sources.append(("state", source.state))
    client = written.client_ip
    return Identity(
        tuple(sources),
        written.anonymous,
        _networks(client.trusted_proxies or []),
        client.trusted_hops or 0,
        client.ipv6_prefix,
        client.header,
    )


def _route(written: schema.Route) -> Route:
    methods = None if written.match.methods is None else set(written.match.methods)
    if methods is not None and "GET" in methods:
        methods.add("HEAD")
    streaming = written.streaming
    return Route(
        written.name,
        tuple(as_list(written.match.path)),
        None if methods is None else frozenset(methods),
        written.exempt,
        _MODES[written.mode],
        written.cost,
        written.priority,
        tuple(
            RouteLimit(name, tuple(as_list(limit.per)), schema.rates(limit.rate), quota(limit.quota), limit.cost)
            for name, limit in written.limits.items()
        ),
        written.on_backend_failure,
        None if streaming is None else Streaming(streaming.max, streaming.max_per_tenant),
    )


def as_list(written: str | list[str]) -> list[str]:
    return [written] if isinstance(written, str) else written


def _priority(name: str, written: schema.Priority) -> Priority:
    timeout = None if written.queue is None else written.queue.timeout
    share = written.min_share
    return Priority(
        name, None if timeout is None else parse_duration(timeout), None if share is None else values.percentage(share)
    )


def _priority_header(written: schema.PriorityHeader | None) -> PriorityHeader | None:
    return None if written is None else PriorityHeader(written.name.lower(), _networks(written.raise_from))


def _shedding(written: schema.Shedding) -> Shedding:
    return Shedding(
        written.algorithm,
        written.limit.initial,
        written.limit.min,
        written.limit.max,
        parse_duration(written.loop_lag_target),
        written.status,
        None if written.body_timeout is None else parse_duration(written.body_timeout),
    )


def _backend(written: schema.Backend) -> BackendSettings:
    return BackendSettings(
        written.type,
        written.max_keys,
        written.url,
        parse_duration(written.timeout),
        written.on_failure,
        written.key_prefix,
        written.secret,
        written.instances,
        written.leases,
        written.deny_cache,
        written.snapshot,
    )


def _metrics(written: schema.Metrics) -> Metrics:
    return Metrics(
        written.path,
        None if written.allow is None else _networks(written.allow),
        0 if written.tenant_label == "off" else written.tenant_label.top,
    )


def _networks(written: list[str]) -> tuple[Network, ...]:
    return tuple(values.network(value) for value in written)
