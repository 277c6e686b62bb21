"""The connections of one event loop, and what goes to which of them."""

from __future__ import annotations

import logging
import re
from asyncio import AbstractEventLoop, TimerHandle, gather, timeout
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast, final

import hiredis

from seawall import advice
from seawall.backends import Failure, Full, Key, Verdict
from seawall.backends.breaker import Breaker
from seawall.backends.redis import blocked
from seawall.backends.redis.asks import MOST_TRIES, Beat, Joint, Note, Part, Probe, Question, Return, Shared, Spend
from seawall.backends.redis.blocked import one_line
from seawall.backends.redis.keys import MOST_TAGS, slot_of, tag_of
from seawall.backends.redis.link import Link
from seawall.backends.redis.meters import BucketMeter, SharedMeter
from seawall.backends.redis.node import Ask, Node, Result
from seawall.backends.redis.slots import Holding, SlotPermit
from seawall.backends.redis.topology import Cluster, OneServer, Routes
from seawall.rate import SECOND, Rate

if TYPE_CHECKING:
    from seawall.backends.redis.backend import RedisBackend

Answer: TypeAlias = "Verdict | Full | None | Awaitable[Verdict | Full | None]"

BEAT = 2.0
"""Seconds between two signs of life."""
QUIET = 10.0
"""Seconds between two log lines that a node is away."""
SWEEP = 0.05
MOST_SWEPT = 64
"""Seconds between two looks at leases, and leases that one looks at: 0.1 ms."""
PATIENCE = 1.0
"""Seconds that an operator waits, who is no request: connecting is a part of it."""

_logger = logging.getLogger("seawall")


@final
class Session:
    """What one event loop has of a backend. ``one`` is the only node there is, unless it is a cluster."""

    def __init__(self, backend: RedisBackend, loop: AbstractEventLoop) -> None:
        self.loop = loop
        self._backend = backend
        self._canary = cast(BucketMeter, backend.meter("canary", "canary", Rate(1_000, SECOND)))
        address, kind = backend.address, Cluster if backend.address.kind == "cluster" else OneServer
        self._routes: Routes = kind(address, backend.context, self._make)
        self._one: Node | None = None if address.kind == "cluster" else self._routes.node(0)
        self._slots: dict[bytes, int] = {}
        self._said: dict[str, float] = {}
        self._away: set[str] = set()
        self._unsaid: dict[str, TimerHandle] = {}
        self._sweeping: TimerHandle | None = None
        self._beating: TimerHandle | None = None
        self._blocks = blocked.key_of(backend.names.prefix)

    def __repr__(self) -> str:
        return f"<Session {list(self._routes.nodes.values())}>"

    @property
    def up(self) -> bool:
        """Whether all nodes are asked: none of them is known to be away."""
        return all(node.breaker.closed for node in self._routes.nodes.values())

    @property
    def _deadline(self) -> float:
        """Of what is asked now, by the loop's clock."""
        return self.loop.time() + self._backend.timeout

    @property
    def _node_of_blocks(self) -> Node:
        return self._routes.node(blocked.SLOT)

    def _make(self, name: str, dial: Any, **more: Any) -> Node:
        backend = self._backend
        return Node(
            name,
            dial,
            backend.script,
            Breaker(backend.clock, backend.random),
            self._probe,
            backend.timeout,
            called=self._called,
            heard=backend.told,
            noted=self._noted,
            connected=self._connected,
            **more,
        )

    def _called(self, result: Result, took: int) -> None:
        if self._backend.observer is not None:
            self._backend.observer.called(result, took)

    def _noted(self, node: Node, link: Link | None, reason: str) -> None:
        """Say that a node is away, or there (again); not more than now and then, for it may come and go."""
        name = node.name
        if link is None:
            quiet = self._said.get(name, -QUIET) + QUIET - self.loop.time()
            if quiet <= 0:
                self._say_away(node, reason)
            elif name not in self._unsaid:
                self._unsaid[name] = self.loop.call_later(quiet, self._say_if_away, node)
            return
        if name in self._away:
            self._away.remove(name)
            _logger.warning("%s is back", name)
        if self._beating is None and self._backend.member:
            self._beat()

    def _say_away(self, node: Node, reason: str) -> None:
        self._said[node.name] = self.loop.time()
        self._away.add(node.name)
        _logger.warning("%s is away (%s); each rule does what it says for that", node.name, one_line(reason))

    def _say_if_away(self, node: Node) -> None:
        del self._unsaid[node.name]
        if not node.breaker.closed and node.name not in self._away and node.name in self._routes.nodes:
            self._say_away(node, node.breaker.statistics()["reason"])

    def _connected(self, node: Node, link: Link) -> None:
        """Find out at once what would be noticed late: rights that are missing, memory that forgets."""
        _logger.info("connected to %s (%s)", node.name, one_line(link.release))
        node.submit(self._probe(node))
        link.call(("INFO", "memory"), lambda told: self._look_at_memory(node, told))

    def _look_at_memory(self, node: Node, told: object) -> None:
        found = re.search(rb"^maxmemory_policy:(\S+)", told, re.MULTILINE) if isinstance(told, bytes) else None
        limited = isinstance(told, bytes) and re.search(rb"^maxmemory:[1-9]", told, re.MULTILINE)
        if found and limited and found[1] != b"noeviction":
            policy = one_line(found[1].decode("ascii", "replace"))
            advice.once(
                f"eviction {node.name}",
                f"{node.name} evicts keys when its memory is full ({policy}), and whoever is evicted has a fresh limit:"
                " set maxmemory-policy to noeviction",
            )

    def _beat(self) -> None:
        """Be counted, and count."""
        self._beating = self.loop.call_later(BEAT, self._beat)
        beat = Beat(self._backend, self._deadline)
        node = self._routes.node(beat.slot)
        if node.breaker.closed:
            node.submit(beat)

    def look_at_blocks(self) -> None:
        """Find out who is blocked."""
        self._node_of_blocks.call(("GET", self._blocks), self._told_of_blocks)

    def _told_of_blocks(self, reply: object) -> None:
        if isinstance(reply, bytes):
            self._backend.told_of_blocks(reply)
        elif reply is None:
            blocks = self._backend.blocks
            known = blocks.by_name()
            blocks.replace(known)
            if known:
                # It outlives every block, so it was lost with a server. Whoever knows it first puts it back.
                text, till = blocked.written(known)
                left = till - self._backend.wall() // blocked.MILLISECOND
                self._node_of_blocks.call(("SET", self._blocks, text, "PX", max(1, left), "NX"), lambda _: None)

    async def fetch_blocks(self) -> None:
        """Know who is blocked now. Raises `OSError`."""
        self._told_of_blocks(await self.command(blocked.SLOT, lambda _: ("GET", self._blocks)))

    async def change_blocks(self, name: str, milliseconds: int, reason: str) -> None:
        """Block a tenant for so long, or let it in again. Raises `OSError`, and `ValueError` for one too many."""
        script = self._backend.blocks_script
        arguments = (1, self._blocks, name, milliseconds, one_line(reason), blocked.MOST_BLOCKS)
        told = await self.command(blocked.SLOT, lambda link: ("EVAL", script.text[link.modern], *arguments))
        if isinstance(told, int):
            raise ValueError(f"{told:,} tenants are blocked, and that is the most")
        self._told_of_blocks(told)

    async def command(self, slot: int, command: Callable[[Link], tuple[Any, ...]]) -> Any:
        """The reply of whoever has ``slot`` to an operator's command. Raises `OSError` with what is wrong."""
        seconds = max(PATIENCE, self._backend.timeout)
        node, asking, tries = self._routes.node(slot), False, 0
        try:
            async with timeout(seconds):
                while True:
                    other, reply = None, None
                    try:
                        reply = await node.ask(command, asking=asking)
                    except OSError:
                        other = self._routes.node(slot)
                        if other is node or tries == MOST_TRIES:
                            raise
                    if isinstance(reply, hiredis.ReplyError):
                        other = self._routes.named(str(reply)) if tries < MOST_TRIES else None
                        if other is None:
                            raise OSError(f"{node.name}: {one_line(str(reply))}")
                    if other is None:
                        return reply
                    node, asking, tries = other, str(reply).startswith("ASK "), tries + 1
        except TimeoutError:
            raise OSError(f"{node.name} is away (no answer within {seconds:g} s)") from None

    def sweep_soon(self) -> None:
        """Have idle leases looked for."""
        if self._sweeping is None:
            self._sweeping = self.loop.call_later(SWEEP, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = None
        backend = self._backend
        backend.sweep(MOST_SWEPT)
        backend.renew()
        if backend.watched or backend.slots.round:
            self.sweep_soon()

    def _probe(self, node: Node) -> Ask:
        key = self._backend.names.canary(lambda slot: self._routes.has(node, slot))
        return Probe(self._backend, node, self._canary, key, self._deadline)

    def open(self) -> None:
        """Begin to connect."""
        for node in list(self._routes.nodes.values()):
            node.connect()

    def spend(self, charges: Shared, failure: Failure | None, permit: SlotPermit | None = None) -> Answer:
        """Ask for all of ``charges`` and for a slot, of one node or of several."""
        backend, loop, node, slot = self._backend, self.loop, self._one, 0
        if node is None:
            slots = self.by_slot(charges)
            home = None if permit is None else self._slot(permit.holding.key)
            if home is not None:
                slots.setdefault(home, [])
            if len(slots) > 1:
                return self._spend_jointly(charges, slots, failure, permit, home)
            slot = next(iter(slots))
            node = self._routes.node(slot)
        if not node.breaker.closed:
            return backend.away(charges, failure, permit)
        future = loop.create_future()
        ask = Spend(backend, charges, slot, loop.time() + backend.timeout, future, failure)
        if permit is not None:
            ask.with_slot(permit)
        node.submit(ask)
        return future

    def _spend_jointly(
        self,
        charges: Shared,
        slots: dict[int, list[int]],
        failure: Failure | None,
        permit: SlotPermit | None,
        home: int | None,
    ) -> Answer:
        backend, future, deadline = self._backend, self.loop.create_future(), self._deadline
        joint = Joint(backend, charges, slots, future, failure, permit)
        for nth, (slot, places) in enumerate(slots.items()):
            part = Part(joint, nth, backend, [charges[at] for at in places], slot, deadline)
            if permit is not None and slot == home:
                part.with_slot(permit)
            node = self._routes.node(slot)
            if node.breaker.closed:
                node.submit(part)
            else:
                part.fail()
        return future

    def note(
        self,
        op: int,
        charges: Sequence[tuple[int, tuple[SharedMeter, Key, int]]],
        since: int,
        taken: list[int] | None,
        *,
        holder: int = 0,
    ) -> None:
        """Debit or refund. Where a server is away nothing is, which the caller of a debit does not get back either."""
        backend = self._backend
        own = [charge for _, charge in charges]
        for slot, places in self.by_slot(own).items():
            node = self._routes.node(slot)
            if not node.breaker.closed:
                continue
            note = Note(
                backend,
                op,
                [own[at] for at in places],
                slot,
                self._deadline,
                since // 1_000,
                [charges[at][0] for at in places],
                taken,
                holder,
            )
            node.submit(note)

    def ask(self, question: Question) -> None:
        """Ask again."""
        self._routes.node(question.slot).submit(cast(Ask, question))

    def by_slot(self, charges: Shared) -> dict[int, list[int]]:
        """The positions of ``charges``, by where they are in a cluster."""
        slots: dict[int, list[int]] = {}
        for at, (meter, key, _) in enumerate(charges):
            slots.setdefault(self._slot(meter.tags[key]), []).append(at)
        return slots

    def _slot(self, key: bytes) -> int:
        """Where ``key`` is in a cluster."""
        if self._one is not None:
            return 0
        slot = self._slots.get(key)
        if slot is None:
            if len(self._slots) >= MOST_TAGS:
                self._slots.clear()
            slot = self._slots[key] = slot_of(tag_of(key))
        return slot

    def give_back(self, holding: Holding, *, exact: bool = False) -> None:
        """Have slots returned with what is sent next, or with ``exact`` say how many there are."""
        slot = self._slot(holding.key)
        node = self._routes.node(slot)
        if node.breaker.closed:
            node.submit(Return(self._backend, holding, slot, self._deadline, exact=exact))
        else:
            holding.returned = 0  # it will have expired, or be told exactly

    def abandon(self) -> None:
        """The loop is closed, and with it everything that could be waited for."""
        for node in self._routes.nodes.values():
            node.abandon()

    async def aclose(self) -> None:
        """Give back what was taken ahead, wait for what is asked, as long as it may take, and close the connections."""
        for timer in (self._sweeping, self._beating, *self._unsaid.values()):
            if timer is not None:
                timer.cancel()
        backend = self._backend
        while backend.watched:
            backend.give_back(backend.watched.popleft(), self)
        for holding in backend.slots.holdings.values():
            holding.spare = 0
            self.give_back(holding, exact=True)
        gone = Beat(backend, self._deadline, held=0)
        node = self._routes.node(gone.slot)
        if node.connected and backend.member:
            node.submit(gone)
        self._routes.close()
        await gather(*(node.aclose() for node in self._routes.nodes.values()))
