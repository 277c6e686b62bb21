"""Behind a load balancer: whose address counts, and who may scrape. The configuration is a mapping in the code.

Here the "load balancer" is on 127.0.0.1, so that curl can play it. It appends the address that it saw to
X-Forwarded-For, and Seawall reads that header from the right, as far as it trusts what it finds.

    python examples/behind_proxy.py
    curl -i -H 'X-Forwarded-For: 203.0.113.7' http://localhost:8000/             # the client is 203.0.113.7
    curl -i -H 'X-Forwarded-For: 8.8.8.8, 203.0.113.7' http://localhost:8000/    # still; the 8.8.8.8 was its own claim
    curl -i -H 'X-Forwarded-For: 203.0.113.7' http://localhost:8000/metrics      # 404: nobody may scrape from outside
    curl -s http://localhost:8000/metrics | head                                 # the machine itself may

Each client has 5 requests a minute, whatever it writes into the header.
"""

import os

from fastapi import FastAPI, Request

from seawall import Seawall

CONFIG = {
    "version": 1,
    "identity": {"client_ip": {"trusted_proxies": ["127.0.0.1"]}},
    "plans": {"default": {"rate": "5/minute"}},
    "metrics": {"path": "/metrics", "allow": ["127.0.0.1"]},
}

app = FastAPI()
app.add_middleware(Seawall, config=CONFIG)


@app.get("/")
async def home(request: Request) -> dict[str, str | None]:
    return {"forwarded_for": request.headers.get("X-Forwarded-For")}


if __name__ == "__main__":
    import uvicorn

    # One place decides who the client is. uvicorn would rewrite the peer's address before Seawall sees it.
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
