"""What is asked of a node: a decision, a note that needs none, a probe."""

from __future__ import annotations

from asyncio import Future
from collections.abc import Mapping, Sequence
from struct import Struct
from typing import TYPE_CHECKING, TypeAlias, cast, final

from seawall.backends import FULL, Charge, Failure, Full, Key, Verdict
from seawall.backends.redis.keys import slot_of
from seawall.backends.redis.meters import MICROSECOND, BucketMeter, SharedMeter
from seawall.backends.redis.node import Node
from seawall.backends.redis.slots import Holding, SlotPermit, record
from seawall.rate import Quota, Rate

if TYPE_CHECKING:
    from seawall.backends.redis.backend import RedisBackend

REFUSED, DONE, ELSEWHEN = range(3)
SPEND, DEBIT, REFUND = range(3)
MOST_INSTANCES = 1_000_000
MOST_TRIES = 3
"""How often a decision is sent on: another node, another window."""
_HEADS = [Struct(f"<BBd{count}H") for count in range(256)]

Shared: TypeAlias = Sequence[tuple[SharedMeter, Key, int]]


def _head(op: int, since: int, places: list[int]) -> bytes:
    count = len(places)
    return _HEADS[count].pack(op, count, since, *places)


def _alone(term: bytes, terms: dict[bytes, int]) -> bytes:
    """A decision about one thing that is no limit."""
    return _head(SPEND, 0, [terms.setdefault(term, len(terms))])


class Question:
    """Some charges, and the instants that bound it. What is common to all that is asked."""

    __slots__ = ("backend", "charges", "deadline", "op", "since", "slot", "tries")

    def __init__(self, backend: RedisBackend, op: int, charges: Shared, slot: int, deadline: float, since: int) -> None:
        self.backend = backend
        self.op = op
        self.charges = charges
        self.slot = slot
        self.deadline = deadline
        self.since = since
        self.tries = 0

    def names(self) -> list[bytes]:
        return [meter.tags[key] + meter.suffix for meter, key, _ in self.charges]

    def pack(self, terms: dict[bytes, int]) -> bytes:
        return self._pack(terms, 0)

    def _pack(self, terms: dict[bytes, int], holder: int) -> bytes:
        backend, number = self.backend, terms.setdefault
        places = [number(meter.record(cost, 0, backend, holder), len(terms)) for meter, _, cost in self.charges]
        return _head(self.op, self.since, places)

    def redirected(self) -> bool:
        """Whether it may be sent on once more; otherwise it fails."""
        self.tries += 1
        if self.tries > MOST_TRIES:
            self.fail()
            return False
        return True

    def fail(self) -> None:
        """Nobody waits for a note."""

    def abandon(self) -> None:
        """Nobody waits for a note."""

    def retry(self) -> None:
        """It was asked about another window than the server is in, which is known now."""
        for meter, _, _ in self.charges:
            meter.forget_window()
        if self.redirected():
            self.backend.session().ask(self)


class Spend(Question):
    """A decision, whose caller waits for ``future``; ``failure`` is what its rule says of a server that is away."""

    __slots__ = ("asked", "costs", "failure", "future", "permit", "wants")

    def __init__(
        self,
        backend: RedisBackend,
        charges: Shared,
        slot: int,
        deadline: float,
        future: Future[Verdict | Full | None],
        failure: Failure | None,
    ) -> None:
        # What `Question.__init__` does, written out: one call less.
        self.backend = backend
        self.op = SPEND
        self.charges = charges
        self.slot = slot
        self.deadline = deadline
        self.since = 0
        self.tries = 0
        self.asked = now = backend.clock()
        self.future = future
        self.failure = failure
        self.costs: list[int] | None = None
        self.wants: list[int] | None = None
        self.permit: SlotPermit | None = None
        if backend.leasing:
            self._lease(now)

    def _lease(self, now: int) -> None:
        """Pay what can be paid from leases, and ask for more of what is asked for often."""
        backend, costs, wants, leased = self.backend, [], [], False
        wall = backend.wall()
        for meter, key, cost in self.charges:
            lease = meter.leases.get(key)
            want = 0
            leased = leased or lease is not None
            if lease is None:
                if cost:
                    backend.watch(meter, key, now)
            elif cost:
                if meter.lapsed(lease, now, wall):
                    # As far as the server has not taken it back itself.
                    units, lease.left = lease.left, 0
                    backend.give_units_back(meter, key, units)
                drawn = meter.draw(lease, cost, now, wall) if lease.left >= cost else None
                if drawn is not None and drawn[1] >= 0:
                    lease.left -= cost
                    cost = 0
                elif lease.left < cost:
                    # Its units are part of the payment, or they would be kept from whoever needs more than they are.
                    cost -= lease.left
                    lease.left = 0
                    most = meter.most_ahead(backend.instances)
                    want = lease.ask(now, most) if cost <= most else 0
            costs.append(cost)
            wants.append(want)
        if leased:
            self.costs, self.wants = costs, wants

    def with_slot(self, permit: SlotPermit) -> None:
        """Ask for a slot as well."""
        self.permit = permit
        permit.asked()

    def names(self) -> list[bytes]:
        names = super().names()
        if self.permit is not None:
            names.append(self.permit.holding.key)
        return names

    def pack(self, terms: dict[bytes, int]) -> bytes:
        backend, permit = self.backend, self.permit
        if permit is None and self.costs is None:
            return self._pack(terms, 0)
        holder, charges, places = backend.holder, self.charges, []
        costs = self.costs or [cost for _, _, cost in charges]
        for (meter, key, full), cost, want in zip(charges, costs, self.wants or [0] * len(costs), strict=True):
            # Where the lease has paid a part, or all of it before, it has that again if this is refused, or nothing.
            lease = meter.leases.get(key) if cost else None
            told = lease is not None and (want or lease.noted)
            term = meter.record(cost, want, backend, holder if told else 0, full - cost if told else 0)
            places.append(terms.setdefault(term, len(terms)))
        if permit is not None:
            holding = permit.holding
            # With nothing else under way it is known what this process has, whatever was lost before.
            exact = holding.asked == 1 and not holding.telling
            if exact:
                holding.returned = 0
            term = record(holder, holding.held, 1, holding.limit, exact=exact)
            places.append(terms.setdefault(term, len(terms)))
        return _head(SPEND, 0, places)

    def _settle_leases(self, reply: list[int], at: int, verdict: Verdict | None) -> None:
        """Give back what was paid in vain, add what was taken ahead, and count it as there in the verdict.

        ``reply`` is from ``at`` on, if there is one.
        """
        admitted = verdict is not None and verdict.waits is None
        for nth, ((meter, key, full), cost, want) in enumerate(
            zip(self.charges, self.costs or (), self.wants or (), strict=True)
        ):
            lease = meter.leases.get(key)
            granted = (want if reply[at + 3 * nth + 2] else 0) if want and admitted else None
            unspent = 0 if admitted else full - cost
            if lease is None:
                unspent += granted or 0
                if unspent:
                    self.backend.give_units_back(meter, key, unspent)
                continue
            lease.left += unspent
            if want:
                lease.answer(granted)
            if verdict is not None:
                lease.state = verdict.states[nth]
                lease.paced = meter.overdrawn(lease.state, verdict.now) and (lease.paced or bool(granted))
                if lease.left:
                    verdict.states[nth] = state = meter.unspent(lease, verdict.now)
                    verdict.left[nth] = meter.rate.remaining(state, verdict.now)

    def settle(self, reply: list[int], at: int, now: int) -> int:
        status = reply[at]
        at += 1
        if status == ELSEWHEN:
            self.retry()
            return at
        now *= MICROSECOND
        first, charges = at, self.charges
        states: list[int] = []
        lefts: list[int] = []
        for meter, _, _ in charges:
            state, left = meter.reading(reply[at], reply[at + 1], now)
            states.append(state)
            lefts.append(left)
            at += 3
        full = False
        if self.permit is not None:
            full = status == REFUSED and reply[at + 1] == 0
            if reply[at] < 0 or reply[at + 2] < 0:
                raise ValueError("no such slots")
            at += 3
        waits: list[int] | None = None
        if status == REFUSED and not full:
            costs = self.costs or [cost for _, _, cost in charges]
            waits = [
                meter.rate.wait(state, now, cost) if cost else 0
                for (meter, _, _), state, cost in zip(charges, states, costs, strict=True)
            ]
            if not any(waits):
                raise ValueError("a refusal of nothing")
        elif status not in (DONE, REFUSED):
            raise ValueError("no such status")
        verdict = Verdict(cast("Sequence[Charge]", charges), states, lefts, waits, now, now)
        if self.costs is not None:
            self._settle_leases(reply, first, None if full else verdict)
        if waits is not None:
            self.backend.remember(charges, verdict, self.asked)
        if self.permit is not None:
            self.permit.answered()
            if status == DONE:
                self.backend.grant(self.permit)
        self.tell(FULL if full else verdict)
        return at

    def fail(self) -> None:
        """This process decides."""
        self.abandon()
        self.tell(self.backend.away(self.charges, self.failure, self.permit))

    def abandon(self) -> None:
        if self.costs is not None:
            self._settle_leases([], 0, None)
        if self.permit is not None:
            self.permit.answered()

    def tell(self, answer: Verdict | Full | None) -> None:
        """Let the caller know, if it is still there."""
        if not self.future.done():
            self.future.set_result(answer)


@final
class Part(Spend):
    """The part of a decision that lies in one slot."""

    __slots__ = ("joint", "nth")

    def __init__(
        self, joint: Joint, nth: int, backend: RedisBackend, charges: Shared, slot: int, deadline: float
    ) -> None:
        super().__init__(backend, charges, slot, deadline, joint.future, joint.failure)
        self.joint = joint
        self.nth = nth

    def tell(self, answer: Verdict | Full | None) -> None:
        self.joint.told(self.nth, answer)


@final
class Note(Question):
    """A debit or a refund. ``taken`` is completed with what a debit took, at the positions ``places``; ``holder`` has
    nothing left of the charges from now on.
    """

    __slots__ = ("holder", "places", "taken")

    def __init__(
        self,
        backend: RedisBackend,
        op: int,
        charges: Shared,
        slot: int,
        deadline: float,
        since: int,
        places: list[int],
        taken: list[int] | None,
        holder: int = 0,
    ) -> None:
        super().__init__(backend, op, charges, slot, deadline, since)
        self.places = places
        self.taken = taken
        self.holder = holder

    def pack(self, terms: dict[bytes, int]) -> bytes:
        return self._pack(terms, self.holder)

    def settle(self, reply: list[int], at: int, now: int) -> int:
        status = reply[at]
        at += 1
        if status == ELSEWHEN:
            self.retry()
            return at
        for (meter, _, cost), place in zip(self.charges, self.places, strict=True):
            if self.taken is not None:
                rate = meter.rate
                if reply[at + 2] and isinstance(rate, Rate):
                    # It hit the bottom: what there was above it.
                    before, _ = meter.reading(reply[at], reply[at + 1], now * MICROSECOND)
                    cost = (now * MICROSECOND * rate.scale + rate.ceiling - before) // rate.interval
                self.taken[place] = cost
            at += 3
        return at


@final
class Probe(Question):
    """The script on a key that nobody else uses: whether a node can decide."""

    __slots__ = ("node", "prefix")

    def __init__(self, backend: RedisBackend, node: Node, meter: BucketMeter, prefix: bytes, deadline: float) -> None:
        super().__init__(backend, SPEND, [(meter, b"", 1)], 0, deadline, 0)
        self.node = node
        self.prefix = prefix

    def names(self) -> list[bytes]:
        return [self.prefix]

    def settle(self, reply: list[int], at: int, now: int) -> int:
        self.node.probed(well=reply[at] in (DONE, REFUSED))
        return at + 4

    def redirected(self) -> bool:
        # Whoever knows who to ask instead can be asked.
        self.node.probed(well=True)
        return False

    def fail(self) -> None:
        self.node.probed(well=False)


@final
class Beat(Question):
    """A sign of life, or with ``held`` 0 a farewell. The answer says how many others there are."""

    __slots__ = ("held",)

    def __init__(self, backend: RedisBackend, deadline: float, held: int = 1) -> None:
        super().__init__(backend, SPEND, [], slot_of(b"instances"), deadline, 0)
        self.held = held

    def names(self) -> list[bytes]:
        return [self.backend.names.prefix + b":{instances}:instances"]

    def pack(self, terms: dict[bytes, int]) -> bytes:
        return _alone(record(self.backend.holder, self.held, 0, None, exact=True), terms)

    def settle(self, reply: list[int], at: int, now: int) -> int:
        if reply[at] != DONE or not 0 <= reply[at + 3] < MOST_INSTANCES:
            raise ValueError("no such number")
        self.backend.counted(reply[at + 3])
        if self.held:
            self.backend.session().look_at_blocks()
        return at + 4


@final
class Return(Question):
    """Slots that are not needed any more; ``exact``: how many this process has."""

    __slots__ = ("exact", "holding", "number")

    def __init__(self, backend: RedisBackend, holding: Holding, slot: int, deadline: float, *, exact: bool) -> None:
        super().__init__(backend, SPEND, [], slot, deadline, 0)
        self.holding = holding
        # Of what is asked for at this moment nobody knows yet how much is granted.
        self.exact = exact and not holding.asked
        self.number = 0
        holding.telling += 1

    def names(self) -> list[bytes]:
        return [self.holding.key]

    def pack(self, terms: dict[bytes, int]) -> bytes:
        holding = self.holding
        self.number += holding.returned
        holding.returned = 0
        return _alone(record(self.backend.holder, holding.held, -self.number, None, exact=self.exact), terms)

    def settle(self, reply: list[int], at: int, now: int) -> int:
        if reply[at] != DONE or reply[at + 1] < 0:
            raise ValueError("no such slots")
        self.holding.telling -= 1
        if self.holding.returned:
            self.backend.return_slots(self.holding)
        return at + 4

    def fail(self) -> None:
        self.abandon()
        self.holding.returned += self.number  # not forgotten before the server has been told

    def abandon(self) -> None:
        self.holding.telling -= 1


@final
class Joint:
    """A decision whose charges lie in several slots: each slot is asked at once, and where one refuses, the others give
    back what they took. So at rest debits less refunds are what was admitted, of every limit; but what was taken in a
    slot whose answer came too late stays debited, as of any call (nobody asks twice).
    """

    def __init__(
        self,
        backend: RedisBackend,
        charges: Shared,
        slots: Mapping[int, list[int]],
        future: Future[Verdict | Full | None],
        failure: Failure | None,
        permit: SlotPermit | None,
    ) -> None:
        self.future = future
        self.failure = failure
        self.permit = permit
        self._backend = backend
        self._charges = charges
        self._full = False
        self._places = list(slots.values())
        self._answers: list[Verdict | None] = [None] * len(slots)
        self._missing = len(slots)

    def told(self, part: int, answer: Verdict | Full | None) -> None:
        """What became of a part; nothing, where its node is away and nobody decides instead."""
        if isinstance(answer, Full):
            self._full = True
        else:
            self._answers[part] = answer
        self._missing -= 1
        if not self._missing:
            verdict = self._together()
            admitted = (self.failure or self._backend.on_failure) == "allow" if verdict is None else verdict.admitted
            if self.permit is not None and (self._full or not admitted):
                self._backend.release(self.permit)
            if not self.future.done():
                self.future.set_result(FULL if self._full else verdict)

    def _together(self) -> Verdict | None:
        answers = [answer for answer in self._answers if answer is not None]
        refused = any(answer.waits is not None for answer in answers)
        unknown = len(answers) < len(self._answers)  # or without a slot
        if refused or unknown:
            for one in answers:
                if one.waits is None:
                    self._backend.refund(one.charges, one.wall)
        if not refused and unknown:
            return None
        charges: list[Charge] = list(cast("Sequence[Charge]", self._charges))
        wall = max(answer.wall for answer in answers)
        states = [meter.empty(wall) for meter, _, _ in self._charges]
        lefts = [meter.rate.remaining(state, wall) for (meter, _, _), state in zip(self._charges, states, strict=True)]
        waits = [0] * len(charges)
        for places, answer in zip(self._places, self._answers, strict=True):
            if answer is None:
                continue
            for nth, at in enumerate(places):
                rate = self._charges[at][0].rate
                # On one clock: a node's, or this process's where it decided.
                ahead = (wall - answer.now) * rate.scale if isinstance(rate, Rate) else 0
                charges[at] = answer.charges[nth]
                states[at], lefts[at] = answer.states[nth] + ahead, answer.left[nth]
                if answer.waits is not None:
                    waits[at] = answer.waits[nth]
                elif refused:
                    states[at] = _refunded(rate, states[at], wall, charges[at][2])
                    lefts[at] = rate.remaining(states[at], wall)
        return Verdict(charges, states, lefts, waits if refused else None, wall, wall)


def _refunded(rate: Rate | Quota, state: int, wall: int, cost: int) -> int:
    """What was spent a moment ago, given back."""
    return rate.refund(state, wall, cost) if isinstance(rate, Rate) else rate.refund(state, wall, cost, wall)
