"""A real Chromium without a window, spoken to over its DevTools protocol, for tests of what a browser makes of us."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT = 30.0


def find() -> str | None:
    """Where there is a Chromium that can be tried."""
    return None if sys.platform == "win32" else next(filter(None, map(shutil.which, NAMES)), None)


class Channel:
    """A connection to the browser: one command at a time, and `events` is everything that it has said meanwhile."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._last = 0
        self.events: list[tuple[str, dict[str, Any]]] = []

    def do(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._last += 1
        asked = {"id": self._last, "method": method, "params": parameters}
        self._connection.send(json.dumps(asked if session is None else {**asked, "sessionId": session}))
        deadline = time.monotonic() + TIMEOUT
        while True:
            said = json.loads(self._connection.recv(timeout=max(0.0, deadline - time.monotonic())))
            if said.get("id") == self._last:
                assert "error" not in said, (method, said["error"])
                result: dict[str, Any] = said["result"]
                return result
            self._note(said)

    def listen(self, seconds: float) -> None:
        """Note what the browser says in so many seconds."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            with suppress(TimeoutError):
                self._note(json.loads(self._connection.recv(timeout=left)))

    def _note(self, said: dict[str, Any]) -> None:
        if "method" in said:
            self.events.append((said["method"], said["params"]))


class Page:
    """One tab, of a profile of its own."""

    def __init__(self, channel: Channel, session: str) -> None:
        self._channel = channel
        self._session = session
        self.events = channel.events
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._channel.do(method, self._session, **parameters)

    def go(self, url: str) -> None:
        """Load ``url``, until all that it needs to begin is there."""
        count = self._loads()
        assert "errorText" not in self.do("Page.navigate", url=url)
        self.until(lambda: self._loads() > count, url)

    def _loads(self) -> int:
        return sum(method == "Page.loadEventFired" for method, _ in self.events)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        said = self.do("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def until(self, holds: Callable[[], Any] | str, what: str = "") -> Any:
        """Wait until a function, or a JavaScript expression, is true; its value."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            value = self.evaluate(holds) if isinstance(holds, str) else holds()
            if value:
                return value
            self._channel.listen(0.02)
        raise AssertionError(f"never: {what or holds}\n{self.events[-20:]}")

    @property
    def text(self) -> str:
        """What is to be read, in one line."""
        # Not by evaluating, for there may be no scripts.
        root = self.do("DOM.getDocument", depth=-1)["root"]
        return " ".join(" ".join(_words(root)).split())

    def requested(self) -> list[str]:
        """The address of everything that was asked for."""
        asked = [event["request"]["url"] for method, event in self.events if method == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith("data:")]

    def complaints(self) -> list[str]:
        """What the browser has logged, violations of the Content Security Policy among it, and exceptions."""
        logged = [event["entry"]["text"] for method, event in self.events if method == "Log.entryAdded"]
        thrown = [
            str(event["exceptionDetails"]) for method, event in self.events if method == "Runtime.exceptionThrown"
        ]
        return logged + thrown

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """Have a window of this size, in a scheme."""
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])

    def without_scripts(self) -> None:
        self.do("Emulation.setScriptExecutionDisabled", value=True)

    def screenshot(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self.do("Page.captureScreenshot", format="png", optimizeForSpeed=False)["data"])


def _words(node: dict[str, Any]) -> Iterator[str]:
    if node["nodeName"] in ("STYLE", "SCRIPT", "NOSCRIPT"):
        return
    if node["nodeType"] == 3:
        yield node["nodeValue"]
    for child in node.get("children", ()):
        yield from _words(child)


class Browser:
    """A process of Chromium."""

    def __init__(self, address: str) -> None:
        self._address = address

    @contextmanager
    def page(self) -> Iterator[Page]:
        """A tab without a past."""
        url = urlsplit(self._address)
        # A socket of our own, which no proxy of the environment is asked for.
        with (
            socket.create_connection((url.hostname, url.port), TIMEOUT) as plain,
            connect(self._address, sock=plain, max_size=None) as connection,
        ):
            channel = Channel(connection)
            context = channel.do("Target.createBrowserContext")["browserContextId"]
            target = channel.do("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
            yield Page(channel, channel.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
            channel.do("Target.disposeBrowserContext", browserContextId=context)


@contextmanager
def running(directory: Path) -> Iterator[Browser]:
    """A Chromium with its profile in ``directory``, until the block ends."""
    program = find()
    assert program is not None
    options = [
        "--headless",
        "--remote-debugging-port=0",
        f"--user-data-dir={directory}",
        "--no-first-run",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--force-color-profile=srgb",
        "--hide-scrollbars",
    ]
    if os.geteuid() == 0:
        options.append("--no-sandbox")  # which does not run as root
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([program, *options, "about:blank"], stdout=log, stderr=log, start_new_session=True)
    try:
        yield Browser(_address(process, directory))
    finally:
        # Debian's program is a script that waits for the real one: all of them, which share a session with nobody else.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _address(process: subprocess.Popen[bytes], directory: Path) -> str:
    """Where the browser listens, which it writes into its profile."""
    told = directory / "DevToolsActivePort"
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        lines = told.read_text().splitlines() if told.exists() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(0.02)
    raise AssertionError(f"Chromium does not start:\n{(directory / 'log').read_text(errors='replace')[-2_000:]}")
