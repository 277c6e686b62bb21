"""An application that is overloaded at will, run by real servers: each case of it is behind a policy of its own.

The first segment of a path is the case, made when it is first asked for; what stands before its ``-`` names its policy.
So tests share a server and nothing else.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from hashlib import sha256
from time import sleep, thread_time
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from seawall import Seawall

BUSY = 0.004
"""Seconds of CPU that ``/busy`` takes."""
BLOCKED = 0.02
"""Seconds for which ``/thread`` blocks one."""
CLASSES = {"first": {"queue": {"timeout": "30s"}}, "second": {"queue": {"timeout": "50ms"}}}
FIXED = {"algorithm": "fixed", "limit": {"initial": 2, "min": 1, "max": 2}}
ADAPTIVE = {"algorithm": "adaptive", "limit": {"initial": 4, "max": 8}}
POLICIES: dict[str, dict[str, Any]] = {
    "fixed": {"shedding": FIXED, "priorities": CLASSES},
    "adaptive": {"shedding": ADAPTIVE, "priorities": CLASSES},
}
"""All requests are ``first``, which waits, but those that ask to be ``second``, which does so for a moment only."""


class Case:
    """One application, its gate, and how often its handlers have begun and ended."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.thread_gate = threading.Event()
        self.begun = 0
        self.ended = 0

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/control", self.control, methods=["GET", "POST"]),
                Route("/wait", self.wait, methods=["GET", "POST"]),
                Route("/sum", self.sum, methods=["POST"]),
                Route("/busy", self.busy),
                Route("/thread", self.thread),
                Route("/thread-wait", self.thread_wait),
                Route("/background", self.background),
                Route("/events", self.events),
                WebSocketRoute("/chat", self.chat),
                WebSocketRoute("/slow-chat", self.slow_chat),
            ]
        )

    async def control(self, request: Request) -> Response:
        """What has happened; a POST lets everything go on."""
        if request.method == "POST":
            self.gate.set()
            self.thread_gate.set()
        return JSONResponse({"begun": self.begun, "ended": self.ended})

    async def wait(self, request: Request) -> Response:
        self.begun += 1
        await self.gate.wait()
        return await self._summed(request)

    async def sum(self, request: Request) -> Response:
        self.begun += 1
        await asyncio.sleep(0.001)
        return await self._summed(request)

    async def _summed(self, request: Request) -> Response:
        body = await request.body()
        self.ended += 1
        return JSONResponse({"size": len(body), "digest": sha256(body).hexdigest()})

    async def busy(self, request: Request) -> Response:
        """Never awaits."""
        self.begun += 1
        end = thread_time() + BUSY
        while thread_time() < end:
            pass
        self.ended += 1
        return Response()

    def thread(self, request: Request) -> Response:
        self.begun += 1
        sleep(BLOCKED)
        self.ended += 1
        return Response()

    def thread_wait(self, request: Request) -> Response:
        self.begun += 1
        self.thread_gate.wait(30)
        self.ended += 1
        return Response()

    async def background(self, request: Request) -> Response:
        self.begun += 1
        return Response(background=BackgroundTask(self._after))

    async def _after(self) -> None:
        await self.gate.wait()
        self.ended += 1

    async def events(self, request: Request) -> Response:
        self.begun += 1
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        await self.gate.wait()
        self.ended += 1
        yield b"data: 2\n\n"

    async def chat(self, socket: WebSocket) -> None:
        self.begun += 1
        await socket.accept()
        async for text in socket.iter_text():
            await socket.send_text(text.upper())
        self.ended += 1

    async def slow_chat(self, socket: WebSocket) -> None:
        await self.gate.wait()
        await self.chat(socket)


def config(policy: str) -> dict[str, Any]:
    return {
        "version": 1,
        "plans": {"default": {"rate": "unlimited", "priority": "first"}},
        "metrics": {"path": "/metrics", "allow": ["127.0.0.1"]},
        "routes": [
            {"name": "control", "match": {"path": "/control"}, "exempt": True},
            {"name": "events", "match": {"path": "/events"}, "streaming": {"max": 4}},
        ],
        **POLICIES[policy],
    }


cases: dict[str, ASGIApp] = {}


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    _, name, rest = scope["path"].split("/", 2)
    case = cases.get(name)
    if case is None:
        policy = name.partition("-")[0]
        case = cases[name] = Seawall(Case().app(), config=config(policy), registry=CollectorRegistry())
    await case({**scope, "path": f"/{rest}", "raw_path": f"/{rest}".encode()}, receive, send)
