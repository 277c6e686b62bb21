"""What an endpoint may say and ask about its own request: a limit of its own, a cost known afterwards, what is left of
its caller's plan and of its time.

All of them find the request's exchange, in its scope or in the context, so that an endpoint needs no parameter for
them.
"""

import functools
import inspect
import re
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, final, overload
from weakref import WeakKeyDictionary

from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection

from seawall.admission import charges_of
from seawall.asgi import LimitExceeded, misuse, parse_per
from seawall.backends import Verdict
from seawall.decision import NEVER, Decision, Outcome
from seawall.exchange import SCOPE_KEY, Exchange, current_exchange
from seawall.gate import Checks, Lane
from seawall.notation import NotationError, RateLike, parse_rates
from seawall.policy import RouteLimit, is_reserved
from seawall.rate import SECOND, Rate
from seawall.stages import refused_spend

F = TypeVar("F", bound=Callable[..., Any])

_made: Counter[str] = Counter()

MAX_COST = 1_000_000_000
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def _exchange(connection: HTTPConnection) -> Exchange | None:
    """The exchange of a request; ``None`` where its path or its caller is exempt."""
    found = connection.scope.get(SCOPE_KEY)
    return found if isinstance(found, Exchange) else None


def _is_whole(value: object) -> bool:
    """Whether ``value`` is an integer: neither a float, which may be NaN, nor a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


@final
class Limit:
    """A limit of one route: a FastAPI dependency, or a decorator. Made by `limit`."""

    def __init__(self, rates: tuple[Rate, ...], per: tuple[str, ...], cost: int, name: str) -> None:
        self._limit = RouteLimit(name, per, rates, cost=cost)
        self._known: WeakKeyDictionary[Lane, Checks] = WeakKeyDictionary()
        # FastAPI asks the instance's own `__call__` whether it is a coroutine function, and calls the type's. As a
        # plain function it would be sent to the thread pool, 50 us away and outside the loop's atomicity.
        self.__dict__["__call__"] = self._check
        self.__signature__ = inspect.signature(self._check)

    def __repr__(self) -> str:
        return f"<limit {self._limit.name}: {self._limit.rates} per {', '.join(self._limit.per)}>"

    @overload
    def __call__(self, connection: HTTPConnection) -> Awaitable[None]: ...
    @overload
    def __call__(self, connection: F) -> F: ...
    def __call__(self, connection: Any) -> Any:
        return self._check(connection) if isinstance(connection, HTTPConnection) else self._decorate(connection)

    async def _check(self, connection: HTTPConnection) -> None:
        await self._enforce(_exchange(connection))

    def _decorate(self, endpoint: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.isclass(endpoint) or not callable(endpoint):
            raise TypeError("seawall.limit decorates a function; limit a class of endpoints by a route in the file")
        if inspect.isasyncgenfunction(endpoint) or inspect.isgeneratorfunction(endpoint):
            raise TypeError("seawall.limit decorates a function, not a generator; use it as a dependency")
        is_coroutine = inspect.iscoroutinefunction(endpoint) or inspect.iscoroutinefunction(type(endpoint).__call__)

        @functools.wraps(endpoint)
        async def limited(*args: Any, **kwargs: Any) -> Any:
            await self._enforce(current_exchange.get())
            if is_coroutine:
                return await endpoint(*args, **kwargs)
            return await run_in_threadpool(endpoint, *args, **kwargs)

        return limited

    async def _enforce(self, exchange: Exchange | None) -> None:
        if exchange is None or exchange.scope is None:
            return  # exempt, or a task that has outlived its request
        # The shell that is furthest in knows best who calls, and what mode holds.
        visit = exchange.inside[-1] if exchange.inside else exchange
        checks = self._checks(visit)
        entries = checks.entries
        gate, lane = visit.gate, visit.lane
        pending = gate.spend(charges_of(visit, [(e.meter, e.whose, e.cost) for e in entries]), visit.terms)
        verdict = pending if pending is None or isinstance(pending, Verdict) else await pending
        if verdict is not None:
            checks.count(verdict, gate.cells.values)
        if lane.enforced:
            exchange.add(entries, verdict, gate.backend)
        if verdict is None:
            denied = gate.unanswered(visit.terms)
        else:
            denied = None if verdict.admitted else refused_spend(visit.terms, entries, verdict)
        if denied is None:
            return
        lane.reject(denied)
        if lane.enforced:
            exchange.withheld = denied
            raise LimitExceeded(denied.status)
        for part in (exchange, *exchange.inside):
            if not part.lane.enforced:
                part.settle(Outcome.SUCCESS, refund=True)  # as enforcing would have left it

    def _checks(self, visit: Exchange) -> Checks:
        """The limit as it is for the callers of a lane."""
        lane = visit.lane
        known = self._known.get(lane)
        if known is None:
            entries = visit.gate.entries(self._limit, lane)
            known = self._known[lane] = Checks(entries, lane.terms.plan, visit.gate.cells)
        return known


def limit(rate: RateLike, *, per: str | Sequence[str] = "client_ip", cost: int = 1, name: str | None = None) -> Limit:
    """A limit for one route, on top of its callers' plans: ``Depends(limit("5/minute"))`` or ``@limit("5/minute")``.

    ``rate`` is any rate that the file takes, or a `limits` item. ``per`` says whose bucket it is: ``client_ip``,
    ``tenant``, ``global``, ``state:NAME`` or a list of them; one bucket however many routes share the object. ``cost``
    is what a request takes of it, from 1 to 1,000,000. ``name`` is what headers, bodies and metrics call it, by default
    the module and line of this call.

    The refusal is the same as for a limit in the file, and the plan gets back what it was charged; while a shared
    backend is away, the route's ``on_backend_failure`` holds for it as well. The endpoint needs
    no ``request`` parameter; the application needs `Seawall` (or one of the single-stage middlewares) around it, or
    nothing is limited.
    """
    try:
        rates = parse_rates(rate)
    except NotationError as error:
        raise misuse(f"limit(): {error.message}") from None
    if not rates:
        raise misuse("limit(): 'unlimited' limits nothing; leave it out")
    if not _is_whole(cost) or not 1 <= cost <= 1_000_000:
        raise misuse(f"limit(): cost is a whole number from 1 to 1,000,000, not {cost!r}")
    if name is None:
        caller = sys._getframe(1)
        module = re.sub(r"[^a-z0-9]+", "-", str(caller.f_globals.get("__name__", "limit")).lower()).strip("-")
        name = f"{module[-50:].strip('-') or 'limit'}-{caller.f_lineno}"
        # One line may make several: a loop, a function that makes limits.
        _made[name] += 1
        if _made[name] > 1:
            name = f"{name}-{_made[name]}"
    elif _NAME.fullmatch(name) is None or is_reserved(name):
        raise misuse(f"limit(): name matches [a-z0-9][a-z0-9_-]{{0,63}} and is not reserved, unlike {name!r}")
    return Limit(rates, parse_per(per), cost, name)


def charge(request: HTTPConnection, cost: int) -> None:
    """Add ``cost`` to what this request was charged, or give some back with a negative one.

    For a cost that is known only afterwards: tokens generated, rows returned. It goes to what a route's ``cost`` goes
    to, the plan's rate and quota. A bucket goes into debt by at most one burst; a quota counts all of it. What is given
    back never exceeds what this request was charged, and is void once the quota's window is over.

    ``cost`` is a whole number of at most 1e9 either way: `TypeError` and `ValueError` otherwise. May be called from any
    thread and more than once; it takes effect with the next message of the answer, or at the end of the request, and
    none after it. Of a request that was let in unchecked, because a shared backend was away, nobody counts it.
    """
    if not _is_whole(cost):
        raise TypeError(f"cost is a whole number, not {cost!r}")
    if not -MAX_COST <= cost <= MAX_COST:
        raise ValueError(f"cost is at most {MAX_COST:_} either way, not {cost}")
    exchange = _exchange(request)
    if exchange is not None:
        for visit in (exchange, *exchange.inside):
            visit.owed += cost


def usage(request: HTTPConnection) -> dict[str, Decision]:
    """What the caller has left of each policy that limits this request, by the policy's name.

    Read off this request's own decision, so it costs no call; what the caller has spent since is not in it. Empty
    where the request is exempt. Without rates and quotas that nobody could check, and without ``concurrency`` where a
    store counts it for all processes.
    """
    exchange = _exchange(request)
    if exchange is None:
        return {}
    found = {}
    for entries, verdict in exchange.spent():
        for entry, state, left in zip(entries, verdict.states, verdict.left, strict=True):
            wait = entry.wait(state, verdict)
            found[entry.name] = Decision(
                admitted=wait == 0,
                rule=entry.name,
                limit=entry.limit,
                remaining=left,
                retry_after=float("inf") if wait == NEVER else wait / SECOND,
                window=float(entry.rate.window_s),
            )
    for part in (exchange, *exchange.inside):
        allowed = part.terms.concurrency
        if allowed is not None and part.gate.fleet is None:
            left = max(0, allowed - part.gate.concurrency.in_flight(part.principal))
            found["concurrency"] = Decision(left > 0, "concurrency", allowed, left, 0.0 if left else 1.0, 0.0)
    return found


def time_left(request: HTTPConnection | None = None) -> float | None:
    """Seconds until this request's deadline, 0.0 once it has passed; ``None`` where the request has none.

    For the time-outs of outgoing calls, and for the deadline that they pass on: what takes longer than the caller waits
    is done for nobody. Without ``request`` it is the one that the context serves, in a thread of an endpoint as well.

    ``None`` as well where no shedding is part of the middleware, and in a task that has outlived its request.
    """
    exchange = current_exchange.get() if request is None else _exchange(request)
    if exchange is None or exchange.scope is None:
        return None
    left = [(part.deadline - part.gate.clock()) / SECOND for part in (exchange, *exchange.inside) if part.deadline != 0]
    return max(0.0, min(left)) if left else None
