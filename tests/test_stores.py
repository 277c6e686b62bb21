"""The servers that other tests are run against: they do what their methods say."""

from __future__ import annotations

import errno
import hashlib
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from proxy import Proxy
from stores import HOST, Server, binary, certificates, cluster, debian_redis, free_port, sentinel, standalone


def test_a_store_begins_without_keys_scripts_and_statistics(store: Server) -> None:
    digest = store.command("SCRIPT", "LOAD", "return 1")
    assert (store.command("DBSIZE"), store.command("SCRIPT", "EXISTS", digest)) == (0, [1])
    store.command("SET", "left", "behind for the test below")
    assert store.calls() == {"config|resetstat": 1, "script|load": 1, "script|exists": 1, "dbsize": 1, "set": 1}


def test_a_store_has_forgotten_what_the_test_before_left(store: Server) -> None:
    digest = hashlib.sha1(b"return 1").hexdigest()
    assert (store.command("DBSIZE"), store.command("SCRIPT", "EXISTS", digest)) == (0, [0])


def test_a_server_that_is_restarted_has_the_same_port_and_no_data() -> None:
    with standalone() as server:
        server.command("SET", "key", "value")
        port, pid = server.port, server.pid
        server.restart()
        assert (server.command("DBSIZE"), server.port) == (0, port)
        assert server.info("server")["process_id"] == str(server.pid) != str(pid)


def test_a_frozen_server_takes_a_question_and_answers_it_when_it_has_thawed(store: Server) -> None:
    line = Line(store.address)
    with line.socket:
        store.freeze()
        try:
            line.ask("PING")
            assert line.is_silent()
            other = Line(store.address)  # the kernel accepts for it
            other.socket.close()
        finally:
            store.thaw()
        assert line.read(7) == b"+PONG\r\n"


@pytest.mark.parametrize("end", [Server.kill, Server.stop])
def test_a_server_that_has_ended_is_refused_and_can_be_started_again(end: Callable[[Server], None]) -> None:
    with standalone() as server:
        server.freeze()
        end(server)
        with pytest.raises(redis.ConnectionError, match="refused"):
            server.command("PING")
        server.restart()
        assert server.command("PING") == "PONG"


def test_a_user_may_do_what_the_rules_say_and_no_more() -> None:
    users = {"app": "on >p@ss:word ~app:* +get"}
    with standalone(password="se/cret", users=users) as server:
        server.command("SET", "app:1", "one")
        app = server.client(server.url_as("app", "p@ss:word"))
        assert app.get("app:1") == b"one"
        with pytest.raises(redis.exceptions.NoPermissionError):
            app.set("app:1", "two")
        with pytest.raises(redis.AuthenticationError):
            server.client(server.url_as()).ping()


def test_a_server_on_a_unix_socket_listens_nowhere_else() -> None:
    with standalone(unix=True, password="secret") as server:
        assert (server.command("PING"), server.port) == ("PONG", 0)
        assert (server.socket is not None, server.command("CONFIG", "GET", "port")) == (True, ["port", "0"])


def test_a_server_with_tls_is_trusted_by_its_authority_alone() -> None:
    with standalone(tls=True, arguments=["--tls-auth-clients", "yes"]) as server:
        known, stranger = certificates(), certificates("stranger")
        shown = {"ssl_certfile": str(known.client), "ssl_keyfile": str(known.client_key)}
        assert server.client(**shown).ping()
        with pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            server.client(server.url.replace(str(known.ca), str(stranger.ca)), **shown).ping()
        with pytest.raises(redis.ConnectionError):
            server.client().ping()
        assert "peer did not return a certificate" in server.log.read_text()


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(AssertionError, match="no-such-option"):
        standalone(arguments=["--no-such-option", "1"]).__enter__()


def test_a_server_takes_another_port_where_somebody_was_quicker(store: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_port()
    monkeypatch.setattr("stores.free_port", iter([store.port, free]).__next__)
    with standalone() as server:
        assert (server.port, server.command("PING"), store.command("PING")) == (free, "PONG", "PONG")


@pytest.fixture(params=[pytest.param(binary, id="under test"), pytest.param(debian_redis, id="Redis")])
def server(request: pytest.FixtureRequest) -> Path:
    found: Path | None = request.param()
    return found or pytest.skip("there is no redis-server on PATH")


def refusal(server: Server, *command: str) -> str:
    """An error as the server sends it: what redis-py makes of it depends on its version."""
    line = Line(server.address)
    with line.socket:
        line.ask("AUTH", server.password or "")
        assert line.read(5) == b"+OK\r\n"
        line.ask(*command)
        return line.socket.makefile().readline().rstrip()


@pytest.mark.slow
def test_the_nodes_of_a_cluster_share_the_slots(server: Path) -> None:
    with cluster(server=server, password="secret") as nodes:
        slot = nodes.slot_of("key")
        owner = nodes.node_of(slot)
        assert [nodes.node_of(slot, asked) for asked in nodes.nodes] == [owner] * 3
        assert {nodes.node_of(slot) for slot in (0, 8_000, 16_383)} == set(nodes.nodes)
        for node in nodes.nodes:
            if node is owner:
                assert node.command("SET", "key", "value") == "OK"
            else:
                assert refusal(node, "SET", "key", "value") == f"-MOVED {slot} {HOST}:{owner.port}"


@pytest.mark.slow
def test_a_migration_can_be_stopped_where_clients_are_told_ask_and_tryagain(server: Path) -> None:
    with cluster(server=server, password="secret") as nodes:
        slot = nodes.slot_of("{tag}1")
        source = nodes.node_of(slot)
        target = next(node for node in nodes.nodes if node is not source)
        source.command("MSET", "{tag}1", "one", "{tag}2", "two")
        migration = nodes.migration(slot, target)

        migration.begin()
        assert source.command("MGET", "{tag}1", "{tag}2") == ["one", "two"]
        assert migration.move("{tag}1") == ["{tag}1"]
        assert refusal(source, "GET", "{tag}1") == f"-ASK {slot} {HOST}:{target.port}"
        assert refusal(source, "MGET", "{tag}1", "{tag}2").startswith("-TRYAGAIN")
        assert refusal(target, "GET", "{tag}1") == f"-MOVED {slot} {HOST}:{source.port}"
        assert migration.move() == ["{tag}2"]
        migration.finish()

        assert target.command("MGET", "{tag}1", "{tag}2") == ["one", "two"]
        assert [nodes.node_of(slot, asked) for asked in nodes.nodes] == [target] * 3
        nodes.migrate(slot, source)
        assert source.command("MGET", "{tag}1", "{tag}2") == ["one", "two"]


@pytest.mark.slow
def test_sentinels_name_a_new_master_after_a_failover_and_after_a_crash(server: Path) -> None:
    with sentinel(server=server, password="secret") as watched:
        first, second = watched.master, watched.replica
        first.command("SET", "key", "value")
        assert first.command("WAIT", 1, 5000) == 1
        watched.failover()
        watched.wait_for_master(second)
        assert second.command("GET", "key") == "value"
        # Told by the Sentinels, the first one follows.
        eventually("up", lambda: first.info("replication").get("master_link_status"))
        with pytest.raises(redis.exceptions.ReadOnlyError):
            first.command("SET", "key", "other")
        second.kill()
        watched.wait_for_master(first)
        assert first.command("SET", "key", "other") == "OK"


@pytest.mark.slow
def test_one_sentinel_is_enough_where_it_needs_no_other() -> None:
    with sentinel(sentinels=1) as watched:
        replica = watched.replica
        watched.master.kill()
        watched.wait_for_master(replica)


RUN_HARD = """
import os, signal
from stores import Server
servers = [Server(), Server()]
servers[1].freeze()
print(*(server.port for server in servers), servers[0].directory.parent, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_servers_and_their_directories_go_with_a_test_run_that_is_killed() -> None:
    run = subprocess.run(
        [sys.executable, "-c", RUN_HARD], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    *ports, directory = run.stdout.split()
    eventually(False, Path(directory).exists)
    eventually([True, True], lambda: [is_refused(int(port)) for port in ports])


def is_refused(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((HOST, port)) == errno.ECONNREFUSED


@pytest.fixture
def proxy(store: Server) -> Iterator[Proxy]:
    with Proxy(store.address) as proxy:
        yield proxy


class Line:
    """A connection by hand, which sees pieces and resets as they come."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=10)

    def ask(self, *words: str) -> None:
        self.socket.sendall(
            b"".join([b"*%d\r\n" % len(words), *(b"$%d\r\n%s\r\n" % (len(w), w.encode()) for w in words)])
        )

    def read(self, size: int) -> bytes:
        """Exactly so many bytes, fewer only if the other side ends in order."""
        read = b""
        while len(read) < size and (piece := self.socket.recv(size - len(read))):
            read += piece
        return read

    def is_silent(self, seconds: float = 0.05) -> bool:
        return not select.select([self.socket], [], [], seconds)[0]


@pytest.fixture
def line(proxy: Proxy) -> Iterator[Line]:
    line = Line(proxy.address)
    with line.socket:
        yield line


def eventually(expected: object, of: Callable[[], object]) -> None:
    """Wait for what another thread or process is about to do."""
    deadline = time.monotonic() + 10
    while of() != expected and time.monotonic() < deadline:
        time.sleep(0.005)
    assert of() == expected


def test_a_proxy_passes_everything_on_and_counts_connections(store: Server, proxy: Proxy) -> None:
    lines = [Line(proxy.address) for _ in range(3)]
    for each in lines:
        each.ask("INCR", "n")
    assert sorted(each.read(4) for each in lines) == [b":1\r\n", b":2\r\n", b":3\r\n"]
    assert (proxy.connections, proxy.open) == (3, 3)
    for each in lines[:2]:
        each.socket.close()
    eventually(1, lambda: proxy.open)
    lines[2].ask("ECHO", "x" * 1_000_000)
    assert lines[2].read(1_000_012) == b"$1000000\r\n" + b"x" * 1_000_000 + b"\r\n"
    lines[2].socket.close()
    eventually((3, 0), lambda: (proxy.connections, proxy.open))


@pytest.mark.parametrize(("reply_only", "least"), [(True, 0.1), (False, 0.2)])
def test_a_delaying_proxy_delays_each_direction_and_keeps_the_order(
    proxy: Proxy, line: Line, reply_only: bool, least: float
) -> None:
    proxy.delayed(0.1, reply_only=reply_only)
    began = time.monotonic()
    for _ in range(50):
        line.ask("INCR", "n")
    assert line.read(241) == b"".join(b":%d\r\n" % n for n in range(1, 51))
    took = time.monotonic() - began
    assert least <= took < least * 10, "together, not one after the other"


def test_a_proxy_that_is_silent_for_both_keeps_the_question_until_it_passes_again(
    store: Server, proxy: Proxy, line: Line
) -> None:
    proxy.silent()
    line.ask("SET", "asked", "yes")
    with Line(proxy.address).socket:
        eventually((2, 2), lambda: (proxy.connections, proxy.open))
    assert (line.is_silent(), store.command("EXISTS", "asked")) == (True, 0)
    proxy.passing()
    assert (line.read(5), store.command("GET", "asked")) == (b"+OK\r\n", "yes")


def test_a_proxy_that_is_silent_for_replies_lets_the_server_do_what_it_is_asked(
    store: Server, proxy: Proxy, line: Line
) -> None:
    proxy.silent(reply_only=True)
    line.ask("SET", "asked", "yes")
    eventually("yes", lambda: store.command("GET", "asked"))
    assert line.is_silent()


def test_a_proxy_drips_a_reply_until_it_passes_again(proxy: Proxy, line: Line) -> None:
    proxy.dripping(1, every=0.1)
    began = time.monotonic()
    line.ask("ECHO", "x" * 10_000)
    pieces = [line.socket.recv(100) for _ in range(4)]
    assert pieces == [b"$", b"1", b"0", b"0"]
    assert time.monotonic() - began >= 0.3
    proxy.passing()
    assert line.read(10_005) == b"00\r\n" + b"x" * 10_000 + b"\r"


def test_a_proxy_resets_in_the_middle_of_a_reply(proxy: Proxy, line: Line) -> None:
    line.ask("ECHO", "before")
    assert line.read(12) == b"$6\r\nbefore\r\n"
    proxy.resetting(7)
    line.ask("ECHO", "a reply")
    assert line.read(7) == b"$7\r\na r"
    with pytest.raises(ConnectionResetError):
        line.read(1)
    eventually(0, lambda: proxy.open)


def test_a_proxy_resets_where_a_reply_would_begin_although_the_server_has_answered(
    store: Server, proxy: Proxy, line: Line
) -> None:
    proxy.resetting(0)
    line.ask("SET", "asked", "yes")
    with pytest.raises(ConnectionResetError):
        line.read(1)
    assert store.command("GET", "asked") == "yes"


def test_a_refusing_proxy_resets_what_is_open_and_listens_again_when_it_passes(proxy: Proxy, line: Line) -> None:
    line.ask("PING")
    assert line.read(7) == b"+PONG\r\n"
    proxy.refusing()
    assert proxy.open == 0
    with pytest.raises(ConnectionResetError):
        line.read(1)
    with pytest.raises(ConnectionRefusedError):
        Line(proxy.address)
    proxy.passing()
    again = Line(proxy.address)
    with again.socket:
        again.ask("PING")
        assert again.read(7) == b"+PONG\r\n"
    assert proxy.connections == 2


def test_a_proxy_answers_with_garbage(store: Server, proxy: Proxy, line: Line) -> None:
    proxy.garbage(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    line.ask("SET", "asked", "yes")
    assert line.read(28) == b"HTTP/1.1 400 Bad Request\r\n\r\n"
    assert store.command("GET", "asked") == "yes"


def test_a_proxy_resets_its_clients_while_there_is_no_server() -> None:
    with Proxy((HOST, free_port())) as proxy:
        with pytest.raises(ConnectionResetError), Line(proxy.address).socket as client:
            client.recv(1)
        eventually((1, 0), lambda: (proxy.connections, proxy.open))


def test_a_closed_proxy_leaves_no_thread_and_no_connection(store: Server) -> None:
    before = threading.active_count()
    with Proxy(store.address) as proxy:
        lines = [Line(proxy.address) for _ in range(50)]
    for each in lines:
        with each.socket, pytest.raises(ConnectionResetError):
            each.read(1)
    assert (proxy.open, threading.active_count()) == (0, before)
