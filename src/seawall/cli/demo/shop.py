"""The application that the demo protects: a shop of some endpoints and one middleware.

It is a FastAPI application where FastAPI is installed, and the same endpoints on plain Starlette where it is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from time import thread_time
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from seawall import Seawall
from seawall.config import load, load_mapping

CONFIG = Path(__file__).with_name("seawall.yaml")
BACKEND = "SEAWALL_DEMO_BACKEND"
"""The variable of the environment with the server's ``backend`` in JSON: no address of a store is in a command line."""

WAITS = 0.010
COMPUTES = 0.008


async def work() -> None:
    """What a page takes: a database, and then the processor."""
    await asyncio.sleep(WAITS)
    until = thread_time() + COMPUTES
    while thread_time() < until:
        pass


def with_fastapi() -> Starlette:
    """The shop as most people would write it."""
    from fastapi import FastAPI

    app = FastAPI(title="Seawall demo")

    @app.get("/v1/items/{item}")
    async def read_item(item: int) -> dict[str, Any]:
        return {"item": item, "name": "a lighthouse"}

    @app.get("/v1/search")
    async def search(q: str = "") -> dict[str, Any]:
        return {"q": q, "found": ["a lighthouse", "a pier"]}

    @app.get("/v1/pages/{page}")
    async def read_page(page: int) -> dict[str, Any]:
        await work()
        return {"page": page}

    @app.post("/v1/checkout")
    async def check_out() -> dict[str, Any]:
        await work()
        return {"sold": "a lighthouse"}

    @app.post("/login")
    async def login() -> dict[str, Any]:
        return {"welcome": False}

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        return {"ok": True}

    return app


def with_starlette() -> Starlette:
    """The same without FastAPI."""

    async def read_item(request: Request) -> JSONResponse:
        return JSONResponse({"item": request.path_params["item"], "name": "a lighthouse"})

    async def search(request: Request) -> JSONResponse:
        return JSONResponse({"q": request.query_params.get("q", ""), "found": ["a lighthouse", "a pier"]})

    async def read_page(request: Request) -> JSONResponse:
        await work()
        return JSONResponse({"page": request.path_params["page"]})

    async def check_out(_: Request) -> JSONResponse:
        await work()
        return JSONResponse({"sold": "a lighthouse"})

    async def login(_: Request) -> JSONResponse:
        return JSONResponse({"welcome": False})

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"ok": True})

    return Starlette(
        routes=[
            Route("/v1/items/{item:int}", read_item),
            Route("/v1/search", search),
            Route("/v1/pages/{page:int}", read_page),
            Route("/v1/checkout", check_out, methods=["POST"]),
            Route("/login", login, methods=["POST"]),
            Route("/healthz", health),
        ]
    )


def build(backend: Mapping[str, Any] | None = None, *, fastapi: bool = find_spec("fastapi") is not None) -> Starlette:
    """The shop behind Seawall, whose state is in memory or in ``backend``."""
    app = with_fastapi() if fastapi else with_starlette()
    if backend is None:
        app.add_middleware(Seawall, config=CONFIG)
    else:
        settings = load_mapping({"version": 1, "plans": {"default": {"rate": "unlimited"}}, "backend": backend})
        app.add_middleware(Seawall, config=replace(load(CONFIG), backend=settings.backend))
    return app
