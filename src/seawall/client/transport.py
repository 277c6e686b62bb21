"""The transports: `seawall.client.core` with I/O."""

from __future__ import annotations

import asyncio
import math
import random as random_module
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache
from time import monotonic_ns, sleep, time
from typing import TYPE_CHECKING, Any, ClassVar, final

import anyio

from seawall.client.breaker import CircuitBreaker
from seawall.client.budget import RetryBudget
from seawall.client.core import CONNECT, SECOND, Caller, Discard, Options, Send, Sleep
from seawall.client.hedging import first_of_two
from seawall.client.host import Host
from seawall.client.library import Library, default
from seawall.client.outgoing import Request, Response
from seawall.client.retry import Failure, RetryPolicy, failure_of
from seawall.client.throttle import AdaptiveThrottle
from seawall.decision import Clock

DEFAULT = default()
if TYPE_CHECKING:
    from httpx2 import AsyncBaseTransport, BaseTransport
else:
    AsyncBaseTransport, BaseTransport = DEFAULT.module.AsyncBaseTransport, DEFAULT.module.BaseTransport


class _Resilient:
    """What both have in common. The arguments are those of `ResilientTransport`."""

    _usual: ClassVar[str]
    """The library's transport that is taken where none is given."""
    _body: Callable[[Any, Host, Any], Any]

    def __init__(
        self,
        transport: Any = None,
        *,
        retry: RetryPolicy | None = None,
        budget: Callable[[], RetryBudget] = RetryBudget,
        throttle: Callable[[], AdaptiveThrottle] | None = AdaptiveThrottle,
        breaker: Callable[[], CircuitBreaker] | None = CircuitBreaker,
        concurrency: int | None = None,
        hedge: bool = False,
        timeout: float | None = None,
        connect: float | None = CONNECT,
        propagate: bool = True,
        route: Callable[[Any], str] | None = None,
        clock: Clock = monotonic_ns,
        wall_clock: Callable[[], float] = time,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        if concurrency is not None and concurrency < 1:
            raise ValueError(f"concurrency is at least 1, or None for no limit, not {concurrency}")
        for name, seconds in (("timeout", timeout), ("connect", connect)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name} is more than 0 seconds, or None for any, not {seconds}")
        _check_plain(transport)
        library = DEFAULT if transport is None else Library.of(transport)
        self._transport: Any = getattr(library.module, self._usual)() if transport is None else transport
        options = Options(
            RetryPolicy() if retry is None else retry,
            budget,
            throttle,
            breaker,
            concurrency,
            hedge,
            timeout,
            connect,
            propagate,
            route,
        )
        self._caller = Caller(options, library, clock=clock, wall_clock=wall_clock, random=random)
        self._error: Any = library.module.TransportError

    def _held(self, response: Response, host: Host | None) -> Response:
        """An answer that holds its place in flight until it is closed."""
        lock = self._caller.lock
        if host is None:
            return response
        if response.is_closed:  # it was read, or was never a stream
            with lock:
                host.leave()
        else:
            response.stream = self._body(response.stream, host, lock)
        return response

    def _kept(self, response: Response, parts: list[bytes] | None) -> bool:
        """Whether an answer whose connection is gone can still be given, as it can if all its parts are known."""
        if parts is None:
            return False
        # As they came: whoever reads it decodes them.
        response.stream = self._caller.library.module.ByteStream(b"".join(parts))
        return True

    def __repr__(self) -> str:
        return f"<{type(self).__name__} around {self._transport!r}>"

    def around(self, transport: Any) -> Any:
        """Another one, around ``transport``, that shares everything that this one knows."""
        _check_plain(transport)
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _transport=transport)
        return other

    def statistics(self) -> dict[str, dict[str, Any]]:
        """By host: requests ``in_flight``, ``retries`` and ``tokens`` left in the budget, the share that is
        ``throttled``, the states of its ``circuits`` by route, and the ``p95`` of the latency in seconds."""
        return self._caller.statistics()


@final
class ResilientTransport(_Resilient, AsyncBaseTransport):
    """A transport for ``httpx2.AsyncClient`` or ``httpx.AsyncClient`` that makes its callers well-behaved.

    >>> import httpx2
    >>> client = httpx2.AsyncClient(transport=ResilientTransport())

    ``transport`` is what really sends, by default ``AsyncHTTPTransport()``. What goes wrong is tried again if that is
    right (``retry``, a `RetryPolicy`) and as long as there is a ``budget`` for it; requests to a host that accepts too
    little are refused here by a ``throttle``, and those to one that fails by a ``breaker``. These three are made anew
    for each host (breakers: for each ``route`` of it, a function from a request to a name, or ``extensions["route"]``),
    so a class or a function is given, or ``None`` for none.

    ``concurrency`` is how many requests to one host may be in flight at once; more are refused here (``None``: any
    number). ``hedge`` sends an idempotent request a second time when it takes longer than 95 of 100 did, and takes the
    first answer.

    ``timeout`` is the seconds until the answer to a call begins, with all its attempts; the deadline of the request
    that is being served behind Seawall, if there is one, counts as well, and so does ``extensions={"deadline": 2.5}``.
    ``connect`` is the most seconds for a connection, and for one out of the pool. With ``propagate`` the time left is
    sent on as ``X-Request-Timeout-Ms``, and the priority as ``X-Request-Priority``.

    Answers have their ``attempts`` in their ``extensions``, and where a failure was not tried again why not, as
    ``retries_ended``: ``attempts``, ``not_repeatable``, ``retried`` (the request that is being served is a retry
    itself), ``hint``, ``deadline``, ``budget``, or the ``reason`` of an error. Errors have both as attributes; they are
    the library's own, and where nothing was sent or nothing is tried again those of `seawall.client.errors`.

    ``clock`` is monotonic nanoseconds, ``wall_clock`` seconds since the epoch, ``random`` 0 to 1.
    """

    _usual = "AsyncHTTPTransport"

    def __init__(self, transport: Any = None, **options: Any) -> None:
        super().__init__(transport, **options)
        self._body = _of(_AsyncBody, self._caller.library.module.AsyncByteStream)

    async def __aenter__(self) -> ResilientTransport:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._transport.__aexit__(*error)

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def handle_async_request(self, request: Request) -> Response:
        """One call with all its attempts."""
        call = self._caller.call(request)
        told: Any = None
        failed: BaseException | None = None
        try:
            while True:
                try:
                    step = call.send(told) if failed is None else call.throw(failed)
                except StopIteration as end:
                    return self._held(*end.value)
                told, failed = None, None
                try:
                    if type(step) is Send:
                        if step.within is None and step.hedge is None:
                            told = await self._transport.handle_async_request(step.request)
                        else:
                            told = await self._send(step)
                    elif type(step) is Sleep:
                        await anyio.sleep(step.seconds)
                    else:
                        told = await self._discard(step)
                except self._error as error:
                    told = error
                except BaseException as error:
                    failed = error
        finally:
            # Or an error and this frame would keep each other for the garbage collector.
            told = failed = None

    async def _send(self, step: Send) -> Response | None:
        """The response, or ``None`` where it is late."""
        send, hedge = self._transport.handle_async_request, step.hedge
        answer: Response | None = None
        if hedge is None and _is_task_of_asyncio():
            # 5 us less than a scope of anyio.
            limit = asyncio.timeout(step.within)
            try:
                async with limit:
                    answer = await send(step.request)
            except TimeoutError:
                if not limit.expired():
                    raise
            return answer
        with anyio.move_on_after(math.inf if step.within is None else step.within):
            if hedge is None:
                answer = await send(step.request)
            else:
                answer, step.won = await first_of_two(
                    send, step.request, step.hedge_after, lambda: hedge(step), _is_good, self._error
                )
        return answer

    async def _discard(self, step: Discard) -> bool:
        response = step.response
        if response.is_closed:
            return True
        stream, parts = response.stream, None
        try:
            try:
                if step.within:
                    with anyio.move_on_after(step.within):
                        parts = [part async for part in stream]
            finally:
                await stream.aclose()
        except self._error:
            return False  # what it said is lost, and was to be thrown away
        return self._kept(response, parts)


@final
class SyncResilientTransport(_Resilient, BaseTransport):
    """`ResilientTransport` for ``Client``: the same arguments, but for ``hedge``, which needs an event loop.

    Safe to use from several threads, as the clients are.
    """

    _usual = "HTTPTransport"

    def __init__(self, transport: Any = None, **options: Any) -> None:
        if options.get("hedge"):
            raise ValueError("hedge is for the asynchronous transport")
        super().__init__(transport, **options)
        self._body = _of(_SyncBody, self._caller.library.module.SyncByteStream)

    def __enter__(self) -> SyncResilientTransport:
        self._transport.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._transport.__exit__(*error)

    def close(self) -> None:
        self._transport.close()

    def handle_request(self, request: Request) -> Response:
        """One call with all its attempts."""
        lock, call = self._caller.lock, self._caller.call(request)
        told: Any = None
        failed: BaseException | None = None
        try:
            while True:
                try:
                    with lock:
                        step = call.send(told) if failed is None else call.throw(failed)
                except StopIteration as end:
                    return self._held(*end.value)
                told, failed = None, None
                try:
                    if type(step) is Send:
                        told = self._send(step)
                    elif type(step) is Sleep:
                        sleep(step.seconds)
                    else:
                        told = self._discard(step)
                except BaseException as error:
                    failed = error
        finally:
            told = failed = None

    def _send(self, step: Send) -> Any:
        try:
            return self._transport.handle_request(step.request)
        except self._error as error:
            return error

    def _discard(self, step: Discard) -> bool:
        response = step.response
        if response.is_closed:
            return True
        stream, parts = response.stream, None
        try:
            try:
                if step.within:
                    parts = self._read(stream, step.within)
            finally:
                stream.close()
        except self._error:
            return False
        return self._kept(response, parts)

    def _read(self, stream: Any, within: float) -> list[bytes] | None:
        """All parts; ``None`` where they take longer, which shows with the next one."""
        clock = self._caller.clock
        until = clock() + int(within * SECOND)
        parts = []
        for part in stream:
            parts.append(part)
            if clock() > until:
                return None
        return parts


class _Body:
    """The body of an answer, which ends what is in flight when it is closed."""

    def __init__(self, stream: Any, host: Host, lock: Any) -> None:
        self._stream = stream
        self._host: Host | None = host
        self._lock = lock

    def _leave(self) -> None:
        with self._lock:
            host, self._host = self._host, None
            if host is not None:
                host.leave()


class _AsyncBody(_Body):
    def __aiter__(self) -> AsyncIterator[bytes]:
        parts: AsyncIterator[bytes] = self._stream.__aiter__()
        return parts

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            self._leave()


class _SyncBody(_Body):
    def __iter__(self) -> Iterator[bytes]:
        return iter(self._stream)

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            self._leave()


@cache
def _of(kind: type[_Body], base: Any) -> Any:
    """``kind`` as a stream of the library: its clients ask whether it is one."""
    return type(kind.__name__, (kind, base), {})


def _check_plain(transport: object) -> None:
    if isinstance(transport, _Resilient):
        raise ValueError("the transport is resilient already, and two would try again what the other has tried")


def _is_task_of_asyncio() -> bool:
    """And not of trio, which may be the guest of an event loop of asyncio."""
    loop = asyncio._get_running_loop()
    return loop is not None and asyncio.current_task(loop) is not None


def _is_good(response: Response) -> bool:
    return failure_of(response.status_code, response.headers) is Failure.NONE
