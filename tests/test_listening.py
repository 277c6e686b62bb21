"""Listening for a caller's leaving while it waits: nothing that was received is lost to the application."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from seawall.exchange import Exchange, Message, Receive, Scope

END: Message = {"type": "http.request", "body": b"", "more_body": False}
GONE: Message = {"type": "http.disconnect"}


def part(body: bytes = b"part") -> Message:
    return {"type": "http.request", "body": body, "more_body": True}


def waiting(receive: Receive, **scope: Any) -> Exchange:
    """An exchange of which only the half that receives is made."""
    exchange = Exchange.__new__(Exchange)
    exchange.late = False
    exchange.receive = receive
    exchange.scope = {"type": "http", "headers": [], **scope}
    return exchange


class Server:
    """A server that delivers from elsewhere what `say` is given, and counts how often it was asked."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.asked = 0
        self.given_up = 0

    def say(self, *messages: Message) -> None:
        for message in messages:
            self.messages.put_nowait(message)

    async def receive(self) -> Message:
        self.asked += 1
        try:
            return await self.messages.get()
        except asyncio.CancelledError:
            self.given_up += 1
            raise


Listen = Callable[[Exchange], Awaitable[None]]


async def from_the_start(exchange: Exchange) -> None:
    exchange.listen()
    await asyncio.sleep(0)


async def from_the_grant(exchange: Exchange) -> None:
    """Nothing: `has_left` begins by itself."""


@pytest.fixture(params=[from_the_start, from_the_grant])
def listen(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("before", [(), (END,), (part(), END), (part(),)])
async def test_who_has_hung_up_is_known(before: tuple[Message, ...], listen: Listen) -> None:
    server = Server()
    server.say(*before, GONE)
    exchange = waiting(server.receive)
    await listen(exchange)
    assert await exchange.has_left()


@pytest.mark.parametrize("there", [(), (END,), (part(), END), (part(),)])
async def test_who_is_there_has_not_left_and_gets_each_message_once(there: tuple[Message, ...], listen: Listen) -> None:
    server = Server()
    server.say(*there)
    exchange = waiting(server.receive)
    await listen(exchange)
    assert not await exchange.has_left()
    server.say(part(b"later"), END, GONE)
    expected = [*there, part(b"later"), END, GONE]
    assert [await exchange.receive() for _ in expected] == expected
    assert server.asked == len(expected)
    assert server.given_up == 0


async def test_who_leaves_between_its_waiting_and_its_grant_is_known_at_once() -> None:
    server = Server()
    exchange = waiting(server.receive)
    exchange.listen()
    server.say(END)
    await asyncio.sleep(0)
    server.say(GONE)
    for _ in range(3):
        await asyncio.sleep(0)
    asked = server.asked
    assert await exchange.has_left()
    assert server.asked == asked == 2


async def test_a_server_that_answers_from_a_thread_has_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seawall.exchange._GRACE", 10.0)  # for a machine that is busy
    loop = asyncio.get_running_loop()
    answers = [END, GONE]

    async def receive() -> Message:
        future: asyncio.Future[Message] = loop.create_future()
        # As soon as the loop turns, but never in the turn that asks.
        loop.call_soon(loop.call_soon, loop.call_soon, future.set_result, answers.pop(0))
        return await future

    assert await waiting(receive).has_left()


async def test_no_more_is_read_than_what_was_asked_for_before_the_grant() -> None:
    server = Server()
    server.say(END)
    exchange = waiting(server.receive)
    exchange.listen()
    await asyncio.sleep(0)
    assert not await exchange.has_left()
    server.say(GONE, GONE)
    for _ in range(3):
        await asyncio.sleep(0)
    assert server.asked == 2
    assert server.messages.qsize() == 1


async def test_of_a_large_body_only_the_beginning_is_read_ahead(listen: Listen) -> None:
    server = Server()
    chunks = [part(bytes([at]) * 20_000) for at in range(10)]
    server.say(*chunks, END, GONE)
    exchange = waiting(server.receive)
    await listen(exchange)
    assert not await exchange.has_left()
    assert server.asked == 4  # 64 KiB are full
    expected = [*chunks, END, GONE]
    assert [await exchange.receive() for _ in expected] == expected


async def test_an_application_that_looks_for_a_message_and_gives_up_loses_none(listen: Listen) -> None:
    server = Server()
    exchange = waiting(server.receive)
    await listen(exchange)
    assert not await exchange.has_left()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(exchange.receive(), 0.001)
    server.say(END)
    assert await exchange.receive() == END
    assert (server.asked, server.given_up) == (1, 0)


async def test_nothing_is_awaited_any_more_when_the_request_has_ended(listen: Listen) -> None:
    server = Server()

    async def request() -> None:
        exchange = waiting(server.receive)
        await listen(exchange)
        assert not await exchange.has_left()

    await asyncio.create_task(request())
    for _ in range(3):
        await asyncio.sleep(0)
    assert (server.asked, server.given_up) == (1, 1)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_what_receive_raises_is_raised_to_the_application(listen: Listen) -> None:
    calls = 0

    async def receive() -> Message:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise LookupError("no such connection")
        return part()

    exchange = waiting(receive)
    await listen(exchange)
    assert not await exchange.has_left()
    assert await exchange.receive() == part()
    with pytest.raises(LookupError):
        await exchange.receive()
    assert await exchange.receive() == part()


async def test_nobody_is_told_to_send_a_body_before_it_is_admitted() -> None:
    server = Server()
    exchange = waiting(server.receive, headers=[(b"expect", b"100-continue")])
    exchange.listen()
    await asyncio.sleep(0)
    assert server.asked == 0
    assert not await exchange.has_left()
    assert server.asked == 1
    server.say(END)
    assert await exchange.receive() == END


class Cycle:
    """As uvicorn's, of which `receive` is a method."""

    def __init__(self, *, disconnected: bool) -> None:
        self.disconnected = disconnected

    async def receive(self) -> Message:
        raise AssertionError("it was asked")


@pytest.mark.parametrize("disconnected", [False, True])
async def test_uvicorn_is_asked_for_no_message(disconnected: bool) -> None:
    cycle = Cycle(disconnected=disconnected)
    exchange = waiting(cycle.receive)
    exchange.listen()
    assert await exchange.has_left() is disconnected
    assert exchange.receive == cycle.receive


async def test_a_websocket_is_not_read_before_its_handshake() -> None:
    server = Server()
    scope: Scope = {"type": "websocket"}
    exchange = waiting(server.receive, **scope)
    exchange.listen()
    assert not await exchange.has_left()
    await asyncio.sleep(0)
    assert server.asked == 0
