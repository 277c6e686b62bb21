"""Streams: a WebSocket and server-sent events are decided when they connect, and are in flight until they end.

Each client address may have two of them open (`concurrency: 2`), and open 30 a minute.

    python examples/websocket.py
    curl -N http://localhost:8000/events &    # twice; they stay open
    curl -N http://localhost:8000/events &
    curl -i http://localhost:8000/events      # 429, "violated-policies":["concurrency"]
    kill %1; sleep 1; curl -N http://localhost:8000/events    # there is room again

A WebSocket that is refused never opens: its handshake is answered with the 429 itself where the server can do that
(uvicorn can), and is closed with 1013, "try again later", where it cannot. Messages in an open stream are not counted.
uvicorn serves WebSockets where the package `websockets` is installed.
"""

import asyncio
import os
from collections.abc import AsyncIterator

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse

from seawall import Seawall

app = FastAPI()
app.add_middleware(
    Seawall,
    config={"version": 1, "plans": {"default": {"rate": "30/minute", "concurrency": 2}}},
)


@app.websocket("/echo")
async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    try:
        while True:
            await websocket.send_text(await websocket.receive_text())
    except WebSocketDisconnect:
        return


async def ticks() -> AsyncIterator[str]:
    number = 0
    while True:
        yield f"data: {number}\n\n"
        number += 1
        await asyncio.sleep(0.2)


@app.get("/events")
async def events() -> StreamingResponse:
    return StreamingResponse(ticks(), media_type="text/event-stream")


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
