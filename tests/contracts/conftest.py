"""Hands every contract the implementations it is run against."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest

from contracts.subjects import Subject, awaited, memory
from seawall.testing import ManualClock

Make: TypeAlias = Callable[[], Subject]


@pytest.fixture(params=[memory, awaited])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes an empty backend, as often as asked."""

    def subject() -> Subject:
        clock = ManualClock()
        return Subject(request.param(clock), clock)

    return subject


@pytest.fixture
def subject(make: Make) -> Subject:
    return make()
