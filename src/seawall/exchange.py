"""A request that is being served, and its answer: headers on the way out, or a refusal; what is still to be paid."""

from __future__ import annotations

from asyncio import Task, create_task, current_task, get_running_loop, shield, sleep, timeout_at, wait
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol, TypeAlias, final

from seawall import tracing
from seawall.admission import Closest, Denied, Entry, Ticket
from seawall.backends import Backend, Charge, Key, Verdict
from seawall.decision import Outcome
from seawall.gate import Gate, Identify, Lane
from seawall.metrics import DENIED, EXPIRED, LIMITED, OUTCOMES, SHED
from seawall.overload.queue import DONE
from seawall.refusals import Refusals
from seawall.responses import Header, Prepared, Spent, closest, grows, policy_header

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

SCOPE_KEY = "seawall"
"""Where a request's exchange is found in its scope."""

current_exchange: ContextVar[Exchange | None] = ContextVar("seawall_exchange", default=None)
"""The exchange that this context serves, for limits whose endpoints take no request."""

_STARTS = frozenset({"http.response.start", "websocket.accept", "websocket.close", "websocket.http.response.start"})
_WITH_HEADERS = _STARTS - {"websocket.close"}


_REFUSED = {
    "rate": LIMITED,
    "quota": LIMITED,
    "concurrency": LIMITED,
    "overload": SHED,
    "queue_full": SHED,
    "queue_timeout": SHED,
    "expired": EXPIRED,
}
"""How a refusal is counted, by its reason; any other is `DENIED`."""

_OVERLOADED = frozenset({503, 504})
"""What an application answers for a downstream that cannot keep up."""


class Shell(Protocol):
    """What an exchange needs of the middleware that it passes through."""

    gate: Gate
    identify: Identify | None
    on_reject: Callable[..., Any] | None
    parts: frozenset[str]
    refusals: Refusals

    async def deliver(
        self,
        prepared: Prepared,
        after: int | None,
        limits: list[Header],
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        connected: bool = False,
    ) -> None: ...


@final
class Passed:
    """A request that a shell has let pass without a lane: exempt, and counted. ``root`` is where it was then."""

    __slots__ = ("root", "shell")

    def __init__(self, shell: Shell, scope: Scope) -> None:
        self.shell = shell
        self.root = scope.get("root_path")


@final
class Exchange(Ticket):
    """A ticket, its lane, and where its answer stands.

    ``closest`` is what the RateLimit header is about, ``extra`` what limits outside its terms have spent, ``owed`` a
    cost that `seawall.charge` has noted and that is not spent yet, ``account`` what was taken of each entry once there
    was such a cost. ``withheld`` is a refusal that a limit inside the application has decided on: whatever
    the application then begins to answer, the refusal is sent instead. ``inside`` are the exchanges of shells further
    in, ``dues`` what limits of endpoints took. ``muted``: what else the application sends is of no interest to anybody.
    ``late``: the body has not come in time.
    """

    __slots__ = (
        "_send",
        "account",
        "answered",
        "closest",
        "counted",
        "dues",
        "extra",
        "gate",
        "inside",
        "lane",
        "late",
        "muted",
        "owed",
        "receive",
        "refused",
        "root",
        "shell",
        "span",
        "status",
        "withheld",
    )

    def __init__(
        self,
        shell: Shell,
        gate: Gate,
        lane: Lane,
        tenant: str | None,
        principal: Key,
        address: bytes | None,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        # What `Ticket.__init__` does, written out: 0.1 us less. The gate is the lane's, which the shell may have no
        # more: identification may have waited, and what is taken is given back where it was.
        self.scope = scope
        self.terms = lane.terms
        self.tenant = tenant
        self.principal = principal
        self._resolve = gate.clients.key
        self.resolved = address
        self.verdict = None
        self.charged = False
        self.held = False
        self.permit = None
        self.stream = None
        self.limiter = None
        self.deadline = 0
        self.klass = lane.terms.klass
        self.group = lane.terms.group
        self.owner = principal
        self.state = DONE
        self.status = 0
        self.shell = shell
        self.gate = gate
        self.lane = lane
        self.receive = receive
        self._send = send
        self.answered = False
        self.refused = False
        self.closest: Closest | None = None
        self.extra: tuple[tuple[Sequence[Entry], Verdict | None], ...] = ()
        self.inside: tuple[Exchange, ...] = ()
        self.withheld: Denied | None = None
        self.owed = 0
        self.account: Account | None = None
        self.counted = False
        self.muted = False
        self.late = False
        self.root = scope.get("root_path")
        self.dues: tuple[tuple[Backend, Verdict], ...] = ()
        self.span: Any = None

    def __repr__(self) -> str:
        who = f"tenant {self.tenant!r}" if self.tenant is not None else "an anonymous caller"
        return f"<Exchange with {who} on {self.terms.route.name}, {'answered' if self.answered else 'open'}>"

    def add(self, entries: Sequence[Entry], verdict: Verdict | None, backend: Backend) -> None:
        """Let the headers speak of a limit outside the policy as well, and a refusal give back what it took."""
        self.extra = (*self.extra, (entries, verdict))
        if verdict is not None and verdict.admitted:
            self.dues = (*self.dues, (backend, verdict))
        self.closest = None

    def include(self, inner: Exchange) -> None:
        """Let the headers speak of what a shell further in enforces as well."""
        self.inside = (*self.inside, inner)
        self.closest = None

    def answer(self, message: Message) -> Awaitable[None]:
        """The ``send`` of the application.

        Not a coroutine function, for what it returns is one already: 0.2 us less for each message.
        """
        if self.owed:
            self.pay()
            for inner in self.inside:
                inner.pay()
        kind = message["type"]
        if self.answered:
            if self.muted:
                return _nothing()
            if self.withheld is not None and kind == "websocket.http.response.start":
                return self._close()  # how frameworks answer an exception, but the connection stands
            return self._send(message)
        if kind not in _STARTS:
            return self._send(message)
        if self.withheld is not None:
            return self.refuse(self.withheld)
        self.answered = True
        self.status = message.get("status", 200)
        self.count(self.lane.admitted)
        if not self.lane.timed or kind == "websocket.accept":
            for part in (self, *self.inside):
                if part.limiter is not None:
                    # Long-lived from here on, and in no latency.
                    part.limiter.release(part, Outcome.IGNORED, part.gate.clock())
        if kind in _WITH_HEADERS and (self.lane.enforced or self.extra or self.inside):
            headers = self.limit_headers(self.status)
            if headers:
                # A copy: the application may send the same message, or hold the same list, again.
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
        return self._send(message)

    async def refuse(self, denied: Denied) -> None:
        """Answer with a refusal, whoever decided on it."""
        self.refused = self.answered = self.muted = True
        outcome = _REFUSED.get(denied.reason, DENIED)
        self.count(outcome, denied)
        policy = denied.waits[0][0] if denied.waits else ""
        self.shell.refusals.note(self.principal, denied.reason, policy, self.terms.route.name)
        answers = self.gate.answers
        if outcome is SHED and self.shell.on_reject is None:
            # What an overloaded service does most, and what caps its goodput: 3 of 13 us less than the whole way.
            plain = answers.plain(denied, self.scope)
            if plain is not None:
                headers, body = plain
                send = self._send
                await send({"type": "http.response.start", "status": denied.status, "headers": [*headers]})
                return await send({"type": "http.response.body", "body": body})
        limits: list[Header] = []
        wait = 0
        if denied.first is not None:
            wait = grows(*denied.first)
            limits = answers.limit_headers(self.policies(), denied.first, wait, denied.status)
        elif outcome is LIMITED:
            limits = answers.concurrency_headers(self.policies(), denied, self.gate.wall_clock())
        after = answers.delay(denied, wait)
        prepared, connected = answers.prepare(denied), self.withheld is not None
        await self.shell.deliver(prepared, after, limits, self.scope, self.receive, self._send, connected=connected)

    async def refuse_late(self) -> bool:
        """Send the refusal that the application let through as an exception; false if it is none, or too late."""
        if self.withheld is None:
            return False
        if self.muted:
            return True
        if not self.answered:
            await self.refuse(self.withheld)
            return True
        if self.scope["type"] == "websocket":
            await self._close()
            return True
        return False

    async def _close(self) -> None:
        """End a WebSocket that was accepted before a limit refused it: 1013, try again later."""
        self.muted = True
        reason = self.withheld.reason if self.withheld is not None else ""
        await self._send({"type": "websocket.close", "code": 1013, "reason": reason})

    def count(self, outcome: int, denied: Denied | None = None) -> None:
        """Count the request, once: as it is answered, or at its end."""
        if self.counted:
            return
        self.counted = True
        gate = self.gate
        gate.cells.values[self.lane.requests[outcome]] += 1
        if gate.labels is not None and self.tenant is not None:
            gate.cells.values[gate.labels.cell(self.tenant, outcome)] += 1
        if self.span is not None:
            self._trace(outcome, denied)

    def _trace(self, outcome: int, denied: Denied | None) -> None:
        """Write on the server's span what became of the request."""
        reason = policy = ""
        if denied is not None:
            reason, policy = denied.reason, denied.waits[0][0] if denied.waits else ""
        terms = self.terms
        tracing.note(
            self.span,
            OUTCOMES[outcome],
            tenant=self.tenant,
            plan=terms.plan,
            priority=terms.priority,
            reason=reason,
            policy=policy,
        )

    def outcome(self, error: BaseException | None = None) -> Outcome:
        """How the application did, for the laws of concurrency: by its status, or by what it raised."""
        if error is not None:
            slow = isinstance(error, TimeoutError | ConnectionError)
            return Outcome.DROPPED if slow and not self.answered else Outcome.IGNORED
        if self.status in _OVERLOADED:
            return Outcome.DROPPED
        return Outcome.SUCCESS if 100 <= self.status < 400 and not self.refused else Outcome.IGNORED

    def limit_body(self, seconds: float) -> None:
        """Let the whole body arrive within ``seconds`` of its first being asked for, or refuse (408).

        The application is told that its caller has left, which ends what would hold a permit for as long as somebody
        sends a byte now and then.
        """
        receive, until, complete = self.receive, 0.0, False

        async def limited() -> Message:
            nonlocal until, complete
            if self.late:
                return {"type": "http.disconnect"}
            if complete:
                return await receive()
            until = until or get_running_loop().time() + seconds
            try:
                async with timeout_at(until):
                    message = await receive()
            except TimeoutError:
                self.late = True
                self.withheld = Denied(408, "expired", terms=self.terms)
                return {"type": "http.disconnect"}
            complete = not message.get("more_body", False)
            return message

        self.receive = limited

    def listen(self) -> None:
        """Notice from now on whether the caller hangs up. Called as it begins to wait.

        uvicorn's cycle knows by itself. Other servers tell who asks for messages, which are kept for the application:
        the beginning of a body, so who leaves in the middle of a large upload is noticed by whoever reads it. A client
        that asks whether it may send its body (100-continue) gets no answer before it is admitted.
        """
        receive = self.receive
        if hasattr(getattr(receive, "__self__", None), "disconnected") or self.scope["type"] != "http":
            return
        if not any(name == b"expect" for name, _ in self.scope["headers"]):
            self.receive = _Ahead(receive).receive

    async def has_left(self) -> bool:
        """Whether the caller has hung up while it waited: work for the dead is what keeps a storm alive."""
        receive = self.receive
        source = getattr(receive, "__self__", None)
        known = getattr(source, "disconnected", None)
        if known is not None:
            return bool(known)
        if self.scope["type"] != "http":
            return False
        if self.late:
            return False  # it is answered: 408
        if type(source) is not _Ahead:
            source = _Ahead(receive)
            self.receive = source.receive
            await source.begin()
        return source.has_ended() and not self.late

    def spent(self, *, shown: bool = False) -> list[Spent]:
        """Everything that was spent for this request; ``shown`` leaves out what is in shadow mode."""
        found: list[Spent] = [
            (exchange.terms.entries, exchange.verdict)
            for exchange in (self, *self.inside)
            if exchange.verdict is not None and (exchange.lane.enforced or not shown)
        ]
        return [*found, *((entries, verdict) for entries, verdict in self.extra if verdict is not None)]

    def policies(self) -> bytes:
        """The value of ``RateLimit-Policy``."""
        verdict, lane = self.verdict, self.lane
        wall = verdict.wall if verdict is not None else self.gate.wall_clock()
        if lane.enforced and not self.extra and not self.inside:
            return lane.policies(wall)
        lanes = [lane, *(inner.lane for inner in self.inside)]
        values = [lane.policies(wall) for lane in lanes if lane.enforced]
        added = dict.fromkeys(entry for entries, _ in self.extra for entry in entries)
        values.append(policy_header(added, None))
        return b", ".join(value for value in values if value)

    def limit_headers(self, status: int) -> list[Header]:
        """The RateLimit headers of an answer that the application gives; none where nothing limits it."""
        if self.closest is None:
            self.closest = closest(self.spent(shown=True))
        answers, about = self.gate.answers, self.closest
        if about is None:
            return answers.policies_only(self.policies())
        return answers.limit_headers(self.policies(), about, grows(*about), status)

    def pay(self) -> None:
        """Spend what `seawall.charge` has noted; give back no more than was taken for this request."""
        cost, self.owed = self.owed, 0
        verdict = self.verdict
        if verdict is None or not self.charged:
            return
        entries = self.terms.entries
        if self.account is None:
            self.account = Account([entry.cost for entry in entries])
        plan = [at for at, entry in enumerate(entries) if entry.of_plan]
        if cost > 0:
            self.account.add(plan, self.gate.backend.debit([(*verdict.charges[at][:2], cost) for at in plan]))
            for at in plan:
                entries[at].adjust(verdict, at, cost)
        else:
            self._give_back(verdict, self.account.withdraw(plan, -cost))
        self.closest = None

    def _give_back(self, verdict: Verdict, amounts: Mapping[int, int]) -> None:
        """Refund some of what each entry was charged."""
        charges: list[Charge] = []
        for at, amount in amounts.items():
            charges.append((*verdict.charges[at][:2], amount))
            self.terms.entries[at].adjust(verdict, at, -amount)
        if charges:
            self.gate.backend.refund(charges, verdict.wall)

    def settle(self, outcome: Outcome, *, refund: bool) -> None:
        """Give back what is held, and all that was spent where it was us who refused. Safe twice."""
        if self.owed:
            self.pay()
        if refund and self.account is not None and self.verdict is not None and self.charged:
            self.charged = False
            self._give_back(self.verdict, self.account.withdraw(range(len(self.terms.entries))))
        if refund:
            dues, self.dues = self.dues, ()
            for backend, verdict in dues:
                backend.refund(verdict.charges, verdict.wall)
        if self.held or refund:
            self.gate.admission.settle(self, outcome, refund=refund)


_MOST_DEBITS = 32
"""Debits whose lists are kept: an endless answer may charge for every message of it."""


@final
class Account:
    """What a request has taken of each of its entries, and not given back.

    A backend across a network says what a debit took when it knows, by completing the list that `Backend.debit`
    returned. So the lists are kept, and added up when something is to be given back; of many the oldest are closed, and
    what was not known of them by then is never given back.
    """

    __slots__ = ("_balance", "_debits")

    def __init__(self, costs: list[int]) -> None:
        self._balance = costs
        self._debits: deque[tuple[Sequence[int], Sequence[int]]] = deque()

    def add(self, positions: Sequence[int], taken: Sequence[int]) -> None:
        """Note a debit: what is ``taken`` of each of the entries at ``positions``."""
        self._debits.append((positions, taken))
        if len(self._debits) > _MOST_DEBITS:
            for at, amount in zip(*self._debits.popleft(), strict=True):
                self._balance[at] += amount

    def withdraw(self, positions: Iterable[int], most: int | None = None) -> dict[int, int]:
        """What may be given back of each of the entries at ``positions``, at most ``most``; it is given back by that.

        Entries of which nothing can be given back are left out.
        """
        known = [*self._balance]
        for debited, taken in self._debits:
            for at, amount in zip(debited, taken, strict=True):
                known[at] += amount
        amounts = {at: known[at] if most is None else min(most, known[at]) for at in positions}
        for at, amount in amounts.items():
            self._balance[at] -= amount
        return {at: amount for at, amount in amounts.items() if amount}


_MOST_AHEAD = 1 << 16
"""Bytes of a body after which no more is read before the application asks for it: where uvicorn stops as well."""
_GRACE = 0.001
"""Seconds for a server to say something that receives in a thread of its own (granian)."""


@final
class _Ahead:
    """A ``receive`` that has begun before the application asks for messages.

    Nothing that a server has begun to deliver is ever given up, as a time-out would: granian hands a message over in a
    thread, and what it hands over to nobody is lost. So what is still awaited is left to the application.
    """

    __slots__ = ("_kept", "_looking", "_reader", "_receive")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: deque[Message] = deque()
        self._looking = True
        self._reader: Task[None] | None = create_task(self._read())
        # Or its traceback, where it is cancelled, would keep all of this for the garbage collector.
        self._reader.add_done_callback(self._forget)
        request = current_task()
        if request is not None:
            request.add_done_callback(partial(_cancel, self._reader))

    def _forget(self, _reader: Task[None]) -> None:
        self._reader = None

    async def begin(self) -> None:
        """Let the server say what it knows already."""
        await sleep(0)  # all that one on this loop has queued
        if not self._kept and self._reader is not None:
            await wait((self._reader,), timeout=_GRACE)

    def has_ended(self) -> bool:
        """Whether the caller is known to have hung up. Nothing more is read before the application asks for it."""
        self._looking = False
        return bool(self._kept) and self._kept[-1]["type"] == "http.disconnect"

    async def _read(self) -> None:
        size, complete = 0, False
        while self._looking and size < _MOST_AHEAD:
            message = await self._receive()
            self._kept.append(message)
            if complete or message["type"] == "http.disconnect":
                break  # nothing but a disconnect follows a body, though a double in a test may repeat it for ever
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)

    async def receive(self) -> Message:
        while not self._kept:
            reader = self._reader
            if reader is None:
                return await self._receive()
            try:
                await shield(reader)  # frameworks look for a message and give up at once
            finally:
                if reader.done():
                    self._reader = None
        return self._kept.popleft()


def _cancel(reader: Task[None], _request: object) -> None:
    """Nobody will ask any more."""
    reader.cancel()


async def _nothing() -> None:
    """What becomes of an application's own answer to what was refused."""
