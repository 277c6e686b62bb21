"""One limit over the four workers of a server: exactly so many requests are admitted, whoever serves them.

    python examples/four_workers.py

A client address may come 100 times an hour. A uvicorn with `--workers 4` gets 400 requests over 32 connections, which
the kernel deals out to its workers. In memory they would admit up to 400. Each of the 100 that are admitted is told how
many are left after it: 99 to 0, each number once.

It uses the server at REDIS_URL, or starts one as redis_state.py does, and ends by itself after about 5 seconds.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter

from fastapi import FastAPI
from overload import free_port
from redis_state import store

from seawall import Seawall

CONFIG = {
    "version": 1,
    "plans": {"default": {"rate": "100/hour"}},
    "routes": [{"name": "worker", "match": {"path": "/worker"}, "exempt": True}],
    "backend": {
        "type": "redis",
        "url": "${REDIS_URL}",
        "secret": "${SEAWALL_SECRET}",
        "key_prefix": "${KEY_PREFIX}",
        "timeout": "250ms",  # 25ms by default; here Redis shares a machine with everything else
        "leases": False,  # a worker would take some of a hot limit ahead: as many in all, the numbers in another order
    },
}

app = FastAPI()
app.add_middleware(Seawall, config=CONFIG)


@app.get("/")
@app.get("/worker")
async def worker() -> dict[str, int]:
    await asyncio.sleep(0.005)
    return {"worker": os.getpid()}


async def ask(port: int, path: str = "/") -> tuple[int, str, str]:
    """The status of an answer, its RateLimit header and its body, over a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    finally:
        writer.close()
    status, *lines = head.split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers.get("ratelimit", ""), body


async def all_together(port: int, count: int, path: str = "/") -> list[tuple[int, str, str]]:
    """So many answers, 32 at a time."""
    places = asyncio.Semaphore(32)

    async def one() -> tuple[int, str, str]:
        async with places:
            return await ask(port, path)

    return await asyncio.gather(*(one() for _ in range(count)))


async def called(port: int) -> list[tuple[int, str, str]]:
    """What 400 requests are answered, once all four workers serve."""
    async with asyncio.timeout(60):
        workers: set[str] = set()
        while len(workers) < 4:
            try:
                workers |= {body for _, _, body in await all_together(port, 32, "/worker")}
            except OSError:
                await asyncio.sleep(0.1)
        return await all_together(port, 400)


def main() -> None:
    port = free_port()
    options = ["--port", str(port), "--workers", "4", "--log-level", "error", "--no-proxy-headers"]
    with store():
        server = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "--app-dir", sys.path[0], "four_workers:app", *options]
        )
        try:
            answers = asyncio.run(called(port))
        finally:
            server.send_signal(signal.SIGTERM)  # its workers end with it
            server.wait(20)
    admitted = Counter(json.loads(body)["worker"] for status, _, body in answers if status == 200)
    for number, (_, count) in enumerate(sorted(admitted.items()), start=1):
        print(f"worker {number}: {count:>3} admitted")
    refused = sum(status == 429 for status, _, _ in answers)
    print(f"together: {admitted.total()} admitted, {refused} refused, {len(answers)} asked")
    left = sorted(int(header.partition("r=")[2].partition(";")[0]) for status, header, _ in answers if status == 200)
    once = left == list(range(100))
    print(
        f"left after each: {left[-1]} to {left[0]}, {'each number once' if once else 'which is not what it should be'}"
    )


if __name__ == "__main__":
    main()
