"""What no single value shows: names that nobody defines, and what is defined twice, over all files.

These checks look at the data as it was read and not at the models, so that they also run where a model has refused
something: everything that is wrong is to be said in one run. A value of the wrong type is therefore simply skipped
here; its own error has been noted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from seawall.config import values
from seawall.config.compile import default_plan
from seawall.config.document import Document, Path
from seawall.notation import NotationError, parse_rates, shorten, suggestion
from seawall.policy import Policy

_DEFAULT_PRIORITIES = tuple(priority.name for priority in Policy().priorities)
VERSION = 1
_NAME_LENGTH = 64


def check(main: Document, included: Sequence[Document]) -> None:
    """Note in each document what is wrong with it in the light of the others."""
    version = main.root.get("version")
    if isinstance(version, int) and not isinstance(version, bool) and version != VERSION:
        main.report("E014", f"version {version} is not known to this release; write version: {VERSION}", ("version",))
    _Names(main).check()
    _tenants(main, included)
    _routes(main)


@final
class _Names:
    """The names one file defines, and whether what refers to them is right."""

    def __init__(self, main: Document) -> None:
        self.main = main
        self.root = main.root
        plans, priorities = self.root.get("plans", {}), self.root.get("priorities", {})
        # Where the definitions themselves could not be read, every reference would seem wrong.
        self.plans = list(plans) if isinstance(plans, dict) else None
        self.priorities = (list(priorities) or list(_DEFAULT_PRIORITIES)) if isinstance(priorities, dict) else None

    def check(self) -> None:
        for section in ("plan", "anonymous_plan"):
            self.reference(
                self.main, "plan", self.plans, _mapping(self.root, "defaults").get(section), "defaults", section
            )
        for name, plan in _entries(self.root, "plans"):
            self.reference(self.main, "priority", self.priorities, plan.get("priority"), "plans", name, "priority")
        for index, route in _routes_of(self.root):
            self.reference(self.main, "priority", self.priorities, route.get("priority"), "routes", index, "priority")

    def tenant(self, document: Document, name: str, tenant: Mapping[str, Any]) -> None:
        self.reference(document, "plan", self.plans, tenant.get("plan"), "tenants", name, "plan")
        if "priority" in tenant:
            self.reference(document, "priority", self.priorities, tenant["priority"], "tenants", name, "priority")
        overridden = tenant.get("overrides")
        if isinstance(overridden, dict) and "priority" in overridden:
            path = ("tenants", name, "overrides", "priority")
            self.reference(document, "priority", self.priorities, overridden["priority"], *path)

    def reference(self, document: Document, kind: str, known: list[str] | None, value: Any, *path: str | int) -> None:
        if known is None or not isinstance(value, str) or not value or value in known or document.full:
            return
        if document.written(path) is not None:
            document.report("E030", f"{shorten(document.written(path))} does not expand to a {kind} of this file", path)
            return
        listed = f"defined are {', '.join(known[:10])}" if known else f"this file defines no {kind}"
        document.report("E030", f"unknown {kind} {shorten(value)}{suggestion(value, known, otherwise=listed)}", path)


def _tenants(main: Document, included: Sequence[Document]) -> None:
    names = _Names(main)
    defaults = _mapping(main.root, "defaults").get("plan")
    default = default_plan(defaults if isinstance(defaults, str) else None, names.plans or ())
    tenants: dict[str, Document] = {}
    keys: dict[str, tuple[Document, Path]] = {}
    without_plan: list[tuple[Document, str]] = []
    for document in (main, *included):
        for name, tenant in _entries(document.root, "tenants"):
            first = tenants.setdefault(name, document)
            if first is not document:
                place = f"{first.name}:{first.line(('tenants', name))}" if first.text is not None else first.name
                message = f"tenant {shorten(name)} is defined twice (first at {place})"
                document.report("E031", message, ("tenants", name), at_key=True)
                continue
            names.tenant(document, name, tenant)
            if "plan" not in tenant:
                without_plan.append((document, name))
            if "keys" in tenant:
                _keys(document, name, tenant["keys"], keys)
    if names.plans is None or not main.complete:
        return
    if default is None and without_plan:
        document, name = without_plan[0]
        more = f" (and {len(without_plan) - 1} more)" if len(without_plan) > 1 else ""
        message = f"tenant {shorten(name)}{more} has no plan, and no plan is the default; set defaults.plan"
        document.report("E034", message, ("tenants", name), at_key=True)
    elif default is None and names.plans:
        _who_else_needs_a_plan(main, names.plans)


def _who_else_needs_a_plan(main: Document, plans: list[str]) -> None:
    identity = _mapping(main.root, "identity")
    sources = identity.get("tenant")
    if isinstance(sources, list) and any(isinstance(source, dict) and "state" in source for source in sources):
        message = "which plan has a tenant from scope['state'] that is not listed? Set defaults.plan"
    elif (
        "anonymous" not in plans
        and "anonymous_plan" not in _mapping(main.root, "defaults")
        and identity.get("anonymous") != "deny"
    ):
        message = "callers without a tenant have no plan: set defaults.anonymous_plan, or name a plan 'anonymous'"
    else:
        return
    main.report("E034", message, ("plans",), at_key=True)


def _keys(document: Document, tenant: str, listed: Any, seen: dict[str, tuple[Document, Path]]) -> None:
    if not isinstance(listed, list):
        return
    for index, key in enumerate(listed):
        digest = key.get("hash") if isinstance(key, dict) else key
        if not isinstance(digest, str):
            continue
        path: Path = ("tenants", tenant, "keys", index)
        first, where = seen.setdefault(digest.lower(), (document, path))
        if (first, where) != (document, path) and values.is_key_hash(digest):
            place = f"{first.name}:{first.line(where)}" if first.text is not None else first.name
            message = f"this key is listed twice (first for tenant {shorten(str(where[1]))}, {place})"
            document.report("E031", message, path)


def _routes(main: Document) -> None:
    routes: dict[str, Path] = {}
    limits: dict[str, Path] = {}
    for index, route in _routes_of(main.root):
        name = route.get("name")
        if isinstance(name, str):
            _once(main, "route", name, routes, ("routes", index, "name"))
        for limit_name, limit in _entries(route, "limits"):
            for derived in limit_names(limit_name, limit):
                path = ("routes", index, "limits", limit_name)
                _once(main, "limit", derived, limits, path)
                if len(limit_name) <= _NAME_LENGTH < len(derived):
                    message = f"{shorten(limit_name)} is too long: it also makes a policy named {shorten(derived)}"
                    main.report("E032", message, path, at_key=True)


def _once(main: Document, kind: str, name: str, seen: dict[str, Path], path: Path) -> None:
    first = seen.setdefault(name, path)
    if first == path:
        return
    if main.written(path) is not None:
        name = str(main.written(path))
    message = f"{kind} {shorten(name)} is defined twice (first at line {main.line(first)})"
    if main.text is None:
        message = f"{kind} {shorten(name)} is defined twice"
    main.report("E031", message, path, at_key=kind == "limit")


def limit_names(name: str, limit: Mapping[str, Any]) -> Iterator[str]:
    """The names of the policies that one route limit makes: one for each rate, one for its quota."""
    rates = _count_rates(limit.get("rate"))
    yield name
    for number in range(2, rates + 1):
        yield f"{name}-{number}"
    if rates and "quota" in limit:
        yield f"{name}-quota"


def _count_rates(written: Any) -> int:
    try:
        if isinstance(written, dict):
            written = written.get("limit")
        if isinstance(written, list):
            return sum(_count_rates(item) for item in written)
        return len(parse_rates(written)) if isinstance(written, str) else 0
    except NotationError:
        return 0


def _mapping(node: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = node.get(key)
    return value if isinstance(value, dict) else {}


def _entries(node: Mapping[str, Any], key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, value in _mapping(node, key).items():
        if isinstance(value, dict):
            yield name, value


def _routes_of(root: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    routes = root.get("routes")
    if isinstance(routes, list):
        for index, route in enumerate(routes):
            if isinstance(route, dict):
                yield index, route
