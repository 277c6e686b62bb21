"""Calendar quotas that outlive a restart."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from seawall import QuotaMiddleware, RateLimitMiddleware, Seawall
from seawall.backends import snapshot
from seawall.backends.memory import MemoryBackend
from seawall.backends.snapshot import Keeper, SnapshotError, read, write
from seawall.rate import SECOND, Quota, Rate
from seawall.testing import ManualClock, drive

FILE: dict[str, Any] = {
    "version": 1,
    "identity": {"tenant": [{"state": "tenant"}]},
    "plans": {"default": {"rate": "100/minute", "quota": "10/day"}},
    "tenants": {"acme": {}},
}


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def memory(clock: ManualClock) -> MemoryBackend:
    return MemoryBackend(clock=clock, wall_clock=clock.wall_ns)


def used(
    backend: MemoryBackend, key: str | bytes, *, limit: int = 10, store: str = "tenant", name: str = "quota"
) -> int:
    return limit - backend.spend([(backend.meter(name, store, Quota(limit, "day")), key, 0)]).left[0]


def spend(backend: MemoryBackend, key: str | bytes, cost: int, *, store: str = "tenant", name: str = "quota") -> None:
    assert backend.spend([(backend.meter(name, store, Quota(10, "day")), key, cost)]).admitted


def keep(path: Path, backend: MemoryBackend) -> None:
    """What a process does at its end."""
    write(path, backend.quotas())


def test_what_was_used_of_quotas_is_there_after_a_restart(tmp_path: Path, clock: ManualClock) -> None:
    before, path = memory(clock), tmp_path / "quotas"
    spend(before, "acme", 3)
    spend(before, b"\x7f\x00\x00\x01", 4, store="address")
    spend(before, "stranger", 5, store="id")
    spend(before, "acme", 6, name="search-daily")
    held = before.meter("rate", "tenant", Rate(5, SECOND))
    before.spend([(held, "acme", 5)])
    keep(path, before)
    after = memory(clock)
    after.restore(read(path))
    assert used(after, "acme") == 3
    assert used(after, b"\x7f\x00\x00\x01", store="address") == 4
    assert used(after, "stranger", store="tenant") == 5  # listed meanwhile
    assert used(after, "acme", name="search-daily") == 6
    assert used(after, "globex") == 0
    assert after.spend([(after.meter("rate", "tenant", Rate(5, SECOND)), "acme", 5)]).admitted


def test_who_has_not_come_since_is_in_the_next_snapshot_too(tmp_path: Path, clock: ManualClock) -> None:
    first, path = memory(clock), tmp_path / "quotas"
    spend(first, "acme", 3)
    for _ in range(3):
        keep(path, first)
        first = memory(clock)
        first.restore(read(path))
    assert used(first, "acme") == 3


def test_a_window_that_has_ended_meanwhile_is_forgotten(tmp_path: Path, clock: ManualClock) -> None:
    before = memory(clock)
    spend(before, "acme", 3)
    keep(tmp_path / "quotas", before)
    clock.advance(86_400)
    after = Keeper(tmp_path / "quotas", memory(clock), clock.wall_ns).backend
    assert used(after, "acme") == 0
    assert not after._families or not any(family.kept for family in after._families.values())


def test_a_changed_limit_keeps_the_count_over_a_restart(tmp_path: Path, clock: ManualClock) -> None:
    before = memory(clock)
    spend(before, "acme", 3)
    keep(tmp_path / "quotas", before)
    after = memory(clock)
    after.restore(read(tmp_path / "quotas"))
    assert used(after, "acme", limit=100) == 3


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.one_of(st.text(max_size=20), st.binary(max_size=20)), st.integers(1, 10), max_size=20),
    st.data(),
)
def test_a_damaged_snapshot_is_refused_and_a_whole_one_is_what_was_written(
    tmp_path: Path, counts: dict[str | bytes, int], data: st.DataObject
) -> None:
    clock, path = ManualClock(), tmp_path / "quotas"
    backend = memory(clock)
    for key, count in counts.items():
        spend(backend, key, count)
    assert write(path, backend.quotas()) == len(counts)
    whole = path.read_bytes()
    assert {key: used for _, _, key, _, used in read(path)} == counts
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = data.draw(
        st.sampled_from([whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole + whole[at:]])
    )
    path.write_bytes(damaged)
    with pytest.raises(SnapshotError):
        read(path)


def test_a_line_that_is_no_count_is_refused_though_its_checksum_is_right(tmp_path: Path, clock: ManualClock) -> None:
    for row in (
        ["quota"],
        ["quota", "tenant", "b", "xyz", 1, 1],
        ["quota", "tenant", "t", "a", 1, -1],
        [1] * 7,
        [["quota"], "tenant", "t", "a", 1, 1],
        ["quota", "tenant", "t", {}, 1, 1],
        ["quota", None, "t", "a", 1, 1],
        ["quota", "tenant", "t", "a", True, 1],
        b"[" * 100_000 + b"\n",
    ):
        path = tmp_path / "quotas"
        body = snapshot._head() + (row if isinstance(row, bytes) else snapshot._json(row))
        path.write_bytes(body + snapshot._json({"sha256": snapshot.sha256(body).hexdigest()}))
        with pytest.raises(SnapshotError):
            read(path)


def test_what_is_no_snapshot_is_said_and_kept_aside(
    tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "quotas"
    path.write_text("something else")
    keeper = Keeper(path, memory(clock), clock.wall_ns)
    assert "quotas.broken is no snapshot, and quotas begin anew" in caplog.text
    assert (tmp_path / "quotas.broken").read_text() == "something else"
    spend(keeper.backend, "acme", 1)
    keeper.save()
    assert [count[2] for count in read(path)] == ["acme"]


def test_a_snapshot_is_its_owners_alone_and_leaves_nothing_beside_it(tmp_path: Path, clock: ManualClock) -> None:
    keeper = Keeper(tmp_path / "quotas", memory(clock), clock.wall_ns)
    spend(keeper.backend, "acme", 1)
    keeper.save()
    assert stat.S_IMODE((tmp_path / "quotas").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quotas", "quotas.lock"]


def test_what_cannot_be_written_is_said_once(
    tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = Keeper(tmp_path / "missing" / "quotas", memory(clock), clock.wall_ns)
    spend(keeper.backend, "acme", 1)
    keeper.save()
    keeper.save()
    assert caplog.text.count("cannot be written, so a restart forgets what was used of quotas") == 1


def test_a_directory_in_its_place_stays_there(
    tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "quotas"
    path.mkdir()
    keeper = Keeper(path, memory(clock), clock.wall_ns)
    assert "is no snapshot, and quotas begin anew" in caplog.text
    spend(keeper.backend, "acme", 1)
    keeper.save()
    assert "cannot be written" in caplog.text
    assert sorted(one.name for one in tmp_path.iterdir()) == ["quotas", "quotas.lock"]


def test_another_span_keeps_the_count_over_a_restart_until_its_own_window_ends(
    tmp_path: Path, clock: ManualClock
) -> None:
    for days, left in ((0, 7), (2, 10)):
        before = memory(clock)
        spend(before, "acme", 3)
        keep(tmp_path / "quotas", before)
        clock.advance(days * 86_400)
        after = memory(clock)
        after.restore(read(tmp_path / "quotas"))
        assert after.spend([(after.meter("quota", "tenant", Quota(10, "month")), "acme", 0)]).left == [left]


def test_who_has_served_nobody_leaves_the_file_to_who_has(tmp_path: Path, clock: ManualClock) -> None:
    """A server may load an application before it forks, and its own ticker ticks as well."""
    path = tmp_path / "quotas"
    parent, worker = (Keeper(path, memory(clock), clock.wall_ns) for _ in range(2))
    parent.save()
    assert not (tmp_path / "quotas.lock").exists()
    spend(worker.backend, "acme", 1)
    worker.save()
    assert [count[2] for count in read(path)] == ["acme"]


def test_two_threads_write_one_after_the_other(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = Keeper(tmp_path / "quotas", memory(clock), clock.wall_ns)
    spend(keeper.backend, "acme", 1)
    inside, most = 0, 0
    fsync = os.fsync

    def slow(file: int) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        inside -= 1
        fsync(file)

    monkeypatch.setattr(snapshot.os, "fsync", slow)
    threads = [threading.Thread(target=keeper.save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert [count[2] for count in read(tmp_path / "quotas")] == ["acme"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")
def test_a_file_system_without_locks_costs_no_file_handles(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    closed: list[int] = []
    close = os.close

    def no_locks(file: int, _: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    keeper = Keeper(tmp_path / "quotas", memory(clock), clock.wall_ns)
    spend(keeper.backend, "acme", 1)
    monkeypatch.setattr(snapshot.fcntl, "flock", no_locks)
    monkeypatch.setattr(snapshot.os, "close", lambda file: (closed.append(file), close(file)))
    keeper.save()
    assert len(closed) == 1
    assert "No locks available" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")
def test_of_two_processes_the_first_keeps_the_file(
    tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "quotas"
    with (tmp_path / "quotas.lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        keeper = Keeper(path, memory(clock), clock.wall_ns)
        spend(keeper.backend, "acme", 1)
        keeper.save()
        keeper.save()
        assert not path.exists()
        assert caplog.text.count("is kept by another process") == 1
    keeper.save()
    assert path.exists()


async def test_an_application_keeps_its_quotas_over_a_restart(tmp_path: Path, clock: ManualClock) -> None:
    path = tmp_path / "seawall.yaml"
    path.write_text(json.dumps({**FILE, "reload": "off", "backend": {"snapshot": "state/quotas"}}))
    (tmp_path / "state").mkdir()
    acme = {"state": {"tenant": "acme"}}
    for left in (9, 8, 7):
        shell: Any = Seawall(hello, path, clock=clock, registry=CollectorRegistry())
        answer = await drive(shell, **acme)
        assert answer.headers["ratelimit"].startswith(f'"quota";r={left};')
        await shell._end()
        del shell


async def test_middlewares_of_one_file_count_in_one_place(tmp_path: Path, clock: ManualClock) -> None:
    path = tmp_path / "seawall.yaml"
    path.write_text(json.dumps({**FILE, "reload": "off", "backend": {"snapshot": "quotas"}}))
    inner: Any = QuotaMiddleware(hello, path, clock=clock, registry=CollectorRegistry())
    outer: Any = RateLimitMiddleware(inner, path, clock=clock, registry=CollectorRegistry())
    assert inner.backend is outer.backend
    await drive(outer, state={"tenant": "acme"})
    await outer._end()
    assert [(count[2], count[4]) for count in read(tmp_path / "quotas")] == [("acme", 1)]


@pytest.mark.slow
def test_a_process_that_does_not_say_when_it_ends_leaves_a_snapshot(tmp_path: Path) -> None:
    """Servers without a life span, scripts."""
    program = """
        import asyncio, sys
        from seawall import Seawall
        from seawall.testing import drive
        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        shell = Seawall(app, {
            "version": 1, "plans": {"default": {"quota": "10/day"}}, "backend": {"snapshot": sys.argv[1]},
        })
        print(asyncio.run(drive(shell)).headers["ratelimit"])
    """
    told = []
    for _ in range(2):
        command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program), str(tmp_path / "quotas")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env={**os.environ})
        told.append(done.stdout.partition(";t=")[0])
    assert told == ['"quota";r=9', '"quota";r=8']
