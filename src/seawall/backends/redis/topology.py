"""Who is to be asked: the one server of a URL, the master that Sentinels name, or the node of a slot in a Cluster.

All of it is off the request path: a connection is made by a task of its own, a cluster's map is read again when a node
says that it has changed, and once a second at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from ssl import SSLContext
from typing import Any, Protocol, final

from seawall.backends.redis.address import Address, Endpoint
from seawall.backends.redis.keys import SLOTS
from seawall.backends.redis.link import Link, LinkError, connect
from seawall.backends.redis.node import Node

MOST_STRANGERS = 8
"""Nodes in no map that are believed in within `MAP_AGAIN`."""
MAP_AGAIN = 1.0
"""Seconds between two readings of a cluster's map."""


async def dial(address: Address, context: SSLContext | None) -> Link:
    """A connection to the server of a URL, or to the master that its Sentinels name. Raises as `connect` does."""
    if address.kind != "sentinel":
        return await connect(address, address.hosts[0], context)
    master = await _master(address, context)
    link = await connect(address, master, context)
    role = await link.ask("ROLE")
    if role[0] != b"master":
        link.drop("connection")
        raise LinkError(f"{master} is named as master but is none yet")
    return link


async def _master(address: Address, context: SSLContext | None) -> Endpoint:
    """What the first Sentinel that answers says. All are asked at once: a dead one takes a second."""
    reasons = []
    tasks = [asyncio.create_task(_ask_sentinel(address, sentinel, context)) for sentinel in address.hosts]
    try:
        for answer in asyncio.as_completed(tasks):
            try:
                return await answer
            except (LinkError, TimeoutError) as error:
                reasons.append(str(error) or "no answer")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    raise LinkError("no Sentinel names a master: " + "; ".join(reasons))


async def _ask_sentinel(address: Address, sentinel: Endpoint, context: SSLContext | None) -> Endpoint:
    link = await connect(address, sentinel, context, sentinel=True)
    try:
        async with asyncio.timeout(1):
            found = await link.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", address.service)
    finally:
        link.drop("connection")
    return Endpoint(found[0].decode(), int(found[1]))


class Routes(Protocol):
    """The nodes of one event loop."""

    nodes: dict[str, Node]

    def node(self, slot: int) -> Node: ...

    def has(self, node: Node, slot: int) -> bool:
        """Whether ``slot`` is known to be the node's."""
        ...

    def named(self, error: str) -> Node | None:
        """Whom ``error`` (MOVED or ASK) says to ask instead; nobody, if it says something else."""
        ...

    def close(self) -> None:
        """Stop what looks for nodes."""
        ...


@final
class OneServer:
    """Everything is asked of one node, wherever it is found."""

    def __init__(self, address: Address, context: SSLContext | None, make: Callable[..., Node]) -> None:
        name = str(address.hosts[0]) if address.kind == "single" else f"master {address.service}"
        self._node = make(name, partial(dial, address, context))
        self.nodes = {name: self._node}

    def node(self, slot: int) -> Node:
        return self._node

    def has(self, node: Node, slot: int) -> bool:
        return True

    def named(self, error: str) -> Node | None:
        return None

    def close(self) -> None:
        """There is nothing to stop."""


@final
class Cluster:
    """The nodes of a cluster by slot. What is asked before its map is known is asked of a node that knows better.

    A node that is asked for a slot it does not have says who has it (MOVED), or who has it for now (ASK). Nothing has
    been debited then, so the other one is asked, in time or not at all.
    """

    def __init__(self, address: Address, context: SSLContext | None, make: Callable[..., Node]) -> None:
        self._address = address
        self._context = context
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._map: list[Node | None] = [None] * SLOTS
        self._reading: asyncio.Task[None] | None = None
        self._read_at = -MAP_AGAIN
        self._strangers: list[float] = []
        self._leaving: list[asyncio.Task[None]] = []
        self._endpoints: dict[str, Endpoint] = {}
        self.nodes: dict[str, Node] = {}
        self._seeds = [self._at(seed) for seed in address.hosts]

    def node(self, slot: int) -> Node:
        known = self._map[slot]
        if known is None:
            self.read()
            # Of the nodes in the URL the first that has not failed.
            known = next((seed for seed in self._seeds if seed.breaker.closed), self._seeds[0])
        return known

    def _at(self, endpoint: Endpoint) -> Node:
        name = str(endpoint)
        known = self.nodes.get(name)
        if known is None:
            self._endpoints[name] = endpoint
            dial = partial(connect, self._address, endpoint, self._context)
            known = self.nodes[name] = self._make(name, dial, redirect=self, one_slot=True)
        return known

    def has(self, node: Node, slot: int) -> bool:
        return self._map[slot] is node

    def moved(self, asks: list[Any], error: str) -> bool:
        """Ask whom ``error`` names. Not more than a few times: they may disagree about it."""
        node = self.named(error)
        if node is None:
            return False
        asks = [ask for ask in asks if ask.redirected()]
        node.resend(asks, asking=error.startswith("ASK "))
        return True

    def named(self, error: str) -> Node | None:
        code, _, rest = error.partition(" ")
        if code not in ("MOVED", "ASK"):
            # TRYAGAIN: some of the keys are here and some there, for the moment it takes to migrate them.
            return None
        slot, _, place = rest.partition(" ")
        host, _, port = place.rpartition(":")
        if not slot.isdecimal() or int(slot) >= SLOTS or not port.isdecimal() or not host:
            return None
        endpoint = Endpoint(host.strip("[]"), int(port))
        if str(endpoint) not in self.nodes and not self._may_add():
            self.read()
            return None
        node = self._at(endpoint)
        if code == "MOVED":
            self._map[int(slot)] = node
            self.read()
        return node

    def _may_add(self) -> bool:
        """Whether to believe in one more node that is in no map: in a few a second, for each is told the password."""
        now = self._loop.time()
        self._strangers = [at for at in self._strangers if now - at < MAP_AGAIN]
        if len(self._strangers) >= MOST_STRANGERS:
            return False
        self._strangers.append(now)
        return True

    def relocate(self, node: Node) -> None:
        self.read()

    def read(self) -> None:
        """Have the map read again, if it was not just now."""
        if self._reading is None and self._loop.time() - self._read_at >= MAP_AGAIN:
            self._read_at = self._loop.time()
            self._reading = self._loop.create_task(self._read())

    async def _read(self) -> None:
        try:
            known = sorted(self.nodes.values(), key=lambda node: not node.breaker.closed)
            for endpoint in dict.fromkeys([*(self._endpoints[node.name] for node in known), *self._address.hosts]):
                try:
                    self._adopt(await self._ask_for_map(endpoint), endpoint.host)
                    return
                except (LinkError, TimeoutError, ValueError, IndexError, TypeError, AttributeError):
                    continue  # it is away, does not know, or speaks of what is no map
        finally:
            self._reading = None

    async def _ask_for_map(self, endpoint: Endpoint) -> Any:
        link = await connect(self._address, endpoint, self._context)
        try:
            async with asyncio.timeout(1):
                return await link.ask("CLUSTER", "SLOTS")
        finally:
            link.drop("connection")

    def _adopt(self, ranges: Any, host: str) -> None:
        """Go by the map that a node at ``host`` has. One that does not know its own name leaves it out."""
        found: list[Node | None] = [None] * SLOTS
        for first, last, master, *_ in ranges:
            if not 0 <= first <= last < SLOTS:
                raise ValueError("no such slots")
            node = self._at(Endpoint(master[0].decode() if master[0] else host, int(master[1])))
            found[first : last + 1] = [node] * (last + 1 - first)
        if not any(found):
            raise ValueError("no map")
        self._map = found
        kept = set(found)
        self._seeds = [node for node in self.nodes.values() if node in kept]
        for name, node in list(self.nodes.items()):
            if node not in kept:
                del self.nodes[name], self._endpoints[name]
                self._leaving.append(self._loop.create_task(node.aclose()))
        self._leaving = [task for task in self._leaving if not task.done()]

    def close(self) -> None:
        for task in (self._reading, *self._leaving):
            if task is not None:
                task.cancel()
