"""A configuration as people write it: read, checked, and turned into a `Policy`.

`load`, `loads` and `load_mapping` give a policy or raise `ConfigError`, whose text is every mistake at its place.
`check` never raises and gives a `Report`. `json_schema` is for editors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from seawall.config.diagnostics import CODES, ConfigError, Diagnostic, Format, Severity, render
from seawall.config.export import json_schema
from seawall.config.loading import Report, check_mapping, check_path, check_text
from seawall.notation import RateLike
from seawall.policy import Policy
from seawall.rate import Rate

__all__ = [
    "CODES",
    "ConfigError",
    "Diagnostic",
    "Format",
    "Report",
    "Severity",
    "check",
    "json_schema",
    "load",
    "load_mapping",
    "loads",
    "render",
    "simple",
]


def check(path: str | os.PathLike[str]) -> Report:
    """Everything wrong with the file at ``path`` and its includes, and the policy if there are only warnings."""
    return check_path(path)


def load(path: str | os.PathLike[str]) -> Policy:
    """The policy in the file at ``path``. `ConfigError` for whatever keeps it from being one."""
    return _policy(check_path(path))


def loads(text: str, name: str = "<string>", base: Path | None = None) -> Policy:
    """The policy in ``text``. ``name`` stands for it in errors; ``include`` is relative to ``base`` (default: here)."""
    return _policy(check_text(text, name, base))


def load_mapping(mapping: Mapping[str, Any]) -> Policy:
    """The policy in a mapping of the shape of the YAML, by the same rules: ``${VARIABLES}`` are replaced here too."""
    return _policy(check_mapping(mapping))


def simple(rates: RateLike | Sequence[Rate]) -> Policy:
    """One rate for every caller: the policy of ``version: 1`` and ``plans: {default: {rate: ...}}``.

    ``rates`` is anything that may be written for a rate, or rates that have been parsed (none: unlimited).
    """
    if isinstance(rates, str) or not isinstance(rates, Sequence) or not all(isinstance(rate, Rate) for rate in rates):
        return load_mapping({"version": 1, "plans": {"default": {"rate": rates}}})
    parsed = tuple(rate for rate in rates if isinstance(rate, Rate))
    policy = simple("unlimited")
    plans = {name: replace(plan, rates=parsed) for name, plan in policy.plans.items()}
    return replace(policy, plans=plans, digest=sha256(repr(parsed).encode()).hexdigest())


def _policy(report: Report) -> Policy:
    if report.policy is None:
        raise ConfigError(report.errors)
    return report.policy
