"""Names in Redis: keyed hashes, so that nobody who reads them learns who calls, and nobody who calls can choose one.

A key is ``prefix:{tag}:limit``. The tag is a hash of whose bucket it is, alone in braces, so that everything of one
caller lies in one slot of a cluster; the limit is a hash of what is counted and of no number in it, so that usage
outlives a change of the limit. Both are BLAKE2b (RFC 7693) over length-prefixed parts, keyed with the secret.
"""

from __future__ import annotations

from base64 import urlsafe_b64encode
from binascii import crc_hqx
from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b
from typing import final

from seawall.backends import Key
from seawall.backends.secret import hash_key

SLOTS = 16_384
MOST_TAGS = 16_384
"""Tags that are remembered for each store: hashing one again takes 1.5 us."""


def slot_of(tag: bytes) -> int:
    """The cluster's slot of what is between the braces (CRC-16/XMODEM, as the cluster specification has it)."""
    return crc_hqx(tag, 0) % SLOTS


@final
class Tags(dict[Key, bytes]):
    """What the keys of each caller of one store begin with, worked out when first asked for, `MOST_TAGS` kept."""

    __slots__ = ("_hash", "_prefix")

    def __init__(self, names: Names, store: str) -> None:
        super().__init__()
        self._hash = names.hashed(store)
        self._prefix = names.prefix

    def __missing__(self, key: Key) -> bytes:
        state = self._hash.copy()
        raw, kind = (key, b"b") if isinstance(key, bytes) else (key.encode("utf-8", "surrogatepass"), b"s")
        state.update(kind + raw)
        if len(self) >= MOST_TAGS:
            self.clear()  # to find the oldest would take longer than to hash those again that are needed
        found = self[key] = b"%b:{%b}:" % (self._prefix, _text(state.digest()))
        return found


@final
class Names:
    """Names under ``prefix``, keyed with ``secret``, or with a constant derived from the prefix where there is none."""

    def __init__(self, prefix: str, secret: str | None) -> None:
        self.prefix = prefix.encode()
        self._key = hash_key(prefix, secret)
        self._tags: dict[str, Tags] = {}
        self.pseudonym = lru_cache(MOST_TAGS)(self._pseudonym)
        """What a tenant is called among those who are blocked."""

    def _pseudonym(self, tenant: str) -> str:
        return _text(self.hashed("blocked", tenant).digest()).decode()

    def hashed(self, *parts: str) -> blake2b:
        """A hash that has begun with ``parts``: each is told from the next by its length."""
        state = blake2b(digest_size=16, key=self._key)
        for part in parts:
            raw = part.encode("utf-8", "surrogatepass")
            state.update(b"%d:%b" % (len(raw), raw))
        return state

    def limit(self, *parts: str) -> bytes:
        """What the keys of one limit end with."""
        return _text(self.hashed("limit", *parts).digest()[:9])

    def tags(self, store: str) -> Tags:
        """The tags of the callers of a store."""
        known = self._tags.get(store)
        if known is None:
            known = self._tags[store] = Tags(self, store)
        return known

    def canary(self, has: Callable[[int], bool]) -> bytes:
        """A key that no caller has, in a slot that a node has, if it has any."""
        # Of a node that has few slots perhaps none of these: it says so (MOVED).
        tags = (b"canary-%d" % nth for nth in range(64))
        tag = next((tag for tag in tags if has(slot_of(tag))), b"canary")
        return b"%b:{%b}:canary" % (self.prefix, tag)


def tag_of(prefix: bytes) -> bytes:
    """What is between the braces of the beginning of a key."""
    return prefix[prefix.index(b"{") + 1 : prefix.index(b"}")]


def _text(digest: bytes) -> bytes:
    return urlsafe_b64encode(digest).rstrip(b"=")
