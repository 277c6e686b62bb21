"""A service as manifests describe it: its image, its configuration, and what that expects of where it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from ipaddress import ip_address
from typing import final

from seawall.monitoring.alerts import Settings
from seawall.policy import Policy
from seawall.rate import SECOND


@final
@dataclass(frozen=True, slots=True)
class Workload:
    """``files`` are the configuration and what it includes, by their paths from its directory, itself first.

    ``variables`` are those that the files name, and whether they have to be set. ``store`` is the one that is the
    whole of ``backend.url``.
    """

    name: str
    image: str
    policy: Policy
    files: Mapping[str, str]
    variables: Mapping[str, bool]
    store: str | None = None
    port: int = 8000

    @property
    def configuration(self) -> str:
        """The name of the file that the application is given."""
        return next(iter(self.files))

    @property
    def probe(self) -> str | None:
        """A path that is answered whatever the load is: the first of the exempt routes."""
        paths = (path for route in self.policy.routes if route.exempt for path in route.paths)
        return next((path for path in paths if "{" not in path and "*" not in path), None)

    @property
    def instances(self) -> int:
        """How many processes there should be at first."""
        return self.policy.backend.instances or 2

    def is_scraped_from(self, address: str) -> bool:
        """Whether `metrics.allow` lets this address in."""
        allow = self.policy.metrics.allow
        return allow is None or any(ip_address(address) in network for network in allow)


def alert_settings(policy: Policy, objective: Decimal, job: str | None, runbooks: str) -> Settings:
    """What alerts on a service take from its policy: the class that matters most, the caps and the patience."""
    # The buckets of the histogram of calls end at 0.1 s: beyond, nothing would ever be slow.
    slow = min(0.4 * policy.backend.timeout_ns / SECOND, 0.05)
    critical = policy.priorities[0].name
    return Settings(objective, critical, policy.backend.max_keys, slow, job, runbooks)
