"""What an operator does about one tenant."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from seawall import MemoryBackend, Seawall, operate
from seawall.asgi import ALL_PARTS
from seawall.blocks import Block, Blocks
from seawall.config import load_mapping
from seawall.config.runtime import check_tenant
from seawall.directory import Known
from seawall.gate import Gate
from seawall.rate import SECOND
from seawall.testing import Answer, ManualClock, drive

TOKEN = "a-token-of-some-length"
FILE: dict[str, Any] = {
    "version": 1,
    "identity": {"tenant": [{"state": "tenant"}]},
    "plans": {"free": {"rate": "10/minute", "quota": "100/day", "concurrency": 5}, "none": {"rate": "unlimited"}},
    "defaults": {"plan": "free", "anonymous_plan": "free"},
    "tenants": {"acme": {}, "open": {"plan": "none"}},
    "routes": [
        {
            "name": "search",
            "match": {"path": "/search"},
            "limits": {
                "search-tenant": {"rate": "5/minute", "per": "tenant"},
                "search-all": {"rate": "1000/minute", "per": "global"},
            },
        }
    ],
    "status": {"path": "/-/seawall", "allow": ["127.0.0.1"], "token": TOKEN},
}
ACME = {"state": {"tenant": "acme"}}


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.fixture
def shell(clock: ManualClock, registry: CollectorRegistry) -> Any:
    return Seawall(hello, FILE, clock=clock, registry=registry)


async def post(shell: Any, body: Any, token: str | None = TOKEN, client: str = "127.0.0.1") -> Answer:
    headers = [] if token is None else [(b"authorization", b"Bearer " + token.encode())]
    answer, sent = Answer(), [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        return sent.pop(0) if sent else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        answer.messages.append(message)
        answer.status = message.get("status", answer.status)
        answer.body += message.get("body", b"")

    scope = {"type": "http", "method": "POST", "path": "/-/seawall", "headers": headers, "client": (client, 1)}
    await shell(scope, receive, send)
    return answer


async def test_a_tenant_is_shown_with_all_limits_that_are_its_own(shell: Any) -> None:
    for _ in range(3):
        await drive(shell, "/search", **ACME)
    shown = json.loads((await post(shell, {"action": "show", "tenant": "acme"})).body)
    assert shown == {
        "tenant": "acme",
        "listed": True,
        "plan": "free",
        "mode": "enforce",
        "priority": "normal",
        "concurrency": 5,
        "limits": [
            {"policy": "rate", "allowance": "10/minute", "limit": 10, "left": 7, "wait": 0.0},
            {"policy": "quota", "allowance": "100/day", "limit": 100, "left": 97, "wait": 0.0},
            {"policy": "search-tenant", "allowance": "5/minute", "limit": 5, "left": 2, "wait": 0.0},
        ],
        "blocked": None,
    }
    assert json.loads((await post(shell, {"action": "show", "tenant": "open"})).body)["limits"] == [
        {"policy": "search-tenant", "allowance": "5/minute", "limit": 5, "left": 5, "wait": 0.0}
    ]


async def test_a_tenant_that_is_reset_has_used_nothing(shell: Any) -> None:
    for _ in range(11):
        await drive(shell, "/search", **ACME)
    assert (await drive(shell, "/search", **ACME)).status == 429
    await drive(shell, state={"tenant": "globex"})
    answer = await post(shell, {"action": "reset", "tenant": "acme"})
    assert json.loads(answer.body) == {"tenant": "acme", "reset": ["rate", "quota", "search-tenant"]}
    assert (await drive(shell, "/search", **ACME)).headers["ratelimit"] == '"search-tenant";r=4;t=12'
    assert (await drive(shell, state={"tenant": "globex"})).headers["ratelimit"] == '"rate";r=8;t=6'


async def test_a_tenant_that_is_blocked_gets_403_until_then(
    shell: Any, clock: ManualClock, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await post(shell, {"action": "block", "tenant": "acme", "seconds": 60, "reason": "scraping"})
    assert (answer.status, json.loads(answer.body)) == (200, {"tenant": "acme", "blocked": True})
    refused = await drive(shell, **ACME)
    assert (refused.status, json.loads(refused.body)["reason"]) == (403, "denied")
    shown = json.loads((await post(shell, {"action": "show", "tenant": "acme"})).body)
    assert shown["blocked"] == {"until": "2026-03-04T12:01:00.000Z", "reason": "scraping"}
    assert (await drive(shell, state={"tenant": "globex"})).status == 200
    assert shell.status()["blocked"] == [{"tenant": "acme", "until": "2026-03-04T12:01:00.000Z", "reason": "scraping"}]
    assert shell.status()["refused"][0]["caller"] == "acme"
    clock.advance(60)
    assert (await drive(shell, **ACME)).status == 200
    assert shell.status()["blocked"] == []
    assert registry.get_sample_value("seawall_requests_total", {"outcome": "denied", "priority": "none"}) == 1
    said = [record for record in caplog.records if getattr(record, "event", "") == "block"]
    assert [record.getMessage() for record in said] == ["an operator has asked to block acme"]


async def test_a_block_can_be_taken_back(shell: Any) -> None:
    await post(shell, {"action": "block", "tenant": "acme", "seconds": 60})
    await post(shell, {"action": "unblock", "tenant": "acme"})
    assert (await drive(shell, **ACME)).status == 200


@pytest.mark.parametrize(("token", "client", "status"), [(None, "127.0.0.1", 401), ("wrong", "127.0.0.1", 401)])
async def test_nobody_without_the_token_does_anything(shell: Any, token: str, client: str, status: int) -> None:
    assert (await post(shell, {"action": "block", "tenant": "acme", "seconds": 60}, token, client)).status == status
    assert (await drive(shell, **ACME)).status == 200


async def test_a_peer_that_may_not_see_the_page_may_not_act_on_it(shell: Any) -> None:
    answer = await post(shell, {"action": "block", "tenant": "acme", "seconds": 60}, client="192.0.2.1")
    assert (answer.status, answer.body) == (404, b"Not Found")
    assert (await drive(shell, **ACME)).status == 200


async def test_a_backend_that_cannot_do_it_says_so(clock: ManualClock, registry: CollectorRegistry) -> None:
    class Plain:
        """No more than a backend has to be."""

        name = "plain"

        def __init__(self) -> None:
            self.inner = MemoryBackend(clock=clock, wall_clock=clock.wall_ns)

        def __getattr__(self, name: str) -> Any:
            if name in ("blocks", "forget", "block"):
                raise AttributeError(name)
            return getattr(self.inner, name)

    shell: Any = Seawall(hello, FILE, backend=Plain(), clock=clock, registry=registry)
    answer = await post(shell, {"action": "reset", "tenant": "acme"})
    assert (answer.status, json.loads(answer.body)) == (409, {"error": "the plain backend cannot do that"})
    assert json.loads((await post(shell, {"action": "show", "tenant": "acme"})).body)["limits"][0]["left"] == 10


async def test_who_the_file_has_no_plan_for_is_not_shown(clock: ManualClock, registry: CollectorRegistry) -> None:
    file = {
        **FILE,
        "identity": {"tenant": [{"api_key": {"header": "X-API-Key"}}]},
        "defaults": {"anonymous_plan": "free"},
        "tenants": {"acme": {"plan": "free", "keys": ["sha256:" + "0" * 64]}},
    }
    shell: Any = Seawall(hello, file, clock=clock, registry=registry)
    for action in ("show", "reset"):
        answer = await post(shell, {"action": action, "tenant": "globex"})
        assert (answer.status, "no such tenant" in answer.body.decode()) == (409, True)


async def test_who_is_in_nobody_s_file_is_reset_whichever_plan_it_was_on(shell: Any) -> None:
    file = {**FILE, "plans": {**FILE["plans"], "pro": {"rate": "9/hour", "quota": "9/month"}}}
    gate = Gate(
        load_mapping(file),
        shell.gate.backend,
        shell.gate.cells,
        parts=ALL_PARTS,
        concurrency=shell.gate.concurrency,
        clock=shell.gate.clock,
        wall_clock=shell.gate.wall_clock,
        random=lambda: 0.5,
    )
    pro = Known("globex", check_tenant({"plan": "pro"}), 0, 0)
    entries = operate.entries_of(gate, "globex", pro)
    assert [str(entry.limit) for entry in entries] == ["9", "9", "5"]
    gate.backend.debit([(entry.meter, "globex", 9) for entry in entries])
    before = await operate.show(gate, shell.gate.backend.blocks, "globex", pro)
    assert [(one["allowance"], one["left"]) for one in before["limits"]] == [
        ("9/hour", 0),
        ("9/month", 0),
        ("5/minute", 0),
    ]
    assert before["plan"] == "pro"
    assert await operate.reset(gate, "globex") == ["rate", "quota", "search-tenant"]
    after = await operate.show(gate, shell.gate.backend.blocks, "globex", pro)
    assert [one["left"] for one in after["limits"]] == [9, 9, 5]


async def test_a_long_id_is_the_caller_that_it_is_to_requests(shell: Any) -> None:
    long = {"state": {"tenant": "x" * 200}}
    for _ in range(3):
        await drive(shell, "/search", **long)
    shown = json.loads((await post(shell, {"action": "show", "tenant": "x" * 200})).body)
    assert [one["left"] for one in shown["limits"]] == [7, 97, 2]
    await post(shell, {"action": "block", "tenant": "x" * 200, "seconds": 60})
    assert (await drive(shell, **long)).status == 403
    await post(shell, {"action": "unblock", "tenant": "x" * 200})
    await post(shell, {"action": "reset", "tenant": "x" * 200})
    assert (await drive(shell, **long)).headers["ratelimit"] == '"rate";r=9;t=6'


def test_blocks_end_by_themselves(clock: ManualClock) -> None:
    blocks = Blocks(clock.wall_ns, name=lambda tenant: f"hash of {tenant}")
    blocks.add("acme", Block(clock.wall_ns() + SECOND))
    assert list(blocks.by_name()) == ["hash of acme"]
    assert [tenant for tenant, _ in blocks] == ["acme"]
    assert (blocks.of("acme"), len(blocks)) == (Block(clock.wall_ns() + SECOND), 1)
    clock.advance(1)
    assert list(blocks) == []
    assert (blocks.of("acme"), len(blocks)) == (None, 0)
    blocks.replace({"hash of globex": Block(clock.wall_ns() + 1), "hash of acme": Block(clock.wall_ns())})
    assert blocks.of("globex") is not None
    assert (blocks.of("acme"), len(blocks), repr(blocks)) == (None, 1, "<Blocks of 1 tenants>")
    blocks.remove("globex")
    assert len(blocks) == 0


def test_blocks_that_have_ended_are_forgotten_when_another_comes(clock: ManualClock) -> None:
    blocks = Blocks(clock.wall_ns)
    for number in range(100):
        blocks.add(f"tenant-{number}", Block(clock.wall_ns() + SECOND))
    clock.advance(1)
    blocks.add("acme", Block(clock.wall_ns() + SECOND))
    assert [tenant for tenant, _ in blocks] == ["acme"]
    assert len(blocks) == 1


async def test_a_tenant_out_of_a_database_is_shown_by_what_that_says(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    def look_up(name: str) -> Any:
        return {"plan": "free", "overrides": {"rate": "77/minute"}} if name == "globex" else None

    shell: Any = Seawall(hello, FILE, tenants=look_up, clock=clock, registry=registry)
    shown = json.loads((await post(shell, {"action": "show", "tenant": "globex"})).body)
    assert shown["limits"][0]["left"] == 77
    assert json.loads((await post(shell, {"action": "show", "tenant": "acme"})).body)["limits"][0]["left"] == 10


async def test_a_tenant_that_has_come_with_a_key_is_shown_by_what_the_database_says_of_the_key(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    names = ["sha256:" + sha256(key).hexdigest() for key in (b"first", b"second")]
    rows: dict[str, Any] = {name: {"id": "globex", "overrides": {"rate": "20/minute"}} for name in names}
    file = {**FILE, "identity": {"tenant": [{"api_key": {"header": "X-API-Key"}}]}}
    shell: Any = Seawall(hello, file, tenants=rows.get, clock=clock, registry=registry)

    async def left() -> Any:
        return json.loads((await post(shell, {"action": "show", "tenant": "globex"})).body)["limits"][0]["left"]

    assert await left() == 10  # as anybody
    for key in ("first", "second"):
        await drive(shell, headers={"X-API-Key": key})
    assert await left() == 18
    rows[names[1]] = {"id": "globex", "overrides": {"rate": "100/minute"}}
    assert await left() == 90
    rows[names[1]] = {"id": "initech"}  # and no longer globex
    assert await left() == 18
    del rows[names[0]]
    assert await left() == 9
