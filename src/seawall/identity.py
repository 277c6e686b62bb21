"""From a scope to who is calling: one pass over the headers, no request object, nothing believed that is not proven.

A tenant is what a verified key, an authentication middleware's ``scope["state"]`` or the application's own ``identify``
says; everybody else is anonymous. An address is the peer's, unless the peer is a proxy the configuration trusts.
Addresses are bytes from here on, so that no spelling of one is a second caller: 4 for IPv4 (also when it came as
``::ffff:1.2.3.4``, which is unwrapped before any mask: one /64 holds all of them), 16 for IPv6.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Any, TypeAlias, final

from seawall import advice
from seawall.admission import bounded_id, state_of
from seawall.decision import Clock
from seawall.policy import Identity, Key, Network

Address: TypeAlias = bytes

UNKNOWN: Address = b"unknown"
"""The one bucket of callers without an address: unix sockets, test clients, servers that tell nothing."""

MAX_HOPS = 32
MAX_FORWARDED = 2_048
_FORWARDING = frozenset(
    b"forwarded via x-real-ip x-client-ip true-client-ip cf-connecting-ip x-cluster-client-ip".split()
)

_MAPPED = bytes(10) + b"\xff\xff"
# One pair of a Forwarded element (RFC 7239), or nothing between two semicolons. A torn or escaped quote is neither.
_FORWARDED_PAIR = re.compile(r'\s*+(?:([^\s=;"\\]+)\s*+=\s*+(?:"([^"\\]*)"|([^\s;"\\]*+)))?+\s*+(?:;|$)')


def parse_address(text: str) -> Address | None:
    """The canonical bytes of an address, or ``None``. Zone, brackets and port go; ``::ffff:`` is unwrapped.

    >>> parse_address("[::ffff:192.0.2.1%eth0]:443") == parse_address("192.0.2.1")
    True
    """
    try:
        return inet_pton(AF_INET, text)
    except (OSError, ValueError):  # ValueError: a NUL inside
        pass
    if text[:1] == "[":
        text, closed, port = text[1:].partition("]")
        if not closed or (port and not (port[0] == ":" and port[1:].isdecimal())):
            return None
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
        if not port.isdecimal():
            return None
        try:
            return inet_pton(AF_INET, host)
        except (OSError, ValueError):
            return None
    try:
        packed = inet_pton(AF_INET6, text.partition("%")[0])
    except (OSError, ValueError):
        return None
    return packed[12:] if packed.startswith(_MAPPED) else packed


def show_address(address: Address) -> str:
    """The address as people write it."""
    if len(address) not in (4, 16):
        return address.decode("latin-1")
    return inet_ntop(AF_INET if len(address) == 4 else AF_INET6, address)


@final
class NetworkSet:
    """Whether an address is in any of some networks: one look-up for each prefix length that occurs."""

    __slots__ = ("_v4", "_v6")

    def __init__(self, networks: Iterable[Network]) -> None:
        self._v4: dict[int, set[int]] = {}
        self._v6: dict[int, set[int]] = {}
        for network in networks:
            base, bits = int(network.network_address), network.prefixlen
            if network.version == 6 and bits >= 96 and base >> 32 == 0xFFFF:
                self._v4.setdefault(128 - bits, set()).add((base & 0xFFFFFFFF) >> (128 - bits))
                continue
            table = self._v4 if network.version == 4 else self._v6
            shift = network.max_prefixlen - bits
            table.setdefault(shift, set()).add(base >> shift)

    def __bool__(self) -> bool:
        return bool(self._v4 or self._v6)

    def __contains__(self, address: Address) -> bool:
        table = self._v4 if len(address) == 4 else self._v6 if len(address) == 16 else None
        if not table:
            return False
        value = int.from_bytes(address)
        return any(value >> shift in bases for shift, bases in table.items())


@final
class ClientIP:
    """Finds the client's address by the policy's rules, and the key of the bucket it shares with its network."""

    def __init__(self, identity: Identity) -> None:
        self._trusted = NetworkSet(identity.trusted_proxies)
        self._hops = identity.trusted_hops
        self._header = identity.header.encode()
        self._forwarded = identity.header == "forwarded"
        self._prefix = identity.ipv6_prefix
        shift = 128 - identity.ipv6_prefix
        self._mask = ((1 << 128) - 1) >> shift << shift
        self.trusts_nobody = not self._trusted and not self._hops

    def peer(self, scope: Mapping[str, Any]) -> Address:
        """The direct peer, whatever headers say."""
        client = scope.get("client")
        if not client:
            return UNKNOWN
        host = client[0]
        return (parse_address(host) if isinstance(host, str) else None) or UNKNOWN

    def trusts(self, peer: Address) -> bool:
        """Whether ``peer`` is a proxy whose word counts."""
        return self._hops > 0 or peer in self._trusted

    def resolve(self, scope: Mapping[str, Any]) -> Address:
        """The client: the peer, or what trusted proxies say of it."""
        address = self.peer(scope)
        if self.trusts_nobody or not self.trusts(address):
            return address
        hops = self._walkable(scope["headers"])
        if self._hops:
            # The n-th from the right; whoever sends fewer did not come through the proxies.
            claimed = hops[self._hops - 1] if len(hops) >= self._hops else ""
            return parse_address(self._node(claimed)) or address
        for hop in hops:
            claimed_address = parse_address(self._node(hop))
            if claimed_address is None:
                break
            address = claimed_address
            if address not in self._trusted:
                break
        return address

    def bucket(self, address: Address) -> bytes:
        """The key under which ``address`` is limited: itself, or its IPv6 prefix."""
        if len(address) != 16 or self._prefix == 128:
            return address
        return (int.from_bytes(address) & self._mask).to_bytes(16)

    def key(self, scope: Mapping[str, Any]) -> bytes:
        """The key of the client's bucket."""
        if self.trusts_nobody:
            # By far the most frequent: 0.2 instead of 0.5 us.
            client: Any = scope.get("client")
            try:
                return inet_pton(AF_INET, client[0])
            except (OSError, ValueError, TypeError, IndexError):
                pass
        return self.bucket(self.resolve(scope))

    def _walkable(self, headers: Iterable[tuple[bytes, bytes]]) -> list[str]:
        """The hops from right to left: repeated lines joined, at most 32 of them and 2 KB, whatever was sent."""
        name = self._header
        lines = [value for key, value in headers if key == name]
        if not lines:
            return []
        tail = lines.pop()
        for line in reversed(lines):
            if len(tail) > MAX_FORWARDED:
                break
            tail = line + b"," + tail
        if len(tail) > MAX_FORWARDED:
            # Cut at a comma, also one just before: half an address may be another one.
            _, _, tail = tail[-MAX_FORWARDED - 1 :].partition(b",")
        hops = tail.decode("latin-1").rsplit(",", MAX_HOPS)
        if len(hops) > MAX_HOPS:
            del hops[0]
        hops.reverse()
        return [hop.strip() for hop in hops]

    def _node(self, hop: str) -> str:
        if not self._forwarded:
            return hop
        # Read whole and not searched: what a proxy quotes (`host="x;for=192.0.2.1"`) may be the caller's own words.
        at, found = 0, []
        while at < len(hop):
            pair = _FORWARDED_PAIR.match(hop, at)
            if pair is None:
                return ""
            if (pair[1] or "").lower() == "for":
                found.append(pair[2] or pair[3] or "")
            at = pair.end()
        return found[0] if len(found) == 1 else ""


@final
class TenantSource:
    """Finds the tenant that a request proves to be: by API key or by ``scope["state"]``, in the policy's order.

    A key that is not listed, or no longer, yields nothing, so that the next source is tried and failed authentication
    ends up with the address it came from. An ``Authorization`` header is read without its ``Bearer``.
    """

    __slots__ = ("_keys", "_sources", "_wall")

    def __init__(self, identity: Identity, keys: Mapping[bytes, Key], wall_clock: Clock) -> None:
        self._sources: tuple[tuple[bytes | None, str], ...] = tuple(
            (name.encode() if kind == "api_key" else None, name) for kind, name in identity.tenant
        )
        self._keys = keys
        self._wall = wall_clock

    def find(self, scope: Mapping[str, Any], unlisted: list[bytes] | None = None) -> str | None:
        """The tenant's id, or ``None`` for an anonymous caller. Hashes of keys that nobody has are added to
        ``unlisted``, as far as they come before what makes it the tenant."""
        for header, name in self._sources:
            if header is None:
                tenant = tenant_id(state_of(scope, name))
                if tenant is not None:
                    return tenant
                continue
            for field, value in scope["headers"]:
                if field == header:
                    if header == b"authorization" and value[:7].lower() == b"bearer ":
                        value = value[7:].strip()
                    digest = key_digest(value)
                    key = self._keys.get(digest)
                    if key is None:
                        if unlisted is not None:
                            unlisted.append(digest)
                    elif key.expires_ns is None or self._wall() < key.expires_ns:
                        return key.tenant
                    break
        return None


def tenant_id(value: object) -> str | None:
    """An id from ``state`` or ``identify`` as text; nothing for ``None``, ``False`` and blanks."""
    if value is None or value is False:
        return None
    text = bounded_id(value)
    if text is None:
        advice.once("id", f"a tenant's id is text, a whole number or a UUID, not {type(value).__name__}; it is ignored")
    return None if not text or text.isspace() else text


def is_forwarded(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a proxy has left a trace in ``headers``."""
    return any(name in _FORWARDING or name.startswith(b"x-forwarded-") for name, _ in headers)


def key_digest(key: bytes) -> bytes:
    """The SHA-256 under which an API key is listed."""
    return sha256(key).digest()
