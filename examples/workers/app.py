"""An application whose metrics are those of all its workers, whichever of them is asked.

Start it one way or the other, send 100 requests, and ask several times how many there were:

    seawall run --app-dir examples/workers app:app --workers 4
    gunicorn -c examples/workers/gunicorn_conf.py --chdir examples/workers app:app

    curl -s -o /dev/null 'http://localhost:8000/?n=[1-100]'
    curl -s http://localhost:8000/metrics | grep ^seawall_requests_total
"""

import os

from fastapi import FastAPI

from seawall import Seawall

app = FastAPI()
app.add_middleware(
    Seawall,
    config={
        "version": 1,
        "plans": {"default": {"rate": "100/second"}},
        "metrics": {"path": "/metrics", "allow": ["127.0.0.1", "::1"]},
    },
)


@app.get("/")
async def home() -> dict[str, int]:
    return {"worker": os.getpid()}
