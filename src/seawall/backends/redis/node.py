"""One server: what is asked in one turn of the event loop goes out as one call, and is answered in time or not at all.

There is no task, lock or timer for a request. Requests leave an `Ask` here; at the end of the turn all of them are one
script call (64 at most, so that no script is long), and its reply settles each. One timer watches the oldest call; who
is not answered by its deadline is failed, while the connection goes on and the late reply is read and dropped. A
cancelled caller merely does not listen any more.

At the first failure the breaker opens and nobody asks, but for a probe now and then: the script itself, on a key that
nobody else uses, since a server that answers PING may still not be able to decide. A time-out that the event loop
caused, by running late itself, is nobody's failure.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from hashlib import sha1
from importlib.resources import files
from struct import Struct
from typing import Any, Literal, Protocol, TypeAlias, final

import hiredis

from seawall.backends.breaker import Breaker
from seawall.backends.redis.link import LOST, Answer, Link, LinkError, UnreachedError
from seawall.rate import SECOND

MOST_ASKS = 64
STUCK = 1.0
"""Seconds without a reply after which a connection is given up, and between two connections: no more than one each."""
LATE = 0.005
"""Seconds by which a timer has to be late to say that the event loop stalled."""
_READ = 0.001
"""Seconds after a stall in which the loop reads what has come meanwhile."""
_MOST_OF = 0.8
"""The part of its time that a call has to have been under way for the server to be blamed."""
_GRACE = 0.0005
"""Half the resolution of a loop's timers."""

_NUMBER = Struct("<H")

Result: TypeAlias = Literal["ok", "timeout", "connection", "error", "mismatch"]
RELOCATED = frozenset({"READONLY", "MASTERDOWN", "CLUSTERDOWN", "LOADING"})
"""Errors of a server that is not the one to ask: another may be, so it is looked for again."""


@final
class Script:
    """The text that decides, and its name in the server's cache. ``modern`` servers need to be told that it may write
    where memory is short: what it writes is small, and expires."""

    def __init__(self, text: str) -> None:
        self.text = {False: text.encode(), True: b"#!lua flags=allow-oom\n" + text.encode()}
        self.name = {modern: sha1(body, usedforsecurity=False).hexdigest() for modern, body in self.text.items()}

    @classmethod
    def own(cls) -> Script:
        return cls(files("seawall.backends.redis").joinpath("spend.lua").read_text("utf-8"))


class Ask(Protocol):
    """Something to be decided in one piece, as spend.lua reads it."""

    deadline: float
    """By the loop's clock."""
    slot: int
    """Of the cluster, in which all of ``names`` are."""

    def names(self) -> list[bytes]:
        """The keys of its charges."""
        ...

    def pack(self, terms: dict[bytes, int]) -> bytes:
        """The decision. ``terms`` are those of the batch, with their numbers; what is not among them is added."""
        ...

    def settle(self, reply: list[int], at: int, now: int) -> int:
        """Take what ``reply`` says from ``at`` on, at ``now`` (microseconds); return where the next one begins.

        Raises `ValueError` or `IndexError` for what is no reply to this.
        """
        ...

    def fail(self) -> None:
        """There will be no reply in time."""
        ...

    def abandon(self) -> None:
        """There will be no reply, and whoever waits is gone with the event loop."""
        ...


class Redirect(Protocol):
    """What a node asks of the cluster that it is a part of."""

    def moved(self, asks: list[Any], error: str) -> bool:
        """Whether somebody else was asked instead, as ``error`` (MOVED or ASK) says."""
        ...

    def relocate(self, node: Node) -> None:
        """The node may not be the one to ask any more."""
        ...


@final
class _Batch:
    """One script call, in flight."""

    __slots__ = ("asks", "deadline", "number", "sent", "whole")

    def __init__(self, asks: list[Ask], number: int, sent: float, *, whole: bool) -> None:
        self.asks = asks
        self.deadline = min(ask.deadline for ask in asks)
        self.number = number
        self.sent = sent
        self.whole = whole


@final
class Node:
    """A server and the way to it. ``dial`` makes a connection, whoever the server is at that time."""

    def __init__(
        self,
        name: str,
        dial: Callable[[], Awaitable[Link]],
        script: Script,
        breaker: Breaker,
        probe: Callable[[Node], Ask],
        budget: float,
        *,
        called: Callable[[Result, int], None],
        heard: Callable[[int], None],
        noted: Callable[[Node, Link | None, str], None],
        connected: Callable[[Node, Link], None],
        redirect: Redirect | None = None,
        one_slot: bool = False,
    ) -> None:
        self.name = name
        self.breaker = breaker
        self._loop = asyncio.get_running_loop()
        self._dial = dial
        self._script = script
        self._probe = probe
        self._budget = budget
        self._called = called
        self._heard = heard
        self._noted = noted
        self._connected = connected
        self._redirect = redirect
        self._one_slot = one_slot
        self._link: Link | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._pending: list[Ask] = []
        self._flights: deque[_Batch] = deque()
        self._number = 0
        self._flushing = False
        self._watch: asyncio.TimerHandle | None = None
        self._again: asyncio.TimerHandle | None = None
        self._stalled = False
        self._closed = False
        self._dial_from = 0.0

    def __repr__(self) -> str:
        return f"<Node {self.name}: {self.breaker!r}, {self._link!r}>"

    @property
    def connected(self) -> bool:
        return self._link is not None and self.breaker.closed

    def submit(self, ask: Ask) -> None:
        """Ask with everything else that is asked in this turn of the loop."""
        self._pending.append(ask)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def call(self, command: tuple[Any, ...], answer: Answer) -> None:
        """Send a command that is no decision, and that nobody waits for, if there is a connection."""
        if self._link is not None:
            self._link.call(command, answer)

    async def ask(self, command: Callable[[Link], tuple[Any, ...]], *, asking: bool = False) -> Any:
        """The reply to a command that is no decision, an error of the server among them.

        Connects, and waits for as long as whoever asks does. Raises `OSError` where that fails.
        """
        if self._link is None:
            self.connect()
            if self._dialling is not None:
                await asyncio.wait((self._dialling,))
        link = self._link
        if link is None:
            raise OSError(f"{self.name} is away ({self.breaker.statistics()['reason'] or 'closed'})")
        if asking:
            link.call((b"ASKING",), lambda _: None)
        reply = await link.reply(*command(link))
        if reply is LOST:
            raise OSError(f"{self.name} is away (connection lost)")
        return reply

    def abandon(self) -> None:
        """The event loop is closed: nobody is answered any more, and nobody can be told."""
        for ask in [*(ask for batch in self._flights for ask in batch.asks), *self._pending]:
            ask.abandon()

    def connect(self) -> None:
        """Begin to connect, if nobody has."""
        if self._link is None and self._dialling is None and not self._closed:
            self._dialling = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        started = self._loop.time()
        try:
            link = await self._dial()
        except Exception as error:  # whatever it is, it must be tried again
            self._dialling = None
            if not isinstance(error, UnreachedError):
                self._dial_from = started + STUCK
            if isinstance(error, TimeoutError):
                self._fail("timeout", "no answer")
            elif isinstance(error, LinkError):
                self._fail("connection", str(error))
            else:
                self._fail("mismatch", f"it does not introduce itself as Redis does: {type(error).__name__}")
            self._lose()
            return
        self._dialling = None
        if self._closed:
            link.drop("connection")
            return
        if link.lost is not None:
            self._lost(link, link.lost)
            return
        self._link = link
        self._dial_from = started + STUCK
        link.on_lost = self._lost
        if self.breaker.closed:
            self._noted(self, link, "")
            self._flush()
        self._connected(self, link)

    def _lost(self, link: Link, reason: str) -> None:
        self._link = None
        if self._closed:
            return
        mistrusted = reason == "mismatch"
        self._fail(
            "mismatch" if mistrusted else "connection", "a reply that was none" if mistrusted else "connection lost"
        )
        self._lose()

    def _lose(self) -> None:
        """Nothing that is waiting will be answered."""
        flights, self._flights = self._flights, deque()
        pending, self._pending = self._pending, []
        for ask in [*(ask for batch in flights for ask in batch.asks), *pending]:
            ask.fail()

    def _flush(self) -> None:
        self._flushing = False
        if not self._pending:
            return
        if self._link is None:
            if self._closed:
                self._lose()
                return
            self.connect()
            self._arm()
            return
        pending, self._pending = self._pending, []
        late = self._loop.time() + _GRACE
        if pending[0].deadline < late:
            # The loop was held up in between. They would be answered after their time, whatever the server does.
            for ask in pending:
                if ask.deadline < late:
                    ask.fail()
            pending = [ask for ask in pending if ask.deadline >= late]
        pieces = deque(self._pieces(pending))
        try:
            while pieces:
                self._send(pieces.popleft())
        finally:
            # Whatever goes wrong, nobody waits for ever.
            self._pending += [ask for piece in pieces for ask in piece]
            self._arm()

    def _pieces(self, asks: list[Ask]) -> list[list[Ask]]:
        groups = {0: asks}
        if self._one_slot:
            groups = {}
            for ask in asks:
                groups.setdefault(ask.slot, []).append(ask)
        return [group[at : at + MOST_ASKS] for group in groups.values() for at in range(0, len(group), MOST_ASKS)]

    def _send(self, asks: list[Ask], *, whole: bool = False, asking: bool = False) -> None:
        """Call the script, by its name or as a ``whole``."""
        link = self._link
        if link is None:
            for ask in asks:
                ask.fail()
            return
        self._number = number = (self._number + 1) & 0xFFFFFFFF
        batch = _Batch(asks, number, self._loop.time(), whole=whole)
        # By their deadlines: what is asked again has less time than what came in between.
        place = len(self._flights)
        while place and self._flights[place - 1].deadline > batch.deadline:
            place -= 1
        self._flights.insert(place, batch)
        keys = [key for ask in asks for key in ask.names()]
        terms: dict[bytes, int] = {}
        decisions = [ask.pack(terms) for ask in asks]
        payload = b"".join([_NUMBER.pack(len(terms)), *terms, *decisions])
        script = self._script
        how, what = (b"EVAL", script.text) if whole else (b"EVALSHA", script.name)
        if asking:
            link.call((b"ASKING",), lambda _: None)
        link.call((how, what[link.modern], len(keys), *keys, number, payload), lambda reply: self._answer(batch, reply))

    def resend(self, asks: list[Ask], *, asking: bool) -> None:
        """Ask what another node did not know, in time or not at all."""
        if not asks:
            return
        if self._closed:
            for ask in asks:
                ask.fail()
            return
        if self._link is None:
            self._pending[:0] = asks
            self.connect()
        else:
            self._send(asks, asking=asking)
        self._arm()

    def _answer(self, batch: _Batch, reply: Any) -> None:
        if reply is LOST:
            return  # the connection is lost: `_lost` has told everybody, or is about to
        late = batch not in self._flights
        if not late:
            self._flights.remove(batch)
        took = int((self._loop.time() - batch.sent) * SECOND)
        if isinstance(reply, hiredis.ReplyError):
            self._refused(batch, str(reply), took, late=late)
            return
        if type(reply) is not list or len(reply) < 3 or reply[0] != batch.number or set(map(type, reply)) != {int}:
            self._mistrust(batch, late=late)
            return
        if late:
            return
        try:
            _settle(batch, reply, self._heard)
        except (ValueError, IndexError):
            self._mistrust(batch, late=False)
        except BaseException:
            self._mistrust(batch, late=False)
            raise
        else:
            self._called("ok", took)

    def _mistrust(self, batch: _Batch, *, late: bool) -> None:
        """A reply that is none: nothing else that comes over this connection is believed."""
        if not late:
            for ask in batch.asks:
                ask.fail()
        if self._link is not None:
            self._link.drop("mismatch")

    def _refused(self, batch: _Batch, error: str, took: int, *, late: bool) -> None:
        """The server says that it has not decided."""
        code = error.split(" ", 1)[0]
        if late:
            return
        if code == "NOSCRIPT" and not batch.whole:
            # It has forgotten the script, and certainly debited nothing. There is time until the deadline.
            self._send(batch.asks, whole=True)
            self._arm()
            return
        if code in ("MOVED", "ASK", "TRYAGAIN") and self._redirect is not None:
            self._called("ok", took)
            if not self._redirect.moved(batch.asks, error):
                for ask in batch.asks:
                    ask.fail()
            return
        self._called("error", took)
        self._fail("error", error, counted=True)
        for ask in batch.asks:
            ask.fail()
        if code in RELOCATED:
            if self._link is not None:
                self._link.drop("connection")
            if self._redirect is not None:
                self._redirect.relocate(self)

    def _arm(self) -> None:
        """Have the oldest deadline watched."""
        if not self._closed:
            if self._flights:
                deadline = self._flights[0].deadline
            elif self._pending:
                deadline = self._pending[0].deadline
            else:
                return
            if self._watch is not None:
                if self._stalled or self._watch.when() <= deadline:
                    return
                self._watch.cancel()
            self._watch = self._loop.call_at(deadline, self._overdue, deadline)

    def _overdue(self, due: float) -> None:
        now = self._loop.time()
        if not self._stalled and now - due > LATE:
            # The loop has stalled. What has come meanwhile is read first.
            self._stalled = True
            self._watch = self._loop.call_later(_READ, self._overdue, due)
            return
        self._stalled, self._watch = False, None
        due = now + _GRACE
        missed: list[Ask] = []
        blamed = False
        while self._flights and self._flights[0].deadline <= due:
            batch = self._flights.popleft()
            # What was held up here before it was sent is not the server's fault.
            blamed = blamed or now - batch.sent >= _MOST_OF * self._budget
            self._called("timeout", int((now - batch.sent) * SECOND))
            missed += batch.asks
        while self._pending and self._pending[0].deadline <= due:
            missed.append(self._pending.pop(0))
            blamed = True
        if blamed:
            self._fail("timeout", "no answer in time")
        for ask in missed:
            ask.fail()
        self._arm()

    def _fail(self, result: Result, reason: str, *, counted: bool = False) -> None:
        if result in ("connection", "mismatch") and not counted:
            self._called(result, 0)
        if self.breaker.fail(reason):
            self._noted(self, None, reason)
        if self._again is None and not self._closed:
            self._again = self._loop.call_later(self.breaker.probe_in() / SECOND + _READ, self._try)

    def _try(self) -> None:
        """Find out whether the server is back."""
        self._again = None
        if self._closed or self.breaker.closed:
            return
        link = self._link
        if link is not None and link.oldest is not None and self._loop.time() - link.oldest > STUCK:
            self._link = None
            link.on_lost = None
            link.drop("connection")
        if self._link is None and self._loop.time() < self._dial_from:
            self._again = self._loop.call_at(self._dial_from, self._try)
            return
        self.breaker.begin_probe()
        if self._redirect is not None:
            self._redirect.relocate(self)
        if self._link is None:
            self.connect()
        else:
            self._ask_probe()

    def _ask_probe(self) -> None:
        self.submit(self._probe(self))

    def probed(self, *, well: bool) -> None:
        """How a probe went."""
        if well:
            if self.breaker.succeed():
                self._noted(self, self._link, "")
        elif not self.breaker.closed:
            # Otherwise whoever is to blame for it has been blamed.
            self._fail("timeout", "the probe failed", counted=True)

    async def aclose(self) -> None:
        """Close the connection. What is asked already is waited for, as long as it may take."""
        self._closed = True
        self._flush()
        while self._flights and self._link is not None:
            await asyncio.sleep(_READ)  # until its reply, or its deadline
            self._overdue(self._loop.time())
        if self._dialling is not None:
            self._dialling.cancel()
        for timer in (self._watch, self._again):
            if timer is not None:
                timer.cancel()
        if self._link is not None:
            self._link.drop("connection")
            self._link = None
        self._lose()


def _settle(batch: _Batch, reply: list[int], heard: Callable[[int], None]) -> None:
    """Give each ask its part of ``reply``. Those that had none are left in the batch where it is no reply to it.

    ``heard`` is told the server's time, in microseconds.
    """
    asks, at, now = batch.asks, 3, reply[1] * 1_000_000 + reply[2]
    if not 1e9 < reply[1] < 1e11 or not 0 <= reply[2] < 1_000_000:
        raise ValueError("no such time")
    heard(now)
    for nth, ask in enumerate(asks):
        batch.asks = asks[nth:]
        at = ask.settle(reply, at, now)
    if at != len(reply):
        batch.asks = []
        raise ValueError("more than was asked")
