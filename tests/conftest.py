"""How the whole suite runs: the settings of Hypothesis, what many files share, and the list of what was left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from prometheus_client import CollectorRegistry

import faults
from seawall.testing import ManualClock
from seawall.watch import Watch
from stores import Server, standalone

# "ci" finds the same on every machine and every time. "dev" looks for something new, "night" looks long:
#   HYPOTHESIS_PROFILE=night make test
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=100,
    print_blob=True,
    # A busy machine is slow; that is no property of the code.
    suppress_health_check=[HealthCheck.too_slow],
)
# What "ci" has found on one Python it need not look for on each.
settings.register_profile("few", settings.get_profile("ci"), max_examples=20)
settings.register_profile("dev", deadline=None, max_examples=300, print_blob=True)
settings.register_profile("night", settings.get_profile("dev"), max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _no_files_of_other_tests() -> None:
    """`seawall.reload` reads every file that is watched, also of what an earlier test has left behind."""
    Watch._all.clear()


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands at noon of a day without surprises."""
    return ManualClock("2026-03-04T12:00:00Z")


@pytest.fixture
def registry() -> CollectorRegistry:
    """Where one test publishes, and no other."""
    return CollectorRegistry()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests did not run, and why, so that a green line cannot hide them."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        # (path, line, "Skipped: reason") of a skip; an expected failure has `wasxfail` instead.
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    for report in terminalreporter.stats.get("xfailed", []):
        reasons[f"known to fail: {report.wasxfail}"] += 1
    if deselected := len(terminalreporter.stats.get("deselected", [])):
        reasons["deselected on the command line"] = deselected
    terminalreporter.write_sep("-", f"left out: {reasons.total()} tests")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:5} {reason}")
    for line in faults.table():
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def valkey() -> Iterator[Server]:
    """One server for all tests; use `store`, which is the same one, without what the tests before left in it."""
    with standalone() as server:
        yield server


@pytest.fixture
def store(valkey: Server) -> Server:
    """A server with no keys, no scripts and no statistics."""
    valkey.command("FLUSHALL")
    valkey.command("SCRIPT", "FLUSH")
    valkey.command("CONFIG", "RESETSTAT")
    return valkey
