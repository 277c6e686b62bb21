"""One call with all its attempts, as a generator that does no I/O.

It says what to do next (`Send`, `Discard`, `Sleep`) and is told what came of it, by a shell that awaits or by one that
blocks: the same decisions, in the same order, for both. From outside in they are: retry, hedge, adaptive throttle,
circuit breaker, limit of what is in flight, time-out. Whatever a call has taken is given back where it ends, also where
that is a cancellation at any of its steps.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass
from threading import RLock
from time import monotonic_ns, time
from typing import Any, NamedTuple, TypeAlias, final

from seawall.client import errors
from seawall.client.breaker import CircuitBreaker
from seawall.client.budget import RetryBudget
from seawall.client.hints import hint
from seawall.client.host import Host, Refused
from seawall.client.library import Library
from seawall.client.outgoing import TRAVEL, Request, Response, outgoing
from seawall.client.retry import IDEMPOTENT, Failure, RetryPolicy, failure_of
from seawall.client.surroundings import Surroundings, surroundings
from seawall.client.throttle import AdaptiveThrottle
from seawall.decision import Clock

SECOND = 1_000_000_000
TRAVEL_NS = int(TRAVEL * SECOND)
MOST_HOSTS = 1_000
"""Hosts that are remembered: those that were called last."""
CONNECT = 1.0
"""Seconds for a connection, or for one out of the pool."""
SMALL = 1 << 14
"""Bytes of an answer that are read, so that its connection can be used again, and not thrown away."""
PATIENCE = 1.0
"""Seconds that this may take."""
LONGEST = 1e9
"""Seconds; a longer time is none."""


class Attempt(NamedTuple):
    """What became of one attempt: its ``status`` or its ``error``, the seconds that it ``took``, and those that were
    ``waited`` before it. ``hedged``: a second one was sent beside it, and the first answer of both is this."""

    number: int
    status: int | None
    error: str | None
    waited: float
    took: float
    hedged: bool = False


@final
class Send:
    """Send ``request`` and tell what comes: a response, an error of the library, or ``None`` if neither has come
    ``within`` so many seconds (``None``: any time).

    After ``hedge_after`` seconds another one may be sent, the request that ``hedge(step)`` gives, if it does (``None``:
    never); ``won`` is whether that was quicker, ``cost`` what it has taken of the budget.
    """

    __slots__ = ("cost", "hedge", "hedge_after", "request", "within", "won")

    def __init__(self, request: Request, within: float | None) -> None:
        self.request = request
        self.within = within
        self.hedge_after = 0.0
        self.hedge: Callable[[Send], Request | None] | None = None
        self.cost = 0
        self.won = False


@final
@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait for so many seconds."""

    seconds: float


@final
@dataclass(frozen=True, slots=True)
class Discard:
    """Let go of the answer's connection, after reading it for at most ``within`` seconds (0: not at all), so that the
    connection can be used again. Tell whether all of it was read, and can still be given."""

    response: Response
    within: float


_LATE = errors.DeadlineExceeded, "no time is left to call", 0.0
_BASES: dict[type[errors.ClientError], str] = {
    errors.DeadlineExceeded: "TimeoutException",
    errors.Throttled: "TransportError",
    errors.CircuitOpen: "TransportError",
    errors.TooManyInFlight: "PoolTimeout",
}
"""What a refusal is to the library."""

Step: TypeAlias = Send | Sleep | Discard
Call: TypeAlias = Generator[Step, Any, tuple[Response, Host | None]]


@final
@dataclass(frozen=True, slots=True)
class Options:
    """How calls are made. All are arguments of the transports, and explained there."""

    retry: RetryPolicy
    budget: Callable[[], RetryBudget]
    throttle: Callable[[], AdaptiveThrottle] | None
    breaker: Callable[[], CircuitBreaker] | None
    concurrency: int | None
    hedge: bool
    timeout: float | None
    connect: float | None
    propagate: bool
    route: Callable[[Any], str] | None


@final
class Caller:
    """Makes calls, and remembers how they went by host."""

    def __init__(
        self,
        options: Options,
        library: Library,
        *,
        clock: Clock = monotonic_ns,
        wall_clock: Callable[[], float] = time,
        random: Callable[[], float],
        around: Callable[[], Surroundings] = surroundings,
    ) -> None:
        self.options = options
        self.library = library
        self.clock = clock
        self.lock = RLock()
        """Held while a step is decided by threads; on an event loop nobody else is there."""
        self._wall = wall_clock
        self._random = random
        self._around = around
        self._hosts: OrderedDict[tuple[str, str, int | None], Host] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Caller of {len(self._hosts)} hosts through {self.library.name}>"

    def call(self, request: Request) -> Call:
        """The steps of one call. It ends with an answer, and the host that is to be left (`Host.leave`) when that was
        read, if any is; or it raises."""
        options, clock = self.options, self.clock
        host = self._host(request)
        breaker = self._breaker(host, request)
        around = self._around()
        deadline = self._deadline(request, around)
        attempts: list[Attempt] = []
        response: Response = None
        error: Exception | None = None
        failure = Failure.NONE
        waited, cost = 0.0, 0
        try:
            while True:
                now = clock()
                if deadline is not None and deadline - now <= TRAVEL_NS:
                    refused: Refused | None = _LATE
                else:
                    refused = host.enter(now, breaker, options.concurrency, self._random)
                if refused is not None:
                    if cost:
                        host.undo(cost)
                    refusal = self._refusal(host, request, *refused)
                    if response is None:
                        raise _told(refusal, attempts, refusal.reason) from error
                    return _given(response, attempts, refusal.reason), None
                if attempts:
                    host.meters.retry(failure.value)
                else:
                    host.budget.request()
                response, step = None, None
                try:
                    step = self._step(host, breaker, request, deadline, now, around, len(attempts))
                    outcome = yield step
                except BaseException:
                    if breaker is not None:
                        breaker.forget()
                    host.in_flight -= 1
                    raise
                finally:
                    if step is not None and step.cost:
                        host.in_flight -= 1
                        host.meters.hedge(won=step.won)
                ended_at = clock()
                took = ended_at - now
                if outcome is not None and not isinstance(outcome, Exception):
                    response, error = outcome, None
                    status: int | None = outcome.status_code
                    failure = failure_of(outcome.status_code, outcome.headers)
                    said = None
                    host.answered(ended_at, breaker, status, failure, took)
                else:
                    host.in_flight -= 1
                    error = self._error(outcome, request, deadline)
                    status, said = None, type(error).__name__
                    failure = self._failed(host, breaker, error, ended_at, took)
                attempts.append(Attempt(len(attempts) + 1, status, said, waited, took / SECOND, step.cost > 0))
                if failure is Failure.NONE and error is None:
                    host.succeeded(cost + step.cost)
                    return _given(response, attempts, ""), host
                again = self._again(host, request, around, deadline, failure, response, len(attempts))
                if isinstance(again, str):
                    if error is None:
                        return _given(response, attempts, again), host
                    if again == "budget":
                        raise _told(errors.also_of(errors.RetryBudgetExhausted, error), attempts, again) from error
                    raise _told(error, attempts, again or getattr(error, "reason", "")) from error.__cause__
                waited, cost = again
                try:
                    if response is not None:
                        try:
                            is_kept = yield Discard(response, self._patience(request, response, deadline))
                        finally:
                            host.in_flight -= 1
                        if not is_kept:
                            response = None
                    yield Sleep(waited)
                except BaseException:
                    host.undo(cost)
                    raise
        finally:
            # Or what is raised and this frame would keep each other for the garbage collector.
            error = refusal = outcome = None

    def _host(self, request: Request) -> Host:
        url = request.url
        key = url.scheme, url.host, url.port
        host = self._hosts.get(key)
        if host is None:
            if not isinstance(request, self.library.module.Request):
                # Or none of its errors is known, and of its bodies none can be sent again.
                theirs = type(request).__module__.partition(".")[0]
                raise TypeError(
                    f"a transport around one of {self.library.name} cannot send a request of {theirs}: "
                    "give it what it is to be around, such as AsyncHTTPTransport(), of the library that calls it"
                )
            options = self.options
            throttle = None if options.throttle is None else options.throttle()
            name = f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}"
            host = self._hosts[key] = Host(name, options.budget(), throttle)
            if len(self._hosts) > MOST_HOSTS:
                self._hosts.popitem(last=False)
        else:
            self._hosts.move_to_end(key)
        return host

    def _breaker(self, host: Host, request: Request) -> CircuitBreaker | None:
        options = self.options
        if options.breaker is None:
            return None
        route = request.extensions.get("route", "")
        if not route and options.route is not None:
            route = options.route(request)
        return host.breaker(str(route), options.breaker)

    def _deadline(self, request: Request, around: Surroundings) -> int | None:
        """The instant by which there has to be an answer: the earliest of all that somebody asks for."""
        least = math.inf
        for seconds in (self.options.timeout, request.extensions.get("deadline"), around.left):
            if seconds is not None:
                least = min(least, float(seconds))
        return self.clock() + int(max(least, 0.0) * SECOND) if least < LONGEST else None

    def _left(self, deadline: int | None) -> float | None:
        return None if deadline is None else (deadline - self.clock()) / SECOND

    def _refusal(self, host: Host, request: Request, kind: type[errors.ClientError], why: str, after: float) -> Any:
        """The error that says why nothing is sent."""
        host.meters.refused(kind.reason)
        refusal = errors.also(kind, getattr(self.library.module, _BASES[kind]))(f"{host.name}: {why}", request=request)
        refusal.retry_after = after
        return refusal

    def _step(
        self,
        host: Host,
        breaker: CircuitBreaker | None,
        request: Request,
        deadline: int | None,
        now: int,
        around: Surroundings,
        number: int,
    ) -> Send:
        left = None if deadline is None else (deadline - now) / SECOND
        step = Send(self._outgoing(request, left, around, number), left)
        if self.options.hedge and not around.retried and self._is_replayable(request) and _is_idempotent(request):
            usual = host.latencies.p95()
            if usual is not None and (left is None or left > usual):

                def hedge(step: Send) -> Request | None:
                    left = self._left(deadline)
                    if left is None or left > TRAVEL:
                        step.cost = host.may_hedge(breaker, self.options.concurrency)
                    return self._outgoing(request, left, around, number + 1) if step.cost else None

                step.hedge_after, step.hedge = usual, hedge
        return step

    def _outgoing(self, request: Request, left: float | None, around: Surroundings, number: int) -> Request:
        options = self.options
        return outgoing(
            request,
            connect=options.connect,
            left=left,
            # What is done for a retry is part of one, also for those who are called in turn.
            attempt=number or int(around.retried and options.propagate),
            priority=around.priority,
            tell=options.propagate,
        )

    def _is_replayable(self, request: Request) -> bool:
        return isinstance(request.stream, self.library.module.ByteStream)

    def _failed(self, host: Host, breaker: CircuitBreaker | None, error: Exception, now: int, took: int) -> Failure:
        """Note everywhere that there was no answer."""
        module = self.library.module
        host.meters.attempt(None)
        failure = Failure.NONE
        if isinstance(error, module.PoolTimeout):
            blame = False  # of our own making
        elif isinstance(error, errors.DeadlineExceeded):
            # Who gave it less time than it usually takes has not heard what it would have said.
            blame = took / SECOND >= (host.latencies.p95() or 0.0)
        elif isinstance(error, module.ConnectError | module.ConnectTimeout):
            blame, failure = True, Failure.UNSENT
        else:
            blame = isinstance(error, module.NetworkError | module.TimeoutException | module.RemoteProtocolError)
            failure = Failure.TRANSIENT if blame else Failure.NONE
        if blame:
            host.failed(now, breaker, took)
        elif breaker is not None:
            breaker.forget()
        return failure

    def _error(self, error: Exception | None, request: Request, deadline: int | None) -> Any:
        """What has gone wrong, where that is that the time is over as what it is."""
        module = self.library.module
        if error is not None and (
            deadline is None or deadline - self.clock() > 0 or not isinstance(error, module.TimeoutException)
        ):
            return error
        late = errors.also_of(errors.DeadlineExceeded, module.ReadTimeout("") if error is None else error)
        late.args, late.request, late.__cause__ = ("no answer in the time that was left",), request, error
        return late

    def _patience(self, request: Request, response: Response, deadline: int | None) -> float:
        """Seconds for reading an answer that is thrown away."""
        length = response.headers.get("content-length", "")
        if request.method != "HEAD" and not (length.isdecimal() and len(length) < 16 and int(length) <= SMALL):
            return 0.0
        left = self._left(deadline)
        return PATIENCE if left is None else max(0.0, min(PATIENCE, left))

    def _again(
        self,
        host: Host,
        request: Request,
        around: Surroundings,
        deadline: int | None,
        failure: Failure,
        response: Response,
        made: int,
    ) -> tuple[float, int] | str:
        """The seconds to wait for another attempt, and what it has cost; or why there is none."""
        policy = self.options.retry
        if failure is Failure.NONE:
            return ""
        if not policy.may_retry(
            request.method,
            idempotent="idempotency-key" in request.headers,
            replayable=self._is_replayable(request),
            failure=failure,
        ):
            return "not_repeatable"
        if made >= policy.attempts:
            return "attempts"
        if around.retried:
            return "retried"
        told = None if response is None else hint(response.headers, self._wall())
        left = self._left(deadline)
        wait = policy.wait(failure, made, told, None if left is None else left - TRAVEL, self._random)
        if wait is None:
            return "deadline" if told is None or told <= policy.longest else "hint"
        cost = host.withdraw(self.clock(), failure)
        return "budget" if cost is None else (wait, cost)

    def statistics(self) -> dict[str, dict[str, Any]]:
        """`Host.statistics`, by the name of the host."""
        with self.lock:
            now = self.clock()
            return {host.name: host.statistics(now) for host in self._hosts.values()}


def _is_idempotent(request: Request) -> bool:
    return request.method.upper() in IDEMPOTENT or "idempotency-key" in request.headers


def _given(response: Response, attempts: list[Attempt], ended: str) -> Response:
    response.extensions["attempts"] = tuple(attempts)
    if ended:
        response.extensions["retries_ended"] = ended
    return response


def _told(error: Any, attempts: list[Attempt], ended: str) -> Exception:
    """``error`` with what was tried."""
    error.attempts = tuple(attempts)
    error.retries_ended = ended
    told: Exception = error
    return told
