"""The process that serves the demo's shop: uvicorn on a port that it says on stdout.

It ends when its stdin does, so that it outlives nobody: not even a parent that was killed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from threading import Thread
from typing import BinaryIO

import uvicorn

from seawall.cli.demo.shop import BACKEND, build


def main(port: int) -> int:
    """Serve on ``port`` of 127.0.0.1 (0: a free one) until stdin ends or a signal comes."""
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        print(json.dumps({"error": os.strerror(error.errno) if error.errno else str(error)}), flush=True)
        return 1
    app = build(json.loads(os.environ.get(BACKEND, "null")))
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        # Seawall reads the forwarding headers itself, by its own rules; uvicorn would rewrite the peer before.
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    Thread(target=stop_with, args=(server, sys.stdin.buffer), daemon=True).start()
    print(json.dumps({"port": listener.getsockname()[1], "app": type(app).__name__}), flush=True)
    server.run(sockets=[listener])
    return 0


def stop_with(server: uvicorn.Server, stdin: BinaryIO) -> None:
    """Stop ``server`` when nobody holds the other end of ``stdin`` any more."""
    while stdin.read(1):
        pass
    server.should_exit = True


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
