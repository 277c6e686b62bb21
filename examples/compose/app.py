"""The service of compose.yaml: a page for everybody, and one that takes its time.

In this directory:

    export SEAWALL_SECRET=$(openssl rand -hex 16) REDIS_PASSWORD=$(openssl rand -hex 16)
    docker compose up --build

Who is anonymous has 100 requests an hour from both processes together, acme has a plan, and globex one that is only
counted. Something to see on the dashboards, at http://localhost:3000:

    curl -s -o /dev/null -w '%{http_code}\n' 'http://localhost:[8000-8001]/?n=[1-60]' | sort | uniq -c
    curl -s -o /dev/null -H 'X-API-Key: acme-demo-key' --parallel 'http://localhost:[8000-8001]/slow?n=[1-2000]'
    curl -s -o /dev/null -H 'X-API-Key: globex-demo-key' 'http://localhost:8000/?n=[1-200]'
    docker compose pause valkey        # each process lets in its half; `unpause` ends it

A change of seawall/seawall.yaml is in force two seconds after it is saved.
"""

import asyncio
import os

from fastapi import FastAPI

from seawall import Seawall

app = FastAPI()
app.add_middleware(Seawall, config=os.environ["SEAWALL_CONFIG"])


@app.get("/")
async def home() -> dict[str, str]:
    return {"hello": "world"}


@app.get("/slow")
async def slow() -> dict[str, str]:
    await asyncio.sleep(0.05)
    return {"hello": "at last"}


@app.get("/healthz")
async def health() -> dict[str, bool]:
    return {"ok": True}
