"""Sending a second time what takes long, and taking what comes first ("The Tail at Scale", Dean and Barroso 2013)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio

from seawall.client.outgoing import Request, Response


async def first_of_two(
    send: Callable[[Request], Awaitable[Response]],
    request: Request,
    after: float,
    second: Callable[[], Request | None],
    is_good: Callable[[Response], bool],
    transport_error: type[Exception],
) -> tuple[Response, bool]:
    """The first good answer to ``request``, and whether it is the one to the ``second``.

    That is sent after so many seconds, where it is one. If none is good, a response is rather given than an error
    raised; what is no ``transport_error`` is raised at once. The loser is cancelled, or its answer closed.
    """
    answers: list[tuple[Any, bool]] = []
    running = 1
    done = anyio.Event()

    def decides(answer: Any) -> bool:
        if isinstance(answer, Exception):
            return not isinstance(answer, transport_error)
        return is_good(answer)

    async def run(request: Request, is_second: bool) -> None:
        # No name for what comes: an error and a frame that knows it keep each other for the garbage collector.
        nonlocal running
        try:
            answers.append((await send(request), is_second))
        except Exception as error:
            answers.append((error, is_second))
        running -= 1
        if not running or decides(answers[-1][0]):
            done.set()

    best: tuple[Any, bool] | None = None
    try:
        async with anyio.create_task_group() as both:
            both.start_soon(run, request, False)
            with anyio.move_on_after(after):
                await done.wait()
            if not done.is_set():
                another = second()
                if another is not None:
                    running += 1
                    both.start_soon(run, another, True)
                await done.wait()
            both.cancel_scope.cancel()
        # Decided, answered at all, or else whichever.
        best = min(answers, key=lambda pair: (not decides(pair[0]), isinstance(pair[0], Exception)))
        if isinstance(best[0], Exception):
            raise best[0]
        return best
    finally:
        losers = [answer for answer, _ in answers if best is None or answer is not best[0]]
        with anyio.CancelScope(shield=True):
            for answer in losers:
                if not isinstance(answer, Exception):
                    with suppress(transport_error):  # or the best one would be lost, and its connection with it
                        await answer.aclose()
        answers.clear()
        best = None
