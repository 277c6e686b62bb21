"""Tenants in the application's own database: who signs up has an API key at once, who pays has another plan at once.

    python examples/runtime_tenants.py
    curl -s -X POST http://localhost:8000/customers/initech          # signs up; the answer has the API key
    curl -i -H 'X-API-Key: THE-KEY' http://localhost:8000/           # 5 a minute, and another one a 429
    curl -s -X PUT http://localhost:8000/customers/initech/plan/pro  # pays: 50 a minute from the next request on
    curl -i http://localhost:8000/                                   # who has no key, or a wrong one: 10 a minute

The file would list none of them. `find` is asked once for each, by the hash of the key, and what it says is kept for a
minute: a process that is not told of a change (`seawall.reload()`) sees it then.
"""

import asyncio
import os
import secrets
import sqlite3
from hashlib import sha256
from typing import Any

from fastapi import FastAPI, HTTPException

import seawall
from seawall import Seawall

CONFIG = {
    "version": 1,
    "identity": {"tenant": [{"api_key": {"header": "X-API-Key"}}]},
    "plans": {
        "anonymous": {"rate": "10/minute"},
        "free": {"rate": "5/minute"},
        "pro": {"rate": "50/minute", "quota": "10_000/day"},
    },
    "defaults": {"plan": "free", "anonymous_plan": "anonymous"},
    "routes": [{"name": "office", "match": {"path": "/customers/**"}, "exempt": True}],
}

database = sqlite3.connect(":memory:", check_same_thread=False)
database.execute("CREATE TABLE customers (id TEXT PRIMARY KEY, hash TEXT UNIQUE, plan TEXT)")


async def find(name: str) -> dict[str, Any] | None:
    """What the file would say of a tenant, by its id or by the hash of an API key; nothing for nobody."""
    column = "hash" if name.startswith("sha256:") else "id"
    rows = await query(f"SELECT id, plan FROM customers WHERE {column} = ?", name)
    return {"id": rows[0][0], "plan": rows[0][1]} if rows else None


async def query(statement: str, *values: str) -> list[Any]:
    """What the database says, asked beside the event loop."""
    return await asyncio.to_thread(lambda: database.execute(statement, values).fetchall())


app = FastAPI()
app.add_middleware(Seawall, config=CONFIG, tenants=find)


@app.get("/")
async def home() -> dict[str, str]:
    return {"hello": "world"}


@app.post("/customers/{name}")
async def sign_up(name: str) -> dict[str, str]:
    key = f"demo_{secrets.token_urlsafe(24)}"
    try:
        await query("INSERT INTO customers VALUES (?, ?, 'free')", name, f"sha256:{sha256(key.encode()).hexdigest()}")
    except sqlite3.IntegrityError:
        raise HTTPException(409, f"there is a {name} already") from None
    return {"key": key}


@app.put("/customers/{name}/plan/{plan}")
async def change(name: str, plan: str) -> dict[str, str]:
    if plan not in CONFIG["plans"]:
        raise HTTPException(404, f"there is no plan {plan}")
    await query("UPDATE customers SET plan = ? WHERE id = ?", plan, name)
    seawall.reload()  # so that this process asks again at once
    return {"plan": plan}


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
