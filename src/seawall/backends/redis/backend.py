"""State in Redis or Valkey, shared by every process that speaks to it: one script call decides a whole request.

What is refused is refused again without a call until it can be admitted, for a second at most. Of what is asked for
often, a few units are taken ahead (`seawall.backends.redis.leases`). While the server is away this process decides for
its share of every limit, or does what the rule says; it asks again four times a second.
"""

from __future__ import annotations

import random as random_module
from asyncio import AbstractEventLoop, _get_running_loop
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from os import getpid
from secrets import randbits
from threading import Lock
from time import monotonic_ns, time_ns
from typing import Any, cast, final
from weakref import WeakValueDictionary

from seawall import advice
from seawall.backends import DENIED_FOR, FULL, Charge, Failure, Full, Key, Meter, Observer, Permit, Verdict, stored
from seawall.backends.redis import blocked
from seawall.backends.redis.address import Address, parse
from seawall.backends.redis.asks import DEBIT, REFUND
from seawall.backends.redis.keys import Names
from seawall.backends.redis.leases import IDLE, MOST_LEASES, Lease
from seawall.backends.redis.link import Link
from seawall.backends.redis.meters import MICROSECOND, BucketMeter, QuotaMeter, SharedMeter
from seawall.backends.redis.node import Script
from seawall.backends.redis.session import Session
from seawall.backends.redis.slots import Holding, SlotPermit, Slots
from seawall.backends.share import LocalMeter, LocalShare
from seawall.blocks import Block, Blocks
from seawall.decision import Clock
from seawall.rate import SECOND, Quota, Rate

MOST_DENIED = 4_096
"""Refusals that are remembered of one limit."""


@final
class RedisBackend:
    """Buckets and quotas in Redis (6.2 or newer) or Valkey, by URL (`seawall.backends.redis.address.parse`).

    ``timeout_ns`` is what one decision may take, 25 ms by default: a call over a local network takes less than one.
    ``on_failure`` holds for rules that say nothing. ``secret`` keys the hashes under which callers are stored.
    ``instances`` is the number of processes that share the limits, for this one's share of them while Redis is away;
    by default those are counted that have been seen there. ``leases`` and ``deny_cache`` can be switched off: then
    every decision is a call. ``max_keys`` is for the local share. One that is no ``member`` is not counted: it looks,
    and does not serve. Raises `ValueError` for a URL that is none.
    """

    name = "redis"

    def __init__(
        self,
        url: str,
        *,
        timeout_ns: int = 25_000_000,
        key_prefix: str = "seawall",
        secret: str | None = None,
        instances: int | None = None,
        max_keys: int = 100_000,
        on_failure: Failure = "local",
        leases: bool = True,
        deny_cache: bool = True,
        member: bool = True,
        clock: Clock = monotonic_ns,
        wall_clock: Clock = time_ns,
        random: Callable[[], float] = random_module.random,
        script: Script | None = None,
    ) -> None:
        self.address: Address = parse(url)
        self.context = self.address.tls.context() if self.address.tls is not None else None
        self.on_failure: Failure = on_failure
        self.observer: Observer | None = None
        self.share = LocalShare(max_keys=max_keys, clock=clock, wall_clock=wall_clock)
        self.share.instances = instances or 1
        self.script = script or Script.own()
        self.names = Names(key_prefix, secret)
        self.random = random
        self.clock = clock
        self.timeout = timeout_ns / SECOND
        self._wall = wall_clock
        self.holder = randbits(51) | 1
        """Who this is among those who have leases and slots, and are counted."""
        self.instances = instances or 1
        self.watched: deque[Lease] = deque()
        self.leasing = False
        self.slots = Slots(self.names)
        self.blocks = Blocks(self.wall, self.names.pseudonym)
        self.blocks_script = blocked.script()
        self.member = member
        self._blocks_told = b"", dict[str, Block]()
        self._leases = leases
        self._expected = instances
        self._deny_cache = deny_cache
        self._meters: WeakValueDictionary[tuple[str, str, Rate | Quota], SharedMeter] = WeakValueDictionary()
        self._making = Lock()
        self._ahead_ns: int | None = None
        self._heard = 0
        self._process = getpid()
        self._session: Session | None = None
        self._sessions: dict[AbstractEventLoop, Session] = {}

    def __repr__(self) -> str:
        where = ", ".join(map(str, self.address.hosts))
        return f"<RedisBackend at {where}, {'up' if self.up else 'away'}>"

    @property
    def up(self) -> bool:
        """Whether it is asked: not while it is known to be away."""
        return self._session is None or self._session.up

    def meter(self, name: str, store: str, rate: Rate | Quota) -> SharedMeter:
        """The meter for a limit; the same one for the same name, store and rate."""
        with self._making:
            known = self._meters.get((name, store, rate))
            if known is None:
                local = self.share.meter(name, store, rate)
                kind: Any = BucketMeter if isinstance(rate, Rate) else QuotaMeter
                known = self._meters[name, store, rate] = kind(name, store, rate, self.names, local)
            return known

    def wall(self) -> int:
        """The server's time in nanoseconds since the epoch, as far as is known."""
        return self._wall() if self._ahead_ns is None else self.clock() + self._ahead_ns

    @property
    def sure(self) -> bool:
        """Whether the server's time is known."""
        return self._ahead_ns is not None

    def told(self, now: int) -> None:
        """The server's time was ``now``, in microseconds, a moment ago.

        Of what was heard before, the latest is the best, for every reply is late; but clocks go apart, by less than a
        thousandth, and are set.
        """
        here = self.clock()
        ahead, before = now * MICROSECOND - here, self._ahead_ns
        if before is None:
            with self._making:
                for meter in self._meters.values():
                    meter.forget_window()  # it was this process's clock that said which it is
        elif 0 < before - ahead < SECOND:
            ahead = max(ahead, before - (here - self._heard) // 1_000)
        self._ahead_ns, self._heard = ahead, here

    def session(self) -> Session:
        """The connections of the running loop."""
        loop = _get_running_loop()
        session = self._session
        if session is None or session.loop is not loop:
            session = self._switch(loop)
        return session

    def _switch(self, loop: AbstractEventLoop | None) -> Session:
        if loop is None:
            raise RuntimeError("state in Redis needs a running event loop")
        if self._process != getpid():
            self._start_anew()
        session = self._sessions.get(loop)
        if session is None:
            closed = [other for other in self._sessions if other.is_closed()]
            self._session = session = self._sessions[loop] = Session(self, loop)
            for other in closed:
                self._sessions.pop(other).abandon()
        self._session = session
        return session

    def _start_anew(self) -> None:
        """Be somebody of one's own after a fork: what the parent has taken is the parent's."""
        self._process = getpid()
        self.holder = randbits(51) | 1
        self._sessions.clear()
        self.instances, self.leasing = self._expected or 1, False
        self.slots = Slots(self.names)
        for lease in self.watched:
            del lease.meter.leases[lease.key]
        self.watched.clear()

    def open(self) -> None:
        """Begin to connect, on the running loop. Waits for nothing and raises nothing, safe twice."""
        self.session().open()

    def spend(
        self, charges: Sequence[Charge], failure: Failure | None = None
    ) -> Verdict | None | Awaitable[Verdict | None]:
        """Take all of ``charges``, or none of them; while the server is away, what ``failure`` says."""
        if not charges:
            return _nothing(self.wall())
        own = cast("Sequence[tuple[SharedMeter, Key, int]]", charges)
        answer: Any = self._known(own, pay=True)
        if answer is None:
            answer = self.session().spend(own, failure)
        return cast("Verdict | None | Awaitable[Verdict | None]", answer)

    def _known(self, charges: Sequence[tuple[SharedMeter, Key, int]], *, pay: bool) -> Verdict | None:
        """What can be said without a call: that it is paid, if it is to ``pay``, or that it is refused still."""
        if self.watched:
            verdict = self._from_leases(charges, pay=pay)
            if verdict is not None:
                return verdict
        if self._deny_cache:
            for meter, key, cost in charges:
                known = meter.denied.get(key) if meter.denied else None
                if known is not None and 0 < known[0] <= cost:
                    return self._refused_before(charges)
        return None

    def permit(self, store: str, key: Key, limit: int) -> SlotPermit:
        """A wish for one of ``limit`` slots over the whole fleet, to hand to `spend_with`."""
        store = stored(store)
        holding = self.slots.holdings.get((store, key))
        if holding is None:
            holding = self.slots.add(store, key, limit, self.clock())
            self.session().sweep_soon()
        holding.limit = limit
        return SlotPermit(holding)

    def spend_with(
        self, permit: Permit, charges: Sequence[Charge], failure: Failure | None = None
    ) -> Verdict | Full | None | Awaitable[Verdict | Full | None]:
        """Take the slot and all of ``charges``, or none of it; `FULL` where there is no slot."""
        own = cast(SlotPermit, permit)
        holding = own.holding
        if holding.running + holding.asked >= holding.limit:
            return FULL
        if not holding.spare:
            shared = cast("Sequence[tuple[SharedMeter, Key, int]]", charges)
            return self._known(shared, pay=False) or self.session().spend(shared, failure, own)
        holding.spare -= 1
        holding.running += 1
        own.held, holding.unused = True, False
        return self.spend(charges, failure) if charges else _nothing(self.wall())

    def grant(self, permit: SlotPermit) -> None:
        """There is a slot for it; back with it, if nobody wants it any more."""
        permit.holding.running += 1
        permit.held = True
        if permit.given_up:
            self.release(permit)

    def release(self, permit: Permit) -> None:
        """Give the slot back, now or as soon as it is granted. Safe twice."""
        own = cast(SlotPermit, permit)
        holding = own.holding
        if own.waiting:
            own.given_up = True
        elif own.held:
            own.held = False
            holding.running -= 1
            if self.leasing and holding.spare < holding.limit // (4 * self.instances):
                holding.spare += 1
            else:
                holding.returned += 1
                self.return_slots(holding)

    def return_slots(self, holding: Holding) -> None:
        """Have the server told what was returned, with one call at a time."""
        if not holding.telling and _get_running_loop() is not None:
            self.session().give_back(holding)

    def renew(self) -> None:
        """Put off the expiry of what is held, of some callers at a time, and give back what is spare and not needed."""
        session = self.session()
        for holding in self.slots.due(self.clock()):
            if holding.unused:
                holding.spare = 0
            holding.unused = True
            session.give_back(holding, exact=True)

    def in_flight(self) -> dict[str, int]:
        """``callers`` of this process with requests in flight, and ``in_flight`` over all of them."""
        return self.slots.statistics()

    def _from_leases(self, charges: Sequence[tuple[SharedMeter, Key, int]], *, pay: bool) -> Verdict | None:
        """Pay with what was taken ahead, if that is enough for all of ``charges``; refuse, if it is for later."""
        now = self.clock()
        wall = self._wall() if self._ahead_ns is None else now + self._ahead_ns
        states, lefts = [], []
        for meter, key, cost in charges:
            lease = meter.leases.get(key)
            if lease is None or lease.left < cost or not cost:
                break
            drawn = meter.draw(lease, cost, now, wall)
            if drawn is None:
                break
            lease.left -= cost
            states.append(drawn[0])
            lefts.append(drawn[1])
            if drawn[1] < 0:
                break
        else:
            if pay:
                return Verdict(cast("Sequence[Charge]", charges), states, lefts, None, wall, wall)
        for (meter, key, cost), _ in zip(charges, states, strict=False):
            meter.leases[key].left += cost
        return self._early(charges, now, wall) if lefts and lefts[-1] < 0 else None

    def _early(self, charges: Sequence[tuple[SharedMeter, Key, int]], now: int, wall: int) -> Verdict:
        """Refuse what could only be paid with what is not there yet."""
        states, lefts, waits = [], [], []
        for meter, key, cost in charges:
            lease = meter.leases.get(key)
            state, wait = meter.empty(wall), 0
            if lease is not None and not meter.lapsed(lease, now, wall):
                state = meter.unspent(lease, wall)
                wait = meter.rate.wait(state, wall, cost) if lease.paced and lease.left >= cost else 0
            states.append(state)
            lefts.append(meter.rate.remaining(state, wall))
            waits.append(wait)
        return Verdict(cast("Sequence[Charge]", charges), states, lefts, waits, wall, wall)

    def watch(self, meter: SharedMeter, key: Key, now: int) -> None:
        """See whether a key becomes hot."""
        if len(self.watched) < MOST_LEASES and meter.most_ahead(self.instances):
            lease = meter.leases[key] = Lease(meter, key, now)
            self.watched.append(lease)
            self.session().sweep_soon()

    def sweep(self, most: int) -> None:
        """Look at the ``most`` that were not looked at for longest, and give back what has become idle of them."""
        now = self.clock()
        for _ in range(min(most, len(self.watched))):
            lease = self.watched.popleft()
            if lease.asking or now - lease.asked < IDLE:
                self.watched.append(lease)
            else:
                self.give_back(lease)

    def give_back(self, lease: Lease, session: Session | None = None) -> None:
        """Let go of a key, and return what was taken of it ahead."""
        meter = lease.meter
        del meter.leases[lease.key]
        if lease.left or (lease.noted and not lease.asking and isinstance(meter, QuotaMeter)):
            # Nothing, too: what a server has noted it would take back once more.
            self.give_units_back(meter, lease.key, lease.left, session)

    def give_units_back(self, meter: SharedMeter, key: Key, units: int, session: Session | None = None) -> None:
        """Return what was taken ahead and is not a lease's any more."""
        charge = (meter, key, units)
        (session or self.session()).note(REFUND, [(0, charge)], self.wall(), None, holder=self.holder)

    def counted(self, others: int) -> None:
        """So many other processes are there."""
        self.instances = max(others + 1, self._expected or 1)
        self.leasing = self._leases
        if self._expected is None:
            self.share.instances = self.instances

    def told_of_blocks(self, text: bytes) -> None:
        """This is who is blocked, in the words of the server."""
        if text != self._blocks_told[0]:
            try:
                self._blocks_told = text, blocked.read(text)
            except ValueError:
                advice.once("blocks", "the text in Redis of who is blocked cannot be read: who was blocked stays so")
                return
        self.blocks.replace(self._blocks_told[1])

    async def block(self, tenant: str, block: Block | None) -> None:
        """Keep a tenant out of all processes until then, or let it in again: here at once, elsewhere within 2 s.

        It is the server's clock that ends it. Raises `OSError` where the server is away, then nobody knows whether it
        was done, and `ValueError` for one more than `MOST_BLOCKS`.
        """
        length = 0 if block is None else -(-(block.until - self._wall()) // blocked.MILLISECOND)
        reason = "" if block is None else block.reason
        self.blocks.learn(tenant)
        await self.session().change_blocks(self.names.pseudonym(tenant), max(0, length), reason)

    async def fetch_blocks(self) -> None:
        """Know who is blocked now, and not only since the last sign of life. Raises `OSError`."""
        await self.session().fetch_blocks()

    async def forget(self, charges: Sequence[tuple[Meter, Key]]) -> None:
        """Let these callers have spent nothing. Raises `OSError` where the server is away.

        What another process holds ahead of them it still admits, and gives back to the new bucket what is left of it:
        at most a lease, within a second (a quota's within 10). What it knows to be refused it refuses for a second.
        """
        own = [(cast(SharedMeter, meter), key, 0) for meter, key in charges]
        session = self.session()
        for slot, places in session.by_slot(own).items():
            keys = [own[at][0].tags[own[at][1]] + own[at][0].suffix for at in places]
            await session.command(slot, partial(_delete, keys))
        for meter, key, _ in own:
            meter.denied.pop(key, None)
            lease = meter.leases.get(key)
            if lease is not None:
                lease.left, lease.paced, lease.state = 0, False, meter.empty(self.wall())
        await self.share.forget([(meter.local, key) for meter, key, _ in own])

    def _refused_before(self, charges: Sequence[tuple[SharedMeter, Key, int]]) -> Verdict | None:
        """What is still known to be refused; nothing, if it may be admitted by now."""
        now, wall = self.clock(), self.wall()
        states, lefts, waits = [], [], []
        for meter, key, cost in charges:
            known = meter.denied.get(key)
            state, wait = meter.empty(wall), 0
            if known is not None:
                if known[1] <= now:
                    del meter.denied[key]
                elif known[0] <= cost:
                    state = known[2]
                    wait = meter.rate.wait(state, wall, cost)
            states.append(state)
            lefts.append(meter.rate.remaining(state, wall))
            waits.append(wait)
        return Verdict(cast("Sequence[Charge]", charges), states, lefts, waits, wall, wall) if any(waits) else None

    def remember(self, charges: Sequence[tuple[SharedMeter, Key, int]], verdict: Verdict, asked: int) -> None:
        """Note what was refused of what was asked at ``asked``, for as long as that is sure to be true."""
        if not self._deny_cache or verdict.waits is None:
            return
        for (meter, key, cost), state, wait in zip(charges, verdict.states, verdict.waits, strict=True):
            if wait:
                denied = meter.denied
                if len(denied) >= MOST_DENIED:
                    denied.clear()  # to find the oldest would take longer than to ask again
                until = asked + (min(wait, DENIED_FOR) if wait > 0 else DENIED_FOR)
                denied[key] = (cost, until, state)

    def away(
        self,
        charges: Sequence[tuple[SharedMeter, Key, int]],
        failure: Failure | None,
        permit: SlotPermit | None,
    ) -> Verdict | Full | None:
        """Decide without the server, as ``failure`` says. Of slots, too, this process has its share."""
        action: Failure = failure or self.on_failure
        if permit is not None and action == "local":
            holding = permit.holding
            if holding.running >= max(1, holding.limit // self.share.instances):
                if self.observer is not None:
                    self.observer.fell_back(action)
                return FULL
        verdict = self.share.stand_in(charges, action, self.observer)
        if permit is not None and (action == "allow" or (verdict is not None and verdict.admitted)):
            self.grant(permit)
        return verdict

    def debit(self, charges: Sequence[Charge]) -> list[int]:
        """Take ``charges`` without asking; what was taken is in the list that is returned once the server has said."""
        taken = [0] * len(charges)
        self._without_asking(DEBIT, charges, 0, taken)
        return taken

    def refund(self, charges: Sequence[Charge], spent_at: int) -> None:
        """Give ``charges`` back that were spent at ``spent_at``."""
        self._without_asking(REFUND, charges, spent_at, None)

    def _without_asking(self, op: int, charges: Sequence[Charge], since: int, taken: list[int] | None) -> None:
        # What was decided by the local share is settled there.
        shared: list[tuple[int, tuple[SharedMeter, Key, int]]] = []
        for at, charge in enumerate(charges):
            if isinstance(charge[0], LocalMeter):
                if op == REFUND:
                    self.share.refund([charge], since)
                elif taken is not None:
                    taken[at] = self.share.debit([charge])[0]
            else:
                own = cast("tuple[SharedMeter, Key, int]", charge)
                own[0].denied.pop(own[1], None)
                shared.append((at, own))
        if shared and _get_running_loop() is not None:
            self.session().note(op, shared, since, taken)

    def statistics(self) -> dict[str, dict[str, int]]:
        """Of this process's share, per store: ``keys``, ``evicted`` and ``overflowed``."""
        return self.share.statistics()

    async def aclose(self) -> None:
        """Give back what was taken ahead and close the connections of the running loop. Safe twice."""
        loop = cast(AbstractEventLoop, _get_running_loop())
        session = self._sessions.get(loop)
        if session is None:
            return
        try:
            # Answers that come meanwhile may have to give something back, over the same connections.
            await session.aclose()
        finally:
            self._sessions.pop(loop, None)
            if session is self._session:
                self._session = None


def _delete(keys: list[bytes], _: Link) -> tuple[Any, ...]:
    return ("DEL", *keys)


def _nothing(now: int) -> Verdict:
    """What is said of no charges."""
    return Verdict([], [], [], None, now, now)
