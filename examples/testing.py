"""How to test an application that Seawall protects: a clock to turn, an app to call, limits to switch off or forget.

No server, no sleep, no HTTP client; pytest is all it needs. This file is itself a test module:

    pytest examples/testing.py
    python examples/testing.py
"""

import asyncio
import os
import sys

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from seawall import Seawall
from seawall.testing import Answer, ManualClock, disabled, drive, reset


async def home(_: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


def build(clock: ManualClock) -> Seawall:
    """The application as in production, but for the clock."""
    shop = Starlette(routes=[Route("/", home)])
    return Seawall(
        shop, config={"version": 1, "plans": {"default": {"rate": "2/minute", "quota": "3/day"}}}, clock=clock
    )


clock = ManualClock(at="2028-02-28T12:00:00Z")
app = build(clock)


def get(path: str = "/", **scope: object) -> Answer:
    return asyncio.run(drive(app, path, **scope))


@pytest.fixture(autouse=True)
def _nobody_has_called_yet() -> None:
    reset()


def test_the_third_request_of_a_minute_is_refused() -> None:
    assert [get().status for _ in range(3)] == [200, 200, 429]


def test_every_address_has_its_own_bucket() -> None:
    assert [get(client=(f"192.0.2.{host}", 1)).status for host in (1, 1, 1, 2)] == [200, 200, 429, 200]


def test_a_request_comes_back_after_half_a_minute() -> None:
    assert [get().status for _ in range(3)] == [200, 200, 429]
    clock.advance(29.9)
    assert get().status == 429
    clock.advance(0.1)
    assert get().status == 200


def test_a_refusal_says_when_to_come_back() -> None:
    for _ in range(2):
        get()
    refused = get()
    wait = int(refused.headers["retry-after"])  # 30 s, and up to a fifth more, so that not all come back at once
    assert 30 <= wait <= 36
    clock.advance(wait)
    assert get().status == 200


def test_the_quota_ends_at_midnight() -> None:
    assert [get().status for _ in range(2)] == [200, 200]
    clock.advance(30)
    assert get().status == 200
    clock.advance(30)
    assert (get().status, b'"violated-policies":["quota"]' in get().body) == (429, True)
    clock.advance(12 * 60 * 60)
    assert get().status == 200


def test_limits_can_be_switched_off_for_tests_of_something_else() -> None:
    with disabled():
        assert {get().status for _ in range(50)} == {200}


def test_reset_forgets_what_was_used() -> None:
    assert [get().status for _ in range(3)] == [200, 200, 429]
    reset()
    assert get().status == 200


if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "pytest", "-q", __file__])
