"""Hands every contract the implementations it is run against."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import TypeAlias

import limits
import pytest

import stores
from contracts.subjects import Counted, Served, Subject, awaited, documented, memory
from seawall.testing import ManualClock

Make: TypeAlias = Callable[[], Subject]


@pytest.fixture(scope="session")
def cluster() -> Iterator[stores.Cluster]:
    with stores.cluster() as nodes:
        yield nodes


@pytest.fixture(scope="session")
def sentinels() -> Iterator[stores.Sentinels]:
    with stores.sentinel() as watched:
        yield watched


EXACT = [
    "memory",
    "awaited",
    "documented",
    "redis",
    pytest.param("sentinel", marks=pytest.mark.slow),
    pytest.param("cluster", marks=pytest.mark.slow),
]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "weak: holds for counters of windows as well, neither buckets nor atomic")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "make" in metafunc.fixturenames:
        weak = metafunc.definition.get_closest_marker("weak") is not None
        metafunc.parametrize("make", [*EXACT, "limits"] if weak else EXACT, indirect=True)


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Make:
    """Makes an empty backend, as often as asked."""
    kind: Callable[[ManualClock], Subject]
    match request.param:
        case "memory":
            kind = memory
        case "awaited":
            kind = awaited
        case "documented":
            kind = documented
        case "limits":
            if int(limits.__version__.partition(".")[0]) < 5:
                pytest.skip(f"the limits backend needs limits 5, and this is {limits.__version__}")
            kind = partial(Counted, request.getfixturevalue("valkey").url)
        case server:
            name = {"redis": "valkey", "sentinel": "sentinels", "cluster": "cluster"}[server]
            kind = partial(Served, request.getfixturevalue(name).url)
    return lambda: kind(ManualClock())


@pytest.fixture
async def subject(make: Make) -> AsyncIterator[Subject]:
    async with make() as made:
        yield made
