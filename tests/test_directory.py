"""Tenants that are in somebody's database and not in the file."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

import seawall
from seawall import ConfigError, Seawall, directory
from seawall.directory import ASK, MOST_KNOWN, Directory
from seawall.testing import ManualClock, drive

FILE: dict[str, Any] = {
    "version": 1,
    "identity": {"tenant": [{"api_key": {"header": "X-API-Key"}}, {"state": "tenant"}]},
    "defaults": {"plan": "free", "anonymous_plan": "free"},
    "plans": {"free": {"rate": "10/minute"}, "pro": {"rate": "100/minute"}},
    "tenants": {"acme": {"plan": "pro", "keys": ["sha256:" + sha256(b"foo").hexdigest()]}},
    "priorities": {"high": {}, "normal": {}},
}


class Database:
    """Answers by name, counts who asks, and can be away or slow."""

    def __init__(self, rows: Mapping[str, Any]) -> None:
        self.rows = dict(rows)
        self.asked: list[str] = []
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None

    async def __call__(self, name: str) -> Any:
        self.asked.append(name)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.rows.get(name)


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.fixture
def protect(clock: ManualClock, registry: CollectorRegistry) -> Callable[..., Any]:
    def make(tenants: Any, file: Mapping[str, Any] = FILE, **more: Any) -> Any:
        return Seawall(hello, file, tenants=tenants, clock=clock, registry=registry, **more)

    return make


def of(tenant: str) -> dict[str, Any]:
    return {"state": {"tenant": tenant}}


async def policies(shell: Any, **changes: Any) -> str:
    return (await drive(shell, **changes)).headers["ratelimit-policy"]


async def test_a_tenant_has_the_plan_that_the_database_says(protect: Any) -> None:
    database = Database({"globex": {"plan": "pro"}, "own": {"plan": "pro", "overrides": {"rate": "7/minute"}}})
    shell = protect(database)
    assert await policies(shell, **of("globex")) == '"rate";q=100;w=60'
    assert await policies(shell, **of("own")) == '"rate";q=7;w=60'
    assert await policies(shell, **of("nobody")) == '"rate";q=10;w=60'
    assert database.asked == ["globex", "own", "nobody"]


async def test_the_file_comes_first(protect: Any) -> None:
    database = Database({"acme": {"plan": "free"}})
    shell = protect(database)
    assert await policies(shell, headers={"X-API-Key": "foo"}) == '"rate";q=100;w=60'
    assert await policies(shell, **of("acme")) == '"rate";q=100;w=60'
    assert database.asked == []


async def test_a_key_that_the_file_does_not_list_is_looked_up_by_its_hash(protect: Any) -> None:
    name = "sha256:" + sha256(b"bar").hexdigest()
    database = Database({name: {"id": "globex", "plan": "pro"}})
    shell = protect(database)
    assert await policies(shell, headers={"X-API-Key": "bar"}) == '"rate";q=100;w=60'
    first = (await drive(shell, headers={"X-API-Key": "bar"})).headers["ratelimit"]
    assert first == '"rate";r=98;t=1'
    assert database.asked == [name]
    # And by the id it is the same tenant, with the same bucket.
    database.rows["globex"] = {"plan": "pro"}
    assert (await drive(shell, **of("globex"))).headers["ratelimit"] == '"rate";r=97;t=1'


async def test_a_key_that_nobody_has_is_nobodys_and_the_next_source_is_tried(protect: Any) -> None:
    database = Database({"globex": {"plan": "pro"}})
    shell = protect(database)
    assert await policies(shell, headers={"X-API-Key": "wrong"}) == '"rate";q=10;w=60'
    assert await policies(shell, headers={"X-API-Key": "wrong"}, **of("globex")) == '"rate";q=100;w=60'
    assert len(database.asked) == 2


async def test_what_identify_says_is_looked_up_too(protect: Any) -> None:
    shell = protect(Database({"globex": {"plan": "pro"}}), identify=lambda scope: "globex")
    assert await policies(shell) == '"rate";q=100;w=60'


async def test_a_plain_function_will_do(protect: Any) -> None:
    shell = protect(lambda name: {"plan": "pro", "priority": None, "overrides": None})
    assert await policies(shell, **of("globex")) == '"rate";q=100;w=60'


async def test_one_name_is_looked_up_once_at_a_time(protect: Any) -> None:
    database = Database({"globex": {"plan": "pro"}})
    database.gate = asyncio.Event()
    shell = protect(database)
    waiting = [asyncio.ensure_future(policies(shell, **of("globex"))) for _ in range(50)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    database.gate.set()
    assert set(await asyncio.gather(*waiting)) == {'"rate";q=100;w=60'}
    assert database.asked == ["globex"]


async def test_who_leaves_while_a_name_is_looked_up_does_not_end_that_for_others(
    protect: Any, registry: CollectorRegistry
) -> None:
    database = Database({"globex": {"plan": "pro"}})
    database.gate = asyncio.Event()
    shell = protect(database)
    first, second = (asyncio.ensure_future(policies(shell, **of("globex"))) for _ in range(2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    database.gate.set()
    assert await second == '"rate";q=100;w=60'
    with pytest.raises(asyncio.CancelledError):
        await first
    labels = {"outcome": "cancelled", "priority": "none"}
    assert registry.get_sample_value("seawall_requests_total", labels) == 1


async def test_what_has_grown_old_is_served_while_it_is_looked_up_again(protect: Any, clock: ManualClock) -> None:
    database = Database({"globex": {"plan": "pro"}})
    shell = protect(database)
    assert await policies(shell, **of("globex")) == '"rate";q=100;w=60'
    database.rows["globex"] = {"plan": "free"}
    clock.advance(59)
    assert await policies(shell, **of("globex")) == '"rate";q=100;w=60'
    assert len(database.asked) == 1
    clock.advance(1)
    assert await policies(shell, **of("globex")) == '"rate";q=100;w=60'
    await asyncio.sleep(0)
    assert await policies(shell, **of("globex")) == '"rate";q=10;w=60'
    assert len(database.asked) == 2


async def test_usage_survives_a_change_of_plan(protect: Any, clock: ManualClock) -> None:
    database = Database({"globex": {"plan": "pro"}})
    shell = protect(database)
    for _ in range(50):
        await drive(shell, **of("globex"))
    database.rows["globex"] = {"plan": "free"}
    seawall.reload()
    answer = await drive(shell, **of("globex"))
    assert answer.headers["ratelimit"] == '"rate";r=4;t=6'


async def test_reload_asks_before_the_next_request_and_not_behind_it(protect: Any) -> None:
    database = Database({"globex": {"plan": "pro"}})
    shell = protect(database)
    await policies(shell, **of("globex"))
    database.rows["globex"] = {"plan": "free"}
    seawall.reload()
    assert await policies(shell, **of("globex")) == '"rate";q=10;w=60'


async def test_who_is_known_stays_known_while_the_database_is_away(
    protect: Any, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database({"globex": {"plan": "pro"}})
    shell = protect(database)
    await policies(shell, **of("globex"))
    database.error = ConnectionError("no\nroute")
    for _ in range(5):
        clock.advance(60)
        assert await policies(shell, **of("globex")) == '"rate";q=100;w=60'
        await asyncio.sleep(0)
    seawall.reload()
    assert await policies(shell, **of("globex")) == '"rate";q=100;w=60'
    assert await policies(shell, **of("initech")) == '"rate";q=10;w=60'
    assert await policies(shell, **of("initech")) == '"rate";q=10;w=60'
    assert database.asked.count("initech") == 1  # not for a while
    database.error = None
    database.rows["initech"] = {"plan": "pro"}
    clock.advance(5)
    assert await policies(shell, **of("initech")) == '"rate";q=100;w=60'
    said = [(record.getMessage(), record.exc_info) for record in caplog.records if "tenants=" in record.msg]
    place = f"{__file__}:{Database.__call__.__code__.co_firstlineno + 5}"
    assert said == [
        (f"tenants= has failed, and who was known stays known: ConnectionError: no\\x0aroute ({place})", None),
        ("tenants= works again", None),
    ]


async def test_a_slow_database_holds_nobody_for_longer_than_its_patience(
    protect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "PATIENCE", 0.01)
    database = Database({})
    database.gate = asyncio.Event()
    shell = protect(database)
    assert await policies(shell, **of("globex")) == '"rate";q=10;w=60'
    monkeypatch.setattr(directory, "PATIENCE", 30)
    async with asyncio.timeout(10):  # and who comes next is not held up at all
        assert await policies(shell, **of("globex")) == '"rate";q=10;w=60'
    database.rows["globex"] = {"plan": "pro"}
    database.gate.set()
    await asyncio.sleep(0.01)
    assert await policies(shell, **of("globex")) == '"rate";q=100;w=60'


async def test_look_ups_that_hang_are_given_up(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(directory, "LONGEST", 0.01)
    database = Database({})
    database.gate = asyncio.Event()
    found = Directory(database, clock)
    assert await found.ask("globex") is None
    assert repr(found) == "<Directory of 0 tenants, 0 asked for>"
    assert "tenants= has failed, and who was known stays known: TimeoutError" in caplog.text


async def test_a_look_up_that_is_cancelled_within_cancels_no_request(
    protect: Any, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """As a pool of connections that is closed does with whoever waits for one."""
    rows = {"globex": {"plan": "pro"}}

    async def look_up(name: str) -> Any:
        if name not in rows:
            raise asyncio.CancelledError
        return rows[name]

    shell = protect(look_up)
    assert await policies(shell, **of("globex")) == '"rate";q=100;w=60'
    del rows["globex"]
    seawall.reload()
    assert await policies(shell, **of("globex")) == '"rate";q=100;w=60'
    assert await policies(shell, **of("initech")) == '"rate";q=10;w=60'
    assert caplog.text.count("tenants= has failed, and who was known stays known: it was cancelled") == 1


async def test_one_tenant_that_is_described_wrongly_is_said_once_and_the_database_is_not_away(
    protect: Any, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    shell = protect(Database({"globex": {"plan": "pro"}, "initech": {"plan": 7}}))
    for _ in range(5):
        clock.advance(3_600)
        await policies(shell, **of("initech"))
        await policies(shell, **of("globex"))
        await asyncio.sleep(0)
    assert [one.getMessage()[:40] for one in caplog.records] == ["what tenants= says of somebody is wrong,"]


@pytest.mark.parametrize(
    ("described", "what"),
    [
        ({"plan": "gold"}, "plan 'gold'"),
        ({"plan": "pro", "priority": "urgent"}, "priority 'urgent'"),
        ({"plan": "pro", "overides": {}}, "unknown key 'overides'"),
        ({"plan": "pro", "overrides": {"rate": "10/fortnight"}}, "unknown time unit 'fortnight'"),
        ("pro", "is a mapping"),
        ({"plan": "${HOME}"}, "HOME"),
    ],
)
async def test_what_makes_no_sense_is_said_and_the_default_plan_holds(
    protect: Any, described: Any, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    shell = protect(Database({"globex": described}))
    assert await policies(shell, **of("globex")) == '"rate";q=10;w=60'
    assert what in caplog.text


async def test_a_tenant_that_is_found_by_its_key_has_to_say_who_it_is(
    protect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    shell = protect(lambda name: {"plan": "pro"} if name.startswith("sha256:") else None)
    assert await policies(shell, headers={"X-API-Key": "bar"}) == '"rate";q=10;w=60'
    assert "has to say its 'id'" in caplog.text
    assert sha256(b"bar").hexdigest() not in caplog.text


async def test_a_changed_file_holds_for_tenants_that_are_known(
    tmp_path: Path, clock: ManualClock, registry: CollectorRegistry
) -> None:
    path = tmp_path / "seawall.yaml"
    text = (
        "version: 1\nreload: off\nidentity: {tenant: [{state: tenant}]}\ndefaults: {plan: free}\n"
        "plans: {free: {rate: 10/minute}, pro: {rate: 100/minute}}\n"
    )
    path.write_text(text)
    database = Database({"globex": {"plan": "pro"}})
    shell: Any = Seawall(hello, path, tenants=database, clock=clock, registry=registry)
    assert await policies(shell, **of("globex")) == '"rate";q=100;w=60'
    path.write_text(text.replace("100/minute", "200/minute"))
    shell._watch.look()
    assert await policies(shell, **of("globex")) == '"rate";q=200;w=60'
    assert database.asked == ["globex"]


def test_a_default_plan_is_needed() -> None:
    file = {"version": 1, "plans": {"a": {"rate": "1/s"}, "b": {"rate": "1/s"}}, "defaults": {"anonymous_plan": "a"}}
    with pytest.raises(ConfigError, match=r"tenants= may name tenants .* set defaults\.plan"):
        Seawall(hello, file, tenants=lambda name: None, registry=CollectorRegistry())


async def test_strangers_push_out_strangers_only(clock: ManualClock) -> None:
    found = Directory(lambda name: {"plan": "pro"} if name == "globex" else None, clock)
    assert await found.ask("globex") is not None
    for number in range(MOST_KNOWN + 10):
        assert await found.ask(f"stranger-{number}") is None
    assert len(found._strangers) == MOST_KNOWN
    assert found.get("stranger-0") is ASK
    assert found.get(f"stranger-{MOST_KNOWN}") is None
    assert found.get("globex") is not ASK
    assert found.get("globex") is not None


async def test_no_more_are_looked_up_at_once_than_a_database_can_bear(clock: ManualClock) -> None:
    database = Database({})
    database.gate = asyncio.Event()
    found = Directory(database, clock)
    asked = [asyncio.ensure_future(found.ask(f"tenant-{number}")) for number in range(directory.MOST_ASKED + 50)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(database.asked) == directory.MOST_ASKED
    database.gate.set()
    assert set(await asyncio.gather(*asked)) == {None}


def test_each_event_loop_looks_up_for_itself(clock: ManualClock) -> None:
    """A look-up belongs to the loop that began it, which may be gone."""
    database = Database({"globex": {"plan": "pro"}})
    found = Directory(database, clock)

    async def give_up() -> None:
        database.gate = asyncio.Event()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await found.ask("globex")

    asyncio.run(give_up())
    database.gate = None

    async def ask() -> Any:
        return await found.ask("globex")

    assert asyncio.run(ask()).id == "globex"
