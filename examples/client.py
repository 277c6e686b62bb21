"""A service that calls another through seawall.client: what goes along by itself, and what is done when that is lost.

    python examples/client.py

A shop asks a service of its own for prices, and both are behind Seawall. Nobody in the shop mentions deadlines or
priorities: the client takes them from the request that is being served, and sends them on. A price that fails once is
asked for again, and the answer says so. Then the prices are killed, and come back: at first calls fail, soon the
circuit is open and nothing is sent any more, and afterwards a part of the calls is let through, more with every moment.

It needs httpx2, starts both services, plain uvicorns on free ports, and ends by itself after about 15 seconds.
"""

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from typing import Any

import httpx2
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from seawall import Seawall
from seawall.client import AsyncClient, CircuitBreaker

PAUSE, RAMP = 1.0, 3.0

# The shop


shop = FastAPI()
shop.add_middleware(
    Seawall,
    config={
        "version": 1,
        "plans": {"default": {"rate": "unlimited"}},
        "priorities": {"critical": {}, "normal": {}, "low": {}},
        "routes": [{"name": "checkout", "match": {"path": "/checkout"}, "priority": "critical"}],
    },
)
# Both are shorter than by default, so that there is something to see soon.
client = AsyncClient(base_url=os.environ.get("PRICES", ""), breaker=partial(CircuitBreaker, pause=PAUSE, ramp=RAMP))


@shop.get("/checkout")
async def checkout(item: str) -> Any:
    try:
        answer = await client.get("/price", params={"item": item})
    except httpx2.TransportError as error:  # those of seawall.client are such errors, too
        return JSONResponse({"error": type(error).__name__}, 502)
    attempts = [(each.status, round(1e3 * each.waited)) for each in answer.extensions["attempts"]]
    return {"price": answer.json(), "attempts": attempts}


@shop.get("/statistics")
async def statistics() -> dict[str, Any]:
    return client.statistics()


# The prices


prices = FastAPI()
prices.add_middleware(Seawall, default="1000/second")
failing = {"anchor"}


@prices.get("/price")
async def price(item: str, request: Request, response: Response) -> dict[str, Any]:
    if item in failing:
        failing.remove(item)
        response.status_code = 500
    return {"told": {name: request.headers.get(name) for name in ("X-Request-Timeout-Ms", "X-Request-Priority")}}


# What is shown


def main() -> None:
    shop_port, prices_port = free_port(), free_port()
    environment = {**os.environ, "PRICES": f"http://127.0.0.1:{prices_port}"}
    running = [serve("client:shop", shop_port, environment), serve("client:prices", prices_port, environment)]
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{shop_port}") as customer:
            wait_for(shop_port)
            wait_for(prices_port)
            answer = customer.get("/checkout?item=rope", headers={"X-Request-Timeout-Ms": "800"}).json()
            print(f"the prices were told: {answer['price']['told']}")
            answer = customer.get("/checkout?item=anchor").json()
            print("attempts: " + ", ".join(f"{status} after waiting {ms} ms" for status, ms in answer["attempts"]))
            running[1].kill()
            running[1].wait()
            print("\nThe prices are lost.")
            ask_for(2.5, customer)
            running[1] = serve("client:prices", prices_port, environment)
            wait_for(prices_port)
            print("The prices are back.")
            ask_for(PAUSE + RAMP + 1.5, customer)
            for host, known in customer.get("/statistics").json().items():
                print(f"\n{host}: {known}")
    finally:
        for server in running:
            server.kill()
            server.wait()


def ask_for(seconds: float, customer: httpx2.Client) -> None:
    """Ask again and again, and say every half second what became of it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        outcomes: Counter[str] = Counter()
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            answer = customer.get("/checkout?item=rope")
            outcomes[answer.json().get("error", "answered")] += 1
            time.sleep(0.01)
        print("    " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))


def serve(app: str, port: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A server process, as people start one."""
    options = ["--port", str(port), "--log-level", "error", "--no-proxy-headers"]
    command = [sys.executable, "-m", "uvicorn", "--app-dir", sys.path[0], app, *options]
    return subprocess.Popen(command, env=environment)


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
