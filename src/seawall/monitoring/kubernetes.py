"""Manifests for Kubernetes: a deployment with its configuration in a ConfigMap, scraped, scaled and alerted on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from textwrap import indent

from seawall.metrics import UTILIZATION
from seawall.monitoring.alerts import Settings, groups, render_groups
from seawall.monitoring.literal import block, quoted
from seawall.monitoring.workload import Workload

CONFIGMAP_BYTES = 1 << 20
"""What Kubernetes holds in a ConfigMap, with all its keys."""
MOUNT = "/etc/seawall"
_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")


class NotMountable(ValueError):
    """Files that no ConfigMap can hold."""


def manifests(workload: Workload, alerts: Settings, *, operator: bool = True) -> dict[str, str]:
    """Files by name. With ``operator`` the Prometheus operator finds the service, else annotations of its pods do."""
    found = {
        "configmap.yaml": _configmap(workload),
        "deployment.yaml": _deployment(workload, annotated=not operator),
        "service.yaml": _service(workload),
        "hpa.yaml": _autoscaler(workload),
    }
    if operator:
        found["servicemonitor.yaml"] = _monitor(workload)
        found["prometheusrule.yaml"] = _rule(workload, alerts)
    return found


def remarks(workload: Workload) -> list[str]:
    """What of the configuration does not fit to where it will be."""
    said = []
    policy = workload.policy
    allow = policy.metrics.allow
    if allow is not None and all(network.is_loopback for network in allow):
        said.append(
            "metrics.allow has addresses of the machine itself only, and Prometheus comes from another pod: "
            "it will get 404; add the network of your pods"
        )
    for name, file in (("history", policy.history), ("backend.snapshot", policy.backend.snapshot)):
        if file is not None and not file.startswith("/"):
            said.append(f"{name}: {file} would be in {MOUNT}, where nothing can be written; name a file on a volume")
    return said


def _key(path: str) -> str:
    key = path.replace("/", "__")
    if not _KEY.fullmatch(key):
        raise NotMountable(f"{path} cannot be a key of a ConfigMap: letters, digits, '-', '_', '.' and '/' only")
    return key


def _configmap(workload: Workload) -> str:
    size = sum(len(text.encode()) for text in workload.files.values())
    if size > CONFIGMAP_BYTES:
        raise NotMountable(f"the configuration has {size:,} bytes, and a ConfigMap holds {CONFIGMAP_BYTES:,}")
    data = "".join(f"  {_key(path)}: {block(text, 4)}\n" for path, text in workload.files.items())
    return f"""\
# Who may call how much. Change it and apply it again: the pods see it within a minute or so (the kubelet's sync
# period), and two seconds later it holds. `seawall check` it before: a file with mistakes changes nothing, and alerts.
apiVersion: v1
kind: ConfigMap
metadata:
  name: {workload.name}-seawall
  labels: {{app.kubernetes.io/name: {workload.name}}}
data:
{data}"""


def _deployment(workload: Workload, *, annotated: bool) -> str:
    name, port, path = workload.name, workload.port, workload.policy.metrics.path
    annotations = ""
    if annotated:
        annotations = f"""
      annotations:
        prometheus.io/scrape: "true"
        prometheus.io/port: "{port}"
        prometheus.io/path: {quoted(path or "")}"""
    variables = "".join(
        f"            - name: {variable}\n"
        f"              valueFrom: {{secretKeyRef: {{name: {name}-seawall, key: {variable}"
        f"{'' if needed else ', optional: true'}}}}}\n"
        for variable, needed in workload.variables.items()
    )
    items = ""
    if any("/" in path for path in workload.files):
        paths = "".join(f"              - {{key: {_key(path)}, path: {path}}}\n" for path in workload.files)
        items = f"            items:\n{paths}"
    probe = f"httpGet: {{path: {workload.probe}, port: http}}" if workload.probe else "tcpSocket: {port: http}"
    return f"""\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {name}
  labels: {{app.kubernetes.io/name: {name}}}
spec:
  # No `replicas`: the autoscaler sets them, and each `apply` would set them back.
  selector:
    matchLabels: {{app.kubernetes.io/name: {name}}}
  strategy:
    rollingUpdate: {{maxSurge: 1, maxUnavailable: 0}}
  template:
    metadata:
      labels: {{app.kubernetes.io/name: {name}}}{annotations}
    spec:
      # Time to finish what has begun, and to give back what was taken ahead of a shared store.
      terminationGracePeriodSeconds: 30
      securityContext: {{runAsNonRoot: true, seccompProfile: {{type: RuntimeDefault}}}}
      containers:
        - name: app
          # One process a pod: whatever the autoscaler adds is a whole event loop, and metrics need no merging.
          image: {quoted(workload.image)}
          ports: [{{name: http, containerPort: {port}}}]
          env:
            # For the application: app.add_middleware(Seawall, config=os.environ["SEAWALL_CONFIG"])
            - {{name: SEAWALL_CONFIG, value: {MOUNT}/{workload.configuration}}}
{variables}\
          readinessProbe:
            # Not a path with limits: a service that sheds is busy, and must not be taken out for it.
            {probe}
            periodSeconds: 5
          livenessProbe:
            {probe}
            periodSeconds: 10
            failureThreshold: 6
          resources:
            # An event loop uses one core at most.
            requests: {{cpu: "1", memory: 256Mi}}
            limits: {{memory: 512Mi}}
          securityContext: {{allowPrivilegeEscalation: false, capabilities: {{drop: [ALL]}}}}
          volumeMounts:
            # The directory, and not the file by `subPath`: that would be the file as it was when the container began.
            # In a directory the kubelet swaps a link to a new version of all files at once, which Seawall sees.
            - {{name: seawall, mountPath: {MOUNT}, readOnly: true}}
      volumes:
        - name: seawall
          configMap:
            name: {name}-seawall
{items}"""


def _service(workload: Workload) -> str:
    return f"""\
apiVersion: v1
kind: Service
metadata:
  name: {workload.name}
  labels: {{app.kubernetes.io/name: {workload.name}}}
spec:
  selector: {{app.kubernetes.io/name: {workload.name}}}
  ports:
    - {{name: http, port: 80, targetPort: http}}
"""


def _monitor(workload: Workload) -> str:
    return f"""\
# For the Prometheus operator. Some installations look only for what has a label of theirs, such as `release`.
apiVersion: monitoring.coreos.com/v1
kind: ServiceMonitor
metadata:
  name: {workload.name}
  labels: {{app.kubernetes.io/name: {workload.name}}}
spec:
  selector:
    matchLabels: {{app.kubernetes.io/name: {workload.name}}}
  endpoints:
    - {{port: http, path: {quoted(workload.policy.metrics.path or "")}, interval: 15s}}
"""


def _autoscaler(workload: Workload) -> str:
    return f"""\
# Enough pods that each is used to 70 %, by what Seawall knows of itself: demand by capacity, with what was refused.
# Needs prometheus-adapter, with a rule that offers the metric:
#   rules:
#     - seriesQuery: '{UTILIZATION.name}{{namespace!="",pod!=""}}'
#       resources: {{overrides: {{namespace: {{resource: namespace}}, pod: {{resource: pod}}}}}}
#       metricsQuery: avg(<<.Series>>{{<<.LabelMatchers>>}}) by (<<.GroupBy>>)
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {workload.name}
  labels: {{app.kubernetes.io/name: {workload.name}}}
spec:
  scaleTargetRef: {{apiVersion: apps/v1, kind: Deployment, name: {workload.name}}}
  minReplicas: {workload.instances}
  maxReplicas: {workload.instances * 10}
  metrics:
    - type: Pods
      pods:
        metric: {{name: {UTILIZATION.name}}}
        target: {{type: AverageValue, averageValue: 700m}}
  behavior:
    scaleUp:
      stabilizationWindowSeconds: 0        # the ratio is smoothed over 5 s already
      policies:
        - {{type: Percent, value: 100, periodSeconds: 30}}
        - {{type: Pods, value: 4, periodSeconds: 30}}
    scaleDown:
      stabilizationWindowSeconds: 300      # the highest of five minutes
      policies:
        - {{type: Percent, value: 20, periodSeconds: 60}}
"""


def _rule(workload: Workload, alerts: Settings) -> str:
    return f"""\
# The rules of `seawall export alerts`, for this service alone. runbook_url leads to a page for each alert.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: {workload.name}-seawall
  labels: {{app.kubernetes.io/name: {workload.name}}}
spec:
  groups:
{indent(render_groups(groups(alerts), alerts), "    ")}"""


def joined(files: Mapping[str, str]) -> str:
    """All files as one, for `kubectl apply -f -`."""
    return "---\n".join(files.values())
