"""Who is blocked, as Redis has it: one JSON text for all, read with each sign of life (blocks.lua writes it).

Tenants are in it by keyed hashes, operators' reasons as they were written. It expires with the last block.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files

from seawall.backends.redis.keys import slot_of
from seawall.backends.redis.node import Script
from seawall.blocks import Block

MOST_BLOCKS = 1_000
"""Tenants that may be blocked at once. Every process reads all of it every two seconds."""
MOST_TEXT = 200
"""Characters of a reason."""
MILLISECOND = 1_000_000
SLOT = slot_of(b"instances")


def key_of(prefix: bytes) -> bytes:
    """Where the text is: beside the processes, so that whoever counts those has it."""
    return prefix + b":{instances}:blocks"


def script() -> Script:
    """What changes the text."""
    return Script(files("seawall.backends.redis").joinpath("blocks.lua").read_text("utf-8"))


def read(text: bytes) -> dict[str, Block]:
    """The blocks in ``text``, by the names of tenants. Raises `ValueError` for what is no such text."""
    try:
        written = json.loads(text)["blocks"].items()
        return {name: Block(round(until) * MILLISECOND, one_line(reason)) for name, (until, reason) in written}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        raise ValueError("no blocks") from None


def written(blocks: Mapping[str, Block]) -> tuple[bytes, int]:
    """The text of ``blocks``, and the milliseconds since the epoch until which it is worth keeping."""
    each = {name: (-(-block.until // MILLISECOND), block.reason) for name, block in blocks.items()}
    till = max(until for until, _ in each.values())
    return json.dumps({"till": till, "blocks": each}, ensure_ascii=False).encode(), till


def one_line(text: str) -> str:
    """What somebody says, as one line of `MOST_TEXT` characters at most."""
    return "".join(char if char.isprintable() else "?" for char in text[:MOST_TEXT])
