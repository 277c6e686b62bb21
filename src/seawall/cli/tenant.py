"""`seawall tenant`: what an operator does about one tenant, in a shared Redis or in a running application."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeAlias, final
from urllib.parse import urlsplit, urlunsplit
from urllib.request import Request

import typer
from rich.text import Text

from seawall import operate
from seawall.asgi import ALL_PARTS
from seawall.blocks import Block
from seawall.cells import Cells
from seawall.cli.status import Unreachable, address_of, ask, fetch
from seawall.cli.terminal import CONFIG_HELP, FOUND, console, fail, policy_of, quiet, say
from seawall.config import check
from seawall.config.diagnostics import printable
from seawall.config.values import check_token
from seawall.gate import Gate
from seawall.notation import DAY, NotationError, instant_text, parse_duration
from seawall.policy import Policy
from seawall.rate import SECOND
from seawall.stages import TenantConcurrency
from seawall.status.document import when

DEFAULT_FILE = Path("seawall.yaml")
LONGEST_BLOCK = 366 * DAY
MOST_ID = 256
MOST_REASON = 200
PATIENCE = 2 * SECOND
"""Nanoseconds for an answer of Redis, where people wait and not requests."""
_MOST_COMPARED = 20_000

Done: TypeAlias = dict[str, Any]
Form: TypeAlias = Literal["text", "json"]

Who = Annotated[str, typer.Argument(metavar="TENANT", help="Its id.")]
Config = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help=f"{CONFIG_HELP} [default: {DEFAULT_FILE}]")
]
Url = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="Ask the running application there, such as http://10.0.0.7:8000."),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="TOKEN",
        envvar="SEAWALL_TOKEN",
        help="The application's status.token; better in SEAWALL_TOKEN, for others see a command line.",
    ),
]
Format = Annotated[Form, typer.Option("--format", help="text for people, or json.")]


def show(tenant: Who, config: Config = None, url: Url = None, token: Token = None, form: Format = "text") -> None:
    """Print what a tenant may do, what it has left, and whether it is blocked. Nothing is charged for it.

    \b
    Examples:
      seawall tenant show acme
      seawall tenant show acme --url http://10.0.0.7:8000 --format json
    """
    _act("show", tenant, {}, _desk(config, url, token), form)


def reset(tenant: Who, config: Config = None, url: Url = None, token: Token = None, form: Format = "text") -> None:
    """Forget what a tenant has used of its rates and quotas.

    Requests in flight still count for its concurrency. What a process has taken ahead may come on top, and for a second
    it may refuse what it knows to be refused.

    \b
    Examples:
      seawall tenant reset acme
    """
    _act("reset", tenant, {}, _desk(config, url, token), form)


def block(
    tenant: Who,
    length: Annotated[
        str, typer.Option("--for", metavar="TIME", show_default=False, help="How long: 30s, 10m, 7d. [default: 1h]")
    ] = "1h",
    reason: Annotated[
        str, typer.Option("--reason", metavar="TEXT", help="Why, for other operators; the tenant is not told.")
    ] = "",
    config: Config = None,
    url: Url = None,
    token: Token = None,
    form: Format = "text",
) -> None:
    """Keep a tenant out for a time: its requests get a 403. Instead of a block that it has, if it has one.

    By Redis every process knows within 2 seconds, and the block ends by the clock of Redis.

    \b
    Examples:
      seawall tenant block acme --for 10m --reason 'ticket 4711'
      seawall tenant block acme --url http://10.0.0.7:8000
    """
    if len(reason) > MOST_REASON:
        fail(f"--reason is at most {MOST_REASON} characters")
    _act("block", tenant, {"seconds": _seconds(length), "reason": reason}, _desk(config, url, token), form)


def unblock(tenant: Who, config: Config = None, url: Url = None, token: Token = None, form: Format = "text") -> None:
    """Let a tenant in again before its block ends.

    \b
    Examples:
      seawall tenant unblock acme
    """
    _act("unblock", tenant, {}, _desk(config, url, token), form)


def register(app: typer.Typer, group: typer.Typer) -> None:
    """Add the verb, as a ``group`` of four, to the command line."""
    group.callback()(_tenant)
    group.command("show")(show)
    group.command("reset")(reset)
    group.command("block")(block)
    group.command("unblock")(unblock)
    app.add_typer(group, name="tenant")


def _tenant() -> None:
    """Look at one tenant, give back what it has used, or keep it out for a time.

    With `backend: {type: redis}` it is done in Redis, for all processes, whether they run or not. Otherwise, or with
    --url, a running application is asked at its `status.path`: it needs a `status.token`, and to allow this machine.
    What is in memory is each process's own, and of several workers the one that answers does it.

    Exit codes: 0 done; 1 it cannot be done: no such plan, a wrong token; 2 nobody answers, or a mistake in the command.

    \b
    Examples:
      seawall tenant show acme
      seawall tenant block acme --for 10m --reason 'ticket 4711'
      seawall tenant unblock acme
      seawall tenant reset acme --url http://10.0.0.7:8000
    """


class Desk(Protocol):
    """Who does what an operator asks for. ``policy`` is the configuration, as far as it can be read here."""

    policy: Policy | None

    def do(self, action: str, tenant: str, arguments: Mapping[str, Any]) -> Done:
        """What was done. Raises `operate.CannotOperate`, and `OSError` where nobody answers."""
        ...


@final
class Application:
    """A running application, by the status page at ``address``."""

    def __init__(self, address: str, token: str, policy: Policy | None) -> None:
        self.address = address
        self.policy = policy
        self._token = token

    def do(self, action: str, tenant: str, arguments: Mapping[str, Any]) -> Done:
        backend = fetch(self.address)["backend"]["type"]  # so that no token is given to something else
        request = Request(
            self.address,
            data=json.dumps({"action": action, "tenant": tenant, **arguments}).encode(),
            headers={"Content-Type": "application/json", "User-Agent": "seawall"},
            method="POST",
        )
        # Not one of those that go with a request to wherever that is sent on.
        request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        status, body = ask(request)
        try:
            told = json.loads(body)
        except (ValueError, RecursionError):
            told = None
        if status == 200 and isinstance(told, dict) and told.get("tenant") is not None:
            if backend != "redis":
                say(f"seawall: what it has ({backend}) is each process's own; this is about the one that has answered")
            return {**told, **_block_of(action, arguments)}
        why = told.get("error") if isinstance(told, dict) else None
        if status in (401, 403, 404, 409) and isinstance(why, str):
            raise operate.CannotOperate(f"{self.address} answers {status}: {why}")
        raise Unreachable(f"{self.address} answers {status}: {why if isinstance(why, str) else 'not a word about it'}")


def _block_of(action: str, arguments: Mapping[str, Any]) -> Done:
    """What is known here of a block that was just put."""
    if action != "block":
        return {}
    return {"until": instant_text(time.time() + arguments["seconds"]), "reason": arguments["reason"]}


@final
class Store:
    """The Redis that a configuration names, without the applications that use it."""

    def __init__(self, policy: Policy) -> None:
        self.policy: Policy | None = policy
        self._policy = policy

    def do(self, action: str, tenant: str, arguments: Mapping[str, Any]) -> Done:
        with quiet():
            return asyncio.run(self._do(action, tenant, arguments))

    async def _do(self, action: str, tenant: str, arguments: Mapping[str, Any]) -> Done:
        settings = self._policy.backend
        try:
            from seawall.backends.redis import RedisBackend

            backend = RedisBackend(
                settings.url or "",
                timeout_ns=max(settings.timeout_ns, PATIENCE),
                key_prefix=settings.key_prefix,
                secret=settings.secret,
                leases=False,
                deny_cache=False,
                member=False,
            )
        except ModuleNotFoundError as error:
            fail(f"the redis backend needs {error.name}: pip install 'seawall[redis]'")
        except ValueError as error:
            fail(f"backend: {error}")
        gate = Gate(
            self._policy,
            backend,
            Cells(),
            parts=ALL_PARTS,
            concurrency=TenantConcurrency(),
            clock=time.monotonic_ns,
            wall_clock=time.time_ns,
            random=random.random,
        )
        try:
            if action == "show":
                await backend.fetch_blocks()
                return await operate.show(gate, backend.blocks, tenant)
            if action == "reset":
                return {"tenant": tenant, "reset": await operate.reset(gate, tenant)}
            put = None
            if action == "block":
                put = Block(time.time_ns() + arguments["seconds"] * SECOND, arguments["reason"])
            await operate.block(backend, tenant, put)
            return {"tenant": tenant, "blocked": put is not None, **_block_of(action, arguments)}
        finally:
            await backend.aclose()


def _desk(config: Path | None, url: str | None, token: str | None) -> Desk:
    """Who is to be asked, by the options, or the end of the verb."""
    if url is None:
        policy = policy_of(config or DEFAULT_FILE)
        if policy.backend.type == "redis":
            return Store(policy)
        fail(
            f"{config or DEFAULT_FILE} keeps usage in the application (backend.type: {policy.backend.type}): "
            "--url http://HOST:PORT asks it. It needs status.token, and each process answers for itself; "
            "with backend.type redis there is one answer for all"
        )
    known = policy_of(config) if config is not None else check(DEFAULT_FILE).policy
    status = None if known is None else known.status
    address = address_of(url)
    if status is not None and urlsplit(url if "://" in url else f"//{url}").path in ("", "/"):
        address = urlunsplit(urlsplit(address)._replace(path=status.path))
    token = token or (None if status is None else status.token)
    if token is None:
        fail("a token is needed, the application's status.token: in SEAWALL_TOKEN, or --token")
    try:
        check_token(token)
    except ValueError as error:
        fail(f"the token cannot be one: {error}")
    return Application(address, token, known)


def _seconds(length: str) -> int:
    try:
        parsed = parse_duration(length)
    except NotationError as error:
        fail(f"--for: {error.message}")
    if not SECOND <= parsed <= LONGEST_BLOCK or parsed % SECOND:
        fail(f"--for is whole seconds, from 1s to {LONGEST_BLOCK // DAY}d")
    return parsed // SECOND


def _act(action: str, tenant: str, arguments: Mapping[str, Any], desk: Desk, form: Form) -> None:
    """Do it and print what was done, or end the verb with why it was not."""
    if not tenant.strip() or len(tenant) > MOST_ID:
        fail(f"a tenant's id is 1 to {MOST_ID} characters")
    if desk.policy is not None and tenant not in desk.policy.tenants:
        say(f"seawall: '{tenant}' is not in the file{_near(tenant, desk.policy)}")
    try:
        done = desk.do(action, tenant, arguments)
    except operate.CannotOperate as error:
        fail(str(error), FOUND)
    except (OSError, Unreachable) as error:
        fail(str(error))
    if form == "json":
        print(json.dumps(done, indent=2))
    else:
        console().print(_TEXTS[action](done))


def _near(tenant: str, policy: Policy) -> str:
    near = get_close_matches(tenant, islice(policy.tenants, _MOST_COMPARED), 3)
    return f"; there is {' and '.join(repr(name) for name in near)}" if near else ""


def _shown(done: Done) -> Text:
    text = Text()
    concurrency = done["concurrency"]
    text.append(printable(str(done["tenant"])), style="bold")
    text.append(f": plan {printable(done['plan'])}, {done['mode']}, priority {printable(done['priority'])}")
    text.append(f", {concurrency:,} at once\n" if concurrency is not None else "\n")
    if done["blocked"] is not None:
        text.append(f"{_until(done['blocked'])}\n", style="bold red")
    text.append("\n")
    for number, line in enumerate(_rows(done["limits"])):
        text.append(f"{line}\n", style="bold" if not number else "")
    text.rstrip()
    return text


def _rows(limits: list[dict[str, Any]]) -> Iterator[str]:
    if not limits:
        yield "no limits of its own"
        return
    rows = [("limit", "allows", "left", "one more")]
    for one in limits:
        name, allowance = printable(one["policy"]), printable(one["allowance"])
        rows.append((name, allowance, f"{one['left']:,}", _wait(one["wait"])))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2].rjust(widths[2]), row[3]]
        yield "  ".join(cells)


def _wait(seconds: float) -> str:
    """When one more unit can be spent: ``now``, ``in 2.5 s``, ``in 6 h 12 min``."""
    if seconds == 0:
        return "now"
    if seconds < 60:
        return f"in {seconds:.3g} s"
    minutes = int(-(-seconds // 60))
    parts = (minutes // 1_440, "d"), (minutes // 60 % 24, "h"), (minutes % 60, "min")
    return "in " + " ".join(f"{count} {unit}" for count, unit in parts if count)


def _until(block: Mapping[str, Any]) -> str:
    reason = f": {printable(block['reason'])}" if block["reason"] else ""
    return f"blocked until {when(str(block['until']))}{reason}"


def _reset(done: Done) -> Text:
    names = ", ".join(map(printable, done["reset"]))
    told = f"has used nothing any more of {names}" if names else "has no limits of its own"
    return Text(f"{printable(str(done['tenant']))} {told}")


def _blocked(done: Done) -> Text:
    return Text(f"{printable(str(done['tenant']))} is {_until(done)}")


def _unblocked(done: Done) -> Text:
    return Text(f"{printable(str(done['tenant']))} is not blocked")


_TEXTS = {"show": _shown, "reset": _reset, "block": _blocked, "unblock": _unblocked}
