"""PromQL out of `Spec` objects: a label that a metric does not have is an error here.

Prometheus itself would find nothing and say nothing, which on a dashboard looks like a good day.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, final

from seawall.cells import Spec

TARGET = ("namespace", "job", "instance")
"""What Prometheus says about where a sample comes from. Outside of Kubernetes there is no namespace, which an
aggregation by it does not mind."""

Part: TypeAlias = Literal["", "bucket", "count", "sum"]
"""Which of a histogram's series; all other metrics have one."""


@final
@dataclass(frozen=True, slots=True)
class Unlike:
    """Any value but this one."""

    value: str


Value: TypeAlias = str | tuple[str, ...] | Unlike
"""Equal to, one of, or anything but."""
Where: TypeAlias = Mapping[str, Value]
ANY: Where = MappingProxyType({})


@final
@dataclass(frozen=True, slots=True)
class Scope:
    """What all queries of one place have in common.

    ``matchers`` are in every selector, as PromQL has them. ``window`` is the range of rates where no other is named.
    """

    matchers: tuple[str, ...] = ()
    window: str = "5m"

    def select(self, name: str, matchers: Iterable[str] = ()) -> str:
        """A selector of what may have no `Spec`: a recorded value, or what Prometheus says of its targets."""
        found = (*self.matchers, *matchers)
        return name + (f"{{{', '.join(found)}}}" if found else "")

    def series(self, spec: Spec, where: Where = ANY, part: Part = "") -> str:
        """A selector of a metric."""
        if bool(part) != (spec.kind == "histogram"):
            raise ValueError(f"{spec.name} is a {spec.kind}: {'it has no parts' if part else 'name its part'}")
        _check(spec, where, part)
        return self.select(f"{spec.name}{part and f'_{part}'}", (matcher(*each) for each in where.items()))

    def rate(self, spec: Spec, *by: str, where: Where = ANY, part: Part = "", over: str = "") -> str:
        """How much is counted a second, over all series or for each value of the labels ``by``."""
        return self._growth("rate", spec, by, where, part, over)

    def increase(self, spec: Spec, *by: str, where: Where = ANY, over: str = "") -> str:
        """How much was counted within a time."""
        return self._growth("increase", spec, by, where, "", over)

    def _growth(self, function: str, spec: Spec, by: tuple[str, ...], where: Where, part: Part, over: str) -> str:
        if spec.kind == "gauge":
            raise ValueError(f"{spec.name} is a gauge, which has no {function}")
        _check(spec, by, part)
        return total(f"{function}({self.series(spec, where, part)}[{over or self.window}])", *by)

    def gauge(self, function: Literal["sum", "max", "min"], spec: Spec, *by: str, where: Where = ANY) -> str:
        """A gauge over all series, or for each value of the labels ``by``."""
        if spec.kind != "gauge":
            raise ValueError(f"{spec.name} is a {spec.kind}, of which only the growth says something")
        _check(spec, by, "")
        return total(self.series(spec, where), *by, function=function)

    def quantile(self, share: float, spec: Spec, *by: str, where: Where = ANY) -> str:
        """What ``share`` (0..1) of the observed are below, for each value of the labels ``by``."""
        return f"histogram_quantile({share}, {self.rate(spec, 'le', *by, where=where, part='bucket')})"


def total(expression: str, *by: str, function: str = "sum") -> str:
    """An aggregation, over everything or for each value of the labels ``by``."""
    return f"{function} by ({', '.join(by)}) ({expression})" if by else f"{function}({expression})"


def matcher(label: str, value: Value) -> str:
    """A label and what it has to be."""
    if isinstance(value, Unlike):
        return f"{label}!={_quoted(value.value)}"
    return f"{label}={_quoted(value)}" if isinstance(value, str) else f"{label}=~{_quoted('|'.join(value))}"


def _check(spec: Spec, labels: Iterable[str], part: Part) -> None:
    known = {*spec.labels, *TARGET, *(["le"] if part == "bucket" else [])}
    unknown = [label for label in labels if label not in known]
    if unknown:
        raise ValueError(f"{spec.name} has the labels {spec.labels}, not {', '.join(unknown)}")


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
