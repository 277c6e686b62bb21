"""Takes the pictures of the status page anew: ``python docs/images/status.py``, where there is a Chromium."""

from __future__ import annotations

import sys
import tempfile
from itertools import count
from math import sin
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / part) for part in ("src", "tests")]

import chromium  # noqa: E402  # of the tests
from seawall.status import StatusPage  # noqa: E402
from status_app import served  # noqa: E402
from status_sample import HELD, sample  # noqa: E402

SIZE = (1000, 1180)
LOOKS = 120


def document(looks: Any = count()) -> dict[str, Any]:  # noqa: B008  # one second passes from look to look
    """Two minutes of a service that comes under load."""
    second = next(looks)
    busy = second > LOOKS // 3
    limit = round(44 + 3 * sin(second / 3)) if not busy else round(31 + 5 * sin(second / 4) + 3 * sin(second / 1.7))
    flight = round(18 + 5 * sin(second / 2)) if not busy else round(limit - 2 + 2 * sin(second))
    said = sample(held={**HELD, "overload": {**HELD["overload"], "limit": limit, "in_flight": flight}})
    said["inflight"]["normal"] = flight - said["inflight"]["critical"] - said["inflight"]["low"]
    said["time"] = f"2026-03-04T12:{second // 60:02}:{second % 60:02}.000Z"
    for outcome, pace in (("allowed", 412), ("limited", 9), ("shed", 37)):
        said["requests"][outcome] += pace * second
    return said


def main() -> None:
    if chromium.find() is None:
        sys.exit("there is no Chromium here")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, chromium.running(Path(profile)) as browser:
        for scheme in ("light", "dark"):
            looks = count()
            with served(StatusPage(lambda: document(looks), interval=0.02)) as origin, browser.page() as page:  # noqa: B023
                page.look(*SIZE, dark=scheme == "dark")
                page.go(origin)
                page.until(f"document.querySelector('polyline.limit')?.points.numberOfItems >= {LOOKS}")
                (HERE / f"status-{scheme}.png").write_bytes(page.screenshot())


if __name__ == "__main__":
    main()
