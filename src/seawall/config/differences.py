"""What one policy allows and another does not, in words: "acme: rate 100/second -> 500/second".

It compares meanings, not files. A comment, the order of tenants or of networks, and what is written out though it is
the default make no difference; the order of routes and of priorities does. A plan that changes is said once, with the
number of tenants it touches, and so is what befalls more than `MANY` tenants alike. Secrets are never shown: of a URL,
a secret or a token only that it changed, of an API key the first 8 hexadecimal digits of its hash.

There is a table for each class of `seawall.policy`, with a line for each field. A test holds the tables to the classes,
so that a setting cannot be added to the language and forgotten here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from datetime import UTC, datetime, time, timedelta
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Literal, Protocol, TypeAlias, final, get_args

from seawall.config.diagnostics import printable
from seawall.decision import Mode
from seawall.notation import duration_text, quota_text, rate_text
from seawall.policy import (
    Access,
    BackendSettings,
    Identity,
    Key,
    Metrics,
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
from seawall.rate import Quota, Rate

Effect: TypeAlias = Literal["raised", "lowered", "added", "removed", "changed"]
EFFECTS: tuple[Effect, ...] = get_args(Effect)

MANY = 5
"""What more tenants than these have in common is said once."""
_SHOWN = 10
"""Entries of a list that are shown; the rest is counted."""
_LONG = 1_000
"""Characters of a text. One path may have more, and a route a thousand paths."""


@final
@dataclass(frozen=True, slots=True)
class Change:
    """One difference.

    ``path`` is the dotted way to the setting, in which ``*`` is several tenants. ``effect`` says what callers notice:
    with ``raised`` they may do more than before, with ``lowered`` less. So a cost that goes up is ``lowered``, and a
    mode that goes from enforce to shadow is ``raised``. ``changed`` is neither, or both.
    """

    path: str
    text: str
    effect: Effect

    def __str__(self) -> str:
        return self.text


def differences(old: Policy, new: Policy) -> tuple[Change, ...]:
    """What changes when ``new`` takes the place of ``old``, in the order of the file; nothing if they mean the same."""
    place = _Place(old, new)
    return tuple(
        change
        for field, compare in SECTIONS.items()
        if getattr(old, field) != getattr(new, field)
        for change in compare(getattr(old, field), getattr(new, field), place)
    )


def summary(changes: Sequence[Change]) -> str:
    """``3 changes: 1 raised, 1 lowered, 1 added``."""
    if not changes:
        return "no changes"
    counts = Counter(change.effect for change in changes)
    each = ", ".join(f"{counts[effect]:,} {effect}" for effect in EFFECTS if counts[effect])
    return f"{_count(len(changes), 'change')}: {each}"


# Where a setting is, and what kinds of settings there are


@final
@dataclass(frozen=True, slots=True)
class _Place:
    """Where a setting is: its path, whose it is (``plan pro``), and what it is called there (``rate``)."""

    old: Policy
    new: Policy
    path: str = ""
    subject: str = ""
    label: str = ""

    def at(self, name: str) -> _Place:
        return replace(self, path=_dotted(self.path, name), label=_dotted(self.label, name))

    def of(self, kind: str, name: str) -> _Place:
        """An entry of a list or a mapping."""
        subject = f"{kind} {name}" if kind else name
        subject = f"{self.subject}, {subject}" if self.subject else subject
        return replace(self, path=_dotted(self.path, name), subject=subject, label="")

    def change(self, words: str, effect: Effect) -> Change:
        said = f"{self.label} {words}" if self.label else words
        text = f"{self.subject}: {said}" if self.subject else said
        return Change(printable(self.path), _cut(printable(text), _LONG), effect)


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class _Setting(Protocol):
    def compare(self, old: Any, new: Any, place: _Place) -> Iterator[Change]:
        """What to say about two values that are not equal."""

    def describe(self, value: Any) -> str:
        """A value that is not the default, among others of something that was added or removed."""


_Compare: TypeAlias = Callable[[Any, Any, _Place], Iterator[Change]]
_Admits: TypeAlias = Callable[[Any, Any, Policy], bool]
"""Whether the second value lets callers do whatever the first does. The policy is the new one."""


def _plain(value: Any) -> str:
    """A value as YAML has it."""
    match value:
        case Mode():
            return value.name.lower()
        case bool():
            return str(value).lower()
        case int():
            return f"{value:_}"
        case _:
            return str(value)


@final
@dataclass(frozen=True, slots=True)
class _Value:
    name: str
    words: Callable[[Any], str] = _plain
    none: str = "none"
    admits: _Admits | None = None

    def compare(self, old: Any, new: Any, place: _Place) -> Iterator[Change]:
        effect: Effect = "changed"
        if self.admits is not None:
            more, less = self.admits(old, new, place.new), self.admits(new, old, place.new)
            effect = "changed" if more == less else "raised" if more else "lowered"
        yield place.at(self.name).change(f"{self._say(old)} -> {self._say(new)}", effect)

    def describe(self, value: Any) -> str:
        return f"{self.name} {self._say(value)}"

    def _say(self, value: Any) -> str:
        return self.none if value is None else _cut(self.words(value), _LONG // 3)


@final
@dataclass(frozen=True, slots=True)
class _Secret:
    name: str

    def compare(self, old: Any, new: Any, place: _Place) -> Iterator[Change]:
        effect: Effect = "added" if old is None else "removed" if new is None else "changed"
        yield place.at(self.name).change(effect, effect)

    def describe(self, value: Any) -> str:
        return self.name


@final
@dataclass(frozen=True, slots=True)
class _Members:
    """A list whose order means nothing."""

    name: str
    none: str = ""

    def compare(self, old: Any, new: Any, place: _Place) -> Iterator[Change]:
        place = place.at(self.name)
        if old is None or new is None:
            yield place.change(f"{self._say(old)} -> {self._say(new)}", "changed")
            return
        ways: tuple[tuple[Effect, Any, Any], ...] = (("added", new, old), ("removed", old, new))
        for effect, members, others in ways:
            known = set(others)
            found = [_member(member) for member in dict.fromkeys(members) if member not in known]
            if found:
                yield place.change(f"{found[0]} {effect}" if len(found) == 1 else f"{effect}: {_listed(found)}", effect)

    def describe(self, value: Any) -> str:
        return f"{self.name} {self._say(value)}"

    def _say(self, value: Any) -> str:
        return self.none if value is None else _listed([_member(member) for member in value]) or "nobody"


@final
@dataclass(frozen=True, slots=True)
class _Section:
    """Settings that belong together, and that may be there or not."""

    name: str

    def compare(self, old: Any, new: Any, place: _Place) -> Iterator[Change]:
        place = place.at(self.name)
        if old is None:
            yield place.change(f"added{_inside(new)}", "added")
        elif new is None:
            yield place.change(f"removed{_inside(old)}", "removed")
        else:
            yield from _compare(old, new, place)

    def describe(self, value: Any) -> str:
        return f"{self.name}{_inside(value)}"


@final
@dataclass(frozen=True, slots=True)
class _Ordered:
    """Entries with names, of which an earlier one goes before a later one."""

    name: str
    kind: str

    def compare(self, old: Any, new: Any, place: _Place) -> Iterator[Change]:
        before, after = ({entry.name: entry for entry in entries} for entries in (old, new))
        place = replace(place.at(self.name), label="")
        for name, entry in before.items():
            if name not in after:
                yield place.of(self.kind, name).change(f"removed{_inside(entry)}", "removed")
        moved = _moved(list(before), list(after))
        order = list(after)
        for at, (name, entry) in enumerate(after.items()):
            there = place.of(self.kind, name)
            if name not in before:
                yield there.change(f"added{_between(order, at)}{_inside(entry)}", "added")
                continue
            if name in moved:
                yield there.change(f"moved{_between(order, at)}", "changed")
            yield from _compare(before[name], entry, there)

    def describe(self, value: Any) -> str:
        return f"{self.name} {_listed([entry.name + _inside(entry) for entry in value])}"


# Plans and tenants, which are understood together


def _plan_of(name: str) -> _Compare:
    """Which plan holds for those who have none of their own."""

    def compare(old: str | None, new: str | None, place: _Place) -> Iterator[Change]:
        before, after = place.old.plans.get(old or ""), place.new.plans.get(new or "")
        limits = [] if before is None or after is None else list(_compare(before, after, _Place(place.old, place.new)))
        yield place.at(name).change(f"{old or 'none'} -> {new or 'none'}{_in_brackets(limits)}", _together(limits))

    return compare


def _plans(old: Mapping[str, Plan], new: Mapping[str, Plan], place: _Place) -> Iterator[Change]:
    place = replace(place, path="plans")
    for name, plan in old.items():
        if name not in new:
            yield place.of("plan", name).change(f"removed{_inside(plan)}", "removed")
    touched = _touched(place)
    for name, plan in new.items():
        if name not in old:
            yield place.of("plan", name).change(f"added{_inside(plan)}", "added")
            continue
        others = " and anonymous callers" if _is_anonymous(name, place) else ""
        for field, setting, before, after in _differing(old[name], plan):
            for change in setting.compare(before, after, place.of("plan", name)):
                yield replace(change, text=f"{change.text} ({_count(touched[name, field], 'tenant')}{others})")


def _is_anonymous(plan: str, place: _Place) -> bool:
    policies = (place.old, place.new)
    return all(policy.anonymous_plan == plan and policy.identity.anonymous != "deny" for policy in policies)


def _touched(place: _Place) -> Counter[tuple[str, str]]:
    """For each plan and field, the tenants for whom it differs because the plan's does."""
    touched: Counter[tuple[str, str]] = Counter()
    # Most tenants have no overrides and share their plans: 100,000 of them are compared in a fraction of a second.
    alike = Counter[tuple[int, int]]()
    one: dict[tuple[int, int], tuple[Tenant, Tenant]] = {}
    for name, tenant in place.new.tenants.items():
        before = place.old.tenants.get(name)
        if before is not None:
            key = (id(before.plan), id(tenant.plan))
            alike[key] += 1
            one[key] = (before, tenant)
    for key, (before, tenant) in one.items():
        for field, _, was, now in _differing(before.plan, tenant.plan):
            if _by_plan(before, tenant, field, was, now, place):
                touched[tenant.plan.name, field] += alike[key]
    return touched


def _by_plan(before: Tenant, after: Tenant, field: str, was: Any, now: Any, place: _Place) -> bool:
    """Whether what differs for a tenant is what differs in its plan."""
    name = after.plan.name
    old, new = place.old.plans.get(name), place.new.plans.get(name)
    return before.plan.name == name and (was, now) == (getattr(old, field, None), getattr(new, field, None))


def _tenants(old: Mapping[str, Tenant], new: Mapping[str, Tenant], place: _Place) -> Iterator[Change]:
    place = replace(place, path="tenants")
    keys = Counter(key.tenant for key in place.old.keys.values())
    for name, tenant in old.items():
        if name not in new:
            inside = _in_brackets(_tenant_parts(tenant, place.old, keys[name]))
            yield place.of("", name).change(f"removed{inside}", "removed")
    keys = Counter(key.tenant for key in place.new.keys.values())
    alike: dict[Change, list[str]] = {}
    known: dict[tuple[object, ...], list[Change]] = {}
    for name, tenant in new.items():
        before = old.get(name)
        if before is None:
            inside = _in_brackets(_tenant_parts(tenant, place.new, keys[name]))
            yield place.of("", name).change(f"added{inside}", "added")
            continue
        kind = (id(before.plan), id(tenant.plan), before.priority, tenant.priority, before.mode, tenant.mode)
        if kind not in known:
            known[kind] = list(_of_tenant(before, tenant, _Place(place.old, place.new)))
        for change in known[kind]:
            alike.setdefault(change, []).append(name)
    for change, names in alike.items():
        if len(names) > MANY:
            yield _said_of(f"{_count(len(names), 'tenant')} ({_listed(names, 3)})", change, "*")
        else:
            yield from (_said_of(name, change, name) for name in names)


def _said_of(subject: str, change: Change, name: str) -> Change:
    path, text = printable(f"tenants.{name}.{change.path}"), printable(f"{subject}: {change.text}")
    return replace(change, path=path, text=_cut(text, _LONG))


def _of_tenant(before: Tenant, after: Tenant, place: _Place) -> Iterator[Change]:
    """What is different for one tenant, in words that do not name it."""
    # A tenant's own priority wins over its plan's, and an override of the priority is both.
    twice = {"priority"} if before.priority != after.priority else set()
    limits = [
        (change, _by_plan(before, after, field, was, now, place))
        for field, setting, was, now in _differing(before.plan, after.plan)
        if field not in twice
        for change in setting.compare(was, now, place)
    ]
    if before.plan.name == after.plan.name:
        yield from (change for change, by_plan in limits if not by_plan)
    else:
        changes = [change for change, _ in limits]
        words = f"{before.plan.name} -> {after.plan.name}{_in_brackets(changes)}"
        yield place.at("plan").change(words, _together(changes))
    yield from _compare(before, after, place)


def _tenant_parts(tenant: Tenant, policy: Policy, keys: int) -> Iterator[str]:
    """What there is to say about a tenant that was added or removed."""
    yield f"plan {tenant.plan.name}"
    plan = policy.plans.get(tenant.plan.name, tenant.plan)
    for field, setting, _, own in _differing(plan, tenant.plan):
        if field != "priority" or tenant.priority is None:
            yield setting.describe(own)
    yield from _described(tenant)
    if keys:
        yield _count(keys, "key")


def _keys(old: Mapping[bytes, Key], new: Mapping[bytes, Key], place: _Place) -> Iterator[Change]:
    """API keys. Those of tenants that come or go are counted with them."""
    added, removed = _only_in(new, old), _only_in(old, new)
    kept: dict[str, list[bytes]] = {}
    for digest, key in new.items():
        if digest in old and old[digest] != key and old[digest].tenant == key.tenant:
            kept.setdefault(key.tenant, []).append(digest)
    for name in dict.fromkeys([*added, *removed, *kept]):
        if (name in place.old.tenants) != (name in place.new.tenants):
            continue
        there = replace(place, path=f"tenants.{name}.keys", subject=name)
        ways: tuple[tuple[Effect, dict[str, list[bytes]]], ...] = (("added", added), ("removed", removed))
        for effect, found in ways:
            if name in found:
                digits = _listed([_digits(digest) for digest in found[name]])
                yield there.change(f"{_count(len(found[name]), 'key')} {effect}: {digits}", effect)
        for digest in kept.get(name, ()):
            yield from _compare(old[digest], new[digest], there.of("key", _digits(digest)))


def _only_in(these: Mapping[bytes, Key], others: Mapping[bytes, Key]) -> dict[str, list[bytes]]:
    """The keys that a tenant has here and not there."""
    found: dict[str, list[bytes]] = {}
    for digest, key in these.items():
        if digest not in others or others[digest].tenant != key.tenant:
            found.setdefault(key.tenant, []).append(digest)
    return found


def _digits(digest: bytes) -> str:
    return digest.hex()[:8]


def _differing(old: Any, new: Any) -> Iterator[tuple[str, _Setting, Any, Any]]:
    """The fields in which two values of one class differ, with how to say it."""
    for field, setting in TABLES[type(new)].items():
        before, after = getattr(old, field), getattr(new, field)
        if before != after:
            yield field, setting, before, after


def _compare(old: Any, new: Any, place: _Place) -> Iterator[Change]:
    for _, setting, before, after in _differing(old, new):
        yield from setting.compare(before, after, place)


def _inside(value: Any) -> str:
    """What is not the default in something that was added or removed, in brackets."""
    return _in_brackets(_described(value))


def _described(value: Any) -> list[str]:
    table = TABLES[type(value)]
    return [
        table[field.name].describe(getattr(value, field.name))
        for field in fields(value)
        if field.name in table and getattr(value, field.name) != _default(field)
    ]


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _in_brackets(parts: Iterable[object]) -> str:
    inside = ", ".join(map(str, parts))
    return f" ({inside})" if inside else ""


def _together(changes: Iterable[Change]) -> Effect:
    """The effect of several changes as one."""
    effects = {change.effect for change in changes}
    return effects.pop() if len(effects) == 1 else "changed"


def _moved(old: Sequence[str], new: Sequence[str]) -> set[str]:
    """The fewest names that have to move for one order to become the other: all but a longest increasing run."""
    place = {name: at for at, name in enumerate(old)}
    kept = [name for name in new if name in place]
    ends: list[int] = []
    lengths = []
    for name in kept:
        length = bisect_left(ends, place[name])
        ends[length : length + 1] = [place[name]]
        lengths.append(length)
    moved = set()
    wanted = len(ends) - 1
    for name, length in zip(reversed(kept), reversed(lengths), strict=True):
        if length == wanted:
            wanted -= 1
        else:
            moved.add(name)
    return moved


def _between(order: Sequence[str], at: int) -> str:
    """Where something stands among others. Nothing where it is alone."""
    if len(order) == 1:
        return ""
    if at == 0:
        return f" first, before {order[1]}"
    if at == len(order) - 1:
        return f" last, after {order[-2]}"
    return f" between {order[at - 1]} and {order[at + 1]}"


def _listed(items: Iterable[str], shown: int = _SHOWN) -> str:
    items = list(items)
    more = f" and {len(items) - shown:,} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


# Values in words


def _member(value: object) -> str:
    if isinstance(value, IPv4Network | IPv6Network) and value.prefixlen == value.max_prefixlen:
        return str(value.network_address)
    return str(value)


def _rates(rates: tuple[Rate, ...]) -> str:
    return ", ".join(map(rate_text, rates)) or "unlimited"


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


def _sources(sources: tuple[tuple[str, str], ...]) -> str:
    return ", ".join(f"{kind} {name}" for kind, name in sources) or "none"


def _percent(share: float) -> str:
    return f"{share * 100:.6f}".rstrip("0").rstrip(".") + "%"


def _top(count: int) -> str:
    return f"top {count:_}" if count else "off"


def _expiry(expires_ns: int) -> str:
    """The last day, as it is written, or the time where it is not midnight."""
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=expires_ns // 1000)
    if moment.time() == time() and moment.toordinal() > 1:
        return (moment - timedelta(days=1)).date().isoformat()
    return moment.isoformat().replace("+00:00", "Z")


# What admits more


def _more(old: Any, new: Any, _: Policy) -> bool:
    return old is not None and new is not None and bool(old <= new)


def _less(old: Any, new: Any, policy: Policy) -> bool:
    return _more(new, old, policy)


def _at_most(old: int | None, new: int | None, _: Policy) -> bool:
    """Bounds, of which none is the highest."""
    return new is None or (old is not None and old <= new)


def _ranked(*order: str) -> _Admits:
    """Words, of which a later one admits more."""

    def admits(old: str | None, new: str | None, _: Policy) -> bool:
        return old in order and new in order and order.index(old) <= order.index(new)

    return admits


def _rates_admit(old: tuple[Rate, ...], new: tuple[Rate, ...], _: Policy) -> bool:
    """Each of the new rates is loose enough to never refuse what some old one lets through."""
    return all(
        any(
            after.amount * rate.period_ns >= rate.amount * after.period_ns and after.burst >= rate.burst for rate in old
        )
        for after in new
    )


def _quota_admits(old: Quota | None, new: Quota | None, _: Policy) -> bool:
    if old is None or new is None:
        return new is None
    days = 31 if (old.span, new.span) == ("day", "month") else 1
    return old.zone == new.zone and old.limit * days <= new.limit


def _priority_admits(old: str | None, new: str | None, policy: Policy) -> bool:
    """Higher classes are listed first."""
    names = [priority.name for priority in policy.priorities]
    return old in names and new in names and names.index(new) <= names.index(old)


def _plan_priority_admits(old: str | None, new: str | None, policy: Policy) -> bool:
    middle = policy.middle_priority
    return _priority_admits(old or middle, new or middle, policy)


_FAILURE = _ranked("deny", "local", "allow")

SECTIONS: Mapping[str, _Compare] = {
    "mode": _Value("mode", admits=_less).compare,
    "identity": _Section("identity").compare,
    "default_plan": _plan_of("defaults.plan"),
    "anonymous_plan": _plan_of("defaults.anonymous_plan"),
    "plans": _plans,
    "tenants": _tenants,
    "keys": _keys,
    "access": _Section("access").compare,
    "routes": _Ordered("routes", "route").compare,
    "priorities": _Ordered("priorities", "priority").compare,
    "priority_header": _Section("priority_header").compare,
    "shedding": _Section("shedding").compare,
    "backend": _Section("backend").compare,
    "responses": _Section("responses").compare,
    "reload_ns": _Value("reload", duration_text, "off").compare,
    "history": _Value("history").compare,
    "metrics": _Section("metrics").compare,
    "status": _Section("status").compare,
}
"""For each field of a policy, how it is compared."""

TABLES: Mapping[type, Mapping[str, _Setting]] = {
    Identity: {
        "tenant": _Value("tenant", _sources),
        "anonymous": _Value("anonymous", admits=_ranked("deny", "shared", "per-ip")),
        "trusted_proxies": _Members("client_ip.trusted_proxies"),
        "trusted_hops": _Value("client_ip.trusted_hops"),
        "ipv6_prefix": _Value("client_ip.ipv6_prefix"),
        "header": _Value("client_ip.header"),
    },
    Plan: {
        "rates": _Value("rate", _rates, admits=_rates_admit),
        "quota": _Value("quota", quota_text, "unlimited", _quota_admits),
        "concurrency": _Value("concurrency", none="unlimited", admits=_at_most),
        "priority": _Value("priority", none="default", admits=_plan_priority_admits),
        "mode": _Value("mode", admits=_less),
    },
    Tenant: {
        "priority": _Value("priority", none="by plan or route", admits=_priority_admits),
        "mode": _Value("mode", admits=_less),
    },
    Key: {"expires_ns": _Value("expires", _expiry, "never", _at_most)},
    Access: {"deny": _Members("deny"), "exempt": _Members("exempt")},
    Route: {
        "paths": _Members("match.path"),
        "methods": _Value("match.methods", lambda methods: _names(sorted(methods)), "all"),
        "exempt": _Value("exempt", admits=_more),
        "mode": _Value("mode", admits=_less),
        "cost": _Value("cost", admits=_less),
        "priority": _Value("priority", none="by plan", admits=_priority_admits),
        "limits": _Ordered("limits", "limit"),
        "on_backend_failure": _Value("on_backend_failure", none="the backend's", admits=_FAILURE),
        "streaming": _Section("streaming"),
    },
    RouteLimit: {
        "rates": _Value("rate", _rates, admits=_rates_admit),
        "quota": _Value("quota", quota_text, "unlimited", _quota_admits),
        "per": _Value("per", _names),
        "cost": _Value("cost", admits=_less),
        "of_plan": _Value("of_plan"),
    },
    Streaming: {
        "max": _Value("max", admits=_more),
        "max_per_tenant": _Value("max_per_tenant", none="unlimited", admits=_at_most),
    },
    Priority: {
        "queue_timeout_ns": _Value("queue.timeout", duration_text, "default", _more),
        "min_share": _Value("min_share", _percent, "default", _more),
    },
    PriorityHeader: {"name": _Value("name"), "raise_from": _Members("raise_from")},
    Shedding: {
        "algorithm": _Value("algorithm"),
        "initial": _Value("limit.initial", admits=_more),
        "min": _Value("limit.min", admits=_more),
        "max": _Value("limit.max", admits=_more),
        "loop_lag_target_ns": _Value("loop_lag_target", duration_text, admits=_more),
        "status": _Value("status"),
        "body_timeout_ns": _Value("body_timeout", duration_text, admits=_at_most),
    },
    BackendSettings: {
        "type": _Value("type"),
        "max_keys": _Value("max_keys"),
        "url": _Secret("url"),
        "timeout_ns": _Value("timeout", duration_text),
        "on_failure": _Value("on_failure", admits=_FAILURE),
        "key_prefix": _Value("key_prefix"),
        "secret": _Secret("secret"),
        "instances": _Value("instances", none="counted"),
        "leases": _Value("leases"),
        "deny_cache": _Value("deny_cache"),
        "snapshot": _Value("snapshot"),
    },
    Responses: {
        "headers": _Value("headers"),
        "detail": _Value("detail"),
        "docs_url": _Value("docs_url"),
    },
    Metrics: {
        "path": _Value("path"),
        "allow": _Members("allow", none="everybody"),
        "tenant_label": _Value("tenant_label", _top),
    },
    Status: {"path": _Value("path"), "allow": _Members("allow"), "token": _Secret("token")},
}
"""For each field of what a policy holds, what it is called in the file and how it is compared."""

SILENT: Mapping[type, frozenset[str]] = {
    Policy: frozenset({"digest", "warnings"}),
    Plan: frozenset({"name"}),
    Tenant: frozenset({"id", "plan"}),
    Key: frozenset({"tenant"}),
    Route: frozenset({"name"}),
    RouteLimit: frozenset({"name"}),
    Priority: frozenset({"name"}),
}
"""Fields without a line: what is no setting, the name of an entry, and what only all of a policy can tell."""
