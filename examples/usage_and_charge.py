"""A cost that is known only afterwards: an endpoint that generates tokens, charges for them, and says what is left.

A plan counts tokens here, 1,000 a minute and 50,000 a day. A request takes 50 to be let in, its `cost`, and pays the
rest when the answer is there. The bucket may go into debt by one burst, so an answer is never cut off; the next request
waits until the debt is paid.

    python examples/usage_and_charge.py
    curl -s -X POST 'http://localhost:8000/complete?words=400'    # "left":600
    curl -s -X POST 'http://localhost:8000/complete?words=900'    # let in, as there are more than 50: now 300 in debt
    curl -i -X POST 'http://localhost:8000/complete?words=1'      # 429: Retry-After says when 50 will be there again

GET /left shows what is left of each policy; asking takes 1, as every request does that has no `cost` of its own.
"""

import os

from fastapi import FastAPI, Request

from seawall import Seawall, charge, usage

ADMISSION = 50

app = FastAPI()
app.add_middleware(
    Seawall,
    config={
        "version": 1,
        "plans": {"default": {"rate": "1_000/minute", "quota": "50_000/day"}},
        "routes": [
            {"name": "complete", "match": {"path": "/complete", "methods": ["POST"]}, "cost": ADMISSION},
        ],
    },
)


@app.post("/complete")
async def complete(request: Request, words: int = 10) -> dict[str, object]:
    text = " ".join(["word"] * words)  # what a model would write
    rest = words - ADMISSION  # negative for a short answer: the difference comes back
    charge(request, rest)
    return {"text": text[:40], "charged": words, "left": usage(request)["rate"].remaining - rest}


@app.get("/left")
async def left(request: Request) -> dict[str, int]:
    return {name: decision.remaining for name, decision in usage(request).items()}


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
