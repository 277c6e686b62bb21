"""Plans, tenants with API keys, a dear route, a login limit and metrics, all from tenants.yaml.

    python examples/tenants_yaml.py
    curl -i -H 'X-API-Key: globex-demo-key' http://localhost:8000/search    # costs 5 of globex's 20 a minute
    curl -s -o /dev/null -w '%{http_code}\n' -X POST 'http://localhost:8000/login?n=[1-4]'    # the 4th is a 429
    curl -s http://localhost:8000/metrics | grep seawall_rejections

Ask the file itself what holds for a request, without a server:

    seawall explain /search --tenant globex --config examples/tenants.yaml
"""

import os
from pathlib import Path

from fastapi import FastAPI

from seawall import Seawall

app = FastAPI()
app.add_middleware(Seawall, config=Path(__file__).with_name("tenants.yaml"))


@app.get("/")
async def home() -> dict[str, str]:
    return {"hello": "world"}


@app.get("/search")
async def search(q: str = "") -> dict[str, list[str]]:
    return {"found": [q]}


@app.post("/login")
async def login() -> dict[str, bool]:
    return {"welcome": False}


@app.get("/healthz")
async def health() -> dict[str, bool]:
    return {"ok": True}


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
