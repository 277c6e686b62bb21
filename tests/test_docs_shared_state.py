"""docs/shared-state.md is true: its files, URLs, rights, sizes, formulas and constants are those of the code."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import PlainTextResponse

from seawall import Seawall
from seawall.backends import DENIED_FOR, share
from seawall.backends.redis import address, backend, blocked, leases, node, session, slots
from seawall.blocks import Block
from seawall.config import check
from seawall.metrics import SPECS
from seawall.policy import BackendSettings
from seawall.rate import SECOND, Quota, Rate
from seawall.testing import drive
from serving import ROOT
from stores import Server, cluster, sentinel, standalone, version

TEXT = (ROOT / "docs" / "shared-state.md").read_text(encoding="utf-8")
WORDS = " ".join(TEXT.split())
FILES = re.findall(r"^```yaml[^\n]*\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
SCHEMES = "|".join(map(re.escape, sorted(address._SCHEMES, key=len, reverse=True)))
URLS = re.findall(rf"`((?:{SCHEMES})://[^`]+)`", TEXT)


@pytest.fixture
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://localhost")
    monkeypatch.setenv("SEAWALL_SECRET", "a secret of the tests")


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("text", FILES, ids=[text.partition("type: ")[2].split()[0] for text in FILES])
def test_a_file_passes_check_without_a_warning(text: str, tmp_path: Path) -> None:
    (tmp_path / "seawall.yaml").write_text(text, encoding="utf-8")
    assert check(tmp_path / "seawall.yaml").diagnostics == ()


@pytest.mark.usefixtures("_environment")
def test_what_is_called_a_default_is_one(tmp_path: Path) -> None:
    [text] = [text for text in FILES if "# These are the defaults." in text]
    written = text.partition("# These are the defaults.")[2]
    (tmp_path / "seawall.yaml").write_text(text, encoding="utf-8")
    policy = check(tmp_path / "seawall.yaml").policy
    assert policy is not None
    names = re.findall(r"^  (\w+):", written, re.MULTILINE)
    default = BackendSettings()
    assert len(names) == 5
    for name in names:
        name = "timeout_ns" if name == "timeout" else name
        assert getattr(policy.backend, name) == getattr(default, name), name
    described = {*names, "type", "url", "secret", "instances"}
    settings = {field.name.removesuffix("_ns") for field in fields(BackendSettings)}
    assert settings - described == {"max_keys", "snapshot"}  # of a memory backend


@pytest.mark.parametrize("url", URLS)
def test_a_url_means_something(url: str) -> None:
    parsed = address.parse(url)
    assert parsed.hosts
    assert (parsed.tls is not None) == url.startswith("rediss")


def test_there_is_a_url_of_each_kind_and_all_options_of_tls_are_named() -> None:
    assert {address.parse(url).kind for url in URLS} == {"single", "sentinel", "cluster"}
    assert {url.partition("://")[0].replace("valkey", "redis") for url in URLS} >= {
        scheme.replace("valkeys", "rediss").replace("valkey", "redis") for scheme in address._SCHEMES
    } - {"redis+unix"}
    assert set(re.findall(r"`(ssl_\w+)`", TEXT)) == set(address._TLS_OPTIONS)


# Who may do what


RULES = re.findall(r"^ACL SETUSER seawall (.+)$", TEXT, re.MULTILINE)


def test_there_are_rules_for_a_server_for_both_kinds_of_several_and_for_sentinels() -> None:
    assert [rules.split()[-1] for rules in RULES] == ["+time", "+role", "+asking", "+sentinel|get-master-addr-by-name"]


async def _answering(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("hello")(scope, receive, send)


def decided_by(url: str, settings: dict[str, Any] | None = None) -> tuple[list[int], bool]:
    """Eight answers of an application, three limits each, and whether the store has been asked to the end."""
    app = Seawall(
        _answering,
        config={
            "version": 1,
            "plans": {"default": {"rate": "6/hour", "quota": "1000/day", "concurrency": 5}},
            "routes": [{"name": "all", "match": {"path": "/**"}, "limits": {"all": {"rate": "9/h", "per": "global"}}}],
            "backend": {
                "type": "redis",
                "url": url,
                "secret": "a secret of the tests",
                "timeout": "5s",  # this machine may be busy
                **(settings or {}),
            },
        },
    )

    async def ask() -> tuple[list[int], bool]:
        statuses = [(await drive(app, "/")).status for _ in range(8)]
        assert isinstance(app.backend, backend.RedisBackend)
        up = app.backend.up
        if up:
            await operated(app.backend)
        await app.backend.aclose()
        return statuses, up

    return asyncio.run(ask())


async def operated(asked: backend.RedisBackend) -> None:
    """Do what an operator does."""
    await asked.block("acme", Block(time.time_ns() + SECOND))
    await asked.fetch_blocks()
    assert len(asked.blocks) == 1
    await asked.forget([(asked.meter("rate", "tenant", Rate(1, SECOND)), "acme")])


def denials(servers: Sequence[Server]) -> list[Any]:
    return [entry for server in servers for entry in server.command("ACL", "LOG")]


EXACT = ([200] * 6 + [429] * 2, True)


def test_the_rights_are_enough_for_a_server() -> None:
    with standalone(users={"seawall": RULES[0]}) as server:
        assert decided_by(server.url_as("seawall", "secret") + "/1") == EXACT
        assert denials([server]) == []


@pytest.mark.parametrize("right", re.findall(r"\+(\w+)", RULES[0]))
def test_no_right_is_one_too_many(right: str, caplog: pytest.LogCaptureFixture) -> None:
    """Without it the store is away, but for INFO, which is asked for the sake of a warning."""
    with standalone(users={"seawall": f"{RULES[0]} -{right}"}) as server:
        decided_by(server.url_as("seawall", "secret") + "/1", {"leases": False})
        assert {entry[entry.index("object") + 1] for entry in denials([server])} == {right}
    away = re.findall(r"is away \((.*?)\b", caplog.text)
    assert bool(away) == (right != "info"), caplog.text


@pytest.mark.slow
def test_the_rights_are_enough_for_a_cluster() -> None:
    with cluster(users={"seawall": f"{RULES[0]} {RULES[2]}"}) as nodes:
        url = nodes.url.replace("://", "://seawall:secret@")
        assert decided_by(url) == EXACT
        assert denials(nodes.nodes) == []


@pytest.mark.slow
def test_the_rights_are_enough_behind_sentinels() -> None:
    with sentinel(users={"seawall": f"{RULES[0]} {RULES[1]}"}) as found:
        for each in found.sentinels:
            each.command("ACL", "SETUSER", "seawall", *RULES[3].split())
        url = found.url.replace("://", "://seawall:secret@")
        url += "?sentinel_username=seawall&sentinel_password=other"
        assert decided_by(url) == EXACT
        assert denials([*found.servers, *found.sentinels]) == []


# What is kept there


def test_keys_are_as_long_and_expire_as_the_page_says(store: Server) -> None:
    sizes = dict(
        re.findall(r"^\| (?:a )?(rate|quota|`concurrency`|the processes) \| [^|]+ \| (\d+) bytes", TEXT, re.MULTILINE)
    )
    assert {name: int(size) for name, size in sizes.items()} == {
        "rate": 32,
        "quota": 16,
        "`concurrency`": 24,
        "the processes": 24,
    }
    lengths: dict[str, set[int]] = {}
    expiries: dict[str, int] = {}
    blocked_for: list[int] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        for key in store.command("KEYS", "*"):
            if key.endswith(":canary"):
                continue  # which a probe leaves for a millisecond
            if key == "seawall:{instances}:blocks":
                blocked_for.append(store.command("PTTL", key))
                continue
            kind = "the processes" if key == "seawall:{instances}:instances" else "of a caller"
            lengths.setdefault(kind, set()).add(store.command("STRLEN", key))
            expiries[key] = store.command("PTTL", key)
            assert kind == "the processes" or re.fullmatch(r"seawall:\{[\w-]{22}\}:[\w-]{12}", key), key
        await _answering(scope, receive, send)

    app = Seawall(
        inside,
        config={
            "version": 1,
            "plans": {"default": {"rate": "6/hour", "quota": "1000/day", "concurrency": 5}},
            "backend": {"type": "redis", "url": store.url, "timeout": "5s", "leases": False},
        },
    )

    async def ask() -> None:
        assert isinstance(app.backend, backend.RedisBackend)
        await app.backend.block("acme", Block(time.time_ns() + 60 * SECOND))
        await app.backend.block("globex", Block(time.time_ns() + SECOND))
        for _ in range(2):
            assert (await drive(app, "/")).status == 200
        await app.backend.aclose()

    asyncio.run(ask())
    assert 1_000 < min(blocked_for) <= max(blocked_for) <= 60_000
    assert lengths["of a caller"] == {32, 16, 24}
    assert lengths["the processes"] == {24}
    assert 0 < min(expiries.values()) <= slots.LIFE // 1_000_000


def test_a_key_is_as_large_as_the_page_says(store: Server) -> None:
    if version(store.binary)[0] != 9:
        pytest.skip("the sizes are those of Valkey 9")
    found = re.search(r"a key with a rate is (\d+) to (\d+) bytes and one with a quota (\d+) to (\d+)", WORDS)
    assert found is not None
    rate, quota = (int(found[1]), int(found[2])), (int(found[3]), int(found[4]))
    plans: dict[str, Any] = {"default": {"rate": "6/hour", "quota": "1000/day"}}
    settings = {"type": "redis", "url": store.url, "timeout": "5s", "leases": False}
    app = Seawall(_answering, config={"version": 1, "plans": plans, "backend": settings})

    async def ask() -> None:
        for host in range(50):
            assert (await drive(app, "/", client=(f"192.0.2.{host}", 50_000))).status == 200
        await app.backend.aclose()

    asyncio.run(ask())
    sizes: dict[int, list[int]] = {32: [], 16: []}
    for key in store.command("KEYS", "*"):
        if "canary" not in key and "instances" not in key:
            sizes[store.command("STRLEN", key)].append(store.command("MEMORY", "USAGE", key))
    assert (len(sizes[32]), len(sizes[16])) == (50, 50)
    assert rate[0] <= min(sizes[32]) <= max(sizes[32]) <= rate[1]
    assert quota[0] <= min(sizes[16]) <= max(sizes[16]) <= quota[1]


# Formulas and constants


@pytest.mark.parametrize("module", [share, leases], ids=lambda module: module.__name__)
def test_a_formula_is_that_of_the_docstring(module: Any) -> None:
    """But for spaces: whoever changes one of them is told of the other."""
    formulas = re.findall(r"^    (.*(?:\* D|\(l - 1\)).*)$", str(module.__doc__), re.MULTILINE)
    assert len(formulas) == 1
    assert re.sub(r"\s|[.,]$", "", formulas[0]) in re.sub(r"\s", "", TEXT)


@pytest.mark.parametrize(
    ("sentence", "value"),
    [
        (r"one call, of up to (\d+) decisions", node.MOST_ASKS),
        (r"as long as no more than ([\d,]+) are refused by one limit", backend.MOST_DENIED),
        (r"until it would be admitted and for (a) second at most", DENIED_FOR / SECOND),
        (r"is given back after (a) second and at the end of a process", leases.IDLE / SECOND),
        (r"takes it back after (\d+) s, spent or not", leases.HELD / SECOND),
        (r"says every (\d+) s that it lives", session.BEAT),
        (r"are known to every process within (\d+) s", session.BEAT),
        (r"of at most ([\d,]+) tenants at a time", blocked.MOST_BLOCKS),
        (r"that was killed is free again after (\d+) s", slots.LIFE / SECOND),
        (r"its slots of `concurrency` are free after (\d+) s", slots.LIFE / SECOND),
        (r"its leases of quotas after (\d+) s", leases.HELD / SECOND),
        (r"at most every (\d+) seconds for each node", session.QUIET),
    ],
)
def test_a_number_is_the_code_s(sentence: str, value: float) -> None:
    found = re.search(sentence, WORDS)
    assert found is not None, sentence
    assert (1 if found[1] == "a" else int(found[1].replace(",", ""))) == value


def test_a_lease_is_as_large_as_the_page_says() -> None:
    """The units ahead are one less: the lease is counted with the one that is being spent."""
    made = backend.RedisBackend("redis://localhost")
    assert "`l = max(1, B / 4N)`" in WORDS
    assert made.meter("rate", "ip", Rate(100, SECOND, 800)).most_ahead(10) == 800 // 40 - 1
    assert "Of a quota a lease is at most a hundredth of a process's share." in WORDS
    assert made.meter("quota", "ip", Quota(10_000, "day")).most_ahead(4) == 10_000 // 4 // 100 - 1


def test_the_metrics_exist() -> None:
    known = {spec.name: set(spec.labels) for spec in SPECS}
    named = re.findall(r"`(seawall_[a-z_]+)(?:\{([^}]+)\})?`", TEXT)
    assert len(named) >= 8
    for name, labels in named:
        assert {label.partition("=")[0] for label in labels.split(",") if label} <= known[name], name
