"""A service with all that belongs to it on one machine: its store, a Prometheus with the alerts, a Grafana with the
dashboards.
"""

from __future__ import annotations

from seawall.monitoring.alerts import Settings, groups, render
from seawall.monitoring.dashboards import dashboards
from seawall.monitoring.literal import quoted
from seawall.monitoring.workload import Workload

PROMETHEUS = "172.30.83.10"
"""The address of the kit's Prometheus: fixed, so that `metrics.allow` may name it."""
GRAFANA_IMAGE = "grafana/grafana:12.2.0"
PROMETHEUS_IMAGE = "prom/prometheus:v3.5.0"
VALKEY_IMAGE = "valkey/valkey:9-alpine"
MOUNT = "/etc/seawall"


def kit(workload: Workload, alerts: Settings) -> dict[str, str]:
    """Files by name."""
    return {
        "compose.yaml": _compose(workload),
        **{f"seawall/{path}": text for path, text in workload.files.items()},
        "prometheus.yml": _prometheus(workload),
        "alerts.yml": render(groups(alerts), alerts),
        "grafana/datasources.yml": _DATASOURCES,
        "grafana/dashboards.yml": _PROVIDERS,
        **{f"grafana/dashboards/{dashboard.name}.json": dashboard.render() for dashboard in dashboards()},
    }


def remarks(workload: Workload) -> list[str]:
    """What of the configuration does not fit to this kit."""
    if workload.is_scraped_from(PROMETHEUS):
        return []
    return [f"metrics.allow does not have {PROMETHEUS}, which is this kit's Prometheus: it will get 404"]


def _compose(workload: Workload) -> str:
    many = workload.instances
    ports = f"{workload.port}-{workload.port + many - 1}" if many > 1 else str(workload.port)
    shared = workload.policy.backend.type == "redis" and workload.store is not None
    variables = "".join(f"      {name}: {value}\n" for name, value in _environment(workload, shared=shared).items())
    names = [name for name, needed in workload.variables.items() if needed and not (shared and name == workload.store)]
    names += ["REDIS_PASSWORD"] if shared else []
    wanted = f"#   export {' '.join(f'{name}={_example(name)}' for name in names)}\n" if names else ""
    store = ", the Valkey that its processes share" if shared else ""
    return f"""\
# {workload.name}{store}, a Prometheus with the alerts, and a Grafana with the dashboards.
# `seawall export compose` writes this directory.
#
{wanted}#   docker compose up
#
# The service is at http://localhost:{workload.port}, Grafana at http://localhost:3000, Prometheus at http://localhost:9090.
services:
  app:
    image: {quoted(workload.image)}        # your application, with seawall{"[redis]" if shared else ""} in it
    environment:
      # For the application: app.add_middleware(Seawall, config=os.environ["SEAWALL_CONFIG"])
      SEAWALL_CONFIG: {MOUNT}/{workload.configuration}
{variables}\
    volumes:
      # The directory, and not the file: editors save by writing another file of that name, which a container that was
      # given the file would never see. A change is in force after two seconds.
      - ./seawall:{MOUNT}:ro
    ports: ["127.0.0.1:{ports}:{workload.port}"]
    deploy: {{replicas: {many}}}
{_APP_ALONE if shared else ""}\
{_VALKEY.replace("PREFIX", workload.policy.backend.key_prefix) if shared else ""}
  prometheus:
    image: {PROMETHEUS_IMAGE}
    volumes:
      - ./prometheus.yml:/etc/prometheus/prometheus.yml:ro
      - ./alerts.yml:/etc/prometheus/alerts.yml:ro
    ports: ["127.0.0.1:9090:9090"]
    networks:
      default: {{ipv4_address: {PROMETHEUS}}}    # the peer that metrics.allow lets in

  grafana:
    image: {GRAFANA_IMAGE}
    environment:
      # Whoever reaches the port may look, and nobody may change anything: it is open to this machine only.
      GF_AUTH_ANONYMOUS_ENABLED: "true"
      GF_AUTH_DISABLE_LOGIN_FORM: "true"
      GF_ANALYTICS_REPORTING_ENABLED: "false"
      GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH: /etc/grafana/seawall/overview.json
    volumes:
      - ./grafana/datasources.yml:/etc/grafana/provisioning/datasources/seawall.yml:ro
      - ./grafana/dashboards.yml:/etc/grafana/provisioning/dashboards/seawall.yml:ro
      - ./grafana/dashboards:/etc/grafana/seawall:ro
    ports: ["127.0.0.1:3000:3000"]

networks:
  default:
    ipam: {{config: [{{subnet: 172.30.83.0/24}}]}}
"""


def _example(variable: str) -> str:
    secret = any(word in variable for word in ("SECRET", "TOKEN", "PASSWORD"))
    return "$(openssl rand -hex 16)" if secret else "..."


def _environment(workload: Workload, *, shared: bool) -> dict[str, str]:
    """What the service finds in its environment: the kit's own store, and what its user exports."""
    found = {
        name: f"${{{name}:?export {name}}}" if needed else f"${{{name}:-}}"
        for name, needed in workload.variables.items()
    }
    if shared and workload.store is not None:
        found[workload.store] = "redis://seawall:${REDIS_PASSWORD:?export REDIS_PASSWORD}@valkey:6379/0"
    return found


_APP_ALONE = """\
    # No depends_on: it starts and serves before the store is there.
"""

_VALKEY = """
  valkey:
    image: {image}
    command:
      - valkey-server
      # Nothing is worth a disk: what is lost is one burst a caller.
      - --save
      - ""
      # Full means that nothing new is written, and never that somebody's usage is thrown away.
      - --maxmemory
      - 256mb
      - --maxmemory-policy
      - noeviction
      - --user
      - default
      - "off"
      - --user
      - seawall
      - "on"
      - ">${REDIS_PASSWORD}"
      - ~PREFIX:*
      - resetchannels
      - +select
      - +info
      - +eval
      - +evalsha
      - +get
      - +set
      - +del
      - +time
    restart: unless-stopped
""".replace("{image}", VALKEY_IMAGE)


def _prometheus(workload: Workload) -> str:
    path = workload.policy.metrics.path
    metrics = "" if path == "/metrics" else f"\n    metrics_path: {quoted(path or '')}"
    return f"""\
global: {{scrape_interval: 5s, evaluation_interval: 15s}}
rule_files: [alerts.yml]
scrape_configs:
  - job_name: {workload.name}{metrics}
    dns_sd_configs:                    # each container of the service, however many there are
      - {{names: [app], type: A, port: {workload.port}, refresh_interval: 5s}}
"""


_DATASOURCES = """\
apiVersion: 1
datasources:
  - name: Prometheus
    uid: prometheus
    type: prometheus
    access: proxy
    url: http://prometheus:9090
    isDefault: true
    jsonData: {timeInterval: 5s}       # prometheus.yml's scrape_interval, for $__rate_interval
"""

_PROVIDERS = """\
apiVersion: 1
providers:
  - name: seawall
    type: file
    allowUiUpdates: false
    options: {path: /etc/grafana/seawall}
"""
