"""A server for as long as a block lasts, and not a moment longer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any, final

from seawall.cli.demo.shop import BACKEND

PATIENCE = 3.0
"""Seconds a server has to end by itself."""


class ServerFailed(Exception):
    """The server did not start. The text says why."""


@final
class Server:
    """``with Server(port) as server:`` runs the shop in a process of its own on ``server.port``.

    ``port`` 0 is a free one. ``backend`` is the setting of that name; without one, state is in memory. Raises
    `ServerFailed`, with what the server said.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        backend: Mapping[str, Any] | None = None,
        module: str = "seawall.cli.demo.serve",
    ) -> None:
        self.port = port
        self.app = ""
        self._backend = backend
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Server {self.url}, process {self.pid}>"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def __enter__(self) -> Server:
        self._errors = tempfile.TemporaryFile()  # closed in `stop`
        # The same modules as here, also where they were found by other means than an installation.
        path = os.pathsep.join(part for part in sys.path if part)
        environment = {**os.environ, "PYTHONPATH": path, BACKEND: json.dumps(self._backend)}
        environment.pop("SEAWALL_METRICS_DIR", None)  # what a demo counts is nobody else's
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module, str(self.port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which then ends that one
            )
            self._read_greeting()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _read_greeting(self) -> None:
        """Learn the port. It is bound by then, so connections wait in its queue until the server answers."""
        line = self._process.stdout.readline() if self._process and self._process.stdout else b""
        if not line:
            raise ServerFailed(f"the server did not start: {self.said() or 'it said nothing'}")
        greeting = json.loads(line)
        if "error" in greeting:
            raise ServerFailed(f"port {self.port} of 127.0.0.1: {greeting['error']}")
        self.port = greeting["port"]
        self.app = greeting["app"]

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def said(self) -> str:
        """The end of what the server wrote to stderr."""
        if self._errors is None:
            return ""
        self._errors.seek(0)
        return self._errors.read()[-2_000:].decode(errors="replace").strip()

    def stop(self) -> None:
        """End the process and everything that it started. Safe twice."""
        process, self._process = self._process, None
        if process is not None:
            with process:  # closes the pipes, which is already a sign to end
                _signal(process, signal.SIGTERM)
                try:
                    process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    _signal(process, getattr(signal, "SIGKILL", signal.SIGTERM))
                    process.wait(PATIENCE)
        if self._errors is not None:
            self._errors.close()
            self._errors = None


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to the whole group of a process that has not been waited for."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            process.terminate()
