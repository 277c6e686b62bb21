"""Alerts fire for what they are for and for nothing else, and each has a page that says what to do."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from seawall.metrics import BACKEND_DURATION, REQUESTS, SPECS
from seawall.monitoring.alerts import BURNS, Alert, Settings, groups, render
from serving import ROOT

RUNBOOKS = ROOT / "docs" / "runbooks"
SETTINGS = Settings()
ALERTS = [rule for group in groups(SETTINGS) for rule in group.rules if isinstance(rule, Alert)]
NAMES = list(dict.fromkeys(alert.name for alert in ALERTS))

promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")


def rules(settings: Settings = SETTINGS) -> dict[str, dict[str, Any]]:
    """Alerts by name and window, as Prometheus reads them."""
    found = {}
    for group in yaml.safe_load(render(groups(settings), settings))["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                found[rule["alert"] + rule["labels"].get("long", "")] = rule
    return found


# Unit tests, as promtool runs them


@dataclass(frozen=True)
class Case:
    """Series, and what is true of an alert after a time.

    ``firing`` has the labels of each alert that fires and what its annotations show as the value.
    """

    alert: str
    says: str
    series: Mapping[str, str]
    at: str
    firing: Sequence[tuple[Mapping[str, str], str]] = ()
    every: str = "1m"


SHOP = {"job": "shop", "namespace": "prod"}
WHERE = 'job="shop", namespace="prod"'


def requests(**outcomes: str) -> dict[str, str]:
    return {
        f'seawall_requests_total{{{WHERE}, instance="a", outcome="{outcome}", priority="normal"}}': values
        for outcome, values in outcomes.items()
    }


def shop(name: str, **labels: str) -> str:
    own = "".join(f', {label}="{value}"' for label, value in labels.items())
    return f"{name}{{{WHERE}{own}}}"


def burn(long: str, short: str, value: str) -> tuple[Mapping[str, str], str]:
    return {**SHOP, "long": long, "short": short}, value


def calls(under_5ms: str, all_: str) -> dict[str, str]:
    """A histogram of which so many are below 5 ms and all below 25 ms."""
    name = f"{BACKEND_DURATION.name}_bucket"
    counts = {"0.001": "0x60", "0.005": under_5ms, "0.01": under_5ms, "0.025": all_, "+Inf": all_}
    return {shop(name, instance="a", backend="redis", le=le): values for le, values in counts.items()}


def reloads(failed: str, loaded: str) -> dict[str, str]:
    return {
        shop("seawall_config_reloads_total", instance="a", result="failed"): failed,
        shop("seawall_config_last_reload_success_timestamp_seconds", instance="a"): loaded,
    }


def tenant(name: str, limited: str, allowed: str) -> dict[str, str]:
    return {
        shop("seawall_tenant_requests_total", instance="a", tenant=name, outcome=outcome): values
        for outcome, values in (("limited", limited), ("allowed", allowed))
    }


def checks(near: str, allow: str) -> dict[str, str]:
    return {
        shop("seawall_policy_checks_total", instance="a", plan="free", policy="rate", decision=decision): values
        for decision, values in (("near", near), ("allow", allow))
    }


INSTANCE = {**SHOP, "instance": "a"}
FAST, SLOW = "SeawallShedBudgetBurnFast", "SeawallShedBudgetBurnSlow"
BUILD = shop("seawall_build_info", instance="a", version="1")

CASES = [
    Case(
        FAST,
        "two of a hundred are shed for an hour",
        requests(allowed="0+980x70", shed="0+20x70"),
        "65m",
        [burn("1h", "5m", "2%"), burn("6h", "30m", "2%")],
    ),
    Case(
        FAST,
        "one of a hundred spends the budget slower",
        requests(allowed="0+990x70", shed="0+10x70"),
        "65m",
        [burn("6h", "30m", "1%")],
    ),
    Case(FAST, "one in two hundred can wait", requests(allowed="0+995x70", shed="0+5x70"), "65m"),
    Case(
        FAST,
        "ten minutes after it is over, only the long pair still speaks of it",
        requests(allowed="0+950x60 57950+1000x60", shed="0+50x60 3000x60"),
        "70m",
        [burn("6h", "30m", "4.289%")],
    ),
    Case(
        FAST,
        "it is over after the short window",
        requests(allowed="0+950x60 57950+1000x60", shed="0+50x60 3000x60"),
        "95m",
    ),
    Case(
        FAST,
        "one of twenty in a quiet hour wakes nobody",
        requests(allowed="0+0.3x70", shed="0+0.05x70"),
        "65m",
    ),
    Case(
        FAST,
        "callers over their plans are no overload",
        requests(allowed="0+1000x70", limited="0+9000x70", denied="0+500x70", shed="0x70"),
        "65m",
    ),
    Case(
        SLOW,
        "four of a thousand for a day",
        requests(allowed="0+4980x312", shed="0+20x312"),
        "26h",
        [burn("1d", "2h", "0.4%"), burn("3d", "6h", "0.4%")],
        every="5m",
    ),
    Case(
        SLOW,
        "three of two thousand for three days",
        requests(allowed="0+3994x870", shed="0+6x870"),
        "72h",
        [burn("3d", "6h", "0.15%")],
        every="5m",
    ),
    Case(SLOW, "half the budget is what it is for", requests(allowed="0+3998x870", shed="0+2x870"), "72h", every="5m"),
    Case(
        "SeawallCriticalShed",
        "one request of the first class is shed",
        {shop(REQUESTS.name, instance="a", outcome="shed", priority="critical"): "0x5 1x20"},
        "8m",
        [(SHOP, "1")],
    ),
    Case(
        "SeawallCriticalShed",
        "others are what sheds are for",
        {
            shop(REQUESTS.name, instance="a", outcome="shed", priority="low"): "0+100x20",
            shop(REQUESTS.name, instance="a", outcome="shed", priority="critical"): "7x20",
        },
        "8m",
    ),
    Case(
        "SeawallQueueSaturated",
        "half of those who wait give up",
        {
            shop("seawall_queue_wait_seconds_count", instance="a", priority="low", result=result): "0+60x30"
            for result in ("admitted", "queue_timeout")
        },
        "20m",
        [(SHOP, "50%")],
    ),
    Case(
        "SeawallQueueSaturated",
        "a tenth is what a queue is for",
        {
            shop("seawall_queue_wait_seconds_count", instance="a", priority="low", result="admitted"): "0+90x30",
            shop("seawall_queue_wait_seconds_count", instance="a", priority="low", result="queue_full"): "0+10x30",
        },
        "20m",
    ),
    Case(
        "SeawallDeadlinesMissed",
        "one of twenty comes too late",
        requests(allowed="0+95x60", expired="0+5x60"),
        "45m",
        [(SHOP, "5%")],
    ),
    Case("SeawallDeadlinesMissed", "one of a thousand", requests(allowed="0+999x60", expired="0+1x60"), "45m"),
    Case(
        "SeawallBackendDown",
        "two of three instances are without it for two minutes",
        {
            shop("seawall_backend_up", instance="a", backend="redis"): "1 0x9",
            shop("seawall_backend_up", instance="b", backend="redis"): "1 0x9",
            shop("seawall_backend_up", instance="c", backend="redis"): "1x10",
        },
        "3m",
        [({**SHOP, "backend": "redis"}, "2")],
    ),
    Case(
        "SeawallBackendDown",
        "a failover is short",
        {shop("seawall_backend_up", instance="a", backend="redis"): "1 0 1x9"},
        "3m",
    ),
    Case(
        "SeawallFallbackActive",
        "decided alone for a quarter of an hour",
        {shop("seawall_backend_fallback_decisions_total", instance="a", action="local"): "0+60x30"},
        "15m",
        [({**SHOP, "action": "local"}, "1")],
    ),
    Case(
        "SeawallFallbackActive",
        "once, at a failover",
        {shop("seawall_backend_fallback_decisions_total", instance="a", action="local"): "0 60x30"},
        "15m",
    ),
    Case(
        "SeawallBackendSlow",
        "one of ten calls takes 10 to 25 ms",
        calls("0+540x30", "0+600x30"),
        "20m",
        [({**SHOP, "backend": "redis"}, "23.5ms")],
    ),
    Case("SeawallBackendSlow", "none does", calls("0+600x30", "0+600x30"), "20m"),
    Case(
        "SeawallBackendMismatch",
        "one answer was none",
        {shop("seawall_backend_requests_total", instance="a", backend="redis", result="mismatch"): "0x10 1x20"},
        "15m",
        [({**SHOP, "backend": "redis"}, "")],
    ),
    Case(
        "SeawallBackendMismatch",
        "time-outs are another matter",
        {
            shop("seawall_backend_requests_total", instance="a", backend="redis", result="timeout"): "0+1x30",
            shop("seawall_backend_requests_total", instance="a", backend="redis", result="mismatch"): "0x30",
        },
        "15m",
    ),
    Case(
        "SeawallKeysNearlyFull",
        "addresses come near the cap",
        {shop("seawall_tracked_keys", instance="a", store="address"): "95000x30"},
        "15m",
        [({**INSTANCE, "store": "address"}, "95000")],
    ),
    Case(
        "SeawallKeysNearlyFull",
        "listed tenants have no cap",
        {
            shop("seawall_tracked_keys", instance="a", store="address"): "80000x30",
            shop("seawall_tracked_keys", instance="a", store="tenant"): "200000x30",
        },
        "15m",
    ),
    Case(
        "SeawallReloadFailed",
        "the file was broken four hours ago and still is",
        reloads("0x60 1x300", "60x360"),
        "5h",
        [(INSTANCE, "1970-01-01 00:01:00 +0000 UTC")],
    ),
    Case(
        "SeawallReloadFailed",
        "it is known two minutes after",
        reloads("0x60 1x300", "60x360"),
        "63m",
        [(INSTANCE, "1970-01-01 00:01:00 +0000 UTC")],
    ),
    Case("SeawallReloadFailed", "it was mended", reloads("0x60 1x300", "60x65 3960x295"), "70m"),
    Case("SeawallReloadFailed", "it was changed without a mistake", reloads("3x360", "60x65 3960x295"), "70m"),
    Case(
        "SeawallConfigSkew",
        "one of three instances runs another policy",
        {
            shop("seawall_config_info", instance="a", hash="1", mode="enforce"): "1x30",
            shop("seawall_config_info", instance="b", hash="1", mode="enforce"): "1x30",
            shop("seawall_config_info", instance="c", hash="2", mode="enforce"): "1x30",
        },
        "15m",
        [(SHOP, "2")],
    ),
    Case(
        "SeawallConfigSkew",
        "a rollout, another job, and an instance that is gone",
        {
            shop("seawall_config_info", instance="a", hash="1", mode="enforce"): "1x10 stale",
            shop("seawall_config_info", instance="a", hash="2", mode="enforce"): "_x8 1x20",
            'seawall_config_info{job="other", namespace="prod", instance="a", hash="3", mode="enforce"}': "1x30",
        },
        "20m",
    ),
    Case(
        "SeawallTargetDown",
        "one instance is not scraped any more",
        {BUILD: "1x10 stale", shop("up", instance="a"): "1x10 0x30"},
        "20m",
        [(INSTANCE, "")],
    ),
    Case(
        "SeawallTargetDown",
        "what never had metrics of Seawall, and what a rollout has removed",
        {shop("up", instance="b"): "0x30", BUILD: "1x10 stale", shop("up", instance="a"): "1x10 stale"},
        "20m",
    ),
    Case("SeawallAbsent", "the whole job is gone", {BUILD: "1x10 stale"}, "20m", [(SHOP, "shop")]),
    Case(
        "SeawallAbsent",
        "there has never been any",
        {"up": "1x30"},
        "20m",
        [({}, "any service")],
    ),
    Case(
        "SeawallAbsent",
        "one instance of two is gone",
        {BUILD: "1x10 stale", shop("seawall_build_info", instance="b", version="1"): "1x30"},
        "20m",
    ),
    Case(
        "SeawallTenantRefused",
        "two of three requests of a tenant are refused for half an hour",
        tenant("acme", "0+120x60", "0+60x60"),
        "35m",
        [({**SHOP, "tenant": "acme"}, "66.67%")],
    ),
    Case(
        "SeawallTenantRefused",
        "a tenth, or of all others together, or of a handful",
        {
            **tenant("acme", "0+10x60", "0+90x60"),
            **tenant("other", "0+90x60", "0+10x60"),
            **tenant("tiny", "0+0.2x60", "0+0.1x60"),
        },
        "35m",
    ),
    Case(
        "SeawallPlanNearLimit",
        "most decisions are near the limit for two hours",
        checks("0+80x180", "0+20x180"),
        "150m",
        [({**SHOP, "plan": "free", "policy": "rate"}, "80%")],
    ),
    Case("SeawallPlanNearLimit", "one of five", checks("0+20x180", "0+80x180"), "150m"),
]


def annotations(case: Case, labels: Mapping[str, str], value: str) -> dict[str, str]:
    """What the annotations read once their labels and the value are filled in."""
    [alert] = [a for a in ALERTS if a.name == case.alert and a.labels.get("long") == labels.get("long")]
    filled = {}
    for name, text in (("summary", alert.summary), ("description", alert.description)):
        text = re.sub(r"\{\{ with .*? end \}\}|\{\{ \$value.*?\}\}", value, text)
        filled[name] = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels[found[1]], text)
    return {**filled, "runbook_url": f"docs/runbooks/{case.alert}.md"}


def unit_tests(every: str) -> dict[str, Any]:
    """The file that promtool runs. Slow ones are evaluated every five minutes, or they take a minute."""
    severity = {alert.name: alert.severity for alert in ALERTS}
    return {
        "rule_files": ["alerts.yml"],
        "evaluation_interval": every,
        "tests": [
            {
                "name": f"{case.alert}: {case.says}",
                "interval": case.every,
                "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
                "alert_rule_test": [
                    {
                        "eval_time": case.at,
                        "alertname": case.alert,
                        "exp_alerts": [
                            {
                                "exp_labels": {**labels, "severity": severity[case.alert]},
                                "exp_annotations": annotations(case, labels, value),
                            }
                            for labels, value in case.firing
                        ],
                    }
                ],
            }
            for case in CASES
            if case.every == every
        ],
    }


@promtool
@pytest.mark.slow
@pytest.mark.parametrize("every", ["1m", "5m"])
def test_alerts_fire_for_what_they_are_for_and_for_nothing_else(every: str, tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").write_text(render(groups(SETTINGS), SETTINGS), encoding="utf-8")
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(unit_tests(every)), encoding="utf-8")
    done = subprocess.run(
        ["promtool", "test", "rules", "tests.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tried_firing_and_not_firing() -> None:
    for fires in (True, False):
        assert {case.alert for case in CASES if bool(case.firing) is fires} == set(NAMES)


@promtool
@pytest.mark.parametrize(
    "settings", [Settings(), Settings(Decimal(99), "first", 1000, 0.05, 'a"b', "https://docs.example")]
)
def test_promtool_accepts_the_rules(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "alerts.yml"
    file.write_text(render(groups(settings), settings), encoding="utf-8")
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS) + 7} rules found" in done.stdout


# Settings


@pytest.mark.parametrize(
    ("objective", "thresholds"),
    [
        ("99.9", ["0.0144", "0.006", "0.003", "0.001"]),
        ("99", ["0.144", "0.06", "0.03", "0.01"]),
        ("99.95", ["0.0072", "0.003", "0.0015", "0.0005"]),
        ("95", ["0.72", "0.3", "0.15", "0.05"]),
    ],
)
def test_thresholds_are_those_of_the_objective(objective: str, thresholds: list[str]) -> None:
    found = rules(Settings(Decimal(objective)))
    for (_, long, short, _), threshold in zip(BURNS, thresholds, strict=True):
        [rule] = [rule for name, rule in found.items() if name.endswith(f"Burn{_speed(long)}{long}")]
        compared = re.findall(r"ratio:rate(\w+)(?:\{.*\})? > (\S+)", rule["expr"])
        assert compared == [(long, threshold), (short, threshold)]
        assert rule["labels"]["long"] == long


def _speed(long: str) -> str:
    return "Fast" if long.endswith("h") else "Slow"


@pytest.mark.parametrize("objective", ["94.99", "100", "100.1", "-99", "NaN", "Infinity"])
def test_an_objective_is_one_that_can_be_missed_and_met(objective: str) -> None:
    with pytest.raises(ValueError, match="the objective is 95 % or more and less than 100"):
        Settings(Decimal(objective))


def test_rules_for_one_job_speak_of_no_other() -> None:
    for name, rule in rules(Settings(job="shop")).items():
        selectors = re.findall(r"(?<![\w:])(?:seawall[\w:]+|up\b)(\{[^}]*\})?", rule["expr"])
        assert selectors, name
        assert all('job="shop"' in matchers for matchers in selectors), name


# Runbooks


PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(RUNBOOKS.glob("*.md"))}
MONITORING = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
KNOWN = {spec.name: {*spec.labels} for spec in SPECS}
KNOWN |= {f"{spec.name}_{part}": {*spec.labels, "le"} for spec in SPECS for part in ("bucket", "count") if spec.bounds}


def asked(text: str) -> list[str]:
    return [block.strip() for block in re.findall(r"^```promql\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def test_each_alert_has_a_page_and_each_page_an_alert() -> None:
    assert sorted(PAGES) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_what_to_do_and_what_not_to(name: str) -> None:
    page = PAGES[name]
    severity = next(alert.severity for alert in ALERTS if alert.name == name)
    assert page.startswith(f"# {name}\n\n**{severity}** · ")
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == [
        "What it means",
        "Is it real, and who is hurt?",
        "Look first",
        "What to do",
        "What not to do",
        "Silence",
    ]
    assert f"amtool silence add alertname={name} " in page.partition("## Silence")[2]
    assert asked(page)
    assert re.search(r"^\$ (seawall|kubectl|redis-cli|curl)", page.partition("## Look first")[2], re.MULTILINE)


@pytest.mark.parametrize("name", [*NAMES, "monitoring"])
def test_what_a_page_asks_for_exists(name: str) -> None:
    for query in asked(PAGES.get(name, MONITORING)):
        for metric, matchers in re.findall(r"(?<![\w:])(seawall_\w+)(?:\{([^}]*)\})?", query):
            labels = set(re.findall(r"(\w+)(?:=~|!=|=)", matchers))
            assert labels <= {*KNOWN[metric], "job", "instance"}, query


@promtool
def test_what_pages_ask_for_is_promql(tmp_path: Path) -> None:
    queries = [query for text in (*PAGES.values(), MONITORING) for query in asked(text)]
    records = [{"record": f"seawall:query:{at}", "expr": query} for at, query in enumerate(queries)]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "pages", "rules": records}]}), encoding="utf-8")
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert f"{len(queries)} rules found" in done.stdout, done.stdout + done.stderr


def test_the_overview_of_alerts_is_theirs() -> None:
    rows = re.findall(r"^\| \[(\w+)\]\(runbooks/(\w+)\.md\) \| (\w+) \|", MONITORING, re.MULTILINE)
    assert rows == [(alert.name, alert.name, alert.severity) for alert in {a.name: a for a in ALERTS}.values()]
    burns = re.findall(r"^\| ([\d.]+) \| (\w+) and (\w+) \| ([\d.]+) % \| \d+ % \| (\w+) \|$", MONITORING, re.MULTILINE)
    assert burns == [(rate, long, short, f"{float(rate) * 0.1:g}", severity) for rate, long, short, severity in BURNS]
