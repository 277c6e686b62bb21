"""Every client address gets 100 requests a minute: FastAPI, one line, no file.

Start it, send 101 requests over one connection, and look at the next answer:

    python examples/quickstart.py
    curl -s -o /dev/null -w '%{http_code}\n' 'http://localhost:8000/?n=[1-101]' | sort | uniq -c
    curl -i http://localhost:8000/

The first 100 are served, the next one is a 429 with Retry-After. A request comes back every 0.6 s, so a slow loop sees
a few more than 100.
"""

import os

from fastapi import FastAPI

from seawall import Seawall

app = FastAPI()
app.add_middleware(Seawall, default="100/minute")


@app.get("/")
async def home() -> dict[str, str]:
    return {"hello": "world"}


if __name__ == "__main__":
    import uvicorn

    # Without `proxy_headers=False` uvicorn believes whatever X-Forwarded-For a caller on this machine sends.
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
