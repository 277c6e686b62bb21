"""Overload protection and fair admission for ASGI services.

>>> from starlette.applications import Starlette
>>> app = Starlette()
>>> app.add_middleware(Seawall, default="100/minute")
"""

from seawall._version import __version__
from seawall.asgi import (
    LimitExceeded,
    LoadSheddingMiddleware,
    PriorityAdmissionMiddleware,
    QuotaMiddleware,
    RateLimitMiddleware,
    Seawall,
    reload,
)
from seawall.backends.memory import MemoryBackend
from seawall.config import ConfigError, load
from seawall.decision import Decision, Refusal
from seawall.endpoint import charge, limit, time_left, usage
from seawall.metrics import metrics_app
from seawall.policy import Policy
from seawall.responses import EXPOSE_HEADERS

__all__ = [
    "EXPOSE_HEADERS",
    "ConfigError",
    "Decision",
    "LimitExceeded",
    "LoadSheddingMiddleware",
    "MemoryBackend",
    "Policy",
    "PriorityAdmissionMiddleware",
    "QuotaMiddleware",
    "RateLimitMiddleware",
    "Refusal",
    "Seawall",
    "__version__",
    "charge",
    "limit",
    "load",
    "metrics_app",
    "reload",
    "time_left",
    "usage",
]
