"""`seawall export`: files that are right as they are, and nothing overwritten."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from seawall.backends import CALL_RESULTS
from seawall.cli.app import build
from seawall.config import check
from seawall.metrics import BACKEND_UP, QUEUE_WAIT, REQUESTS, SPECS, UTILIZATION
from seawall.monitoring.dashboards import dashboards
from seawall.monitoring.grafana import Dashboard, Panel, Query, Variable
from seawall.monitoring.literal import block, quoted
from seawall.monitoring.promql import Scope, Unlike
from serving import ROOT

COMPOSE = ROOT / "examples" / "compose"
KUBERNETES = ROOT / "examples" / "kubernetes"
SMALL = "version: 1\nplans: {default: {rate: 100/minute}}\nmetrics: {path: /metrics}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a configuration and values for the variables of the examples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDIS_URL", "redis://localhost")
    monkeypatch.setenv("SEAWALL_SECRET", "a secret of the tests")
    (tmp_path / "seawall.yaml").write_text(SMALL, encoding="utf-8")
    return tmp_path


def export(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(build(None), ["export", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def files(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# Queries


def test_a_query_is_made_of_the_names_of_its_metric() -> None:
    assert Scope(('job="shop"',)).rate(REQUESTS, "priority", where={"outcome": ("shed", "expired")}) == (
        'sum by (priority) (rate(seawall_requests_total{job="shop", outcome=~"shed|expired"}[5m]))'
    )
    assert Scope().series(REQUESTS, {"outcome": Unlike('a"b')}) == 'seawall_requests_total{outcome!="a\\"b"}'
    assert Scope().gauge("min", BACKEND_UP) == "min(seawall_backend_up)"
    assert Scope(window="1h").quantile(0.99, QUEUE_WAIT) == (
        "histogram_quantile(0.99, sum by (le) (rate(seawall_queue_wait_seconds_bucket[1h])))"
    )
    assert Scope().increase(REQUESTS, "instance") == ("sum by (instance) (increase(seawall_requests_total[5m]))")


@pytest.mark.parametrize(
    "asked",
    [
        lambda scope: scope.rate(REQUESTS, "tenant"),
        lambda scope: scope.rate(REQUESTS, where={"tenant": "acme"}),
        lambda scope: scope.rate(REQUESTS, "le"),
        lambda scope: scope.rate(REQUESTS, part="count"),
        lambda scope: scope.rate(QUEUE_WAIT),
        lambda scope: scope.rate(UTILIZATION),
        lambda scope: scope.increase(UTILIZATION),
        lambda scope: scope.gauge("max", REQUESTS),
        lambda scope: scope.gauge("max", UTILIZATION, "tenant"),
        lambda scope: scope.quantile(0.5, REQUESTS),
        lambda scope: Variable("tenant", "Tenant", REQUESTS).render(),
    ],
)
def test_a_query_for_what_a_metric_does_not_have_is_refused(asked: Any) -> None:
    with pytest.raises(ValueError, match="seawall_"):
        asked(Scope())


# Text that becomes YAML


@pytest.mark.parametrize(
    "text", ["a: b\n", "  a: b\nc\n", "a", "a\n\n", "a\n\n  \n b\n", "# ä ${X}\n\tb\n", "|-\n---\n"]
)
def test_a_block_is_read_as_what_was_written(text: str) -> None:
    assert yaml.safe_load(f"a:\n  b: {block(text, 4)}\n  c: 1\n") == {"a": {"b": text, "c": 1}}


@pytest.mark.parametrize("text", ["yes", "{{ $value }}", 'a "b" \\ c: #', "", "1.0", "ä"])
def test_a_quoted_text_is_read_as_what_was_written(text: str) -> None:
    assert yaml.safe_load(f"a: {quoted(text)}") == {"a": text}


# Dashboards


DOCUMENTS = {dashboard.name: json.loads(dashboard.render()) for dashboard in dashboards()}
PANELS = [
    pytest.param(panel, id=f"{name}: {panel['title']}")
    for name, document in DOCUMENTS.items()
    for panel in document["panels"]
    if panel["type"] != "row"
]


def test_there_is_a_dashboard_for_the_service_its_callers_its_store_and_its_calls(here: Path) -> None:
    result = export("dashboards", "-o", "grafana")
    assert result.exit_code == 0
    assert {name: json.loads(text) for name, text in files(here / "grafana").items()} == {
        f"{name}.json": document for name, document in DOCUMENTS.items()
    }
    assert list(DOCUMENTS) == ["overview", "tenants", "backend", "client"]


def test_the_same_code_gives_the_same_bytes() -> None:
    assert [dashboard.render() for dashboard in dashboards()] == [dashboard.render() for dashboard in dashboards()]
    for name, document in DOCUMENTS.items():
        assert (document["uid"], document["id"], document["schemaVersion"]) == (f"seawall-{name}", None, 42)


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_dashboard_asks_for_its_source_and_where_to_look(document: dict[str, Any]) -> None:
    variables = {variable["name"]: variable for variable in document["templating"]["list"]}
    assert list(variables)[:4] == ["datasource", "namespace", "job", "instance"]
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    for name, variable in variables.items():
        if name != "datasource":
            assert (variable["multi"], variable["includeAll"]) == (True, True)
            assert variable["definition"] == variable["query"]["query"]
    assert re.search("localhost|[0-9]{2}:[0-9]{2}", json.dumps(document)) is None


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_the_panels_of_a_dashboard_lie_beside_each_other(document: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        at = panel["gridPos"]
        assert 0 <= at["x"] <= at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    numbers = [panel["id"] for panel in document["panels"]]
    titles = [panel["title"] for panel in document["panels"]]
    assert len(numbers) == len(set(numbers))
    assert len(titles) == len(set(titles))


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_says_what_it_shows_and_in_which_unit(panel: dict[str, Any]) -> None:
    """The rules of Grafana's linter of dashboards: description, unit, source, variables, and ranges that scale."""
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"]["uid"] == "${datasource}"
    assert panel["targets"]
    for target in panel["targets"]:
        expression = target["expr"]
        for selector in re.findall(r"seawall_\w+\{([^}]*)\}", expression):
            assert all(f'{label}=~"${label}"' in selector for label in ("namespace", "job", "instance"))
        assert set(re.findall(r"\[(.*?)\]", expression)) <= {"$__rate_interval", "$__range"}
        assert "by (le" not in expression or "histogram_quantile" in expression or panel["type"] == "heatmap"
        if panel["type"] == "timeseries" and " by (" in expression:
            assert "{{" in target["legendFormat"]


def test_a_panel_keeps_its_number_when_another_row_grows() -> None:
    def numbers(first: int) -> list[int]:
        panel = Panel("A", "B.", "short", [Query("1")], "stat", width=12)
        rows = {"one": [panel] * first, "two": [panel] * 3}
        document = json.loads(Dashboard("d", "D", "d", rows).render())
        assert {panel["gridPos"]["x"] for panel in document["panels"]} == {0, 12}
        return [panel["id"] for panel in document["panels"] if panel["id"] >= 200]

    assert numbers(2) == numbers(5) == [200, 201, 202, 203]


# What is printed, and what is written


def test_one_file_is_printed_and_several_want_a_directory(here: Path) -> None:
    assert json.loads(export("dashboards", "tenants").stdout) == DOCUMENTS["tenants"]
    refused = export("dashboards")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "4 files: --output DIR" in refused.stderr
    assert export("compose").exit_code == 2
    assert yaml.safe_load(export("alerts").stdout)["groups"]
    assert len(list(yaml.safe_load_all(export("k8s").stdout))) == 6


def test_nothing_is_overwritten_that_differs(here: Path) -> None:
    assert export("dashboards", "-o", "out").exit_code == 0
    written = files(here / "out")
    (here / "out" / "tenants.json").write_text("mine", encoding="utf-8")
    (here / "out" / "backend.json").unlink()
    refused = export("dashboards", "-o", "out")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "tenants.json is there already and differs; --force replaces it" in refused.stderr
    assert set(files(here / "out")) == {"overview.json", "tenants.json", "client.json"}, (
        "and none of the others is written"
    )
    forced = export("dashboards", "-o", "out", "--force")
    assert (forced.exit_code, files(here / "out")) == (0, written)
    assert re.findall(r"wrote out/(\w+)", forced.stderr) == ["tenants", "backend"]
    again = export("dashboards", "-o", "out")
    assert (again.exit_code, again.stderr.count("is as it should be")) == (0, 4)


def test_where_nothing_can_be_written_it_says_why(here: Path) -> None:
    (here / "file").write_text("mine", encoding="utf-8")
    (here / "bytes").mkdir()
    (here / "bytes" / "alerts.yml").write_bytes(b"\xff")
    (here / "taken" / "alerts.yml").mkdir(parents=True)
    for place, why in (
        ("file", "cannot be written: Not a directory"),
        ("bytes", "differs; --force"),
        ("taken", "cannot be written: Is a directory"),
        ("a" * 300, "cannot be written: File name too long"),
    ):
        result = export("alerts", "-o", place)
        assert (result.exit_code, result.stdout) == (2, "")
        assert why in result.stderr
    assert export("alerts", "-o", "bytes", "--force").exit_code == 0


@pytest.mark.parametrize("verb", ["dashboards", "alerts", "k8s", "compose"])
def test_each_verb_has_help_with_examples_and_says_what_to_do_next(verb: str, here: Path) -> None:
    helped = export(verb, "--help")
    assert helped.exit_code == 0
    assert f"seawall export {verb}" in helped.stdout
    assert "Next: " in export(verb, "-o", "out").stderr


# Alerts


def test_alerts_take_what_they_need_from_the_configuration(here: Path) -> None:
    (here / "seawall.yaml").write_text(
        "version: 1\n"
        "plans: {default: {rate: 100/minute, priority: paid}}\n"
        "priorities: {paid: {}, free: {}}\n"
        "backend: {type: redis, url: redis://localhost, timeout: 100ms, max_keys: 5_000}\n",
        encoding="utf-8",
    )
    text = export(
        "alerts", "-c", "seawall.yaml", "--slo", "99%", "--job", "shop", "--runbooks", "https://x.example/r/"
    ).stdout
    rules = {
        rule["alert"] + rule["labels"].get("long", ""): rule
        for group in yaml.safe_load(text)["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }
    assert '{job="shop", outcome="shed", priority="paid"}' in rules["SeawallCriticalShed"]["expr"]
    assert rules["SeawallKeysNearlyFull"]["expr"].endswith("> 4500")
    assert rules["SeawallBackendSlow"]["expr"].endswith("> 0.04")
    assert "> 0.144" in rules["SeawallShedBudgetBurnFast1h"]["expr"]
    assert rules["SeawallAbsent"]["annotations"]["runbook_url"] == "https://x.example/r/SeawallAbsent.md"
    selectors = re.findall(
        r"(?<!\w)(?:seawall_|job:seawall_|up\b)\w*(?::\w+)?(\{[^}]*\})?", text.partition("groups:")[2]
    )
    expressions = [matchers for matchers in selectors if matchers]
    assert all('job="shop"' in matchers for matchers in expressions)


@pytest.mark.parametrize("objective", ["94.9", "100", "-1", "many", "nan", "inf", ""])
def test_an_objective_that_makes_no_sense_is_refused(objective: str, here: Path) -> None:
    result = export("alerts", "--slo", objective)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"seawall: --slo {objective}")


# Kubernetes


def manifests(text: str) -> dict[str, Any]:
    """Manifests by their kind, of which each has a name."""
    found = {}
    for manifest in yaml.safe_load_all(text):
        assert manifest["metadata"]["name"]
        found[manifest["kind"]] = manifest
    return found


VERSIONS = {
    "ConfigMap": "v1",
    "Deployment": "apps/v1",
    "Service": "v1",
    "HorizontalPodAutoscaler": "autoscaling/v2",
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
}
"""`kubernetes-validate` has checked the files of examples/kubernetes against the schemas of 1.37."""


def test_the_example_for_kubernetes_is_what_is_exported(here: Path) -> None:
    result = export("k8s", "--name", "shop", "-c", KUBERNETES / "config" / "seawall.yaml", "-o", "out")
    assert result.exit_code == 0
    assert files(here / "out") == {name: text for name, text in files(KUBERNETES).items() if "/" not in name}
    found = manifests("---\n".join(files(here / "out").values()))
    assert {kind: manifest["apiVersion"] for kind, manifest in found.items()} == VERSIONS
    assert "--from-literal=REDIS_URL=... --from-literal=SEAWALL_SECRET=..." in result.stderr


def test_the_manifests_speak_of_each_other(here: Path) -> None:
    found = manifests(export("k8s", "--name", "shop", "-c", KUBERNETES / "config" / "seawall.yaml").stdout)
    [labels] = [found["Deployment"]["spec"]["template"]["metadata"]["labels"]]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert (
        found["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
        <= found["Service"]["metadata"]["labels"].items()
    )
    [container] = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    [port] = container["ports"]
    [service] = found["Service"]["spec"]["ports"]
    [endpoint] = found["ServiceMonitor"]["spec"]["endpoints"]
    assert (service["targetPort"], endpoint["port"], endpoint["path"]) == (port["name"], service["name"], "/metrics")
    scaled = found["HorizontalPodAutoscaler"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"] == "shop"
    assert scaled["metrics"][0]["pods"]["metric"]["name"] == UTILIZATION.name
    assert "replicas" not in found["Deployment"]["spec"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert [variable["name"] for variable in container["env"]] == ["SEAWALL_CONFIG", "REDIS_URL", "SEAWALL_SECRET"]
    rules = [rule for group in found["PrometheusRule"]["spec"]["groups"] for rule in group["rules"]]
    assert all('job="shop"' in rule["expr"] for rule in rules)


def test_what_the_pod_mounts_is_the_configuration_as_a_directory(here: Path) -> None:
    found = manifests(export("k8s", "-c", KUBERNETES / "config" / "seawall.yaml").stdout)
    pod = found["Deployment"]["spec"]["template"]["spec"]
    [container], [volume] = pod["containers"], pod["volumes"]
    [mount] = container["volumeMounts"]
    assert mount == {"name": volume["name"], "mountPath": "/etc/seawall", "readOnly": True}, "and no subPath"
    assert volume["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    mounted = here / "mounted"
    for item in volume["configMap"]["items"]:
        path = mounted / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found["ConfigMap"]["data"][item["key"]], encoding="utf-8")
    assert set(found["ConfigMap"]["data"]) == {item["key"] for item in volume["configMap"]["items"]}
    assert files(mounted) == files(KUBERNETES / "config")
    name = container["env"][0]["value"].removeprefix("/etc/seawall/")
    assert check(mounted / name).diagnostics == ()


def test_without_the_operator_pods_say_where_their_metrics_are(here: Path) -> None:
    found = manifests(export("k8s", "--annotations").stdout)
    assert set(found) == set(VERSIONS) - {"ServiceMonitor", "PrometheusRule"}
    template = found["Deployment"]["spec"]["template"]
    assert template["metadata"]["annotations"] == {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": "8000",
        "prometheus.io/path": "/metrics",
    }
    [container] = template["spec"]["containers"]
    assert container["readinessProbe"]["tcpSocket"] == {"port": "http"}, "there is no exempt route"
    assert "items" not in template["spec"]["volumes"][0]["configMap"]


def test_variables_are_those_that_are_written_and_not_those_of_comments(here: Path) -> None:
    (here / "seawall.yaml").write_text(
        f"{SMALL}# ${{NOT_THIS}}\n"
        "backend: {type: redis, url: '${REDIS_URL:-redis://x}', secret: '${SEAWALL_SECRET}'}\n"
        "status: {path: /-/seawall, allow: [127.0.0.1], token: 'nobodys-secret-$${NOR_THIS}'}\n",
        encoding="utf-8",
    )
    found = manifests(export("k8s", "--name", "shop").stdout)
    _, *variables = found["Deployment"]["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {each["name"]: each["valueFrom"]["secretKeyRef"] for each in variables} == {
        "REDIS_URL": {"name": "shop-seawall", "key": "REDIS_URL", "optional": True},
        "SEAWALL_SECRET": {"name": "shop-seawall", "key": "SEAWALL_SECRET"},
    }


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("metrics: {path: /metrics, allow: [127.0.0.1]}", "metrics.allow has addresses of the machine itself only"),
        ("history: changes.jsonl", "history: changes.jsonl would be in /etc/seawall, where nothing can be written"),
        ("backend: {snapshot: quotas.json}", "backend.snapshot: quotas.json would be in /etc/seawall"),
        ("backend: {type: redis, url: 'redis://:hunter22@x', secret: '${SEAWALL_SECRET}'}", "W005"),
    ],
)
def test_what_does_not_fit_to_a_cluster_is_said(more: str, said: str, here: Path) -> None:
    base = SMALL if "metrics" not in more else SMALL.partition("metrics")[0]
    (here / "seawall.yaml").write_text(f"{base}{more}\n", encoding="utf-8")
    result = export("k8s")
    assert result.exit_code == 0
    assert said in result.stderr
    (here / "seawall.yaml").write_text(f"{SMALL}history: /var/lib/shop/changes.jsonl\n", encoding="utf-8")
    assert said not in export("k8s").stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["k8s", "--name", "Shop"], 2, "--name Shop: lower-case letters"),
        (["k8s", "--name", "a" * 41], 2, "40 at most"),
        (["compose", "--name", "", "-o", "out"], 2, "--name : lower-case letters"),
        (["k8s", "-c", "missing.yaml"], 2, "missing.yaml: error[E000]"),
        (["alerts", "-c", "broken.yaml"], 1, "broken.yaml:1:10: error["),
        (["k8s", "-c", "silent.yaml"], 1, "silent.yaml has no metrics.path"),
        (["k8s", "-c", "below/up.yaml"], 1, "is not below below"),
        (["k8s", "-c", "spaces/seawall.yaml"], 1, "cannot be a key of a ConfigMap"),
        (["k8s", "-c", "large/seawall.yaml"], 1, "a ConfigMap holds 1,048,576"),
    ],
)
def test_what_cannot_be_exported_is_said(arguments: list[str], code: int, said: str, here: Path) -> None:
    more = {
        "broken.yaml": "version: 7\n",
        "silent.yaml": SMALL.partition("metrics")[0],
        "below/up.yaml": f"{SMALL}include: ../other.yaml\n",
        "other.yaml": "tenants: {acme: {}}\n",
        "spaces/seawall.yaml": f"{SMALL}include: '*.part.yaml'\n",
        "spaces/a b.part.yaml": "tenants: {acme: {}}\n",
        "large/seawall.yaml": f"{SMALL}{'# much to say' * 100_000}\n",
    }
    for name, text in more.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(text, encoding="utf-8")
    result = export(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr


# Compose


def test_the_example_of_compose_is_what_is_exported(here: Path) -> None:
    result = export("compose", "--name", "shop", "-c", COMPOSE / "seawall" / "seawall.yaml", "-o", "out")
    assert result.exit_code == 0
    own = {"app.py", "Dockerfile", "Dockerfile.dockerignore", "compose.override.yaml"}
    assert files(here / "out") == {name: text for name, text in files(COMPOSE).items() if name not in own}
    assert own <= set(files(COMPOSE))
    assert "172.30.83.10" not in result.stderr


def composed(text: Mapping[str, str], name: str) -> Any:
    return yaml.safe_load(text[name])


def test_the_parts_of_a_kit_speak_of_each_other(here: Path) -> None:
    export("compose", "--name", "shop", "-c", COMPOSE / "seawall" / "seawall.yaml", "-o", "out")
    kit = files(here / "out")
    services, settings = composed(kit, "compose.yaml")["services"], composed(kit, "seawall/seawall.yaml")
    assert set(services) == {"app", "valkey", "prometheus", "grafana"}
    assert services["app"]["deploy"]["replicas"] == settings["backend"]["instances"]
    assert services["app"]["ports"] == ["127.0.0.1:8000-8001:8000"]
    assert services["app"]["environment"]["SEAWALL_CONFIG"] == "/etc/seawall/seawall.yaml"
    assert services["app"]["volumes"] == ["./seawall:/etc/seawall:ro"], "the directory, or a change would not be seen"
    assert settings["metrics"]["allow"] == [services["prometheus"]["networks"]["default"]["ipv4_address"]]
    written = set(re.findall(r"\$\{(\w+)\}", kit["seawall/seawall.yaml"]))
    assert written | {"SEAWALL_CONFIG"} == set(services["app"]["environment"])
    prometheus = composed(kit, "prometheus.yml")
    [job] = prometheus["scrape_configs"]
    [targets] = job["dns_sd_configs"]
    assert (job["job_name"], targets["names"], targets["port"]) == ("shop", ["app"], 8000)
    assert prometheus["rule_files"] == ["alerts.yml"]
    mounted = dict(
        volume.split(":")[:2] for service in ("prometheus", "grafana") for volume in services[service]["volumes"]
    )
    assert {path.removeprefix("./") for path in mounted} == {name for name in kit if "dashboards/" not in name} - {
        "compose.yaml",
        "seawall/seawall.yaml",
    } | {"grafana/dashboards"}
    [source] = composed(kit, "grafana/datasources.yml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    [provider] = composed(kit, "grafana/dashboards.yml")["providers"]
    assert provider["options"]["path"] == mounted["./grafana/dashboards"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/overview.json"
    assert {json.loads(text)["uid"] for name, text in kit.items() if name.endswith(".json")} == {
        f"seawall-{name}" for name in DOCUMENTS
    }
    assert all(str(port).startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", ()))


def test_the_rights_of_a_kit_are_those_that_the_documentation_asks_for(here: Path) -> None:
    rights = re.search(
        r"^ACL SETUSER seawall on >secret ~seawall:\* resetchannels -@all (.+)$",
        (ROOT / "docs" / "shared-state.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert rights is not None
    export("compose", "-c", COMPOSE / "seawall" / "seawall.yaml", "-o", "out")
    command = composed(files(here / "out"), "compose.yaml")["services"]["valkey"]["command"]
    assert [right for right in command if right.startswith("+")] == rights[1].split()


def test_a_kit_without_a_shared_store_has_none(here: Path) -> None:
    (here / "seawall.yaml").write_text(
        SMALL.replace("/metrics", "/-/metrics") + "responses: {docs_url: '${DOCS:-https://x.example}'}\n",
        encoding="utf-8",
    )
    assert export("compose", "-o", "out").exit_code == 0
    kit = files(here / "out")
    services = composed(kit, "compose.yaml")["services"]
    assert set(services) == {"app", "prometheus", "grafana"}
    assert services["app"]["environment"]["DOCS"] == "${DOCS:-}"
    assert composed(kit, "prometheus.yml")["scrape_configs"][0]["metrics_path"] == "/-/metrics"


def test_a_kit_lets_the_service_do_in_its_store_what_it_has_to(here: Path) -> None:
    (here / "seawall.yaml").write_text(
        f"{SMALL}backend: {{type: redis, url: '${{STORE}}', secret: '${{SEAWALL_SECRET}}', "
        "key_prefix: shop, instances: 1}\n"
        "status: {path: /-/seawall, allow: [127.0.0.1], token: '${NAME}'}\n",
        encoding="utf-8",
    )
    result = CliRunner().invoke(
        build(None), ["export", "compose", "-o", "out"], env={"STORE": "redis://x", "NAME": "a" * 32}
    )
    assert result.exit_code == 0
    services = composed(files(here / "out"), "compose.yaml")["services"]
    assert "~shop:*" in services["valkey"]["command"]
    assert services["app"]["environment"]["STORE"].startswith("redis://seawall:${REDIS_PASSWORD:?")
    assert services["app"]["ports"] == ["127.0.0.1:8000:8000"]
    assert "export SEAWALL_SECRET=$(openssl rand -hex 16) NAME=... REDIS_PASSWORD=$(openssl rand -hex 16)" in (
        here / "out" / "compose.yaml"
    ).read_text(encoding="utf-8")


def test_a_kit_whose_prometheus_would_be_turned_away_is_warned_about(here: Path) -> None:
    (here / "seawall.yaml").write_text(SMALL.replace("/metrics}", "/metrics, allow: [127.0.0.1]}"), encoding="utf-8")
    assert "metrics.allow does not have 172.30.83.10" in export("compose", "-o", "out").stderr


def test_the_results_of_calls_are_those_that_are_explained() -> None:
    [panel] = [panel for panel in DOCUMENTS["backend"]["panels"] if panel["title"] == "Calls, by how they ended"]
    assert all(result in panel["description"] for result in CALL_RESULTS)
    assert len(SPECS) >= 26
