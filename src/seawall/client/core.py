"""One call with all its attempts, as a generator that does no I/O.

It says what to do next (`Send`, `Discard`, `Sleep`) and is told what came of it, by a shell that awaits or by one that
blocks: the same decisions, in the same order, for both. From outside in they are: retry, hedge, adaptive throttle,
circuit breaker, limit of what is in flight, time-out. Whatever a call has taken is given back where it ends, also where
that is a cancellation at any of its steps.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from threading import RLock
from time import monotonic_ns, time
from typing import Any, TypeAlias, final

from seawall.client import errors
from seawall.client.breaker import CircuitBreaker, State
from seawall.client.budget import RetryBudget
from seawall.client.hints import hint
from seawall.client.latency import Latencies
from seawall.client.library import Library
from seawall.client.meters import Meters
from seawall.client.retry import IDEMPOTENT, Failure, RetryPolicy, failure_of
from seawall.client.surroundings import Surroundings, surroundings
from seawall.client.throttle import AdaptiveThrottle
from seawall.decision import Clock

SECOND = 1_000_000_000
MOST_HOSTS = 1_000
"""Hosts, and routes of one, that are remembered: those that were called last."""
CONNECT = 1.0
"""Seconds for a connection, or for one out of the pool."""
TRAVEL = 0.01
"""Seconds of the time left that are kept for the way there."""
SMALL = 1 << 14
"""Bytes of an answer that are read, so that its connection can be used again, and not thrown away."""

Request: TypeAlias = Any
Response: TypeAlias = Any

logger = logging.getLogger("seawall.client")


@final
@dataclass(frozen=True, slots=True)
class Attempt:
    """What became of one attempt: its ``status`` or its ``error``, the seconds that it ``took``, and those that were
    ``waited`` before it. ``hedged``: a second one was sent beside it, and the first answer of both is this."""

    number: int
    status: int | None
    error: str | None
    waited: float
    took: float
    hedged: bool = False


@final
@dataclass(slots=True)
class Send:
    """Send ``request`` and tell what comes: a response or an error. ``within``: seconds until there has to be one.

    ``hedge_after``: seconds after which it may be sent once more, if ``hedge()`` says so."""

    request: Request
    within: float | None
    hedge_after: float | None
    hedge: Callable[[], bool]
    hedged: bool = False


@final
@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait for so many seconds."""

    seconds: float


@final
@dataclass(frozen=True, slots=True)
class Discard:
    """Let go of the answer; tell whether all of it was read before."""

    response: Response


Step: TypeAlias = Send | Sleep | Discard
Call: TypeAlias = Generator[Step, Any, tuple[Response, Callable[[], None]]]


@final
class Host:
    """What is known of one host."""

    def __init__(self, name: str, budget: RetryBudget, throttle: AdaptiveThrottle | None, meters: Meters) -> None:
        self.name = name
        self.budget = budget
        self.throttle = throttle
        self.breakers: OrderedDict[str, CircuitBreaker] = OrderedDict()
        self.in_flight = 0
        self.latencies = Latencies()
        self.meters = meters
        self.exhausted = False
        self.throttling = False


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
    propagate: bool
    route: Callable[[Any], str]


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
        self._hosts: OrderedDict[str, Host] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Caller of {len(self._hosts)} hosts through {self.library.name}>"

    def host(self, name: str) -> Host:
        host = self._hosts.get(name)
        if host is None:
            options = self.options
            throttle = None if options.throttle is None else options.throttle()
            host = self._hosts[name] = Host(name, options.budget(), throttle, Meters.of(name))
            if len(self._hosts) > MOST_HOSTS:
                self._hosts.popitem(last=False)
        else:
            self._hosts.move_to_end(name)
        return host

    def _breaker(self, host: Host, request: Request) -> CircuitBreaker | None:
        if self.options.breaker is None:
            return None
        route = str(request.extensions.get("route", "")) or self.options.route(request)
        breaker = host.breakers.get(route)
        if breaker is None:
            breaker = host.breakers[route] = self.options.breaker()
            if len(host.breakers) > MOST_HOSTS:
                host.breakers.popitem(last=False)
        else:
            host.breakers.move_to_end(route)
        return breaker

    def call(self, request: Request) -> Call:
        """The steps of one call. It ends with the answer, and with what to call once that was read; or raises."""
        host = self.host(_name_of(request))
        breaker = self._breaker(host, request)
        around = self._around() if self.options.propagate else Surroundings()
        deadline = self._deadline(request, around)
        replayable = isinstance(request.stream, self.library.module.ByteStream)
        idempotent = "idempotency-key" in request.headers
        most = 1 if around.retried else self.options.retry.attempts
        attempts: list[Attempt] = []
        response: Response = None
        error: Exception | None = None
        waited, cost, kept = 0.0, 0, False
        ended = ""
        host.budget.request()
        while True:
            refusal = self._enter(host, breaker, request, deadline)
            if refusal is not None:
                if cost:
                    host.budget.undo(cost)
                if kept:
                    ended = type(refusal).__name__
                    break
                raise self._final(refusal, attempts) from error
            response, error, took, hedged = yield from self._attempt(
                host, breaker, request, deadline, around, len(attempts), replayable=replayable, idempotent=idempotent
            )
            kept = False
            attempts.append(_attempt(len(attempts) + 1, response, error, waited, took, hedged=hedged))
            failure = self._failure(response, error)
            if failure is Failure.NONE:
                if error is None:
                    self._succeeded(host, cost)
                break
            if len(attempts) >= most:
                ended = "attempts"
                break
            if not self.options.retry.may_retry(
                request.method, idempotent=idempotent, replayable=replayable, failure=failure
            ):
                break
            told = None if response is None else hint(response.headers, self._wall())
            wait = self.options.retry.wait(failure, len(attempts), told, self._left(deadline), self._random)
            if wait is None:
                ended = "hint" if told is not None else "deadline"
                break
            paid = host.budget.withdraw(failure)
            if paid is None:
                ended = "budget"
                self._exhausted(host, exhausted=True)
                break
            self._exhausted(host, exhausted=False)
            cost, waited = paid, wait
            host.meters.retry(failure.value)
            try:
                if response is not None:
                    self._leave(host)()
                    kept = yield Discard(response)
                yield Sleep(wait)
            except BaseException:
                host.budget.undo(cost)
                raise
        if response is None and error is not None:
            raise self._final(error, attempts, exhausted=ended == "budget") from error.__cause__
        response.extensions["attempts"] = tuple(attempts)
        if ended:
            response.extensions["retries_ended"] = ended
        return response, _nothing if kept else self._leave(host)

    def _attempt(
        self,
        host: Host,
        breaker: CircuitBreaker | None,
        request: Request,
        deadline: int | None,
        around: Surroundings,
        number: int,
        *,
        replayable: bool,
        idempotent: bool,
    ) -> Generator[Step, Any, tuple[Response, Exception | None, float, bool]]:
        """Send once, and note everywhere what came of it."""
        left = self._left(deadline)
        within = None if left is None else max(left, 0.0)
        step = Send(self._prepared(request, left, around, number), within, None, lambda: False)
        if self.options.hedge and replayable and (idempotent or request.method.upper() in IDEMPOTENT):
            usual = host.latencies.p95()
            if usual is not None and (left is None or left > usual):
                step.hedge_after, step.hedge = usual, lambda: self._may_hedge(host)
        began = self.clock()
        response: Response = None
        error: Exception | None = None
        try:
            outcome = yield step
        except BaseException:
            if breaker is not None:
                breaker.forget()
            self._leave(host)()
            raise
        if isinstance(outcome, Exception):
            error = outcome
            self._leave(host)()
        else:
            response = outcome
        now = self.clock()
        took = now - began
        self._note(host, breaker, request, response, error, now, took)
        if step.hedged:
            host.meters.hedge()
        return response, error, took / SECOND, step.hedged

    def _note(
        self,
        host: Host,
        breaker: CircuitBreaker | None,
        request: Request,
        response: Response,
        error: Exception | None,
        now: int,
        took: int,
    ) -> None:
        failure = self._failure(response, error)
        host.meters.attempt("error" if error is not None else f"{response.status_code // 100}xx")
        if error is None:
            if failure is not Failure.THROTTLED and host.throttle is not None:
                host.throttle.accepted(now)
            if failure is Failure.NONE:
                host.latencies.add(took)
        if breaker is None:
            return
        if error is not None and failure is Failure.NONE:
            breaker.forget()  # of our own making: no connection was free, or the request is wrong
            return
        # A server that sheds is at work; to shut it off would be the outage that it avoids.
        failed = failure in (Failure.UNSENT, Failure.TRANSIENT)
        if breaker.record(now, failed=failed, took=took):
            self._changed(host, breaker, request)

    def _succeeded(self, host: Host, cost: int) -> None:
        host.budget.succeeded(cost)
        host.meters.budget(host.budget.tokens)

    def _changed(self, host: Host, breaker: CircuitBreaker, request: Request) -> None:
        state = breaker.state
        if state is State.RAMPING:
            return
        host.meters.breaker(sum(one.state is not State.CLOSED for one in host.breakers.values()))
        logger.warning(
            "the circuit to %s is %s",
            host.name,
            state.value if state is State.CLOSED else f"open for {breaker.pause / SECOND:g} s",
            extra={"event": f"circuit_{state.value}", "host": host.name},
        )

    def _exhausted(self, host: Host, *, exhausted: bool) -> None:
        host.meters.budget(host.budget.tokens)
        if exhausted is not host.exhausted:
            host.exhausted = exhausted
            state = "exhausted, and failures are final for now" if exhausted else "there again"
            logger.warning(
                "the retry budget of %s is %s",
                host.name,
                state,
                extra={"event": "budget_exhausted" if exhausted else "budget_back", "host": host.name},
            )

    def _enter(
        self, host: Host, breaker: CircuitBreaker | None, request: Request, deadline: int | None
    ) -> Exception | None:
        """Take what an attempt needs, or say what there is not."""
        base = self.library.module.TransportError
        left = self._left(deadline)
        if left is not None and left <= TRAVEL:
            timeout = self.library.module.TimeoutException
            return self._refusal(host, errors.DeadlineExceeded, timeout, "no time is left to call", request)
        now = self.clock()
        throttle = host.throttle
        if throttle is not None:
            admitted = throttle.admit(now, self._random)
            self._throttling(host, throttling=throttle.probability() > 0)
            if not admitted:
                return self._refusal(host, errors.Throttled, base, "it accepts too little of what it is sent", request)
        if breaker is not None and not breaker.admit(now):
            if throttle is not None:
                throttle.forget()
            refusal = self._refusal(host, errors.CircuitOpen, base, "its circuit is open", request)
            refusal.retry_after = breaker.retry_after(now)  # type: ignore[attr-defined]
            return refusal
        most = self.options.concurrency
        if most is not None and host.in_flight >= most:
            for taken in (throttle, breaker):
                if taken is not None:
                    taken.forget()
            pool = self.library.module.PoolTimeout
            return self._refusal(host, errors.TooManyInFlight, pool, f"{most} requests are in flight", request)
        host.in_flight += 1
        return None

    def _throttling(self, host: Host, *, throttling: bool) -> None:
        if throttling is not host.throttling:
            host.throttling = throttling
            state = "are refused here" if throttling else "are all sent again"
            logger.warning(
                "requests to %s %s",
                host.name,
                f"{state}, for it accepts too few" if throttling else state,
                extra={"event": "throttling" if throttling else "throttling_over", "host": host.name},
            )

    def _refusal(
        self, host: Host, kind: type[errors.ClientError], base: type[Exception], why: str, request: Request
    ) -> Exception:
        host.meters.refused(kind.__name__)
        made: Any = errors.also(kind, base)
        refusal: Exception = made(f"{host.name}: {why}", request=request)
        return refusal

    def _final(self, error: Exception, attempts: list[Attempt], *, exhausted: bool = False) -> Exception:
        """The error to raise, with what was tried."""
        if exhausted:
            made: Any = errors.also(errors.RetryBudgetExhausted, type(error))
            final: Exception = made(f"{error} (not tried again: the retry budget is exhausted)")
            final.request = getattr(error, "_request", None)  # type: ignore[attr-defined]
            final.__cause__ = error
            error = final
        error.attempts = tuple(attempts)  # type: ignore[attr-defined]
        return error

    def _leave(self, host: Host) -> Callable[[], None]:
        """What gives a place in flight back, once."""
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                host.in_flight -= 1

        return leave

    def _may_hedge(self, host: Host) -> bool:
        with self.lock:
            return host.budget.withdraw(Failure.TRANSIENT) is not None

    def _failure(self, response: Response, error: Exception | None) -> Failure:
        if error is None:
            return failure_of(response.status_code, response.headers)
        module = self.library.module
        if isinstance(error, module.ConnectError | module.ConnectTimeout):
            return Failure.UNSENT
        if isinstance(error, errors.DeadlineExceeded | module.PoolTimeout):
            return Failure.NONE
        broken = module.NetworkError | module.TimeoutException | module.RemoteProtocolError
        return Failure.TRANSIENT if isinstance(error, broken) else Failure.NONE

    def _deadline(self, request: Request, around: Surroundings) -> int | None:
        """The instant by which there has to be an answer: the earliest of all that somebody asks for."""
        asked = [self.options.timeout, request.extensions.get("deadline"), around.left]
        told = [float(seconds) for seconds in asked if seconds is not None]
        return self.clock() + int(min(told) * SECOND) if told else None

    def _left(self, deadline: int | None) -> float | None:
        return None if deadline is None else (deadline - self.clock()) / SECOND

    def _prepared(self, request: Request, left: float | None, around: Surroundings, number: int) -> Request:
        """The request as it is sent: with what the other side should know, and within the time that is left."""
        timeout = _timeouts(request.extensions.get("timeout") or {}, left)
        added: list[tuple[bytes, bytes]] = []
        if number:
            added.append((b"x-retry-attempt", b"%d" % number))
        if self.options.propagate:
            if left is not None and "x-request-timeout-ms" not in request.headers:
                added.append((b"x-request-timeout-ms", b"%d" % max(1, int((left - TRAVEL) * 1_000))))
            if around.priority is not None and "x-request-priority" not in request.headers:
                added.append((b"x-request-priority", around.priority.encode("ascii", "ignore")))
        return self.library.module.Request(
            request.method,
            request.url,
            headers=[*request.headers.raw, *added],
            stream=request.stream,
            extensions={**request.extensions, "timeout": timeout},
        )

    def statistics(self) -> dict[str, dict[str, Any]]:
        """By host: requests ``in_flight``, ``retries`` and ``tokens`` left in the budget, the share that is
        ``throttled``, the states of its ``circuits`` by route, and the ``p95`` of the latency in seconds."""
        return {
            name: {
                "in_flight": host.in_flight,
                "retries": round(host.budget.earned, 1),
                "tokens": host.budget.tokens,
                "throttled": 0.0 if host.throttle is None else round(host.throttle.probability(), 3),
                "circuits": {route: breaker.state.value for route, breaker in host.breakers.items()},
                "p95": host.latencies.p95(),
            }
            for name, host in list(self._hosts.items())
        }


def _timeouts(given: Mapping[str, float | None], left: float | None) -> dict[str, float | None]:
    """The time-outs of the library, none of them longer than what is left, and a connection within a second."""
    timeouts: dict[str, float | None] = {}
    for name in ("connect", "read", "write", "pool"):
        most = [seconds for seconds in (given.get(name), left) if seconds is not None]
        if name in ("connect", "pool"):
            most.append(CONNECT)
        timeouts[name] = min(most, default=None)
    return timeouts


def _name_of(request: Request) -> str:
    url = request.url
    return f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}"


def _attempt(
    number: int, response: Response, error: Exception | None, waited: float, took: float, *, hedged: bool
) -> Attempt:
    status = None if response is None else int(response.status_code)
    said = None if error is None else type(error).__name__
    return Attempt(number, status, said, round(waited, 6), round(took, 6), hedged)


def _nothing() -> None:
    """An answer that was read has nothing to give back."""
