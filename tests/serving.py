"""A server process for as long as a block lasts, and a client of one connection, for tests of what people run."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT = 60.0
STOP_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that has been read."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Served:
    """A server that listens on 127.0.0.1."""

    process: subprocess.Popen[bytes]
    port: int
    _connection: http.client.HTTPConnection | None = field(default=None, init=False)

    def ask(self, path: str = "/", method: str = "GET", headers: Mapping[str, str] | None = None) -> Reply:
        """One request, over a connection that is kept: refusals must not close it."""
        if self._connection is None:
            self._connection = self.connect()
        self._connection.request(method, path, headers=dict(headers or {}))
        answer = self._connection.getresponse()
        fields = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, fields, answer.read())

    def statuses(self, count: int, path: str = "/", **how: str) -> list[int]:
        return [self.ask(path, **how).status for _ in range(count)]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def serving(arguments: Sequence[str], log: Path, cwd: Path = ROOT, attempts: int = 3) -> Iterator[Served]:
    """Run ``python ARGUMENTS`` with a free PORT in its environment (and for ``{port}``) until the block ends."""
    served = None
    while served is None:
        attempts -= 1
        port = free_port()
        command = [sys.executable, *(argument.format(port=port) for argument in arguments)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, "PORT": str(port)},
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C at the tests is not for it
            )
        if _is_up(process, port):
            served = Served(process, port)
        else:  # somebody else was quicker to take the port, or it is broken
            process.kill()
            process.wait()
            assert attempts, f"{command} does not serve:\n{log.read_text(errors='replace')}"
    try:
        yield served
    finally:
        served.close()


def _is_up(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            # Whoever took the port before it lets it end now.
            time.sleep(0.2)
            return process.poll() is None
        time.sleep(0.02)
    return False


def most(burst: int, per_second: float, seconds: float) -> int:
    """What a bucket of ``burst`` and ``per_second`` admits at most in ``seconds``: B + r * t."""
    return burst + int(per_second * seconds)
