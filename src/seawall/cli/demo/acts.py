"""What the demo plays: four acts, each with callers, servers, and what must be so at its end."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, TypeAlias, final

from seawall.cli.demo import store
from seawall.cli.demo.callers import FLOOD, OUTAGE, STEADY, Caller, Tally, call, capacity, crowd, keep_coming
from seawall.cli.demo.client import Connection
from seawall.cli.demo.scrape import Reading, Scrape, Watch, differing
from seawall.cli.demo.server import Server, ServerFailed
from seawall.cli.demo.shop import CONFIG
from seawall.cli.demo.verdict import (
    Account,
    Check,
    Compared,
    Outage,
    account,
    agreement,
    compare,
    only_these_refused,
    outage_checks,
    overload_checks,
    plans_held,
)
from seawall.cli.explanation import explain
from seawall.config import load
from seawall.rate import SECOND

if TYPE_CHECKING:
    from seawall.cli.demo.screen import View

PROCESSES = 2
"""Of the shop, where their state is shared."""
QUIET = 0.5 / 3.0
"""The part of a crowd that is half of what the service can do."""


@final
@dataclass(frozen=True, slots=True)
class Act:
    """One act. ``seconds`` are those of its parts, ``short`` the same in a hurry."""

    number: int
    title: str
    story: str
    seconds: tuple[float, ...]
    short: tuple[float, ...]
    play: Callable[[Stage, Act], Awaitable[Played]]


@final
@dataclass(slots=True)
class Played:
    """An act, and what came of it. ``accounts`` are of what it is about, ``before`` of what was before that.

    ``began`` and ``ended`` are monotonic nanoseconds, ``spans`` what was the matter from when to when.
    """

    act: Act
    accounts: list[Account]
    began: int
    ended: int
    checks: list[Check]
    notes: list[str] = field(default_factory=list)
    before: list[Account] = field(default_factory=list)
    readings: list[list[Reading]] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
    spans: list[tuple[int, int, str]] = field(default_factory=list)
    outage: Outage | None = None

    @property
    def held(self) -> bool:
        return all(check.ok for check in self.checks)


@final
class NotPlayed(Exception):
    """An act for which something is missing. The text says what."""


Servers: TypeAlias = Callable[..., Server]
Call: TypeAlias = Coroutine[Any, Any, None]


@final
class Stage:
    """Where acts are played: the server of the first three of them, the view, and how much time there is.

    ``server`` makes one; it is for tests that it may be another.
    """

    def __init__(self, view: View, *, server: Servers = Server, port: int = 0, short: bool = False) -> None:
        self.view = view
        self.new_server = server
        self.short = short
        self.random = random.Random(1)
        self._port = port
        self._running = ExitStack()
        self._server: Server | None = None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    async def server(self) -> Server:
        """The one server of the first acts, started for the first of them."""
        if self._server is None:
            self._server = await self.start(port=self._port)
        return self._server

    async def start(self, **options: Any) -> Server:
        """A server that answers, for as long as the stage is there. Raises `ServerFailed`."""
        server = self._running.enter_context(self.new_server(**options))
        connection = Connection(server.port)
        try:
            await connection.request("GET", "/healthz", {})
        except OSError as error:
            raise ServerFailed(f"the server does not answer: {error or 'in time'}; {server.said()}") from None
        finally:
            connection.close()
        self.view.say(f"A {server.app} app on a real uvicorn at {server.url}, behind one middleware and one YAML file.")
        return server

    def seconds(self, act: Act) -> tuple[float, ...]:
        return act.short if self.short else act.seconds

    async def perform(self, watch: Watch, accounts: Sequence[Account], calls: Iterable[Call]) -> None:
        """Let all ``calls`` come to their end, and show what becomes of them."""
        done = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(watch.until(done))
            running = [group.create_task(one) for one in calls]
            while not all(task.done() for task in running):
                await asyncio.wait(running, timeout=self.view.every)
                self.view.show(accounts)
            done.set()


async def open_accounts(callers: Iterable[Caller], shares: int = 0) -> list[Account]:
    """An account for each address of each caller, with the limits that the loaded policy has for its request."""
    policy = load(CONFIG)
    return [
        account(Tally(caller, address), await explain(policy, caller.scope(address)), shares)
        for caller in callers
        for address in caller.addresses
    ]


async def counted(watch: Watch) -> Scrape:
    """What the servers say; of one that says nothing, nothing, which agrees with nobody."""
    with suppress(OSError):
        return await watch.scrape()
    return Scrape("")


# The acts


async def play_plans(stage: Stage, act: Act, callers: tuple[Caller, ...], refused: frozenset[str]) -> Played:
    """Callers with plans, of whom only ``refused`` ask for more than theirs."""
    server = await stage.server()
    accounts = await open_accounts(callers)
    (seconds,) = stage.seconds(act)
    watch = Watch([server.port])
    try:
        before = await counted(watch)
        asked = watch.asked
        began = monotonic_ns()
        until = began + round(seconds * SECOND)
        with stage.view.act(act, accounts, seconds):
            await stage.perform(watch, accounts, [call(one.tally, watch.ports, until) for one in accounts])
        ended = monotonic_ns()
        after = await counted(watch)
    finally:
        watch.close()
    compared = compare(accounts, before, after, exempt=watch.asked - asked)
    checks = [only_these_refused(accounts, refused), *plans_held(accounts), agreement(compared)]
    return Played(act, accounts, began, ended, checks, readings=watch.readings, compared=compared)


async def play_overload(stage: Stage, act: Act) -> Played:
    """A crowd of three classes: half of what the service can do, and then three times that."""
    server = await stage.server()
    measuring, calm, crowded = stage.seconds(act)
    watch = Watch([server.port])
    try:
        stage.view.say(f"Measuring for {measuring:g} s what it can do.")
        page = crowd(1.0)[1]
        able = await capacity(Tally(page, page.addresses[0]), server.port, measuring)
        if not able:
            raise ServerFailed("the server serves nothing")
        callers = crowd(able)
        quiet = await open_accounts(_slower(callers, QUIET))
        accounts = await open_accounts(callers)
        before = await counted(watch)
        asked = watch.asked
        began = monotonic_ns()
        with stage.view.act(act, accounts, calm + crowded, f"It can do {able:.0f} requests a second."):
            await _crowd(stage, watch, quiet, calm)
            begins = monotonic_ns()
            until = await _crowd(stage, watch, accounts, crowded)
        ended = monotonic_ns()
        after = await counted(watch)
    finally:
        watch.close()
    compared = compare([*quiet, *accounts], before, after, exempt=watch.asked - asked)
    offered = sum(one.tally.asked for one in accounts) / crowded
    served = sum(one.tally.admitted for one in accounts) / crowded
    return Played(
        act,
        accounts,
        began,
        ended,
        [*overload_checks(accounts), agreement(compared)],
        [f"{offered:.0f} requests a second came, {able:.0f} are possible, {served:.0f} were served"],
        before=quiet,
        readings=watch.readings,
        compared=compared,
        spans=[(begins, until, "three times too much")],
    )


async def _crowd(stage: Stage, watch: Watch, accounts: Sequence[Account], seconds: float) -> int:
    """Let callers come for so long, and wait until all are answered; when the last of them came."""
    until = monotonic_ns() + round(seconds * SECOND)
    draw = stage.random.expovariate
    await stage.perform(watch, accounts, [keep_coming(one.tally, watch.ports[0], until, draw) for one in accounts])
    return until


def _slower(callers: Iterable[Caller], times: float) -> Iterable[Caller]:
    return [replace(one, pace=one.pace * times) for one in callers]


async def play_outage(stage: Stage, act: Act) -> Played:
    """Two processes with one state, which is away for a while."""
    there, away, after_it = stage.seconds(act)
    try:
        async with store.running() as shared:
            backend = {
                "type": "redis",
                "url": shared.url,
                "secret": secrets.token_hex(16),
                "key_prefix": f"seawall-demo-{secrets.token_hex(4)}",
                # 25ms by default; here the store shares a machine with everything else.
                "timeout": "100ms",
                "instances": PROCESSES,
                # Every decision is one call, so that what is left can be added up.
                "leases": False,
            }
            servers = [await stage.start(backend=backend) for _ in range(PROCESSES)]
            return await _lose(stage, act, shared, [server.port for server in servers], there, away, after_it)
    except store.Missing as missing:
        raise NotPlayed(str(missing)) from None


async def _lose(
    stage: Stage, act: Act, shared: store.Store, ports: Sequence[int], there: float, away: float, after_it: float
) -> Played:
    outage = Outage(len(ports))
    accounts = await open_accounts(OUTAGE, len(ports))
    watch = Watch(ports)

    async def take_away() -> None:
        await asyncio.sleep(there)
        outage.lost = monotonic_ns()
        shared.freeze()
        stage.view.say(f"{shared.name} is frozen")
        await asyncio.sleep(away)
        outage.back = monotonic_ns()
        shared.thaw()
        stage.view.say(f"{shared.name} goes on")

    seconds = there + away + after_it
    name = "seawall_backend_requests_total"
    try:
        before = await counted(watch)
        asked = watch.asked
        began = monotonic_ns()
        until = began + round(seconds * SECOND)
        with stage.view.act(act, accounts, seconds, f"{len(ports)} processes share what they count in {shared.name}."):
            calls = [call(one.tally, ports, until) for one in accounts]
            await stage.perform(watch, accounts, [*calls, take_away()])
        ended = monotonic_ns()
        after = await counted(watch)
    finally:
        watch.close()
        shared.thaw()
    outage.known = watch.all_up_since(outage.back)
    calls_made = differing(before.by(name, "result"), after.by(name, "result"))
    failed = calls_made.total() - calls_made["ok",]
    compared = compare(accounts, before, after, exempt=watch.asked - asked)
    alone = differing(*(one.by("seawall_backend_fallback_decisions_total", "action") for one in (before, after)))
    told = (
        f"{calls_made['ok',]} calls to {shared.name} and {failed} that failed, "
        f"{alone['local',]} decisions by the processes' shares"
    )
    return Played(
        act,
        accounts,
        began,
        ended,
        [*outage_checks(accounts, outage, failed), *plans_held(accounts), agreement(compared)],
        [told],
        readings=watch.readings,
        compared=compared,
        spans=[(outage.lost, outage.back, "Redis is frozen")],
        outage=outage,
    )


ACTS = (
    Act(
        1,
        "steady",
        "Tenants of several plans and visitors without a key, all within their limits: nobody is refused.",
        (4.0,),
        (2.0,),
        partial(play_plans, callers=STEADY, refused=frozenset()),
    ),
    Act(
        2,
        "one tenant floods",
        "globex asks for six times its plan and somebody guesses passwords: they are refused, the others are not.",
        (6.0,),
        (3.0,),
        partial(play_plans, callers=FLOOD, refused=frozenset({"globex", "guesser"})),
    ),
    Act(
        3,
        "overload",
        "Three times more than the service can do: what matters least is refused first.",
        (1.0, 2.0, 5.0),
        (0.6, 1.0, 3.0),
        play_overload,
    ),
    Act(
        4,
        "Redis lost and back",
        "The state that two processes share goes away: each holds callers to its share, and usage is kept.",
        (2.0, 3.0, 3.0),
        (1.2, 1.5, 2.5),
        play_outage,
    ),
)
