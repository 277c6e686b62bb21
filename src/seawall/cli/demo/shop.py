"""The application that the demo protects: a shop of four endpoints and one middleware.

It is a FastAPI application where FastAPI is installed, and the same endpoints on plain Starlette where it is not.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from seawall import Seawall

CONFIG = Path(__file__).with_name("seawall.yaml")


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

    async def login(_: Request) -> JSONResponse:
        return JSONResponse({"welcome": False})

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"ok": True})

    return Starlette(
        routes=[
            Route("/v1/items/{item:int}", read_item),
            Route("/v1/search", search),
            Route("/login", login, methods=["POST"]),
            Route("/healthz", health),
        ]
    )


def build(*, fastapi: bool = find_spec("fastapi") is not None) -> Starlette:
    """The shop behind Seawall."""
    app = with_fastapi() if fastapi else with_starlette()
    app.add_middleware(Seawall, config=CONFIG)
    return app
