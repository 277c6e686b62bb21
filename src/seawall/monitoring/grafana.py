"""Grafana's JSON: panels, variables and rows, without a word about what is on them.

The classic model in its last version (42), which every Grafana since 10 imports. The same code gives the same bytes: no
time, no random uid, and numbers of panels that stay when another row grows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, final

from seawall.cells import Spec
from seawall.metrics import BUILD_INFO, LAST_RELOAD
from seawall.monitoring.promql import TARGET, Scope, total

SCHEMA = 42
COLUMNS = 24
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Steps: TypeAlias = tuple[tuple[float, str], ...]
"""Colours from a value on; what is below the first is green."""
Kind: TypeAlias = Literal["timeseries", "stat", "table", "heatmap"]

SEEN = Scope(tuple(f'{label}=~"${label}"' for label in TARGET), "$__rate_interval")
"""What the variables at the top of a dashboard select."""


@final
@dataclass(frozen=True, slots=True)
class Query:
    """``legend`` names the series by its labels, as Grafana writes them: ``{{outcome}}``.

    In a table it is the column of the values, which has none where only their labels are of interest.
    """

    expression: str
    legend: str = ""


@final
@dataclass(frozen=True, slots=True)
class Panel:
    """``unit`` is one of Grafana's. ``words`` stand for values, ``nothing`` for none at all."""

    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 8
    steps: Steps = ()
    stacked: bool = False
    words: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    nothing: str = ""
    units: Mapping[str, str] = field(default_factory=dict)
    """Of columns of a table that have another unit than the rest."""

    def render(self, number: int, x: int, y: int) -> dict[str, Any]:
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": SOURCE,
            "gridPos": {"h": self.height, "w": self.width, "x": x, "y": y},
            "fieldConfig": {"defaults": self._defaults(), "overrides": self._overrides()},
            "options": _OPTIONS[self.kind],
            "targets": [self._target(at, query) for at, query in enumerate(self.queries)],
            **({"transformations": self._columns()} if self.kind == "table" else {}),
        }

    def _defaults(self) -> dict[str, Any]:
        defaults: dict[str, Any] = {"unit": self.unit}
        if self.kind == "timeseries":
            defaults["min"] = 0
            defaults["color"] = {"mode": "palette-classic"}
            defaults["custom"] = {
                "drawStyle": "line",
                "lineWidth": 1,
                "fillOpacity": 30 if self.stacked else 10,
                "showPoints": "never",
                "spanNulls": False,
                "stacking": {"mode": "normal" if self.stacked else "none", "group": "A"},
                "thresholdsStyle": {"mode": "dashed" if self.steps else "off"},
            }
        elif self.kind == "stat":
            defaults["color"] = {"mode": "thresholds"}
        if self.kind != "heatmap":
            defaults["thresholds"] = {
                "mode": "absolute",
                "steps": [
                    {"color": "green", "value": None},
                    *({"color": colour, "value": value} for value, colour in self.steps),
                ],
            }
        if self.words:
            options = {
                value: {"index": at, "text": text, "color": colour}
                for at, (value, (text, colour)) in enumerate(self.words.items())
            }
            defaults["mappings"] = [{"type": "value", "options": options}]
        if self.nothing:
            defaults["noValue"] = self.nothing
        return defaults

    def _overrides(self) -> list[dict[str, Any]]:
        return [
            {"matcher": {"id": "byName", "options": column}, "properties": [{"id": "unit", "value": unit}]}
            for column, unit in self.units.items()
        ]

    def _target(self, at: int, query: Query) -> dict[str, Any]:
        now = self.kind == "table"
        return {
            "refId": chr(ord("A") + at),
            "datasource": SOURCE,
            "editorMode": "code",
            "expr": query.expression,
            "legendFormat": query.legend or "__auto",
            "format": {"table": "table", "heatmap": "heatmap"}.get(self.kind, "time_series"),
            "instant": now,
            "range": not now,
        }

    def _columns(self) -> list[dict[str, Any]]:
        # What Grafana calls the values of several queries, once they are one table.
        values = {f"Value #{chr(ord('A') + at)}": query.legend for at, query in enumerate(self.queries)}
        names = {value: name for value, name in values.items() if name}
        hidden = {"Time": True, **{value: True for value, name in values.items() if not name}}
        options = {"excludeByName": hidden, "indexByName": {}, "renameByName": names}
        sort = [{"field": next(iter(names.values())), "desc": True}] if names else []
        return [
            {"id": "merge", "options": {}},
            {"id": "organize", "options": options},
            {"id": "sortBy", "options": {"fields": {}, "sort": sort}},
        ]


_OPTIONS: Mapping[Kind, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "colorMode": "background",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "auto",
        "wideLayout": True,
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    },
    "table": {"cellHeight": "sm", "showHeader": True},
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5, "fill": "dark-orange"},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "showValue": "never",
        "tooltip": {"mode": "single", "yHistogram": False},
        "yAxis": {"axisPlacement": "left", "unit": "s"},
    },
}


@final
@dataclass(frozen=True, slots=True)
class Variable:
    """Values of ``label`` to choose from. ``every`` is the regular expression of all of them."""

    name: str
    label: str
    spec: Spec
    every: str = ".+"
    within: tuple[str, ...] = ()

    def render(self) -> dict[str, Any]:
        if self.name not in {*self.spec.labels, *TARGET}:
            raise ValueError(f"{self.spec.name} has no label {self.name}")
        matchers = ", ".join(f'{label}=~"${label}"' for label in self.within)
        query = f"label_values({self.spec.name}{matchers and f'{{{matchers}}}'}, {self.name})"
        return {
            "name": self.name,
            "label": self.label,
            "type": "query",
            "datasource": SOURCE,
            "definition": query,
            "query": {"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": self.every,
            "current": {"text": ["All"], "value": ["$__all"]},
            "options": [],
            "regex": "",
            "hide": 0,
        }


@final
@dataclass(frozen=True, slots=True)
class Dashboard:
    """``rows`` have a heading and panels, which fill lines of 24 columns from the left."""

    name: str
    title: str
    description: str
    rows: Mapping[str, Sequence[Panel]]
    variables: Sequence[Variable] = ()

    def render(self) -> str:
        """The file."""
        return json.dumps(self._document(), indent=2, ensure_ascii=False) + "\n"

    def _document(self) -> dict[str, Any]:
        choices = (
            # `.*` is also no namespace at all.
            Variable("namespace", "Namespace", BUILD_INFO, every=".*"),
            Variable("job", "Job", BUILD_INFO, within=("namespace",)),
            Variable("instance", "Instance", BUILD_INFO, within=("namespace", "job")),
            *self.variables,
        )
        return {
            "uid": f"seawall-{self.name}",
            "title": self.title,
            "description": self.description,
            "tags": ["seawall"],
            "schemaVersion": SCHEMA,
            "version": 1,
            "id": None,
            "editable": True,
            "graphTooltip": 1,
            "timezone": "browser",
            "time": {"from": "now-3h", "to": "now"},
            "refresh": "30s",
            "annotations": {"list": [_BUILT_IN, _reloads()]},
            "links": [_LINKS],
            "templating": {"list": [_DATASOURCE, *(choice.render() for choice in choices)]},
            "panels": list(self._panels()),
        }

    def _panels(self) -> Iterable[dict[str, Any]]:
        y = 0
        for row, (heading, panels) in enumerate(self.rows.items(), start=1):
            yield {
                "id": row * 100,
                "type": "row",
                "title": heading,
                "collapsed": False,
                "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
                "panels": [],
            }
            x, y, tallest = 0, y + 1, 0
            for at, panel in enumerate(panels, start=1):
                if x + panel.width > COLUMNS:
                    x, y, tallest = 0, y + tallest, 0
                yield panel.render(row * 100 + at, x, y)
                x, tallest = x + panel.width, max(tallest, panel.height)
            y += tallest


_DATASOURCE = {
    "name": "datasource",
    "label": "Data source",
    "type": "datasource",
    "query": "prometheus",
    "multi": False,
    "includeAll": False,
    "current": {},
    "options": [],
    "refresh": 1,
    "regex": "",
    "hide": 0,
}
_LINKS = {
    "title": "Seawall",
    "type": "dashboards",
    "tags": ["seawall"],
    "asDropdown": False,
    "includeVars": True,
    "keepTime": True,
    "targetBlank": False,
    "icon": "external link",
    "tooltip": "",
    "url": "",
}
_BUILT_IN = {
    "builtIn": 1,
    "datasource": {"type": "grafana", "uid": "-- Grafana --"},
    "enable": True,
    "hide": True,
    "iconColor": "rgba(0, 211, 255, 1)",
    "name": "Annotations & Alerts",
    "type": "dashboard",
}


def _reloads() -> dict[str, Any]:
    changed = f"changes({SEEN.series(LAST_RELOAD)}[2m])"  # twice the step
    return {
        "name": "Policy changed",
        "datasource": SOURCE,
        "enable": True,
        "expr": f"{total(changed, 'job')} > 0",
        "iconColor": "purple",
        "step": "1m",
        "titleFormat": "{{job}}: another policy",
    }
