#!/usr/bin/env python
"""What `seawall.client` adds to a call, beside the bare client of the same library. One interleaved run.

    python benchmarks/client.py             everything, a minute or two; writes results/client.json
    python benchmarks/client.py --quick     at CI size; writes nothing without --json

Parts: **memory**, a transport that answers at once, so that only the client is measured; **loopback**, a server of
another process, one call after the other over one connection. Each subject and the bare client take turns in short
slots, and what is added is the difference of neighbours. Time is this process's processor time. What was measured never
makes it fail; it exits with 1 if something broke.

Needs `pip install -e .[bench]`, and httpx for its rows.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

if __package__ in (None, ""):
    # In place of this directory, in which `import redis` would find another benchmark.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import harness
from benchmarks.harness import Report, Summary, Verdict, say
from seawall.client import ResilientTransport, SyncResilientTransport

BAR = 50.0
"""Microseconds that a call may take longer."""
PACKAGES = ("httpx2", "httpx", "httpcore2", "httpcore", "anyio", "seawall")
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\nhello"


@dataclass(frozen=True, slots=True)
class Effort:
    rounds: int
    calls: int
    """In one slot."""


FULL = Effort(100, 100)
QUICK = Effort(4, 20)


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds of processor time: a call as a whole, what it takes longer than the bare client's, and the ratio of
    both."""

    part: str
    library: str
    name: str
    total: Summary
    added: Summary | None
    ratio: Summary | None


# How a call is made: bare, with what a user writes in one line, with a time-out for the call as a whole.
WAITING: dict[str, Callable[[Any], Any]] = {
    "bare": lambda inner: inner,
    "resilient": ResilientTransport,
    "resilient, 5 s for a call": lambda inner: ResilientTransport(inner, timeout=5.0),
}
BLOCKING: dict[str, Callable[[Any], Any]] = {
    "bare, blocking": lambda inner: inner,
    "resilient, blocking": SyncResilientTransport,
}


def in_memory(library: ModuleType) -> tuple[Any, Any]:
    """Transports that answer at once, with what a server's answer has."""

    class Waiting(library.AsyncBaseTransport):  # type: ignore[misc, name-defined]
        async def handle_async_request(self, request: Any) -> Any:
            return library.Response(200, headers=HEADERS, stream=library.ByteStream(b"hello"))

    class Blocking(library.BaseTransport):  # type: ignore[misc, name-defined]
        def handle_request(self, request: Any) -> Any:
            return library.Response(200, headers=HEADERS, stream=library.ByteStream(b"hello"))

    return Waiting(), Blocking()


HEADERS = [(b"content-type", b"text/plain"), (b"content-length", b"5")]


@contextmanager
def slots(
    library: ModuleType, transports: Callable[[], tuple[Any, Any]], url: str, runner: asyncio.Runner, calls: int
) -> Iterator[dict[str, Callable[[], float]]]:
    """A function for each subject that makes a slot's calls and says how many microseconds one took."""
    awaited = {name: library.AsyncClient(transport=wrap(transports()[0])) for name, wrap in WAITING.items()}
    blocked = {name: library.Client(transport=wrap(transports()[1])) for name, wrap in BLOCKING.items()}
    try:
        yield {
            **{name: waiting(client, url, runner, calls) for name, client in awaited.items()},
            **{name: blocking(client, url, calls) for name, client in blocked.items()},
        }
    finally:
        for client in awaited.values():
            runner.run(client.aclose())
        for client in blocked.values():
            client.close()


def waiting(client: Any, url: str, runner: asyncio.Runner, calls: int) -> Callable[[], float]:
    async def batch() -> float:
        began = time.process_time_ns()
        for _ in range(calls):
            (await client.get(url)).raise_for_status()
        return (time.process_time_ns() - began) / calls / 1e3

    return lambda: runner.run(batch())


def blocking(client: Any, url: str, calls: int) -> Callable[[], float]:
    def batch() -> float:
        began = time.process_time_ns()
        for _ in range(calls):
            client.get(url).raise_for_status()
        return (time.process_time_ns() - began) / calls / 1e3

    return batch


def rows_of(part: str, library: ModuleType, samples: dict[str, list[float]]) -> list[Row]:
    rows = []
    for name, took in samples.items():
        bare = samples["bare, blocking" if name.endswith("blocking") else "bare"]
        if took is bare:
            rows.append(Row(part, library.__name__, name, Summary.of(took), None, None))
            continue
        added, ratio = harness.differences(took, bare), harness.ratios(took, bare)
        rows.append(Row(part, library.__name__, name, Summary.of(took), Summary.of(added), Summary.of(ratio)))
    return rows


def measure(effort: Effort, seed: int) -> list[Row]:
    rows: list[Row] = []
    with serving() as url, asyncio.Runner() as runner:
        for name in ("httpx2", "httpx"):
            try:
                library = importlib.import_module(name)
            except ModuleNotFoundError:
                say(f"{name} is not installed, and left out")
                continue
            parts: dict[str, Callable[[], tuple[Any, Any]]] = {
                "memory": lambda library=library: in_memory(library),  # type: ignore[misc]
                "loopback": lambda library=library: (library.AsyncHTTPTransport(), library.HTTPTransport()),  # type: ignore[misc]
            }
            for part, transports in parts.items():
                with slots(library, transports, url, runner, effort.calls) as subjects:
                    for warm_up in subjects.values():
                        warm_up()
                    say(f"{name}, {part}")
                    samples = harness.interleave(subjects, rounds=effort.rounds, seed=seed)
                rows += rows_of(part, library, samples)
    return rows


@contextmanager
def serving() -> Iterator[str]:
    """A server in another process, that reads no more of a request than its end."""
    command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=harness.child_environment()) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}/"
        finally:
            server.terminate()


async def serve() -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(ANSWER)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(converse, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def verdicts(rows: list[Row]) -> list[Verdict]:
    return [
        Verdict(
            "client",
            f"{row.library}, {row.part}, {row.name}: added to a call of the bare client",
            row.added.median,
            BAR,
            "us",
        )
        for row in rows
        if row.added is not None
    ]


def rendered(rows: list[Row]) -> str:
    show = harness.show
    return harness.table(
        ["call", "cpu us", "added us", "p10..p90", "x bare"],
        [
            [
                f"{row.library}, {row.part}, {row.name}",
                show(row.total.median),
                show(row.added.median if row.added else None),
                f"{show(row.added.p10)}..{show(row.added.p90)}" if row.added else "-",
                show(row.ratio.median if row.ratio else None),
            ]
            for row in rows
        ],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
        return 0
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a line for each request
    harness.pin(0)
    report = Report("What seawall.client adds to a call", harness.environment(PACKAGES))
    print(harness.header(report.environment))
    rows = measure(QUICK if options.quick else FULL, options.seed)
    print(rendered(rows))
    report.parts["client"] = {"rows": rows}
    report.verdicts = verdicts(rows)
    for verdict in report.verdicts:
        print(verdict)
    path = options.json or (None if options.quick else harness.RESULTS / "client.json")
    if path is not None:
        report.write(path)
        say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
