"""`seawall export`: what watches a service and what runs it, as files to keep and to change."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Literal

import typer

from seawall.cli.terminal import CONFIG_HELP, FOUND, console, exit_code, fail, plural, say, show, why, write
from seawall.config import check
from seawall.config.document import read
from seawall.monitoring import alerts as rules
from seawall.monitoring import compose as composed
from seawall.monitoring import kubernetes
from seawall.monitoring.dashboards import dashboards as all_dashboards
from seawall.monitoring.workload import Workload, alert_settings
from seawall.policy import Policy

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_VARIABLE = re.compile(r"\$\$|\$\{(\w+)(:-)?")

Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Write files there, instead of to the terminal.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there and differ.")]
Config = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help=CONFIG_HELP)]
Objective = Annotated[
    str, typer.Option("--slo", metavar="PERCENT", help="Requests within their plans that must not be shed: 95 to 100.")
]
Runbooks = Annotated[
    str, typer.Option("--runbooks", metavar="URL", help="Where you have put docs/runbooks, for the links in alerts.")
]
Name = Annotated[str, typer.Option("--name", metavar="NAME", help="What the service is called.")]
Image = Annotated[str | None, typer.Option("--image", metavar="IMAGE", help="Its image. [default: NAME:latest]")]


def dashboards(
    name: Annotated[
        Literal["overview", "tenants", "backend", "client"] | None,
        typer.Argument(metavar="NAME", help="Which, for one alone."),
    ] = None,
    output: Output = None,
    force: Force = False,
) -> None:
    """Write dashboards for Grafana: overview, tenants, backend, client.

    \b
    Examples:
      seawall export dashboards -o grafana/
      seawall export dashboards overview > overview.json
    """
    files = {f"{each.name}.json": each.render() for each in all_dashboards() if name in (None, each.name)}
    _deliver(files, output, force=force)
    say(
        "Next: in Grafana, Dashboards > New > Import; or provision the directory (docs/monitoring.md). "
        "The data source is chosen at the top of each."
    )


def alerts(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="Take classes, caps and time-outs from this file."),
    ] = None,
    objective: Objective = "99.9",
    job: Annotated[
        str | None, typer.Option("--job", metavar="JOB", help="For this job of Prometheus alone. [default: all]")
    ] = None,
    runbooks: Runbooks = rules.RUNBOOKS,
    output: Output = None,
    force: Force = False,
) -> None:
    """Write alerts for Prometheus: multi-window burn rates of shed requests, and what else an operator must know.

    \b
    Examples:
      seawall export alerts > alerts.yml && promtool check rules alerts.yml
      seawall export alerts --slo 99.5 --job shop --config seawall.yaml -o prometheus/
    """
    policy = Policy() if config is None else _policy(config)
    settings = _settings(policy, objective, job, runbooks)
    _deliver({"alerts.yml": rules.render(rules.groups(settings), settings)}, output, force=force)
    say("Next: name the file in prometheus.yml's rule_files, and route by the label `severity`: page, ticket, info.")


def k8s(
    config: Config = Path("seawall.yaml"),
    name: Name = "app",
    image: Image = None,
    objective: Objective = "99.9",
    runbooks: Runbooks = rules.RUNBOOKS,
    operator: Annotated[
        bool,
        typer.Option("--operator/--annotations", help="How Prometheus finds it: by its operator, or by annotations."),
    ] = True,
    output: Output = None,
    force: Force = False,
) -> None:
    """Write manifests for Kubernetes: Deployment, Service, ConfigMap, autoscaler, and what Prometheus needs.

    The configuration becomes a ConfigMap, mounted so that a change of it is in force without a restart. Its
    ${VARIABLES} come from a Secret, NAME-seawall, which is yours to make.

    \b
    Examples:
      seawall export k8s --name shop --image shop:1.4 -o deploy/
      seawall export k8s --name shop --annotations | kubectl apply --dry-run=client -f -
    """
    workload = _workload(config, name, image)
    settings = _settings(workload.policy, objective, name, runbooks)
    try:
        files = kubernetes.manifests(workload, settings, operator=operator)
    except kubernetes.NotMountable as error:
        fail(str(error), FOUND)
    if output is None:
        print(kubernetes.joined(files), end="")
    else:
        _deliver(files, output, force=force)
    for remark in kubernetes.remarks(workload):
        say(f"seawall: {remark}")
    if workload.variables:
        literals = " ".join(f"--from-literal={variable}=..." for variable in workload.variables)
        say(f"Next: kubectl create secret generic {name}-seawall {literals}")
    say(f"Next: kubectl apply -f {output or 'FILE'}; the application reads its configuration from $SEAWALL_CONFIG.")


def compose(
    config: Config = Path("seawall.yaml"),
    name: Name = "app",
    image: Image = None,
    objective: Objective = "99.9",
    runbooks: Runbooks = rules.RUNBOOKS,
    output: Output = None,
    force: Force = False,
) -> None:
    """Write a directory for Docker Compose: the service, its store, Prometheus with alerts, Grafana with dashboards.

    \b
    Examples:
      seawall export compose --name shop -o shop/ && docker compose --project-directory shop up
    """
    workload = _workload(config, name, image)
    settings = _settings(workload.policy, objective, name, runbooks)
    _deliver(composed.kit(workload, settings), output, force=force)
    for remark in composed.remarks(workload):
        say(f"seawall: {remark}")
    say(f"Next: docker compose --project-directory {output} up; {output}/compose.yaml says what to export before.")


def register(app: typer.Typer, group: typer.Typer) -> None:
    """Add the verb, as a ``group`` of four, to the command line."""
    group.callback()(_export)
    group.command("dashboards")(dashboards)
    group.command("alerts")(alerts)
    group.command("k8s")(k8s)
    group.command("compose")(compose)
    app.add_typer(group, name="export")


def _export() -> None:
    """Write dashboards, alerts, Kubernetes manifests or a Compose directory for a service with Seawall.

    Nothing that is there is replaced without --force.

    \b
    Examples:
      seawall export dashboards -o grafana/
      seawall export alerts --slo 99.5 > alerts.yml
      seawall export k8s --name shop -o deploy/
      seawall export compose --name shop -o shop/
    """


def _deliver(files: Mapping[str, str], output: Path | None, *, force: bool) -> None:
    """Print the one file, or write all of them; none where one is there that differs."""
    if output is None:
        if len(files) != 1:
            fail(f"these are {plural(len(files), 'file')}: --output DIR says where to write them")
        print(*files.values(), end="")
        return
    missing, differing = [], []
    for name, text in files.items():
        try:
            if (output / name).read_text(encoding="utf-8") != text:
                differing.append(name)
        except FileNotFoundError:
            missing.append(name)
        except OSError as error:
            fail(f"{output / name} cannot be written: {why(error)}")
        except ValueError:  # it is no text
            differing.append(name)
    if differing and not force:
        fail(f"{output / differing[0]} is there already and differs; --force replaces it")
    for name in files:
        if name in missing or name in differing:
            path = output / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                fail(f"{path.parent} cannot be made: {why(error)}")
            write(path, files[name])
            say(f"wrote {path}")
        else:
            say(f"{output / name} is as it should be")


def _settings(policy: Policy, objective: str, job: str | None, runbooks: str) -> rules.Settings:
    try:
        return alert_settings(policy, Decimal(objective.removesuffix("%")), job, runbooks.rstrip("/"))
    except InvalidOperation:
        fail(f"--slo {objective} is no percentage, such as 99.9")
    except ValueError as error:
        fail(f"--slo {objective}: {error}")


def _policy(path: Path) -> Policy:
    return _checked(path)[0]


def _checked(path: Path) -> tuple[Policy, tuple[Path, ...]]:
    """The policy and the files that it was read from, or the end of the verb; what is secret in them is said."""
    report = check(path)
    if report.policy is None:
        show(report.errors, console(sys.stderr))
        raise typer.Exit(exit_code(report))
    show([warning for warning in report.warnings if warning.code == "W005"], console(sys.stderr))
    return report.policy, report.files


def _workload(config: Path, name: str, image: str | None) -> Workload:
    if not _NAME.fullmatch(name):
        fail(f"--name {name}: lower-case letters, digits and '-', 40 at most, a letter first")
    policy, paths = _checked(config)
    if policy.metrics.path is None:
        fail(f"{config} has no metrics.path, so there is nothing to watch: `metrics: {{path: /metrics}}`", FOUND)
    files: dict[str, str] = {}
    variables: dict[str, bool] = {}
    store = None
    for path in paths:
        relative = Path(os.path.relpath(path, config.parent)).as_posix()
        if relative.startswith("../"):
            fail(f"{path} is not below {config.parent}; what is included has to be deployed with it", FOUND)
        text = files[relative] = path.read_text(encoding="utf-8-sig")
        # Of what was written, not of comments; whatever it is set to here.
        document = read(text, str(path), os.environ)
        for written in filter(None, document.expanded.values()):
            for found in _VARIABLE.finditer(written):
                if found[1]:
                    variables[found[1]] = variables.get(found[1], False) or not found[2]
        if path == paths[0]:
            url = re.fullmatch(r"\$\{(\w+)(:-[^}]*)?\}", document.written(("backend", "url")) or "")
            store = url[1] if url else None
    return Workload(name, image or f"{name}:latest", policy, files, variables, store)
