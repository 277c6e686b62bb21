"""What watches a service from outside: dashboards, alerts, and manifests to run them beside it.

Pure generators of text. Each query is built from the `Spec` of its metric, so that a metric that is renamed or loses a
label breaks these modules, and not a dashboard on the day it is needed.
"""
