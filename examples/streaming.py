"""Streams beside requests: their own budget, so that listeners who stay for hours take no places from anybody.

    python examples/streaming.py
    curl -N http://localhost:8000/events &    # three times; they stay open. X-API-Key tells callers apart
    curl -N -H 'X-API-Key: acme-demo-key' http://localhost:8000/events &
    curl -i http://localhost:8000/events      # 429: one caller may have 3, "violated-policies":["streams"]
    curl -i -H 'X-API-Key: acme-demo-key' http://localhost:8000/events    # 503 once all 4 are taken, whoever asks
    curl -s http://localhost:8000/now         # answered: of the one place for requests, streams hold none
    curl -s http://localhost:8000/metrics | grep seawall_streams

A request to a rule with `streaming` has to find room as any other does. Then its answer begins, and it gives its place
back and counts as a stream until the handler ends. A WebSocket is decided in its handshake and treated alike; /echo is
one, in the same budget. Server-sent events on a rule without `streaming` keep their place to the end.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse

from seawall import Seawall

app = FastAPI()
app.add_middleware(
    Seawall,
    config={
        "version": 1,
        "identity": {"tenant": [{"api_key": {"header": "X-API-Key"}}]},
        "plans": {"default": {"rate": "unlimited"}},
        "tenants": {
            "acme": {"keys": ["sha256:8676d15d94dabdd1283e6c407e2bb08a7b5c13b4e3667d4795c17172e080a3d4"]},
        },
        "routes": [
            {
                "name": "live",
                "match": {"path": ["/events", "/echo"]},
                "streaming": {"max": 4, "max_per_tenant": 3},
            },
        ],
        # One request at a time, to show that streams are not among them. Leave this out, and the limit is found.
        "shedding": {"algorithm": "fixed", "limit": {"initial": 1, "min": 1}},
        "metrics": {"path": "/metrics", "allow": ["127.0.0.1"]},
    },
)


async def ticks() -> AsyncIterator[str]:
    number = 0
    while True:
        yield f"data: {number}\n\n"
        number += 1
        await asyncio.sleep(0.2)


@app.get("/events")
async def events() -> StreamingResponse:
    return StreamingResponse(ticks(), media_type="text/event-stream")


@app.websocket("/echo")
async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    try:
        while True:
            await websocket.send_text(await websocket.receive_text())
    except WebSocketDisconnect:
        return


@app.get("/now")
async def now() -> dict[str, float]:
    return {"now": time.time()}


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
