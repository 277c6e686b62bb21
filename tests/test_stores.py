"""The servers that other tests are run against: they do what their methods say."""

from __future__ import annotations

import hashlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from proxy import Proxy
from stores import HOST, Server, free_port


def test_a_store_begins_without_keys_scripts_and_statistics(store: Server) -> None:
    digest = store.command("SCRIPT", "LOAD", "return 1")
    assert (store.command("DBSIZE"), store.command("SCRIPT", "EXISTS", digest)) == (0, [1])
    store.command("SET", "left", "behind for the test below")
    assert store.calls() == {"config|resetstat": 1, "script|load": 1, "script|exists": 1, "dbsize": 1, "set": 1}


def test_a_store_has_forgotten_what_the_test_before_left(store: Server) -> None:
    digest = hashlib.sha1(b"return 1").hexdigest()
    assert (store.command("DBSIZE"), store.command("SCRIPT", "EXISTS", digest)) == (0, [0])


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
        line = Line(proxy.address)
        with line.socket, pytest.raises(ConnectionResetError):
            line.read(1)
        eventually((1, 0), lambda: (proxy.connections, proxy.open))


def test_a_closed_proxy_leaves_no_thread_and_no_connection(store: Server) -> None:
    before = threading.active_count()
    with Proxy(store.address) as proxy:
        lines = [Line(proxy.address) for _ in range(50)]
    for each in lines:
        with each.socket, pytest.raises(ConnectionResetError):
            each.read(1)
    assert (proxy.open, threading.active_count()) == (0, before)
