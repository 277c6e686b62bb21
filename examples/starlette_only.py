"""Starlette without FastAPI, and single limits without a file: a rate, a quota, and one route's own limit.

    python examples/starlette_only.py
    curl -i http://localhost:8000/            # RateLimit-Policy names "rate" and "quota"
    curl -s -o /dev/null -w '%{http_code}\n' 'http://localhost:8000/report?n=[1-4]'    # the 4th is a 429
    curl -s http://localhost:8000/report      # ... by the policy "report"

The three limits come from three places, and the answer has one set of headers for all of them.
"""

import os

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from seawall import QuotaMiddleware, RateLimitMiddleware, limit


async def home(_: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


@limit("3/minute", name="report")
async def report(_: Request) -> PlainTextResponse:
    return PlainTextResponse("a long report")


app = Starlette(
    routes=[Route("/", home), Route("/report", report)],
    middleware=[
        Middleware(RateLimitMiddleware, limit="10/second"),  # per client address, as nothing else is said
        Middleware(QuotaMiddleware, limit="1_000/day", zone="Europe/Berlin"),  # until midnight there
    ],
)


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
