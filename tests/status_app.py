"""An application that is nothing but a status page, to be served, and a server of any application in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from seawall.status import StatusPage
from serving import START_TIMEOUT, free_port
from status_sample import sample

app = StatusPage(sample)


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """Serve ``app`` in a thread; its origin."""
    port = free_port()
    settings = uvicorn.Config(
        app,
        port=port,
        loop="asyncio",  # the older ones set uvloop for the whole process, whose order is another
        log_level="critical",
        lifespan="off",
        timeout_graceful_shutdown=1,
        timeout_keep_alive=30,
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_TIMEOUT
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
