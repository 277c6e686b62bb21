"""A tenant as a database may describe it: what the file may say of one, by the same rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from seawall.config import schema
from seawall.config.compile import tenant_of
from seawall.config.diagnostics import ConfigError, Diagnostic
from seawall.config.document import adopt
from seawall.config.problems import validate
from seawall.config.redaction import seal
from seawall.policy import Policy, Tenant

RuntimeTenant: TypeAlias = schema.RuntimeTenant


def check_tenant(described: Mapping[str, Any], *, by_key: bool = False) -> RuntimeTenant:
    """``described``, checked; with its id, if it was found ``by_key``. Raises `ConfigError` for what is wrong."""
    if not isinstance(described, Mapping):
        raise _wrong(f"a tenant is a mapping such as {{'plan': 'pro'}}, or None, not {type(described).__name__}")
    # A column without a value is no mistake. Variables of the environment are for the file alone.
    document = adopt({key: value for key, value in described.items() if value is not None}, "<tenant>", {})
    written = validate(document, schema.RuntimeTenant) if document.complete else None
    if written is None or document.problems:
        raise ConfigError(seal(document))
    if by_key and written.id is None:
        raise _wrong("a tenant that is found by an API key has to say its 'id'")
    return written


def compile_tenant(name: str, written: RuntimeTenant, policy: Policy) -> Tenant:
    """The tenant that ``written`` makes by the plans of ``policy``. Raises `ConfigError` for one that it has not."""
    if (written.plan or policy.default_plan or "") not in policy.plans:
        raise _wrong(f"tenant '{name}' is on the plan '{written.plan}', which is not in the file")
    tenant = tenant_of(name, written, policy.plans, policy.default_plan)
    if tenant.priority is not None and tenant.priority not in {one.name for one in policy.priorities}:
        raise _wrong(f"tenant '{name}' has the priority '{tenant.priority}', which is not in the file")
    return tenant


def _wrong(message: str) -> ConfigError:
    return ConfigError([Diagnostic("<tenant>", 0, 0, "error", "E014", message)])
