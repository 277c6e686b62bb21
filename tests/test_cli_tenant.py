"""`seawall tenant`: by Redis and by a running application, what it prints, how it ends, what it makes of mistakes."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from harness import hello
from pages import DOCS, Reader, blocks
from seawall import Seawall, directory
from seawall.backends.redis import blocked, session
from seawall.cli.tenant import LONGEST_BLOCK, _wait
from seawall.config import load
from seawall.notation import DAY
from seawall.rate import SECOND
from seawall.testing import drive, reset
from serving import free_port, serving
from status_app import served
from stores import Server
from test_cli import environment, invoke, run_process
from test_cli_status import answering

TOKEN = "a-token-of-the-tests"
FILE = """\
version: 1
identity: {tenant: [{api_key: {header: X-API-Key}}, {state: tenant}]}
plans:
  free: {rate: 10/minute, quota: 1000/day, concurrency: 5}
  none: {rate: unlimited}
defaults: {plan: free, anonymous_plan: free}
tenants: {acme: {}, acme-staging: {}, open: {plan: none}}
status: {path: /-/ops, allow: [127.0.0.1], token: "${SEAWALL_TOKEN}"}
"""
REDIS = """\
backend: {type: redis, url: "${REDIS_URL}", secret: a secret, key_prefix: tenants, timeout: 5s, deny_cache: false}
"""
UNTIL = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    reset()
    monkeypatch.setenv("SEAWALL_TOKEN", TOKEN)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a configuration, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seawall.yaml").write_text(FILE, encoding="utf-8")
    return tmp_path


@pytest.fixture
def shared(here: Path, store: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with state in a Redis."""
    monkeypatch.setenv("REDIS_URL", store.url)
    (here / "seawall.yaml").write_text(FILE + REDIS, encoding="utf-8")
    return here


def use(times: int, tenant: str = "acme") -> list[int]:
    """What an application answers that begins, is asked so often, and ends."""

    async def ask() -> list[int]:
        app: Any = Seawall(hello, config=load("seawall.yaml"), registry=CollectorRegistry())
        app.gate.shared.open()
        await app.gate.shared.fetch_blocks()
        statuses = [(await drive(app, state={"tenant": tenant})).status for _ in range(times)]
        await app.gate.shared.aclose()
        return statuses

    return asyncio.run(ask())


# In Redis


def test_a_tenant_is_shown_as_redis_has_it(shared: Path) -> None:
    assert use(3) == [200] * 3
    result = invoke("tenant", "show", "acme")
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.fullmatch(
        r"acme: plan free, enforce, priority normal, 5 at once\n\n"
        r"limit  allows     left  one more\n"
        r"rate   10/minute     7  now\n"
        r"quota  1_000/day   997  now\n",
        result.stdout,
    )
    told = json.loads(invoke("tenant", "show", "acme", "--format", "json").stdout)
    assert (told["tenant"], told["listed"], told["blocked"]) == ("acme", True, None)
    assert [(one["policy"], one["limit"], one["left"]) for one in told["limits"]] == [
        ("rate", 10, 7),
        ("quota", 1000, 997),
    ]
    assert invoke("tenant", "show", "open").stdout == (
        "open: plan none, enforce, priority normal\n\nno limits of its own\n"
    )


def test_who_is_reset_has_used_nothing(shared: Path) -> None:
    assert use(11) == [200] * 10 + [429]
    assert re.search(r"^rate   10/minute     0  in \d", invoke("tenant", "show", "acme").stdout, re.MULTILINE)
    result = invoke("tenant", "reset", "acme")
    assert (result.exit_code, result.stdout) == (0, "acme has used nothing any more of rate, quota\n")
    assert use(11) == [200] * 10 + [429]
    told = json.loads(invoke("tenant", "reset", "acme", "--format", "json").stdout)
    assert told == {"tenant": "acme", "reset": ["rate", "quota"]}
    assert invoke("tenant", "reset", "open").stdout == "open has no limits of its own\n"


def test_who_is_blocked_is_kept_out_of_whatever_runs_until_it_is_let_in(shared: Path, store: Server) -> None:
    result = invoke("tenant", "block", "acme", "--for", "10m", "--reason", "ticket 4711")
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.fullmatch(rf"acme is blocked until {UNTIL}: ticket 4711\n", result.stdout)
    assert 590_000 < store.command("PTTL", "tenants:{instances}:blocks") <= 600_000
    assert use(2) == [403] * 2
    assert use(1, "acme-staging") == [200]
    shown = invoke("tenant", "show", "acme").stdout
    assert re.search(rf"^blocked until {UNTIL}: ticket 4711$", shown, re.MULTILINE)
    told = json.loads(invoke("tenant", "show", "acme", "--format", "json").stdout)["blocked"]
    assert told["reason"] == "ticket 4711"
    assert told["until"].endswith("Z")
    assert invoke("tenant", "unblock", "acme").stdout == "acme is not blocked\n"
    assert use(1) == [200]
    told = json.loads(invoke("tenant", "block", "acme", "--format", "json").stdout)
    assert {**told, "until": None} == {"tenant": "acme", "blocked": True, "until": None, "reason": ""}
    assert 3_590_000 < store.command("PTTL", "tenants:{instances}:blocks") <= 3_600_000
    assert json.loads(invoke("tenant", "unblock", "acme", "--format", "json").stdout) == {
        "tenant": "acme",
        "blocked": False,
    }


def test_who_is_not_listed_is_served_all_the_same_with_a_hint(shared: Path) -> None:
    assert use(3, "acmee") == [200] * 3
    result = invoke("tenant", "show", "acmee")
    assert (result.exit_code, result.stderr) == (0, "seawall: 'acmee' is not in the file; there is 'acme'\n")
    assert re.search(r"^rate   10/minute     7", result.stdout, re.MULTILINE)
    assert invoke("tenant", "reset", "zebra").stderr == "seawall: 'zebra' is not in the file\n"
    assert "there is 'acme-staging' and 'acme'" in invoke("tenant", "unblock", "acme-st").stderr


def test_nothing_is_said_of_a_tenant_that_no_plan_is_for(shared: Path) -> None:
    text = (
        (FILE + REDIS)
        .replace(", {state: tenant}", "")
        .replace("plan: free, ", "")
        .replace("acme: {}", "acme: {plan: free}")
    )
    (shared / "seawall.yaml").write_text(text.replace("acme-staging: {}, ", ""), encoding="utf-8")
    result = invoke("tenant", "show", "globex")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.endswith("seawall: the file lists no such tenant, and has no plan for others\n")
    assert invoke("tenant", "block", "globex").exit_code == 0


@pytest.mark.parametrize("verb", ["show", "reset", "block", "unblock"])
def test_a_redis_that_is_away_is_said_once(verb: str, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{free_port()}")
    result = invoke("tenant", verb, "acme")
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"seawall: 127\.0\.0\.1:\d+ is away \(.*\)\n", result.stderr)


def test_a_redis_that_cannot_decide_is_no_share_of_a_limit(
    store: Server, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may read but not write in it is told so, and not what a process by itself would let in."""
    store.command("ACL", "SETUSER", "looker", "on", ">secret", "~*", "+@all", "-evalsha", "-eval")
    monkeypatch.setenv("REDIS_URL", store.url.replace("//", "//looker:secret@"))
    result = invoke("tenant", "show", "acme")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "seawall: it is away\n")
    assert "NOPERM" in invoke("tenant", "block", "acme").stderr


def test_what_is_wrong_with_where_redis_is_is_said(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "rediss://localhost?ssl_ca_certs=/nowhere.pem")
    result = invoke("tenant", "show", "acme")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("seawall: backend: ssl_ca_certs")


def test_what_redis_needs_is_said_where_it_is_missing(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("seawall.backends.redis.") and "address" not in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hiredis", None)
    result = invoke("tenant", "show", "acme")
    assert result.exit_code == 2
    assert result.stderr == "seawall: the redis backend needs hiredis: pip install 'seawall[redis]'\n"


# By a running application


@pytest.fixture
def running(here: Path) -> Iterator[str]:
    """The address of an application that keeps its state in memory."""
    with served(Seawall(hello, config=load("seawall.yaml"), registry=CollectorRegistry())) as address:
        yield address


EACH_ITS_OWN = "seawall: what it has (memory) is each process's own; this is about the one that has answered\n"


def test_an_application_does_it_at_its_status_path(running: str) -> None:
    result = invoke("tenant", "block", "acme", "--url", running, "--for", "90s", "--reason", "ticket 4711")
    assert (result.exit_code, result.stderr) == (0, EACH_ITS_OWN)
    assert re.fullmatch(rf"acme is blocked until {UNTIL}: ticket 4711\n", result.stdout)
    told = json.loads(invoke("tenant", "show", "acme", "--url", f"{running}/-/ops", "--format", "json").stdout)
    assert (told["plan"], told["blocked"]["reason"]) == ("free", "ticket 4711")
    assert (
        invoke("tenant", "unblock", "acme", "--url", running.removeprefix("http://")).stdout == "acme is not blocked\n"
    )
    assert (
        invoke("tenant", "reset", "acme", "--url", running).stdout == "acme has used nothing any more of rate, quota\n"
    )
    shown = invoke("tenant", "show", "acme", "--url", running).stdout
    assert "rate   10/minute     10  now\n" in shown


def test_it_needs_no_file_but_a_token(running: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "seawall.yaml").write_text("nonsense: of something else\n", encoding="utf-8")
    result = invoke("tenant", "show", "acme", "--url", f"{running}/-/ops")
    assert (result.exit_code, result.stderr) == (0, EACH_ITS_OWN)
    elsewhere = invoke("tenant", "show", "acme", "--url", running)  # where the default path is not
    assert (elsewhere.exit_code, "/-/seawall" in elsewhere.stderr) == (2, True)
    monkeypatch.delenv("SEAWALL_TOKEN")
    missing = invoke("tenant", "show", "acme", "--url", f"{running}/-/ops")
    assert (missing.exit_code, "SEAWALL_TOKEN" in missing.stderr) == (2, True)
    assert invoke("tenant", "show", "acme", "--url", f"{running}/-/ops", "--token", TOKEN).exit_code == 0
    named = invoke("tenant", "show", "acme", "--url", running, "--config", "seawall.yaml")
    assert (named.exit_code, "error[" in named.stderr) == (1, True)


def test_the_token_is_that_of_the_file_where_no_other_is_named(
    running: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "seawall.yaml").write_text(FILE.replace("${SEAWALL_TOKEN}", TOKEN), encoding="utf-8")
    monkeypatch.delenv("SEAWALL_TOKEN")
    assert invoke("tenant", "show", "acme", "--url", running).exit_code == 0


def test_a_wrong_token_is_no_success_and_never_repeated(running: str) -> None:
    for token, code in (
        ("another-token-entirely", 1),
        ("short", 2),
        ("with spaces in it, and long", 2),
        ("\N{SNOWMAN}" * 20, 2),
    ):
        result = invoke("tenant", "block", "acme", "--url", running, "--token", token)
        assert (result.exit_code, result.stdout) == (code, "")
        assert token not in result.stderr
        assert "token" in result.stderr
    assert "blocked" not in invoke("tenant", "show", "acme", "--url", running).stdout


def test_who_may_not_see_the_page_is_told_what_that_may_mean(here: Path) -> None:
    (here / "seawall.yaml").write_text(FILE.replace("127.0.0.1", "10.9.8.7"), encoding="utf-8")
    with served(Seawall(hello, config=load("seawall.yaml"), registry=CollectorRegistry())) as address:
        result = invoke("tenant", "reset", "acme", "--url", address)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith(
        "/-/ops answers 404: nothing is there (status.path), or this machine is not one of status.allow\n"
    )


def test_an_application_that_lets_nobody_act_says_so(here: Path) -> None:
    text = FILE.replace(', token: "${SEAWALL_TOKEN}"', "")
    (here / "seawall.yaml").write_text(text, encoding="utf-8")
    with served(Seawall(hello, config=load("seawall.yaml"), registry=CollectorRegistry())) as address:
        result = invoke("tenant", "reset", "acme", "--url", address)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "answers 404: no token is configured (status.token)" in result.stderr


def test_nobody_there_ends_with_2(here: Path) -> None:
    result = invoke("tenant", "show", "acme", "--url", f"127.0.0.1:{free_port()}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "cannot be reached: Connection refused" in result.stderr


def test_a_token_is_given_to_a_status_page_only_and_never_sent_on(here: Path) -> None:
    """Not to what is no status page, and not along with a redirect."""
    seen: list[str] = []

    def answer(path: str) -> tuple[int, str, bytes]:
        seen.append(path)
        return 200, "application/json", b'{"hello": "world"}'

    with answering(answer) as host:
        result = invoke("tenant", "show", "acme", "--url", host)
    assert (result.exit_code, seen) == (2, ["/-/ops"])
    assert "something else than the status page" in result.stderr


class Impostor:
    """A status page whose answer to a POST is another one."""

    def __init__(self, app: Any, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        self.app, self.status, self.body, self.headers = app, status, body, headers
        self.tokens: list[tuple[str, bytes | None]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.tokens.append((f"{scope['method']} {scope['path']}", dict(scope["headers"]).get(b"authorization")))
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        headers = [(b"content-length", b"%d" % len(self.body)), *self.headers]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


@pytest.mark.parametrize(
    ("status", "body", "code", "said"),
    [
        (409, b'{"error": "cannot \\u001b[31m"}', 1, r"answers 409: cannot \x1b[31m"),
        (401, b'{"error": "the token is missing or wrong"}', 1, "answers 401: the token is missing or wrong"),
        (503, b'{"error": "the store does not answer: it is away"}', 2, "answers 503: the store does not answer"),
        (500, b"Internal Server Error", 2, "answers 500: not a word about it"),
        (401, b"<html>", 2, "answers 401: not a word about it"),
        (200, b'{"hello": "world"}', 2, "answers 200: not a word about it"),
        (200, b"[" * 9_000, 2, "answers 200: not a word about it"),
    ],
)
def test_what_an_application_answers_decides_how_it_ends(
    here: Path, status: int, body: bytes, code: int, said: str
) -> None:
    page: Any = Seawall(hello, config=load("seawall.yaml"), registry=CollectorRegistry())
    with served(Impostor(page, status, body)) as address:
        result = invoke("tenant", "block", "acme", "--url", address)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    assert "\x1b" not in result.stderr


def test_a_redirect_does_not_get_the_token(here: Path) -> None:
    page: Any = Seawall(hello, config=load("seawall.yaml"), registry=CollectorRegistry())
    impostor = Impostor(page, 303, b"", ((b"location", b"/elsewhere"),))
    with served(impostor) as address:
        result = invoke("tenant", "block", "acme", "--url", address)
    assert (result.exit_code, result.stdout) == (2, "")
    assert impostor.tokens == [
        ("GET /-/ops", None),
        ("POST /-/ops", b"Bearer " + TOKEN.encode()),
        ("GET /elsewhere", None),
    ]


@pytest.mark.slow
def test_an_application_of_its_own_process_keeps_a_tenant_out(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "app.py").write_text(
        "from fastapi import FastAPI, Request\n"
        "from seawall import Seawall\n"
        "app = FastAPI()\n"
        "app.add_middleware(Seawall, config='seawall.yaml')\n"
        "@app.middleware('http')\n"
        "async def who(request: Request, call_next):\n"
        "    request.state.tenant = request.headers.get('x-tenant')\n"
        "    return await call_next(request)\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    words = ["-m", "uvicorn", "app:app", "--port", "{port}", "--log-level", "warning"]
    with serving(words, here / "log", cwd=here) as application:
        url = f"http://127.0.0.1:{application.port}"

        def statuses(tenant: str) -> list[int]:
            return application.statuses(2, "/", headers={"x-tenant": tenant})  # type: ignore[arg-type]

        assert statuses("acme") == [404, 404]
        done = run_process("tenant", "block", "acme", "--url", url, SEAWALL_TOKEN=TOKEN)
        assert (done.returncode, done.stdout[:16]) == (0, "acme is blocked "), done.stderr
        assert statuses("acme") == [403, 403]
        assert statuses("globex") == [404, 404]
        done = run_process("tenant", "unblock", "acme", "--url", url, SEAWALL_TOKEN=TOKEN)
        assert done.returncode == 0
        assert statuses("acme") == [404, 404]
        shown = run_process("tenant", "show", "acme", "--url", url, "--format", "json", SEAWALL_TOKEN=TOKEN)
        assert json.loads(shown.stdout)["limits"][1]["left"] == 996


# Mistakes


def test_memory_without_an_address_says_what_to_do(here: Path) -> None:
    result = invoke("tenant", "show", "acme")
    assert (result.exit_code, result.stdout) == (2, "")
    for words in ("backend.type: memory", "--url http://HOST:PORT", "status.token", "each process", "redis"):
        assert words in result.stderr


def test_a_missing_file_leads_to_config(here: Path) -> None:
    result = invoke("tenant", "show", "acme", "--config", "missing.yaml")
    assert (result.exit_code, "--config names another file" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["acme"],
        ["show"],
        ["show", "a", "b"],
        ["show", ""],
        ["show", " "],
        ["show", "x" * 257],
        ["block", "acme", "--for", "10"],
        ["block", "acme", "--for", "1.5h"],
        ["block", "acme", "--for", "500ms"],
        ["block", "acme", "--for", "1500ms"],
        ["block", "acme", "--for", "367d"],
        ["block", "acme", "--for", "-1h"],
        ["block", "acme", "--reason", "x" * 201],
        ["show", "acme", "--url", "ftp://localhost"],
        ["show", "acme", "--url", "http://user:password@localhost"],
        ["show", "acme", "--format", "xml"],
    ],
)
def test_mistakes_in_the_command_end_with_2(arguments: list[str], shared: Path, store: Server) -> None:
    result = invoke("tenant", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr
    assert store.command("DBSIZE") == 0


def test_a_block_may_last_as_long_as_a_block_by_the_status_page(shared: Path, store: Server) -> None:
    assert invoke("tenant", "block", "acme", "--for", f"{LONGEST_BLOCK // DAY}d").exit_code == 0
    assert store.command("PTTL", "tenants:{instances}:blocks") > 365 * 86_400_000


@pytest.mark.parametrize(
    "tenant", ["a\x1b[31mb", "a\nb", "\N{RIGHT-TO-LEFT OVERRIDE}ab", "\udcff", "zo\xeb", "x" * 200]
)
@pytest.mark.parametrize("verb", ["show", "reset", "block", "unblock"])
def test_an_id_is_nothing_that_a_terminal_obeys(tenant: str, verb: str, shared: Path) -> None:
    result = invoke("tenant", verb, tenant)
    assert result.exit_code == 0
    shown = result.stdout + result.stderr
    assert not any(char in shown for char in "\x1b\N{RIGHT-TO-LEFT OVERRIDE}\udcff")
    assert "a\nb" not in shown
    json.loads(invoke("tenant", verb, tenant, "--format", "json").stdout)


def test_a_reason_is_nothing_that_a_terminal_obeys(shared: Path) -> None:
    assert "\x1b" not in invoke("tenant", "block", "acme", "--reason", "a\x1b[31mb").stdout
    assert "\x1b" not in invoke("tenant", "show", "acme").stdout


def test_a_pipe_gets_no_colour(shared: Path) -> None:
    done = run_process("tenant", "block", "acme", FORCE_COLOR="1")
    shown = run_process("tenant", "show", "acme", FORCE_COLOR="1")
    assert (done.returncode, shown.returncode) == (0, 0)
    assert "\x1b" not in done.stdout + shown.stdout


@pytest.mark.parametrize("verb", ["show", "reset", "block", "unblock"])
def test_each_has_help_with_an_example(verb: str) -> None:
    result = invoke("tenant", verb, "--help")
    assert result.exit_code == 0
    assert f"seawall tenant {verb} acme" in result.stdout


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "now"),
        (0.004, "in 0.004 s"),
        (59.96, "in 60 s"),
        (60, "in 1 min"),
        (61, "in 2 min"),
        (3_600, "in 1 h"),
        (22_320, "in 6 h 12 min"),
        (86_400, "in 1 d"),
        (90_000.5, "in 1 d 1 h 1 min"),
    ],
)
def test_a_wait_is_in_words(seconds: float, text: str) -> None:
    assert _wait(seconds) == text


# docs/tenants.md


PAGE = " ".join((DOCS / "tenants.md").read_text(encoding="utf-8").split())


@pytest.mark.parametrize(
    ("sentence", "value"),
    [
        (r"An answer is kept for (\d+) s, `None`", directory.FRESH / SECOND),
        (r"Other processes find out within the (\d+) s", directory.FRESH / SECOND),
        (r"`None` for (\d+) s", directory.STRANGE / SECOND),
        (r"A request waits (\d+) s for it at most", directory.PATIENCE),
        (r"it is asked again every (\d+) s", directory.RETRY / SECOND),
        (r"([\d,]+) tenants are remembered", directory.MOST_KNOWN),
        (r"At most ([\d,]+) tenants are blocked at a time in Redis", blocked.MOST_BLOCKS),
        (r"in all, within (\d+) s, also after restarts", session.BEAT),
        (r"(\d+) days at most", LONGEST_BLOCK / DAY),
    ],
)
def test_a_number_of_the_page_is_the_code_s(sentence: str, value: float) -> None:
    found = re.search(sentence, PAGE)
    assert found is not None, sentence
    assert int(found[1].replace(",", "")) == value


def test_tenants_of_the_page_have_the_plans_that_its_database_says(here: Path) -> None:
    [block] = [block for block in blocks(DOCS / "tenants.md", "python") if "tenants=find" in block.text]
    page = Reader(DOCS / "tenants.md", here)
    page.python(block)
    for tenant, amount in (("initech", 100), ("umbrella", 20), ("stranger", 10)):
        answer = asyncio.run(drive(page.names["app"], state={"tenant": tenant}))
        assert answer.headers["ratelimit-policy"] == f'"rate";q={amount};w=60'
    for key, amount in (("hooli-demo-key", 100), ("nobody-s-key", 10)):
        answer = asyncio.run(drive(page.names["app"], headers={"X-API-Key": key}))
        assert answer.headers["ratelimit-policy"] == f'"rate";q={amount};w=60'
