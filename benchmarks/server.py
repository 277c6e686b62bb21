"""Real servers: one uvicorn worker (httptools, uvloop) per application on a core of its own, load from the other.

What is compared is the server's processor time per request, from ``/proc``: requests per second also say how fast the
load generator and the loopback are. All servers run for the whole measurement, idle except in their own slots.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from benchmarks import apps, harness, peers

SERVER_CORE, LOAD_CORE = 0, 1
START_TIMEOUT = 30.0
WARM_UP = 0.3


@dataclass(frozen=True, slots=True)
class Served:
    """An application that is served, and the one it is compared with."""

    name: str
    base: str | None
    build: Callable[[], apps.ASGIApp]
    status: int = 200


BARE = "bare application"
PREBUILT = "prebuilt 429"

SERVED = (
    Served(BARE, None, lambda: apps.bare),
    Served("pure ASGI no-op", BARE, lambda: apps.passthrough(apps.bare)),
    Served("floor, 3 limits", BARE, lambda: apps.floor(apps.bare)),
    Served("Seawall, 3 limits", BARE, lambda: apps.seawall(apps.bare, apps.three_limits())),
    Served("Starlette", None, peers.starlette_app),
    Served("slowapi ASGI, 3 limits", "Starlette", lambda: peers.slowapi_app(3, base_http=False)),
    Served("slowapi BaseHTTP, 3 limits", "Starlette", lambda: peers.slowapi_app(3, base_http=True)),
    Served(PREBUILT, None, lambda: apps.refuse_at_once, 429),
    Served("Seawall refusing", PREBUILT, lambda: apps.seawall(apps.bare, apps.three_limits(apps.REJECT)), 429),
    Served("slowapi ASGI refusing", PREBUILT, lambda: peers.slowapi_app(3, base_http=False, refuse=True), 429),
)


@dataclass(slots=True)
class Running:
    """A server process and where it listens."""

    process: subprocess.Popen[str]
    port: int

    def cpu_ns(self) -> int:
        """Processor time it has used so far, user and system, over all its threads."""
        return cpu_ns(self.process.pid)


def cpu_ns(pid: int) -> int:
    """Processor time of a process: from ``schedstat``, which counts nanoseconds, else from ``stat``, in ticks."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        return sum(int(_read(f"/proc/{pid}/task/{task}/schedstat").split()[0]) for task in tasks)
    except (OSError, IndexError):
        fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * 10**9 // os.sysconf("SC_CLK_TCK")


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


@dataclass(slots=True)
class Samples:
    """Round by round, of one application: processor microseconds per request, and requests per second."""

    cpu: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)


def measure(
    *, generations: int, rounds: int, seconds: float, connections: int, seed: int
) -> tuple[dict[str, Samples], dict[str, str]]:
    """The samples of each application, and of each that does not serve the reason.

    Each of ``generations`` starts all servers anew: where a process's memory happens to lie makes it some per cent
    faster or slower for all its life, which no number of rounds averages out.
    """
    shuffler = random.Random(seed)
    samples: dict[str, Samples] = {}
    failures: dict[str, str] = {}
    for generation in range(generations):
        with ExitStack() as stack:
            load = stack.enter_context(loader())
            running = start_all(stack, load, connections, failures)
            order = [served for served in SERVED if served.name in running]
            for number in range(rounds):
                harness.say(f"  servers {generation + 1}/{generations}, round {number + 1}/{rounds}")
                shuffler.shuffle(order)
                for served in order:
                    cpu, rate = slot(load, running[served.name], served.status, connections, seconds)
                    taken = samples.setdefault(served.name, Samples())
                    taken.cpu.append(cpu)
                    taken.rate.append(rate)
    return {name: taken for name, taken in samples.items() if name not in failures}, failures


def start_all(
    stack: ExitStack, load: subprocess.Popen[str], connections: int, failures: dict[str, str]
) -> dict[str, Running]:
    """Start and warm every server that has not failed yet, for as long as ``stack`` is open."""
    running: dict[str, Running] = {}
    for served in SERVED:
        if served.name in failures:
            continue
        try:
            server = stack.enter_context(serve(served.name))
            slot(load, server, served.status, connections, WARM_UP)
            running[served.name] = server
        except Exception as error:
            failures[served.name] = f"failed: {error}"
            harness.say(f"  {served.name} {failures[served.name]}")
    return running


def slot(
    load: subprocess.Popen[str], server: Running, status: int, connections: int, seconds: float
) -> tuple[float, float]:
    """Load one server once: processor microseconds per request, and requests per second."""
    assert load.stdin is not None
    assert load.stdout is not None
    before = server.cpu_ns()
    load.stdin.write(json.dumps({"port": server.port, "connections": connections, "seconds": seconds}) + "\n")
    load.stdin.flush()
    answer = load.stdout.readline()
    if not answer:
        raise RuntimeError("the load generator ended")
    counts: dict[str, Any] = json.loads(answer)
    used = server.cpu_ns() - before
    others = {seen: count for seen, count in counts["statuses"].items() if seen != str(status)}
    # A server that starts out admitting may answer a few before it refuses.
    if counts["errors"] or not counts["requests"] or sum(others.values()) > counts["requests"] // 100:
        raise RuntimeError(f"answered {counts['statuses']} with {counts['errors']} lost connections, not {status}")
    return used / counts["requests"] / 1e3, counts["requests"] / counts["seconds"]


@contextmanager
def serve(name: str) -> Iterator[Running]:
    """A server for one application, in a process group of its own, which ends with the block."""
    with _child([sys.executable, "-m", "benchmarks.server", name]) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.strip().isdecimal():
            raise RuntimeError(line.strip() or f"ended at start with exit code {process.wait(START_TIMEOUT)}")
        yield Running(process, int(line))


@contextmanager
def loader() -> Iterator[subprocess.Popen[str]]:
    """The load generator's process."""
    with _child([sys.executable, "-m", "benchmarks.load", str(LOAD_CORE)]) as process:
        yield process


@contextmanager
def _child(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=harness.ROOT,
        env=harness.child_environment(),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a server that is measured has nothing to hand over
        process.communicate()


def main() -> None:
    """Serve the application that the first argument names on a free port, which is printed once it listens."""
    harness.pin(SERVER_CORE)
    import uvicorn

    served = next(served for served in SERVED if served.name == sys.argv[1])
    try:
        app = served.build()
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0], flush=True)
        raise SystemExit(0) from None
    config = uvicorn.Config(
        app, http="httptools", loop="uvloop", lifespan="off", log_level="error", access_log=False, ws="none"
    )
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        print(listener.getsockname()[1], flush=True)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
