"""What an operator should know and no request should pay for: warnings, each said once in a process, with the fix."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable
from traceback import walk_tb

from starlette.middleware.cors import CORSMiddleware

logger = logging.getLogger("seawall")

_MAX_CHAIN = 64
_FORWARDING = (b"x-forwarded-for", b"forwarded")
_WORKERS = re.compile(r"(?:^|\s)(?:--workers[=\s]|-w[=\s]?)(\d{1,4})(?=\s|$)")
_NUMBER = re.compile(r"^\d{1,4}$")

_said: set[str] = set()


def once(key: str, text: str, *, exc_info: bool = False, error: Exception | None = None) -> None:
    """Warn the first time that ``key`` is.

    Of ``error``, whose text and traceback may hold what a caller has sent, it says the type and the place.
    """
    if key not in _said:
        _said.add(key)
        if error is not None:
            text = f"{text} ({type(error).__name__} at {place(error)})"
        logger.warning("%s", text, exc_info=exc_info)


def place(error: Exception) -> str:
    """Where an error that was caught had been raised: the file and the line of its innermost frame."""
    *_, (frame, line) = walk_tb(error.__traceback__)
    return f"{frame.f_code.co_filename}:{line}"


def forget() -> None:
    """Let everything be said again (tests)."""
    _said.clear()


def chain(app: object) -> Iterable[object]:
    """``app`` and the apps that it wraps, as far as they tell by the usual attribute."""
    for _ in range(_MAX_CHAIN):
        if app is None:
            return
        yield app
        app = getattr(app, "app", None)


def about_twice(kind: str) -> None:
    """Two middlewares that would do the same."""
    once("twice", f"{kind} is installed twice with one policy; the inner one does nothing")


def about_cors(app: object) -> None:
    """A CORS middleware that refusals do not pass through."""
    for link in chain(app):
        # The list is that of an application that was wrapped whole, and builds its own stack later.
        kinds = [type(link), *(getattr(each, "cls", None) for each in getattr(link, "user_middleware", ()))]
        if CORSMiddleware in kinds:
            once(
                "cors",
                "CORSMiddleware is inside Seawall, so browsers cannot read a refusal: add it after Seawall (the last "
                "one added is the outermost), with expose_headers=seawall.EXPOSE_HEADERS",
            )


def about_proxies(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """A proxy that is in front and not configured. Whether ``headers`` show one."""
    for name, _ in headers:
        if name in _FORWARDING:
            once(
                "proxy",
                f"requests carry {name.decode()}, and no proxy is trusted, so all clients of one proxy share its "
                "limits: set identity.client_ip.trusted_proxies to the proxy's addresses",
            )
            return True
    return False


def about_workers() -> None:
    """Several processes that each count for themselves, as far as the command line and the environment tell."""
    told = _WORKERS.findall(" ".join(sys.argv)) + _NUMBER.findall(os.environ.get("WEB_CONCURRENCY", ""))
    workers = max(map(int, told), default=1)
    if workers > 1:
        once(
            "workers",
            f"{workers} workers, and each counts for itself in memory: callers get up to {workers} times their plan. "
            "Let them share what they count, with backend: {type: redis, url: ...}, or divide the limits by "
            f"{workers}",
        )
