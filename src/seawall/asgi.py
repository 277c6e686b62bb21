"""The ASGI shell: a gate before an application, and the bytes of what the gate refuses.

One middleware class does everything, and the single-stage ones are the same shell with fewer parts. Stacked in one app
they find each other when they are built: the outermost takes over the parts of all that read the same policy, so that
together they decide what `Seawall` decides, once.

On the request path: no task, no lock, no request object, no logging, no exception for a refusal. A permit is given back
in ``finally``, when the application's coroutine has ended, and never on ``http.disconnect``.
"""

from __future__ import annotations

import inspect
import logging
import random as random_module
from asyncio import AbstractEventLoop, Task, _get_running_loop, create_task, get_running_loop, timeout
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from os import PathLike
from pathlib import Path
from time import monotonic_ns, time, time_ns
from typing import Any, NamedTuple, TypeAlias, TypeVar, final
from weakref import WeakSet, WeakValueDictionary

from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException

from seawall import advice, operate, ticker, tracing
from seawall._version import __version__
from seawall.admission import GONE, Denied
from seawall.backends import Backend, Key, OperatedBackend, SharedBackend
from seawall.backends.memory import MemoryBackend
from seawall.backends.snapshot import Keeper
from seawall.blocks import Block, Blocks
from seawall.config import ConfigError, load_mapping, simple
from seawall.config.diagnostics import Diagnostic, printable
from seawall.decision import Clock, Mode, Outcome, Refusal
from seawall.directory import Asked, Directory, Known, LookUp
from seawall.exchange import SCOPE_KEY, ASGIApp, Exchange, Message, Passed, Receive, Scope, Send, current_exchange
from seawall.gate import NOBODY, Gate, Identify
from seawall.identity import NetworkSet, is_forwarded, tenant_id
from seawall.metrics import (
    ALLOWED,
    BUILD_INFO,
    CANCELLED,
    CONCURRENCY_LIMIT,
    CONFIG_INFO,
    CONFIG_RELOADS,
    DECISION_DURATION,
    DENIED,
    EXEMPT,
    LAST_RELOAD,
    LOOP_LAG,
    OUTCOMES,
    QUEUED,
    REJECTIONS,
    REQUEST_DURATION,
    SHADOW_REJECTIONS,
    STREAMS,
    UTILIZATION,
    BackendCalls,
    Publication,
    Reading,
    metrics_app,
)
from seawall.notation import NotationError, RateLike, instant_text, parse_quota, parse_rates
from seawall.policy import BackendSettings, Per, Plan, Policy, Route, RouteLimit
from seawall.rate import SECOND, Quota, Rate
from seawall.refusals import Journal, Refusals
from seawall.responses import Header, Prepared, grpc_headers, wants_html
from seawall.routing import has_control_character, path_below_root
from seawall.stages import CALLER, TenantConcurrency
from seawall.status import ActionError, StatusPage, counted, document
from seawall.status.document import MOST_REFUSED
from seawall.watch import Watch, on_hangup, reload_all

OnReject: TypeAlias = Callable[[Any, Refusal], "ASGIApp | None | Awaitable[ASGIApp | None]"]
Config: TypeAlias = "str | PathLike[str] | Mapping[str, Any] | Policy"
T = TypeVar("T")

_REQUEST_BOUNDS = REQUEST_DURATION.bounds_ns
_DECISION_BOUNDS = DECISION_DURATION.bounds_ns
_FORWARDING_LOOKS = 256
_FORGETFUL = "the quota is kept in memory: a restart forgets what was used of it, and each process counts its own"
_READS = frozenset({"GET", "HEAD"})
_SHUT_DOWN = frozenset({"lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"})
_CLOSING = 2.0
"""Seconds for a shared backend to give back what it holds, at the end of an application."""

logger = logging.getLogger("seawall")

_live: WeakSet[Middleware] = WeakSet()
_shared: WeakValueDictionary[tuple[BackendSettings, Clock, Clock], SharedBackend] = WeakValueDictionary()
_switched_off = 0


RATE_PARTS = frozenset({"rate", "concurrency"})
QUOTA_PARTS = frozenset({"quota"})
SHEDDING_PARTS = frozenset({"shedding"})
PRIORITY_PARTS = frozenset({"priority"})
ALL_PARTS = RATE_PARTS | QUOTA_PARTS | SHEDDING_PARTS | PRIORITY_PARTS


class Middleware:
    """The shell around the stages that ``parts`` names."""

    parts: frozenset[str] = frozenset()

    def __init__(
        self,
        app: ASGIApp,
        policy: Policy | Watch,
        *,
        backend: Backend | None = None,
        identify: Identify | None = None,
        on_reject: OnReject | None = None,
        registry: CollectorRegistry | None = None,
        clock: Clock | None = None,
        tenants: LookUp | None = None,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        self.app = app
        self._watch = policy if isinstance(policy, Watch) else None
        self.policy = policy = policy.policy if isinstance(policy, Watch) else policy
        self._started = time()
        self.refusals = Refusals()
        self._inner = [link for link in advice.chain(app) if isinstance(link, Middleware)]
        # What stands further in with the same policy is done here, in one decision; there it finds itself covered.
        absorbed = [inner for inner in self._inner if _same(inner.policy, policy)]
        self._enforced = self.parts.union(*(inner.parts for inner in absorbed))
        identify = _agreed("identify", identify, *(inner.identify for inner in absorbed))
        on_reject = _agreed("on_reject", on_reject, *(inner.on_reject for inner in absorbed))
        backend = _agreed("backend", backend, *(inner.given_backend for inner in absorbed))
        self.identify: Identify | None = identify
        self.on_reject: OnReject | None = on_reject
        self._clock = clock or monotonic_ns
        self._directory = None if tenants is None else Directory(tenants, self._clock)
        self.given_backend: Backend | None = backend
        self._wall_clock: Clock = getattr(clock, "wall_ns", time_ns)
        self._random = random
        self._publication = Publication.of(registry)
        self._cells = self._publication.cells
        self._traces = tracing.begin()
        self._loops: WeakSet[AbstractEventLoop] = WeakSet()
        self._closing: set[Task[None]] = set()
        roots = [getattr(link, "root_path", "") for link in advice.chain(app)]
        self._root = next((root for root in roots if root and isinstance(root, str)), "")
        self._metrics_app: ASGIApp = metrics_app(registry)
        self._put_in_force(policy, *self._gate(policy))
        self._publication.sources.add(self)
        _live.add(self)
        self._advise()
        self._journal = Journal(self.refusals)
        ticker.every(1.0, self._tick)
        if self._watch is not None:
            # An alert on the first failure needs a series that was 0 before.
            self._cells.block(CONFIG_RELOADS, "result", ("ok", "failed"))
            self._watch.subscribe(self)

    def _gate(self, policy: Policy, before: Gate | None = None) -> tuple[Gate, Keeper | None]:
        """What ``policy`` needs at run time. Raises `ConfigError` where it cannot be had."""
        if policy.default_plan is None and (self.identify is not None or self._directory is not None):
            given = "identify=" if self._directory is None else "tenants="
            raise misuse(f"{given} may name tenants that the file does not list: set defaults.plan")
        backend, keeper = self._backend(policy.backend, before)
        gate = Gate(
            policy,
            backend,
            self._cells,
            parts=self._enforced,
            concurrency=TenantConcurrency() if before is None else before.concurrency,
            clock=self._clock,
            wall_clock=self._wall_clock,
            random=self._random,
            before=before,
        )
        return gate, keeper

    def _backend(self, settings: BackendSettings, before: Gate | None) -> tuple[Backend, Keeper | None]:
        """The backend that ``settings`` name, and who keeps its quotas in a file."""
        if self.given_backend is not None:
            return self.given_backend, None
        if settings.type != "memory":
            return _share(settings, self._clock, self._wall_clock), None
        if before is not None and isinstance(before.backend, MemoryBackend):
            backend = before.backend
        else:
            backend = MemoryBackend(max_keys=settings.max_keys, clock=self._clock, wall_clock=self._wall_clock)
        if settings.snapshot is None:
            return backend, None
        keeper = Keeper.of(self._directory_of_config / settings.snapshot, backend, self._wall_clock)
        return keeper.backend, keeper

    @property
    def _directory_of_config(self) -> Path:
        """Where the files are relative to that a configuration names."""
        return Path(self._watch.files[0] if self._watch is not None else "seawall.yaml").absolute().parent

    def _put_in_force(self, policy: Policy, gate: Gate, keeper: Keeper | None) -> None:
        """Decide by ``gate`` from now on. Nothing here may fail, for it is too late to go back."""
        self.policy, self.gate, self._keeper = policy, gate, keeper
        self._pages = self._pages_of(policy)
        self._blocks = gate.backend.blocks if isinstance(gate.backend, OperatedBackend) else _NO_BLOCKS
        self._looks = _FORWARDING_LOOKS if gate.clients.trusts_nobody else 0
        self._decision_seconds = self._cells.index(DECISION_DURATION, gate.backend.name)
        if gate.shared is not None:
            gate.shared.observer = BackendCalls(gate.shared.name, self._cells)
        elif self.given_backend is None and isinstance(gate.backend, MemoryBackend):
            gate.backend.resize(policy.backend.max_keys)

    def _pages_of(self, policy: Policy) -> dict[str, _Page]:
        """What is answered here, by path."""
        pages = {}
        if policy.metrics.path is not None:
            allow = None if policy.metrics.allow is None else NetworkSet(policy.metrics.allow)
            pages[policy.metrics.path] = _Page(self._metrics_app, _READS, allow)
        status = policy.status
        if status is not None:
            app: ASGIApp = StatusPage(self.status, token=status.token, act=self._act)
            pages[status.path] = _Page(app, _READS | {"POST"}, NetworkSet(status.allow))
        return pages

    def prepare(self, policy: Policy) -> Callable[[], None]:
        """See `seawall.watch.Subscriber`."""
        return partial(self._follow, policy, *self._gate(policy, before=self.gate))

    def forget_tenants(self) -> None:
        """Have ``tenants`` asked anew for everybody."""
        if self._directory is not None:
            self._directory.forget()

    def _follow(self, policy: Policy, gate: Gate, keeper: Keeper | None) -> None:
        before = self.gate.shared
        gate.enter_into_force()
        self._put_in_force(policy, gate, keeper)
        self._advise()
        if before is gate.shared or not _is_running():
            return
        if gate.shared is not None:
            gate.shared.open()
        if before is not None and not any(other.gate.shared is before for other in _live):
            # Requests that it serves still make it connect again, for as long as they last.
            closing = create_task(_close(before))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _tick(self) -> None:
        """Log what has become of requests in this second."""
        gate = self.gate
        turnstile = gate.turnstile if gate.policy.mode is Mode.ENFORCE else None
        self._journal.tick(0 if turnstile is None else turnstile.refused, gate.called)

    def reloaded(self, result: str) -> None:
        """See `seawall.watch.Subscriber`."""
        self._cells.values[self._cells.index(CONFIG_RELOADS, result)] += 1

    @property
    def loop(self) -> AbstractEventLoop | None:
        """The loop that has served last, as far as is known."""
        return next((loop for loop in self._loops if loop.is_running()), None)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.gate!r}, {self.gate.backend!r}>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        kind = scope["type"]
        if (kind != "http" and kind != "websocket") or _switched_off:
            if kind == "lifespan":
                return await self._live(scope, receive, send)
            return await self.app(scope, receive, send)
        started = self._clock()
        # Upper case, for some routers and servers take `post` where a rule says POST.
        method = scope["method"].upper() if kind == "http" else "GET"
        if type(scope["headers"]) is not list:
            scope["headers"] = list(scope["headers"])  # any iterable is allowed, and it is read more than once
        if method == "OPTIONS" and _is_preflight(scope["headers"]):
            return await self.app(scope, receive, send)
        gate = self.gate
        seen: Exchange | Passed | None = scope.get(SCOPE_KEY)
        if seen is not None and self._is_covered_by(seen, scope):
            return await self.app(scope, receive, send)
        path = path_below_root(scope, self._root) if self._root or scope.get("root_path") else scope["path"]
        page = self._pages.get(path)
        if page is not None and kind == "http" and method in page.methods:
            return await self._serve_page(page, seen, scope, receive, send)
        if not path.isprintable() and has_control_character(path) and gate.policy.mode is not Mode.OFF:
            return await self._turn_away(_CONTROL_CHARACTER, gate.policy.mode, seen, scope, receive, send)
        position = gate.routes.match(path, method)
        if gate.passes[position]:
            return await self._pass(None, seen, scope, receive, send)
        address = None
        if gate.guarded:
            client = gate.clients.resolve(scope)
            if client in gate.denies:
                return await self._turn_away(_DENIED, gate.modes[position], seen, scope, receive, send)
            if client in gate.exempts:
                return await self._pass(None, seen, scope, receive, send)
            address = gate.clients.bucket(client)
        if self._looks:
            self._look_for_proxies(scope)
        known = None
        if self._directory is not None:
            tenant, known = await self._known(self._directory, seen, scope)
        elif self.identify is None:
            tenant = gate.tenants.find(scope)
        elif type(seen) is Exchange and seen.shell.identify == self.identify:
            tenant = seen.tenant
        else:
            tenant = await self._identified(seen, scope)
        if self._blocks and tenant is not None and self._blocks.of(tenant) is not None:
            return await self._turn_away(_DENIED, gate.modes[position], seen, scope, receive, send, tenant)
        found = gate.lane(scope, position, tenant, address, known)
        if found is None:
            return await self._turn_away(_UNIDENTIFIED, gate.modes[position], seen, scope, receive, send)
        lane, principal, address = found
        if lane.terms.mode is Mode.OFF and gate.hints is None:
            return await self._pass(tenant, seen, scope, receive, send)
        hint = gate.hints.read(scope, started) if gate.hints is not None else None
        if hint is not None:
            lane = gate.hinted(lane, hint)

        exchange = Exchange(self, gate, lane, tenant, principal, address, scope, receive, send)
        if self._traces:
            exchange.span = tracing.current()
        if hint is not None:
            exchange.deadline = gate.deadline(hint)
        if gate.body_timeout is not None and kind == "http":
            exchange.limit_body(gate.body_timeout)
        if seen is not None:
            if type(seen) is Exchange:
                return await self._serve_inside(seen, exchange, scope, receive, send)
            exchange.counted = True
        values = gate.cells.values
        entered: int | None = None
        ended = CANCELLED
        outcome = Outcome.IGNORED
        before = current_exchange.get()
        current_exchange.set(exchange)
        try:
            denied: Any = gate.admit(exchange)
            if denied is not None and type(denied) is not Denied:
                denied = await denied
            if exchange.verdict is not None:
                nearest = lane.checks.count(exchange.verdict, values)
                if lane.enforced:
                    exchange.closest = nearest
            decided = self._clock()
            took = decided - started
            values[self._decision_seconds + bisect_left(_DECISION_BOUNDS, took)] += 1
            values[self._decision_seconds + len(_DECISION_BOUNDS) + 1] += took
            if denied is not None:
                if denied.reason is GONE:
                    return None
                lane.reject(denied)
                if denied.enforced:
                    return await exchange.refuse(denied)
                exchange.settle(Outcome.IGNORED, refund=True)  # as enforcing would have left it
            entered = decided
            values[lane.inflight] += 1
            scope[SCOPE_KEY] = exchange
            await self.app(scope, exchange.receive, exchange.answer)
            ended = lane.admitted
            outcome = exchange.outcome()
            if exchange.withheld is not None and not exchange.answered:
                await exchange.refuse(exchange.withheld)
        except Exception as error:
            ended = lane.admitted  # the server will answer 500
            outcome = exchange.outcome(error)
            if not ((exchange.late or _is_refusal(error)) and await exchange.refuse_late()):
                raise
        finally:
            if entered is not None:
                values[lane.inflight] -= 1
                if lane.timed and kind == "http" and not exchange.refused:
                    took = self._clock() - entered
                    values[lane.seconds + bisect_left(_REQUEST_BOUNDS, took)] += 1
                    values[lane.seconds + len(_REQUEST_BOUNDS) + 1] += took
            if not exchange.counted:
                exchange.count(ended)
            if exchange.held or exchange.owed or (exchange.refused and (exchange.charged or exchange.dues)):
                exchange.settle(outcome, refund=exchange.refused)
            # Or each request would be a cycle, left to the garbage collector; and whoever serves a scope again is new.
            scope.pop(SCOPE_KEY, None)
            exchange.scope = None
            exchange.receive = _gone
            exchange.inside = ()
            # Set and not reset: the coroutine may be closed in another context, in which a token is an error.
            current_exchange.set(before)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Connect as the application begins, and disconnect when it has ended and before the server knows.

        It begins and serves whatever the store does. Where the application does not take part in this, neither does
        Seawall, but for connecting: the server goes on without, and nobody says when it ends.
        """
        begun = False

        async def tell(message: Message) -> None:
            nonlocal begun
            if message["type"] == "lifespan.startup.complete":
                begun = True
            elif message["type"] in _SHUT_DOWN:
                begun = False
                await self._end()
            await send(message)

        if self._watch is not None:
            self._loops.add(get_running_loop())
            on_hangup()
        elif self.gate.shared is None and self._keeper is None:
            return await self.app(scope, receive, send)
        if self.gate.shared is not None:
            self.gate.shared.open()
        try:
            await self.app(scope, receive, tell)
        except Exception:
            if begun:
                await self._end()
            raise
        if begun:
            await self._end()

    async def _end(self) -> None:
        if self._keeper is not None:
            self._keeper.save()
        if self.gate.shared is not None:
            await _close(self.gate.shared)

    async def _serve_inside(self, outer: Exchange, inner: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve what another shell has let in: this one's limits join its headers, and its refusal undoes both."""
        lane = inner.lane
        outcome = Outcome.IGNORED
        try:
            denied: Any = inner.gate.admit(inner)
            if denied is not None and type(denied) is not Denied:
                denied = await denied
            if inner.verdict is not None:
                lane.checks.count(inner.verdict, inner.gate.cells.values)
            outer.include(inner)
            if denied is not None:
                if denied.reason is GONE:
                    return None
                lane.reject(denied)
                if denied.enforced:
                    return await outer.refuse(denied)
                inner.settle(Outcome.IGNORED, refund=True)
            await self.app(scope, inner.receive, send)
            outcome = outer.outcome()
        except Exception as error:
            outcome = outer.outcome(error)
            if not (_is_refusal(error) and await outer.refuse_late()):
                raise
        finally:
            inner.settle(outcome, refund=outer.refused)
            inner.scope = None
            inner.receive = _gone

    async def _pass(
        self, tenant: str | None, seen: Exchange | Passed | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Serve what is exempt: counted, and otherwise untouched."""
        self._count_nobody(EXEMPT, seen, tenant)
        await self._serve_passed(seen, scope, receive, send)

    async def _serve_passed(self, seen: Exchange | Passed | None, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve what has no lane. Shells further in are told, while it lasts, that it is decided and counted."""
        if seen is not None:
            return await self.app(scope, receive, send)
        scope[SCOPE_KEY] = Passed(self, scope)
        try:
            await self.app(scope, receive, send)
        finally:
            scope.pop(SCOPE_KEY, None)

    def _count_nobody(
        self, outcome: int, seen: Exchange | Passed | None, tenant: str | None = None, reason: str = ""
    ) -> None:
        """Count a request without a lane, unless a shell further out counts it."""
        if seen is not None:
            return
        values = self._cells.values
        values[self.gate.nobody[outcome]] += 1
        if self.gate.labels is not None and tenant is not None:
            values[self.gate.labels.cell(tenant, outcome)] += 1
        if self._traces and (span := tracing.current()) is not None:
            tracing.note(span, OUTCOMES[outcome], tenant=tenant, reason=reason)

    async def _turn_away(
        self,
        denied: Denied,
        mode: Mode,
        seen: Exchange | Passed | None,
        scope: Scope,
        receive: Receive,
        send: Send,
        caller: Key = NOBODY,
    ) -> None:
        """Refuse somebody who has no lane (400, 401 or 403), or in shadow mode say that one would have."""
        spec = REJECTIONS if mode is Mode.ENFORCE else SHADOW_REJECTIONS
        self._cells.values[self._cells.index(spec, denied.reason, "", "", "none")] += 1
        if mode is Mode.SHADOW:
            self._count_nobody(ALLOWED, seen)
            return await self._serve_passed(seen, scope, receive, send)
        if type(seen) is Exchange:
            return await seen.refuse(denied)
        self._count_nobody(DENIED, seen, caller if isinstance(caller, str) else None, denied.reason)
        self.refusals.note(caller, denied.reason, "", "none")
        await self.deliver(self.gate.answers.prepare(denied), None, [], scope, receive, send)

    async def deliver(
        self,
        prepared: Prepared,
        after: int | None,
        limits: list[Header],
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        connected: bool = False,
    ) -> None:
        """Send a refusal in the form that its caller understands. The request's body is not read.

        ``connected`` is whether the application may have taken a WebSocket's first message already.
        """
        if self.on_reject is not None:
            custom = await self._custom(scope, prepared.refusal(after))
            if custom is not None:
                return await custom(scope, receive, send)
        accept = content_type = b""
        for name, value in scope["headers"]:
            if name == b"accept":
                accept = value
            elif name == b"content-type":
                content_type = value
        if content_type.startswith(b"application/grpc") and scope["type"] == "http":
            headers = [*grpc_headers(prepared, after), *limits]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            return await send({"type": "http.response.body", "body": b""})
        html = b"html" in accept.lower() and wants_html(accept)
        body, headers = self.gate.answers.fill(prepared, after, html=html)
        start = {"type": "http.response.start", "status": prepared.status, "headers": [*headers, *limits]}
        if scope["type"] == "http":
            await send(start)
            return await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
        if not connected:
            await receive()  # the handshake, which a server may want to have handed over first
        if "websocket.http.response" in (scope.get("extensions") or ()):
            await send({**start, "type": "websocket.http.response.start"})
            return await send({"type": "websocket.http.response.body", "body": body})
        # 1013, try again later; the reason is all that can be said before a connection is there.
        await send({"type": "websocket.close", "code": 1013, "reason": prepared.reason})

    async def _custom(self, scope: Scope, refusal: Refusal) -> ASGIApp | None:
        """What `on_reject` wants to answer instead."""
        if self.on_reject is None:
            return None
        try:
            answer: Any = self.on_reject(scope, refusal)
            custom: ASGIApp | None = await answer if inspect.isawaitable(answer) else answer
            return custom
        except Exception as error:
            advice.once("on_reject", "on_reject= failed; refusals are answered as usual", error=error)
            return None

    async def _identified(self, seen: Exchange | Passed | None, scope: Scope) -> str | None:
        """What ``identify`` says. Nobody, if it fails: a bug there must neither open the gate nor close it to all."""
        if self.identify is None:
            return None
        try:
            answer = self.identify(scope)
            return tenant_id(await answer if inspect.isawaitable(answer) else answer)
        except Exception as error:
            advice.once("identify", "identify= failed; its callers are anonymous", error=error)
            return None
        except BaseException:
            self._count_nobody(CANCELLED, seen)
            raise

    async def _known(
        self, directory: Directory, seen: Exchange | Passed | None, scope: Scope
    ) -> tuple[str | None, Known | None]:
        """The tenant, and what the application's database says of one that the file does not list."""
        gate, unlisted = self.gate, list[bytes]()
        if self.identify is None:
            tenant = gate.tenants.find(scope, unlisted)
        else:
            tenant = await self._identified(seen, scope)
        names = [f"sha256:{digest.hex()}" for digest in unlisted]
        if tenant is not None and tenant not in gate.policy.tenants:
            names.append(tenant)
        for name in names:
            known = directory.get(name)
            if isinstance(known, Asked):
                try:
                    known = await directory.ask(name)
                except BaseException:
                    self._count_nobody(CANCELLED, seen)
                    raise
            if known is not None:
                return known.id, known
        return tenant, None

    async def _serve_page(
        self, page: _Page, seen: Exchange | Passed | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer for Seawall itself, if this peer may ask: 404 like any path that does not exist, if not."""
        self._count_nobody(EXEMPT, seen)
        if self._may_see(page, scope):
            return await page.app(scope, receive, send)
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"9")]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else b"Not Found"})

    def _may_see(self, page: _Page, scope: Scope) -> bool:
        """Whether the direct peer is allowed, and whoever it forwards for.

        Forwarding headers from a peer that is no trusted proxy are refused, or an nginx on the same machine, which is
        not configured anywhere, would open a path meant for localhost to everybody.
        """
        allowed = page.allow
        if allowed is None:
            return True
        clients = self.gate.clients
        peer = clients.peer(scope)
        if peer not in allowed:
            return False
        if not is_forwarded(scope["headers"]):
            return True
        # A proxy that tells nothing we can read is no client either.
        client = clients.resolve(scope)
        return clients.trusts(peer) and client != peer and client in allowed

    def _is_covered_by(self, seen: Exchange | Passed, scope: Scope) -> bool:
        """Whether a shell further out already enforces everything that this one would.

        In an application mounted below it the same rules are about other paths, so there it does not.
        """
        outer = seen.shell
        if not (self.parts <= outer.gate.parts and _same(self.policy, outer.gate.policy)):
            return False
        if seen.root != scope.get("root_path"):
            return False
        if self.parts & outer.parts:
            advice.about_twice(type(self).__name__)
        return True

    def _look_for_proxies(self, scope: Scope) -> None:
        """Say once that a proxy is in front and not configured. Looks at the first few hundred requests only."""
        self._looks = 0 if advice.about_proxies(scope["headers"]) else self._looks - 1

    def _advise(self) -> None:
        """What is better said before the first request."""
        for text in self.policy.warnings:
            # Of a file that says nothing, and a backend that was given.
            if self.gate.shared is None or not (text is _FORGETFUL or "warning[W008]" in text):
                advice.once(text, text)
        if any(other.parts & self.parts and _same(other.policy, self.policy) for other in self._inner):
            advice.about_twice(type(self).__name__)
        advice.about_cors(self.app)
        if self.gate.backend.name == "memory":
            advice.about_workers()

    @property
    def backend(self) -> Backend:
        return self.gate.backend

    def statistics(self) -> dict[str, Any]:
        """What is held now: ``backend`` (keys by store), ``concurrency`` (callers and requests in flight), ``overload``
        (the limit and why, what is in flight and waits, the lag) and ``streams`` (open, by rule)."""
        gate = self.gate
        return {
            "backend": gate.backend.statistics(),
            "concurrency": gate.concurrency.statistics() if gate.fleet is None else gate.fleet.in_flight(),
            "overload": {} if gate.turnstile is None else gate.turnstile.current.statistics(),
            "streams": {} if gate.streams is None else dict(gate.streams.open),
        }

    def status(self) -> dict[str, Any]:
        """The document of the status page: what holds, how reloads went, what is counted and held, who was refused."""
        gate, watch = self.gate, self._watch
        counts, workers = counted(self._cells)
        return document(
            self.policy,
            now=time(),
            started=self._started,
            counts=counts,
            held=self.statistics(),
            up=gate.shared is None or gate.shared.up,
            reload=None if watch is None else watch.state,
            files=() if watch is None else [str(file) for file in watch.files],
            refused=self.refusals.busiest(MOST_REFUSED, gate.caller),
            blocked=[
                {"tenant": tenant, "until": instant_text(block.until / SECOND), "reason": block.reason}
                for tenant, block in self._blocks.shown(self.policy.tenants)
            ],
            history=() if watch is None else watch.changes(),
            workers=workers,
        )

    async def _act(self, action: str, given: dict[str, Any]) -> dict[str, Any]:
        """Do what an operator asks for by the status page."""
        tenant = given["tenant"]
        known = None
        if self._directory is not None and tenant not in self.policy.tenants:
            known = await self._directory.of(tenant)
        try:
            if action == "reset":
                done: dict[str, Any] = {"reset": await operate.reset(self.gate, tenant, known)}
            elif action == "show":
                return await operate.show(self.gate, self._blocks, tenant, known)
            else:
                until = None
                if action == "block":
                    until = Block(self._wall_clock() + int(given["seconds"] * SECOND), given.get("reason", ""))
                await operate.block(self.gate.backend, tenant, until)
                done = {"blocked": action == "block"}
        except operate.CannotOperate as error:
            raise ActionError(str(error), 409) from None
        except OSError as error:
            raise ActionError(f"the store does not answer: {error}", 503) from None
        shown = printable(tenant)
        logger.warning("an operator has asked to %s %s", action, shown, extra={"event": action, "tenant": shown})
        return {"tenant": tenant, **done}

    def readings(self) -> Iterable[Reading]:
        """Metrics that are read off at a scrape."""
        if self.gate.turnstile is not None:
            overload = self.gate.turnstile.current.statistics()
            yield CONCURRENCY_LIMIT, (), overload["limit"]
            yield LOOP_LAG, (), overload["lag"]
            yield UTILIZATION, (), overload["utilization"]
            for name, waiting in overload["waiting"].items():
                yield QUEUED, (name,), waiting
        if self.gate.streams is not None:
            for rule, count in list(self.gate.streams.open.items()):  # a thread may ask
                yield STREAMS, (rule,), count
        yield CONFIG_INFO, (self.policy.digest[:12], self.policy.mode.name.lower()), 1
        yield LAST_RELOAD, (), self._started if self._watch is None else self._watch.state.loaded_at
        yield BUILD_INFO, (__version__,), 1

    def before_scrape(self) -> None:
        if self.gate.labels is not None:
            self.gate.labels.grant()

    def reset(self) -> None:
        """Forget every caller's usage, and all counts (tests). A memory backend that was given forgets as well; what is
        in a shared store stays there.
        """
        if isinstance(self.given_backend, MemoryBackend):
            self.given_backend.clear()
        self._put_in_force(self.policy, *self._gate(self.policy))
        self._cells.clear()


class LimitExceeded(HTTPException):
    """What `seawall.limit` raises. Applications need not catch it: whatever they answer, the refusal is sent."""

    def __init__(self, status: int = CALLER) -> None:
        super().__init__(status, "rate limit exceeded" if status == CALLER else "rate limit not checked")


def _is_refusal(error: BaseException) -> bool:
    """Whether an exception is what `seawall.limit` raises, as it is or out of a task group."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_refusal, error.exceptions))
    return isinstance(error, LimitExceeded)


class _Page(NamedTuple):
    """What Seawall answers itself on a path: with which methods, and to which peers (``None``: to all)."""

    app: ASGIApp
    methods: frozenset[str]
    allow: NetworkSet | None


@final
class Seawall(Middleware):
    """Everything that a configuration file says, in one middleware.

    ``config`` is the path of a YAML file, a mapping of the same shape, or a loaded `Policy`; ``default`` instead of it
    is one rate for every client address (``"100/minute"``). Exactly one of the two is given.

    ``backend`` replaces the one that the configuration names, of which a process has one for equal settings.
    ``identify(scope)`` returns a tenant's id (or ``None`` for an anonymous caller) instead of the configured sources,
    now or awaited. ``on_reject(scope, refusal)`` returns, now or awaited, an ASGI app that answers instead of Seawall
    (all of it: headers as well), or ``None``. ``tenants(name)`` returns, now or awaited, what the file would say of a
    tenant that it does not list (``{"plan": "pro", "overrides": {...}}``), or ``None``: by its id, or by ``sha256:``
    and the hash of an API key that nobody has, and then with the ``id``. Answers are kept for a minute, and while the
    function fails for longer. ``registry`` is where metrics are published, by default one of Seawall's
    own (`metrics_app`). ``clock`` is monotonic nanoseconds (tests).

    Raises `ConfigError`, whose text is every mistake in the file at its place.

    >>> from starlette.applications import Starlette
    >>> app = Starlette()
    >>> app.add_middleware(Seawall, default="100/minute")
    """

    parts = ALL_PARTS

    def __init__(
        self,
        app: ASGIApp,
        config: Config | None = None,
        *,
        default: RateLike | None = None,
        backend: Backend | None = None,
        identify: Identify | None = None,
        on_reject: OnReject | None = None,
        tenants: LookUp | None = None,
        registry: CollectorRegistry | None = None,
        clock: Clock | None = None,
    ) -> None:
        policy = _policy(config, "default", None if default is None else (lambda: simple(parse_rates(default))))
        super().__init__(
            app,
            policy,
            backend=backend,
            identify=identify,
            on_reject=on_reject,
            tenants=tenants,
            registry=registry,
            clock=clock,
        )


@final
class RateLimitMiddleware(Middleware):
    """The rates of a configuration (and its tenants' concurrency), or one rate without a file.

    ``limit`` is a rate such as ``"10/second"``; ``per`` says whose: ``client_ip`` (the default), ``tenant``,
    ``global``, ``state:NAME``, or a list of them. Everything else is as for `Seawall`.
    """

    parts = RATE_PARTS

    def __init__(
        self,
        app: ASGIApp,
        config: Config | None = None,
        *,
        limit: RateLike | None = None,
        per: str | Sequence[str] = "client_ip",
        backend: Backend | None = None,
        identify: Identify | None = None,
        on_reject: OnReject | None = None,
        registry: CollectorRegistry | None = None,
        clock: Clock | None = None,
    ) -> None:
        build = None if limit is None else (lambda: _single("rate", per, rates=parse_rates(limit)))
        super().__init__(
            app,
            _policy(config, "limit", build),
            backend=backend,
            identify=identify,
            on_reject=on_reject,
            registry=registry,
            clock=clock,
        )


@final
class QuotaMiddleware(Middleware):
    """The calendar quotas of a configuration, or one quota without a file.

    ``limit`` is a count per day or month such as ``"10_000/day"``, ``zone`` the time zone whose midnight ends it,
    ``per`` whose it is. Everything else is as for `Seawall`.
    """

    parts = QUOTA_PARTS

    def __init__(
        self,
        app: ASGIApp,
        config: Config | None = None,
        *,
        limit: str | None = None,
        zone: str = "UTC",
        per: str | Sequence[str] = "client_ip",
        backend: Backend | None = None,
        identify: Identify | None = None,
        on_reject: OnReject | None = None,
        registry: CollectorRegistry | None = None,
        clock: Clock | None = None,
    ) -> None:
        build = None if limit is None else (lambda: _single("quota", per, quota=parse_quota(limit, zone)))
        super().__init__(
            app,
            _policy(config, "limit", build),
            backend=backend,
            identify=identify,
            on_reject=on_reject,
            registry=registry,
            clock=clock,
        )


@final
class LoadSheddingMiddleware(Middleware):
    """The shedding of a configuration (with its deadlines and budgets of streams), or of these settings without a file.

    ``algorithm`` is ``adaptive`` (the default), ``gradient2``, ``aimd`` or ``fixed``; ``initial``, ``min`` and ``max``
    are requests in flight, 20, 2 and 1000 by default. All requests are alike here: `PriorityAdmissionMiddleware` tells
    them apart. Everything else is as for `Seawall`.
    """

    parts = SHEDDING_PARTS

    def __init__(
        self,
        app: ASGIApp,
        config: Config | None = None,
        *,
        algorithm: str | None = None,
        initial: int | None = None,
        min: int | None = None,  # noqa: A002  # as the file calls them
        max: int | None = None,  # noqa: A002
        identify: Identify | None = None,
        on_reject: OnReject | None = None,
        registry: CollectorRegistry | None = None,
        clock: Clock | None = None,
    ) -> None:
        limit = {name: value for name, value in (("initial", initial), ("min", min), ("max", max)) if value is not None}
        shedding: dict[str, Any] = {} if algorithm is None else {"algorithm": algorithm}
        if limit:
            shedding["limit"] = limit
        build = None if config is not None and not shedding else partial(_sheds, shedding)
        super().__init__(
            app,
            _policy(config, "algorithm=, initial=, min= or max", build),
            identify=identify,
            on_reject=on_reject,
            registry=registry,
            clock=clock,
        )


@final
class PriorityAdmissionMiddleware(Middleware):
    """The priorities of a configuration: who is admitted first when not all can be, fairly between tenants.

    How many can be is what ``shedding`` says, the adaptive law if it says nothing. ``classes`` are the names without a
    file, the most important first; requests are then of the middle one, and a header may lower that. Everything else
    is as for `Seawall`.
    """

    parts = PRIORITY_PARTS

    def __init__(
        self,
        app: ASGIApp,
        config: Config | None = None,
        *,
        classes: Sequence[str] | None = None,
        identify: Identify | None = None,
        on_reject: OnReject | None = None,
        registry: CollectorRegistry | None = None,
        clock: Clock | None = None,
    ) -> None:
        build = None if classes is None else partial(_ranks, classes)
        super().__init__(
            app,
            _policy(config, "classes", build),
            identify=identify,
            on_reject=on_reject,
            registry=registry,
            clock=clock,
        )


def _sheds(shedding: Mapping[str, Any]) -> Policy:
    """The policy of shedding without a file."""
    return load_mapping({"version": 1, "plans": {"default": {"rate": "unlimited"}}, "shedding": dict(shedding)})


def _ranks(classes: Sequence[str]) -> Policy:
    """The policy of priorities without a file."""
    if isinstance(classes, str) or len(set(classes)) != len(classes):
        raise misuse(f"classes= is a list of different names, the most important first, not {classes!r}")
    priorities: dict[str, Any] = {name: {} for name in classes}
    return load_mapping({"version": 1, "plans": {"default": {"rate": "unlimited"}}, "priorities": priorities})


def _policy(config: Config | None, shortcut: str, build: Callable[[], Policy] | None) -> Policy | Watch:
    """The policy of a configuration, as a watch where it is a file, or the one that a keyword describes; exactly one of
    them is given."""
    if (config is None) == (build is None):
        raise misuse(f"give either config= or {shortcut}=, not {'both' if build else 'neither'}")
    if build is not None:
        try:
            return build()
        except NotationError as error:
            raise misuse(f"{shortcut}=: {error.message}") from None
    if isinstance(config, Policy):
        return config
    if isinstance(config, Mapping):
        return load_mapping(config)
    if isinstance(config, str | PathLike):
        return Watch.of(config)
    raise misuse(f"config= is a path, a mapping or a Policy, not {type(config).__name__}")


def _single(name: str, per: str | Sequence[str], rates: tuple[Rate, ...] = (), quota: Quota | None = None) -> Policy:
    """The policy of one limit without a file: of one rule that everything matches, in a plan that limits nothing."""
    route = Route("everything", ("/**",), limits=(RouteLimit(name, parse_per(per), rates, quota, of_plan=True),))
    return Policy(
        plans={"default": Plan("default")},
        default_plan="default",
        anonymous_plan="default",
        routes=(route,),
        digest=sha256(repr(route).encode()).hexdigest(),
        warnings=(_FORGETFUL,) if quota else (),
    )


def parse_per(per: str | Sequence[str]) -> Per:
    """Whose limit it is, checked."""
    kinds = (per,) if isinstance(per, str) else tuple(per)
    for kind in kinds or ("",):
        if kind not in ("client_ip", "tenant", "global") and not (kind.startswith("state:") and len(kind) > 6):
            raise misuse(f"per= is client_ip, tenant, global, state:NAME or a list of them, not {kind!r}")
    return kinds


def misuse(message: str) -> ConfigError:
    return ConfigError([Diagnostic("seawall", 0, 0, "error", "E015", message)])


def _share(settings: BackendSettings, clock: Clock, wall_clock: Clock) -> SharedBackend:
    """The backend that a configuration names: one connection, one share of the limits for all that name it alike."""
    backend = _shared.get((settings, clock, wall_clock))
    if backend is not None:
        return backend
    url = settings.url or ""
    options: dict[str, Any] = {
        "timeout_ns": settings.timeout_ns,
        "key_prefix": settings.key_prefix,
        "secret": settings.secret,
        "instances": settings.instances,
        "max_keys": settings.max_keys,
        "on_failure": settings.on_failure,
        "deny_cache": settings.deny_cache,
        "clock": clock,
        "wall_clock": wall_clock,
    }
    made: SharedBackend
    try:
        if settings.type == "redis":
            from seawall.backends.redis import RedisBackend

            made = RedisBackend(url, leases=settings.leases, **options)
        else:
            from seawall.backends.limits import LimitsBackend

            made = LimitsBackend(url, **options)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("redis", "hiredis"):
            raise
        raise misuse("the redis backend needs: pip install 'seawall[redis]'") from None
    except ValueError as error:
        raise misuse(f"backend: {error}") from None
    _shared[settings, clock, wall_clock] = made
    return made


def _is_running() -> bool:
    return _get_running_loop() is not None


async def _close(backend: SharedBackend) -> None:
    """Let go of the store. An application that ends must not be kept from it."""
    try:
        async with timeout(_CLOSING):
            await backend.aclose()
    except Exception:
        logger.warning("the %s backend could not be closed in order", backend.name, exc_info=True)


def _same(one: Policy, other: Policy) -> bool:
    """Whether two policies are one, loaded twice. Asked on the request path, so by their digests."""
    return one is other or (one.digest == other.digest != "")


def _agreed(name: str, *given: T | None) -> T | None:
    """What stacked middlewares of one policy were given, by whichever of them; they may not disagree."""
    told = [value for value in given if value is not None]
    if any(value != told[0] for value in told):
        raise misuse(f"stacked middlewares of one policy were given different {name}=")
    return told[0] if told else None


def _is_preflight(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether an OPTIONS request is a browser asking for permission."""
    names = {name for name, _ in headers}
    return b"origin" in names and b"access-control-request-method" in names


def reload() -> None:
    """Read every configuration file of this process again, now, and look up ``tenants`` anew.

    Raises `ConfigError` for files that are wrong; of each of them what was in force stays.
    """
    for middleware in list(_live):
        middleware.forget_tenants()
    reload_all()


def switch_off(off: bool) -> None:
    """Let everything pass, or stop doing so. Nests (tests)."""
    global _switched_off
    _switched_off += 1 if off else -1


def reset_all() -> None:
    """Forget all usage, all counts and all warnings of this process (tests)."""
    advice.forget()
    for middleware in list(_live):
        middleware.reset()


async def _gone() -> Message:
    """What there is to receive after the end of a request."""
    return {"type": "http.disconnect"}


_NO_BLOCKS = Blocks(time_ns)
_CONTROL_CHARACTER = Denied(400, "denied")
_DENIED = Denied(403, "denied")
_UNIDENTIFIED = Denied(401, "unidentified")
