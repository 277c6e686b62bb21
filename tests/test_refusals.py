"""Who has been refused lately, and the log lines that say so."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from seawall import Seawall
from seawall.refusals import MOST_KEPT, MOST_LOGGED, MOST_NOTED, Journal, Refusals
from seawall.testing import ManualClock, drive


def text(key: str | bytes) -> str:
    return key if isinstance(key, str) else key.hex()


def both(key: str | bytes) -> tuple[str, str]:
    return text(key), "tenant" if isinstance(key, str) else "address"


def busiest(refusals: Refusals, most: int = 20) -> list[tuple[str, int]]:
    return [(one["caller"], one["count"]) for one in refusals.busiest(most, both)]


@pytest.fixture(autouse=True)
def _hear(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "seawall")


def test_the_busiest_come_first_with_why(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals()
    for _ in range(3):
        refusals.note("acme", "rate", "rate", "search")
    refusals.note("acme", "rate", "search-all", "search")
    refusals.note("acme", "overload", "", "default")
    refusals.note(b"\x01", "rate", "rate", "default")
    assert refusals.busiest(20, both) == [
        {
            "caller": "acme",
            "kind": "tenant",
            "count": 5,
            "reasons": {"rate": 4, "overload": 1},
            "policies": {"rate": 3, "search-all": 1},
        },
        {"caller": "01", "kind": "address", "count": 1, "reasons": {"rate": 1}, "policies": {"rate": 1}},
    ]
    assert len(refusals.busiest(1, both)) == 1


def test_who_has_stopped_is_gone_after_a_while_and_who_goes_on_is_not() -> None:
    refusals = Refusals()
    for _ in range(100):
        refusals.note("acme", "rate", "rate", "default")
    for _ in range(12):
        refusals.turn(text)
        refusals.note("globex", "rate", "rate", "default")
    assert busiest(refusals)[0][0] == "globex"
    for _ in range(20):
        refusals.turn(text)
    assert busiest(refusals) == []


def test_a_flood_of_callers_is_bounded_and_hides_nobody_for_long() -> None:
    refusals = Refusals()
    for window in range(2):
        for number in range(10 * MOST_NOTED):
            refusals.note(b"%d" % number, "rate", "rate", "default")
        for _ in range(50):
            refusals.note("acme", "rate", "rate", "default")
        refusals.turn(text)
        if window == 0:
            assert busiest(refusals, 1)[0][1] == 1  # it came too late in this window
        assert len(refusals._kept) <= MOST_KEPT
        # The next window begins with who comes often.
        for _ in range(50):
            refusals.note("acme", "rate", "rate", "default")
    assert busiest(refusals, 1)[0][0] == "acme"


def test_a_window_is_a_few_lines_however_many_were_refused(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals()
    for number in range(20):
        for _ in range(100 - number):
            refusals.note(f"tenant-{number}", "quota", "search-daily", "search")
    refusals.turn(text)
    lines = [record for record in caplog.records if record.name == "seawall"]
    assert len(lines) == MOST_LOGGED + 1
    assert lines[0].getMessage() == "refused tenant-0 100 times in 10 s: quota (search-daily) on rule search"
    assert {key: getattr(lines[0], key) for key in ("event", "caller", "reason", "policy", "rule", "count")} == {
        "event": "refused",
        "caller": "tenant-0",
        "reason": "quota",
        "policy": "search-daily",
        "rule": "search",
        "count": 100,
    }
    assert lines[-1].getMessage() == "refused others 1320 times in 10 s"
    refusals.turn(text)
    assert len([record for record in caplog.records if record.name == "seawall"]) == MOST_LOGGED + 1


def test_shedding_is_one_line_as_it_begins_and_one_as_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(Refusals())
    for refused in (0, 0, 7, 9, 9, 9, 20, 20, 20, 20, 20, 20, 20, 20):
        journal.tick(refused, text)
    assert [record.getMessage() for record in caplog.records if record.name == "seawall"] == [
        "shedding: more comes than the service can do; 7 requests were shed in the last second",
        "shedding is over after 5 s; 20 requests were shed",
    ]
    journal.tick(0, text)  # another event loop counts
    journal.tick(1, text)
    assert caplog.records[-1].getMessage().startswith("shedding: more comes")


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


async def test_requests_that_are_refused_are_noted_and_logged_without_an_address(
    clock: ManualClock, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    file = {
        "version": 1,
        "identity": {"tenant": [{"state": "tenant"}]},
        "plans": {"default": {"rate": "1/hour"}},
        "access": {"deny": ["198.51.100.0/24"]},
    }
    shell: Any = Seawall(hello, file, clock=clock, registry=registry)
    evil = "acme\nrefused nobody"
    for _ in range(4):
        await drive(shell, state={"tenant": evil})
        await drive(shell, client=("203.0.113.77", 1))
    await drive(shell, client=("198.51.100.1", 1))
    found = {one["caller"]: one["count"] for one in shell.refusals.busiest(20, shell.gate.caller)}
    assert found == {evil: 3, "203.0.113.77": 3, "anonymous": 1}
    for _ in range(10):
        shell._tick()
    lines = [record.getMessage() for record in caplog.records if getattr(record, "event", "") == "refused"]
    assert len(lines) == 3
    assert all("\n" not in line for line in lines)
    assert "203.0.113.77" not in caplog.text
    assert "address " in caplog.text
