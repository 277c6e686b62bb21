"""State in Redis, Valkey, behind Sentinels or in a Cluster: `RedisBackend`, which needs the extra ``redis``.

It is imported when it is asked for, so that a URL can be checked (`seawall.backends.redis.address`) without the extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seawall.backends.redis.backend import RedisBackend

__all__ = ["RedisBackend"]


def __getattr__(name: str) -> Any:
    if name == "RedisBackend":
        from seawall.backends.redis.backend import RedisBackend

        return RedisBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
