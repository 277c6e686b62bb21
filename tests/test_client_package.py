"""`seawall.client` as a whole: what it needs to be imported, what it raises, what it counts, whom it serves."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import pickle
import subprocess
import sys
import timeit
from types import ModuleType
from typing import Any

import httpx
import httpx2
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from calling import LIBRARIES
from harness import call as ask
from seawall import Seawall, client, metrics, metrics_app
from seawall.client import (
    CircuitBreaker,
    CircuitOpen,
    ClientError,
    DeadlineExceeded,
    Failure,
    NotSent,
    ResilientTransport,
    RetryBudget,
    RetryBudgetExhausted,
    RetryPolicy,
    SyncResilientTransport,
    Throttled,
    TooManyInFlight,
    errors,
)
from seawall.client.host import Host
from seawall.client.library import Library, default
from seawall.client.meters import MOST_HOSTS, Meters
from seawall.testing import ManualClock, drive

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda module: module.__name__)
AT_ONCE = RetryPolicy(base=0, throttled_base=0)


# Importing


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return (done.stdout + done.stderr).strip()


def without(*names: str) -> str:
    """Code that makes modules as if they were not installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({names!r})); "


HIDING = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""

CALLS = """
import asyncio
import LIBRARY as library
from seawall.client import AsyncClient, Client, ResilientTransport, SyncResilientTransport
inner = library.MockTransport(lambda _: library.Response(200, text="hello"))
with Client(transport=inner) as client:
    assert isinstance(client, library.Client)
    assert client.get("http://host.test/").text == "hello"
async def main():
    async with AsyncClient(transport=inner) as client:
        assert (await client.get("http://host.test/")).text == "hello"
    transport = ResilientTransport()
    assert isinstance(transport, library.AsyncBaseTransport)
    await transport.aclose()
asyncio.run(main())
assert isinstance(SyncResilientTransport(), library.BaseTransport)
print(client.__class__.__mro__[1].__module__.partition(".")[0], sorted({"httpx", "httpx2"} & set(sys.modules)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("library", "hidden"), [("httpx2", "httpx"), ("httpx", "httpx2")])
def test_one_of_the_libraries_is_enough(library: str, hidden: str) -> None:
    code = f"HIDDEN = ({hidden!r},)" + HIDING + CALLS.replace("LIBRARY", library)
    assert run(code) == f"{library} ['{library}']"


@pytest.mark.slow
def test_without_both_it_says_what_to_install() -> None:
    said = run("HIDDEN = ('httpx', 'httpx2')" + HIDING + "import seawall; print('seawall'); import seawall.client")
    assert said.startswith("seawall\n"), "which needs neither"
    assert said.endswith("ImportError: seawall.client needs httpx2 or httpx: pip install 'seawall[client]'")


@pytest.mark.slow
def test_a_library_that_is_broken_is_not_taken_for_one_that_is_not_there() -> None:
    said = run("HIDDEN = ('httpcore2', 'httpcore', 'idna')" + HIDING + "import seawall.client")
    assert "No module named" in said
    assert "pip install" not in said


@libraries
def test_a_transport_tells_its_library(library: ModuleType) -> None:
    assert Library.of(library.AsyncHTTPTransport()).module is library
    assert Library.of(library.MockTransport(lambda _: library.Response(200))).name == library.__name__

    class Mine(library.BaseTransport):  # type: ignore[misc, name-defined]
        pass

    assert Library.of(Mine()).module is library


@pytest.mark.parametrize(("inside", "theirs"), [(httpx2, "httpx"), (httpx, "httpx2")])
async def test_a_request_of_the_other_library_is_a_mistake_that_says_so(inside: ModuleType, theirs: str) -> None:
    caller = sys.modules[theirs]
    text = f"a transport around one of {inside.__name__} cannot send a request of {theirs}: give it what it is to be"
    async with caller.AsyncClient(transport=ResilientTransport(inside.AsyncHTTPTransport())) as waiting:
        with pytest.raises(TypeError, match=text):
            await waiting.get("http://host.test/")
    with (
        caller.Client(transport=SyncResilientTransport(inside.HTTPTransport())) as blocking,
        pytest.raises(TypeError, match=text),
    ):
        blocking.get("http://host.test/")


def test_what_is_no_transport_of_either_is_taken_for_the_first() -> None:
    assert Library.of(object()).module is default().module is httpx2


def test_all_that_is_public_is_there_and_explained() -> None:
    for name in client.__all__:
        assert (getattr(client, name).__doc__ or "").strip(), name


# Errors


KINDS = [CircuitOpen, Throttled, TooManyInFlight, DeadlineExceeded, RetryBudgetExhausted]


@libraries
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_ours_and_the_library_s(library: ModuleType, kind: type[ClientError]) -> None:
    made = errors.also(kind, library.TransportError)
    assert made is errors.also(kind, library.TransportError)
    error = made("why", request=library.Request("GET", "http://host.test/"))
    assert isinstance(error, kind)
    assert isinstance(error, library.TransportError)
    assert isinstance(error, library.HTTPError)
    assert type(error).__name__ == kind.__name__
    assert type(error).__module__ == "seawall.client.errors"
    assert str(error).startswith("why")
    assert error.request.url == "http://host.test/"
    assert error.attempts == ()
    assert isinstance(error, NotSent) is (kind in KINDS[:3])


@libraries
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clone", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_an_error_goes_to_another_process_and_back(library: ModuleType, kind: type[ClientError], clone: Any) -> None:
    error = errors.also(kind, library.ConnectError)("why", request=library.Request("GET", "http://host.test/"))
    error.attempts = (client.Attempt(1, 503, None, 0.0, 0.1),)
    error.retry_after = 2.5
    again = clone(error)
    assert type(again) is type(error)
    assert (str(again), again.attempts, again.retry_after) == (str(error), error.attempts, 2.5)
    assert again.request.method == "GET"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_that_is_only_ours_does_so_too(kind: type[ClientError]) -> None:
    """Which is how a test stands in for a client."""
    again = pickle.loads(pickle.dumps(kind("why")))
    assert (type(again), again.args) == (kind, ("why",))


def test_each_reason_is_another() -> None:
    assert len({kind.reason for kind in KINDS} - {""}) == len(KINDS)


# Metrics


@pytest.fixture
def _fresh(monkeypatch: pytest.MonkeyPatch, registry: CollectorRegistry) -> None:
    """Nothing was counted, and no host is known."""
    monkeypatch.setattr(Meters, "_of", {})
    monkeypatch.setattr(metrics, "REGISTRY", registry)


def value(name: str, **labels: str) -> float | None:
    return metrics.REGISTRY.get_sample_value(f"seawall_client_{name}", labels)


@pytest.mark.usefixtures("_fresh")
def test_what_clients_do_can_be_scraped() -> None:
    host = "http://metrics.test"
    outcomes = iter([200, 404, 503, 302, None, None, 429, 500, 500, 500])

    def answer(request: Any) -> Any:
        status = next(outcomes)
        if status is None:
            raise httpx2.ConnectError("nobody is there")
        return httpx2.Response(status, text="said")

    transport = SyncResilientTransport(
        httpx2.MockTransport(answer),
        retry=RetryPolicy(attempts=2, base=0, throttled_base=0),
        breaker=lambda: CircuitBreaker(calls=9, failures=0.6),
        clock=ManualClock(),
    )
    with httpx2.Client(transport=transport) as client:
        assert [client.get(host).status_code for _ in range(3)] == [200, 404, 302]
        with pytest.raises(httpx2.ConnectError):
            client.post(host)
        assert client.post(host).status_code == 429
        with pytest.raises(DeadlineExceeded):
            client.get(host, extensions={"deadline": 0})
        assert [client.post(host).status_code for _ in range(3)] == [500] * 3
        with pytest.raises(CircuitOpen):
            client.get(host)
    assert {result: value("attempts_total", host=host, result=result) for result in RESULTS} == {
        "2xx": 1,
        "3xx": 1,
        "4xx": 2,
        "5xx": 4,
        "error": 2,
    }
    assert value("retries_total", host=host, reason="transient") == 1
    assert value("retries_total", host=host, reason="unsent") == 1
    assert value("refusals_total", host=host, reason="deadline_exceeded") == 1
    assert value("refusals_total", host=host, reason="circuit_open") == 1
    assert value("open_circuits", host=host) == 1
    assert value("budget_tokens", host=host) == transport.statistics()[host]["tokens"] < 50


RESULTS = ("2xx", "3xx", "4xx", "5xx", "error")


@pytest.mark.usefixtures("_fresh")
def test_gauges_are_of_all_clients_that_live() -> None:
    host = "http://metrics.test"

    def made(status: int) -> httpx2.Client:
        inner = httpx2.MockTransport(lambda _: httpx2.Response(status))
        made = httpx2.Client(
            transport=SyncResilientTransport(
                inner, retry=RetryPolicy(attempts=1), breaker=lambda: CircuitBreaker(calls=1)
            )
        )
        made.get(f"{host}/")
        return made

    one, other = made(200), made(500)
    assert (value("budget_tokens", host=host), value("open_circuits", host=host)) == (100, 1)
    del other
    assert (value("budget_tokens", host=host), value("open_circuits", host=host)) == (50, 0)
    del one
    assert value("budget_tokens", host=host) == 0


@pytest.mark.usefixtures("_fresh")
def test_hosts_with_series_of_their_own_are_bounded() -> None:
    inner = httpx2.MockTransport(lambda _: httpx2.Response(200))
    with httpx2.Client(transport=SyncResilientTransport(inner)) as client:
        for number in range(MOST_HOSTS + 30):
            client.get(f"http://host-{number}.test/")
    assert value("attempts_total", host="http://host-49.test", result="2xx") == 1
    assert value("attempts_total", host="http://host-50.test", result="2xx") is None
    assert value("attempts_total", host="other", result="2xx") == 30
    assert value("budget_tokens", host="other") == 30 * 50


@pytest.mark.usefixtures("_fresh")
def test_a_host_that_ends_while_another_is_shown_is_shown_no_more_after() -> None:
    """Where it is the garbage collector that ends it, in the thread that is just showing the other."""
    name = "http://metrics.test"
    one, other = (Host(name, RetryBudget(), None) for _ in range(2))
    with one.meters._changing:
        del other
        assert value("budget_tokens", host=name) == 100
    assert one.withdraw(0, Failure.TRANSIENT) == 14
    assert value("budget_tokens", host=name) == 36


@pytest.mark.usefixtures("_fresh")
def test_a_call_takes_no_longer_for_the_hosts_that_share_a_series() -> None:
    hosts = [Host(f"http://host-{number}.test", RetryBudget(), None) for number in range(1_000)]
    alone, shared = (min(timeit.repeat(host._show, number=50, repeat=5)) for host in (hosts[0], hosts[-1]))
    assert shared < 10 * alone
    assert value("budget_tokens", host="other") == 950 * 50


@pytest.mark.usefixtures("_fresh")
def test_odd_statuses_have_one_series() -> None:
    statuses = iter([600, 999, 20, 199])
    inner = httpx2.MockTransport(lambda _: httpx2.Response(next(statuses)))
    with httpx2.Client(transport=SyncResilientTransport(inner)) as client:
        for _ in range(4):
            client.get("http://metrics.test/")
    found = [
        line
        for line in generate_latest(metrics.REGISTRY).decode().splitlines()
        if line.startswith("seawall_client_attempts")
    ]
    results = {line.split('result="')[1].split('"')[0]: line.split()[-1] for line in found if "metrics.test" in line}
    assert {name: float(count) for name, count in results.items() if float(count)} == {"other": 3.0, "1xx": 1.0}


@pytest.mark.usefixtures("_fresh")
def test_a_host_s_name_cannot_break_the_page() -> None:
    inner = httpx2.MockTransport(lambda _: httpx2.Response(200))
    with httpx2.Client(transport=SyncResilientTransport(inner)) as client:
        client.get("http://user:secret@b\u00fccher.test:81/")
    text = ask(metrics_app()).body.decode()
    assert 'host="http://xn--bcher-kva.test:81"' in text
    assert "secret" not in text


# Within a service behind Seawall


def service(inner: Any, **settings: Any) -> Seawall:
    """An application that calls another one, over ``inner``, and says what became of it."""
    outgoing = httpx2.AsyncClient(transport=ResilientTransport(inner, retry=AT_ONCE, **settings))

    async def page(request: Request) -> Response:
        try:
            answer = await outgoing.get("http://other.test/", headers=dict(request.query_params))
        except DeadlineExceeded as late:
            return PlainTextResponse(str(late), 504)
        made = len(answer.extensions["attempts"])
        return PlainTextResponse(f"{made} {answer.extensions.get('retries_ended', '')}", answer.status_code)

    policy = {
        "version": 1,
        "plans": {"default": {"rate": "1000/s"}},
        "priorities": {"critical": {}, "normal": {}, "background": {}},
        "shedding": {"limit": {"initial": 10}},
    }
    return Seawall(Starlette(routes=[Route("/", page)]), config=policy, clock=ManualClock())


class Other:
    """The other service: notes what it is told, and answers with one status."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.heard: list[Any] = []

    async def __call__(self, request: Any) -> Any:
        self.heard.append(request.headers)
        return httpx2.Response(self.status)


async def test_deadline_and_priority_of_the_request_that_is_served_go_along() -> None:
    other = Other()
    app = service(httpx2.MockTransport(other))
    answer = await drive(app, headers={"X-Request-Timeout-Ms": "5000", "X-Request-Priority": "background"})
    assert (answer.status, answer.body) == (200, b"1 ")
    (heard,) = other.heard
    assert 1_000 < int(heard["x-request-timeout-ms"]) <= 4_990, "the outgoing clock is a real one"
    assert heard["x-request-priority"] == "background"


async def test_without_a_deadline_there_is_none_and_the_priority_is_that_of_the_request() -> None:
    other = Other()
    await drive(service(httpx2.MockTransport(other)))
    (heard,) = other.heard
    assert "x-request-timeout-ms" not in heard
    assert heard["x-request-priority"] == "normal"


async def test_a_call_within_a_retry_is_not_tried_again() -> None:
    """Or three layers with three attempts each would make twenty-seven."""
    other = Other(503)
    app = service(httpx2.MockTransport(other))
    assert (await drive(app)).body == b"3 attempts"
    assert (await drive(app, headers={"X-Retry-Attempt": "1"})).body == b"1 retried"
    assert (await drive(app, headers={"X-Retry-Attempt": "0"})).body == b"2 budget"
    assert [heard.get("x-retry-attempt") for heard in other.heard] == [None, "1", "2", "1", None, "1"]


async def test_nothing_is_called_for_a_request_whose_time_is_almost_over() -> None:
    other = Other()
    answer = await drive(service(httpx2.MockTransport(other)), headers={"X-Request-Timeout-Ms": "9"})
    assert (answer.status, other.heard) == (504, [])
    assert answer.body == b"http://other.test: no time is left to call"


async def test_what_outlives_its_request_is_bound_by_nothing_of_it() -> None:
    other, kept = Other(), []
    outgoing = httpx2.AsyncClient(transport=ResilientTransport(httpx2.MockTransport(other)))

    async def page(scope: Any, receive: Any, send: Any) -> None:
        kept.append(contextvars.copy_context())
        await PlainTextResponse("hello")(scope, receive, send)

    policy = {"version": 1, "plans": {"default": {"rate": "9/s"}}, "shedding": {"limit": {"initial": 10}}}
    await drive(Seawall(page, config=policy), headers={"X-Request-Timeout-Ms": "5000", "X-Retry-Attempt": "1"})
    await asyncio.get_running_loop().create_task(outgoing.get("http://other.test/"), context=kept[0])
    (heard,) = other.heard
    assert {"x-request-timeout-ms", "x-request-priority"}.isdisjoint(heard)


@libraries
async def test_a_service_that_sheds_is_waited_for_as_it_asks(library: ModuleType) -> None:
    """Seawall on both sides: 429 with its Retry-After, and the retry after that is served."""
    served = Seawall(
        Starlette(routes=[Route("/", lambda _: PlainTextResponse("hello"))]),
        default="1/second",
        clock=(clock := ManualClock()),
    )
    slept: list[float] = []
    transport = ResilientTransport(library.ASGITransport(served), clock=clock, random=lambda: 0.0)

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.advance(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seawall.client.transport.anyio.sleep", sleep)
        async with library.AsyncClient(transport=transport) as client:
            statuses = [(await client.get("http://testserver/")).status_code for _ in range(3)]
    assert statuses == [200, 200, 200]
    assert slept == [pytest.approx(wait, abs=0.5) for wait in (1.5, 1.5)]
