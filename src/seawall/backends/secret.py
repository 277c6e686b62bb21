"""The key of the hashes under which callers and limits are stored."""

from __future__ import annotations

from hashlib import blake2b


def hash_key(prefix: str, secret: str | None) -> bytes:
    """32 bytes of ``secret``; without one, of the ``prefix`` of all keys, which keeps nothing from who can read it."""
    source = f"seawall prefix {prefix}" if secret is None else f"seawall secret {secret}"
    return blake2b(source.encode(), digest_size=32).digest()
