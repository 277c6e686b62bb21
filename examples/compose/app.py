"""The service of compose.yaml."""

from pathlib import Path

from fastapi import FastAPI

from seawall import Seawall

app = FastAPI()
app.add_middleware(Seawall, config=Path(__file__).with_name("seawall.yaml"))


@app.get("/")
async def home() -> dict[str, str]:
    return {"hello": "world"}
