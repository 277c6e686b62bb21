"""Who is served first when not all can be: a route that matters, and callers that say that they can wait.

    python examples/priorities.py

The same service as in overload.py, at three times what it can do. `/checkout` is critical by its rule in the
configuration. Pages are normal. The third kind asks for the same pages ahead of time, and says so in a header, with
which anybody may lower its priority and nobody raise it. Nearly every checkout is served, as many pages as there is
room for, and of the low ones little more than their `min_share`, which keeps them from starving.

It starts a plain uvicorn on a free port, and ends by itself after about 10 seconds.
"""

import asyncio

from fastapi import FastAPI
from overload import Crowd, free_port, serve, work

from seawall import Seawall

CONFIG = {
    "version": 1,
    "plans": {"default": {"rate": "unlimited"}},
    "routes": [{"name": "checkout", "match": {"path": "/checkout"}, "priority": "critical"}],
    "priorities": {"critical": {}, "normal": {}, "low": {"min_share": "5%"}},  # the first is the last to be refused
}

app = FastAPI()
app.add_middleware(Seawall, config=CONFIG)
app.get("/checkout")(work)
app.get("/page")(work)

AHEAD = "X-Request-Priority: low\r\n"
COMING = {"critical": ("/checkout", "", 0.4), "normal": ("/page", "", 1.0), "low": ("/page", AHEAD, 1.6)}
"""What each kind of caller asks for, with which headers, and how many come, in units of what is possible."""


async def three_times_too_much() -> Crowd:
    crowd = Crowd(free_port())
    server = serve("priorities:app", crowd.port)
    try:
        async with asyncio.timeout(30):
            capacity = await crowd.capacity("/page")
        kinds = (crowd.keep_coming(times * capacity, path, headers) for path, headers, times in COMING.values())
        await asyncio.gather(*kinds)
    finally:
        server.kill()
        server.wait()
    return crowd


def main() -> None:
    counts = asyncio.run(three_times_too_much()).counts
    print(f"{'':<10}{'came':>8}{'served':>8}{'refused':>9}{'gave up':>9}")
    for name, (path, headers, _) in COMING.items():
        served, refused, late = (counts[path + headers, outcome] for outcome in ("served", "refused", "gave up"))
        came = served + refused + late
        print(f"{name:<10}{came:>8}{served / came:>8.0%}{refused / came:>9.0%}{late / came:>9.0%}")


if __name__ == "__main__":
    main()
