"""Four times more than a service can do, with Seawall in front of it and without: who was served, and how fast.

    python examples/overload.py

Each request waits 10 ms, as for a database, and then computes for 5 ms. First as many are asked for as one process can
do; then four times as many come for four seconds, whatever becomes of those before them, from callers who give up after
a second. Without protection nearly all of them get their answer too late: the service is busy, and what it does is of
use to nobody. With Seawall, which needs no settings for this, as many as it can do are served, fast, and the others
know at once that they are not.

It starts a server for each of the two, a plain uvicorn on a free port, and ends by itself after about 15 seconds.
priorities.py has the same crowd, and tells its callers apart.
"""

import asyncio
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter

from fastapi import FastAPI

from seawall import LoadSheddingMiddleware

TIMES = 4
SECONDS = 4.0
PATIENCE = 1.0

bare = FastAPI()
protected = FastAPI()
protected.add_middleware(LoadSheddingMiddleware)  # or Seawall, of which it is a part


@bare.get("/")
@protected.get("/")
async def work() -> dict[str, str]:
    await asyncio.sleep(0.010)
    until = time.thread_time() + 0.005
    while time.thread_time() < until:
        pass
    return {"hello": "world"}


# The callers


class Crowd:
    """Callers that come when they want to and not when the last one has been served."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.latencies: list[float] = []

    async def come(self, path: str, headers: str) -> None:
        """One caller, counted by what it asked for and what became of it."""
        came = time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE):
                status = await self.ask(path, headers)
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            self.counts[path + headers, "gave up"] += 1
        else:
            if status == 200:
                self.latencies.append(time.monotonic() - came)
            self.counts[path + headers, "served" if status == 200 else "refused"] += 1

    async def ask(self, path: str = "/", headers: str = "") -> int:
        """The status of one answer, over a connection of those that are open."""
        reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
        except BaseException:
            writer.close()  # as callers do that give up
            raise
        self.idle.append((reader, writer))
        return int(head.split()[1])

    async def capacity(self, path: str = "/") -> float:
        """What the server can do a second, once it is up: twenty callers ask again as soon as they are served."""
        while True:
            try:
                await self.ask(path)
                break
            except (OSError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.05)
        began = time.monotonic()

        async def insist() -> int:
            served = 0
            while time.monotonic() - began < 1:
                served += await self.ask(path) == 200
            return served

        served = sum(await asyncio.gather(*(insist() for _ in range(20))))
        return served / (time.monotonic() - began)

    async def keep_coming(self, rate: float, path: str = "/", headers: str = "") -> None:
        """``rate`` callers a second, at random, for `SECONDS`; done when the last one is."""
        came, now = [], 0.0
        began = time.monotonic()
        while now < SECONDS:
            now += random.expovariate(rate)
            await asyncio.sleep(began + now - time.monotonic())
            came.append(asyncio.create_task(self.come(path, headers)))
        await asyncio.gather(*came)


def serve(app: str, port: int) -> subprocess.Popen[bytes]:
    """A server process, as people start one."""
    options = ["--port", str(port), "--log-level", "error", "--no-proxy-headers", "--loop", "asyncio", "--http", "h11"]
    return subprocess.Popen([sys.executable, "-m", "uvicorn", "--app-dir", sys.path[0], app, *options])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def overload(app: str, rate: float = 0.0) -> tuple[float, Crowd]:
    """Offer ``rate`` a second, or `TIMES` what the server can do: the rate, and what became of them."""
    crowd = Crowd(free_port())
    server = serve(app, crowd.port)
    try:
        async with asyncio.timeout(30):
            capacity = await crowd.capacity()
        rate = rate or TIMES * capacity
        await crowd.keep_coming(rate)
    finally:
        server.kill()
        server.wait()
    return rate, crowd


def main() -> None:
    rate, without = asyncio.run(overload("overload:bare"))
    print(f"{rate / TIMES:.0f} a second are possible, {rate:.0f} a second come, for {SECONDS:g} s:\n")
    print(f"{'':<16}{'served':>10}{'refused':>10}{'gave up':>10}{'median':>12}")
    show("without Seawall", without)
    show("with Seawall", asyncio.run(overload("overload:protected", rate))[1])


def show(name: str, crowd: Crowd) -> None:
    counts = "".join(f"{crowd.counts['/', outcome]:>10}" for outcome in ("served", "refused", "gave up"))
    median = f"{statistics.median(crowd.latencies) * 1e3:.0f} ms" if crowd.latencies else "-"
    print(f"{name:<16}{counts}{median:>12}")


if __name__ == "__main__":
    main()
