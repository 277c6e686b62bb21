"""The transports: `seawall.client.core` with I/O."""

from __future__ import annotations

import random as random_module
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache, partial
from time import monotonic_ns, sleep, time
from typing import Any, final

import anyio

from seawall.client import errors
from seawall.client.breaker import CircuitBreaker
from seawall.client.budget import RetryBudget
from seawall.client.core import SMALL, Caller, Options, Request, Response, Send, Sleep
from seawall.client.library import Library, default
from seawall.client.retry import RetryPolicy
from seawall.client.throttle import AdaptiveThrottle
from seawall.decision import Clock

_DEFAULT = default()
_module: Any = _DEFAULT.module
_AsyncBase: Any = _module.AsyncBaseTransport
_SyncBase: Any = _module.BaseTransport


class _Resilient:
    """What both have in common. The arguments are those of `ResilientTransport`."""

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
        propagate: bool = True,
        route: Callable[[Any], str] = lambda _: "",
        clock: Clock = monotonic_ns,
        wall_clock: Callable[[], float] = time,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        if concurrency is not None and concurrency < 1:
            raise ValueError(f"concurrency is at least 1, or None for no limit, not {concurrency}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout is more than 0 seconds, or None for none, not {timeout}")
        library = _DEFAULT if transport is None else Library.of(transport)
        self._transport: Any = self._make(library) if transport is None else transport
        options = Options(
            RetryPolicy() if retry is None else retry,
            budget,
            throttle,
            breaker,
            concurrency,
            hedge,
            timeout,
            propagate,
            route,
        )
        self._caller = Caller(options, library, clock=clock, wall_clock=wall_clock, random=random)

    def _make(self, library: Library) -> Any:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} around {self._transport!r}>"

    def around(self, transport: Any) -> Any:
        """Another one, around ``transport``, that shares everything that this one knows."""
        other = object.__new__(type(self))
        other._transport, other._caller = transport, self._caller
        return other

    def statistics(self) -> dict[str, dict[str, Any]]:
        """By host: requests ``in_flight``, ``retries`` and ``tokens`` left in the budget, the share that is
        ``throttled``, the states of its ``circuits`` by route, and the ``p95`` of the latency in seconds."""
        return self._caller.statistics()


@final
class ResilientTransport(_Resilient, _AsyncBase):  # type: ignore[misc]  # its base is only known at run time
    """A transport for ``httpx2.AsyncClient`` or ``httpx.AsyncClient`` that makes its callers well-behaved.

    >>> client = _module.AsyncClient(transport=ResilientTransport())

    ``transport`` is what really sends, by default ``AsyncHTTPTransport()``. What goes wrong is tried again if that is
    right (``retry``, a `RetryPolicy`) and as long as there is a ``budget`` for it; requests to a host that accepts too
    little are refused here by a ``throttle``, and those to one that fails by a ``breaker``. These three are made anew
    for each host (breakers: for each ``route`` of it, a function from a request to a name, or ``extensions["route"]``),
    so a class or a function is given, or ``None`` for none.

    ``concurrency`` is how many requests to one host may be in flight at once; more are refused here (``None``: any
    number). ``hedge`` sends an idempotent request a second time when it takes longer than 95 of 100 did, and takes the
    first answer. ``timeout`` is the seconds for a call with all its attempts; the deadline of the request that is being
    served behind Seawall, if there is one, counts as well, and so does ``extensions={"deadline": seconds}``. With
    ``propagate`` what is left is sent on as ``X-Request-Timeout-Ms``, and the priority as ``X-Request-Priority``.

    Answers have their ``attempts`` in their ``extensions``. Errors are the library's own, and where nothing was sent or
    nothing is tried again those of `seawall.client.errors`. ``clock`` is monotonic nanoseconds, ``wall_clock`` seconds
    since the epoch, ``random`` 0 to 1.
    """

    def _make(self, library: Library) -> Any:
        return library.module.AsyncHTTPTransport()

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
        while True:
            try:
                step = call.send(told) if failed is None else call.throw(failed)
            except StopIteration as end:
                response, leave = end.value
                if response.is_closed:  # it was read, or was never a stream
                    leave()
                    return response
                response.stream = _body(_AsyncBody, self._caller.library.module.AsyncByteStream)(response.stream, leave)
                return response
            told, failed = None, None
            try:
                if type(step) is Send:
                    told = await self._send(step)
                elif type(step) is Sleep:
                    await anyio.sleep(step.seconds)
                else:
                    told = await _discard(step.response)
            except BaseException as error:
                failed = error

    async def _send(self, step: Send) -> Any:
        """The response, or an error of the library; whatever else is raised ends the call."""
        try:
            if step.within is None:
                return await self._sent(step)
            with anyio.fail_after(step.within):
                return await self._sent(step)
        except TimeoutError:
            return self._late(step.request)
        except Exception as error:
            if not isinstance(error, self._caller.library.module.TransportError):
                raise
            return error

    def _late(self, request: Request) -> Exception:
        made: Any = errors.also(errors.DeadlineExceeded, self._caller.library.module.ReadTimeout)
        late: Exception = made("no answer in the time that was left", request=request)
        return late

    async def _sent(self, step: Send) -> Response:
        if step.hedge_after is None:
            return await self._transport.handle_async_request(step.request)
        return await self._hedged(step, step.hedge_after)

    async def _hedged(self, step: Send, after: float) -> Response:
        """The first good answer of two. The loser is cancelled, or its answer closed."""
        answers: list[Any] = []
        done = anyio.Event()
        running = 1

        async def send() -> None:
            nonlocal running
            try:
                answer = await self._transport.handle_async_request(step.request)
            except self._caller.library.module.TransportError as error:
                answer = error
            answers.append(answer)
            running -= 1
            if not _is_bad(answer) or not running:
                done.set()

        try:
            async with anyio.create_task_group() as both:
                both.start_soon(send)
                with anyio.move_on_after(after):
                    await done.wait()
                if not done.is_set() and step.hedge():
                    step.hedged = True
                    running += 1
                    both.start_soon(send)
                await done.wait()
                both.cancel_scope.cancel()
        except BaseException:
            await _close_all(answers)
            raise
        best = next((answer for answer in answers if not _is_bad(answer)), answers[-1])
        await _close_all([answer for answer in answers if answer is not best])
        if isinstance(best, Exception):
            raise best
        return best


@final
class SyncResilientTransport(_Resilient, _SyncBase):  # type: ignore[misc]
    """`ResilientTransport` for ``Client``: the same arguments, but for ``hedge``, which needs an event loop.

    Safe to use from several threads, as the clients are.
    """

    def __init__(self, transport: Any = None, **options: Any) -> None:
        if options.get("hedge"):
            raise ValueError("hedge is for the asynchronous transport")
        super().__init__(transport, **options)

    def _make(self, library: Library) -> Any:
        return library.module.HTTPTransport()

    def __enter__(self) -> SyncResilientTransport:
        self._transport.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._transport.__exit__(*error)

    def close(self) -> None:
        self._transport.close()

    def handle_request(self, request: Request) -> Response:
        """One call with all its attempts."""
        lock = self._caller.lock
        with lock:
            call = self._caller.call(request)
        told: Any = None
        failed: BaseException | None = None
        while True:
            try:
                with lock:
                    step = call.send(told) if failed is None else call.throw(failed)
            except StopIteration as end:
                response, leave = end.value
                if response.is_closed:  # it was read, or was never a stream
                    leave()
                    return response
                kind = _body(_SyncBody, self._caller.library.module.SyncByteStream)
                response.stream = kind(response.stream, partial(self._left, leave))
                return response
            told, failed = None, None
            try:
                if type(step) is Send:
                    told = self._send(step)
                elif type(step) is Sleep:
                    sleep(step.seconds)
                else:
                    told = _discard_now(step.response)
            except BaseException as error:
                failed = error

    def _left(self, leave: Callable[[], None]) -> None:
        with self._caller.lock:
            leave()

    def _send(self, step: Send) -> Any:
        try:
            return self._transport.handle_request(step.request)
        except self._caller.library.module.TransportError as error:
            return error


class _Body:
    """The body of an answer, which ends what is in flight when it is closed."""

    def __init__(self, stream: Any, leave: Callable[[], None]) -> None:
        self._stream = stream
        self._leave = leave


class _AsyncBody(_Body):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        self._leave()
        await self._stream.aclose()


class _SyncBody(_Body):
    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        self._leave()
        self._stream.close()


@cache
def _body(kind: type[_Body], base: Any) -> Any:
    """``kind`` as a stream of the library: its clients ask whether it is one."""
    return type(kind.__name__, (kind, base), {})


def _is_bad(answer: Any) -> bool:
    return isinstance(answer, Exception) or answer.status_code >= 500


def _is_small(response: Response) -> bool:
    length = response.headers.get("content-length", "")
    return length.isdecimal() and int(length) <= SMALL


async def _discard(response: Response) -> bool:
    """Whether the answer was read, which leaves its connection for the next attempt."""
    if _is_small(response):
        try:
            await response.aread()
            return True
        except Exception:  # of the connection; what it said is lost, and it was to be discarded
            return False
        finally:
            await response.aclose()
    await response.aclose()
    return False


def _discard_now(response: Response) -> bool:
    if _is_small(response):
        try:
            response.read()
            return True
        except Exception:
            return False
        finally:
            response.close()
    response.close()
    return False


async def _close_all(answers: list[Any]) -> None:
    with anyio.CancelScope(shield=True):
        for answer in answers:
            if not isinstance(answer, Exception):
                await answer.aclose()
