"""Who is calling: addresses against the standard library, proxies against callers who lie, keys and ids by table."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from seawall.admission import MAX_ID, bounded_id
from seawall.backends.memory import MemoryBackend
from seawall.identity import (
    MAX_FORWARDED,
    MAX_HOPS,
    UNKNOWN,
    ClientIP,
    NetworkSet,
    TenantSource,
    key_digest,
    parse_address,
    show_address,
    tenant_id,
)
from seawall.policy import Identity, Key
from seawall.rate import SECOND, Quota, Rate
from seawall.testing import ManualClock

PROXY = "10.0.0.1"
TRUSTED = tuple(ip_network(text) for text in ("10.0.0.0/8", "fd00::/8"))
HeaderName = Literal["x-forwarded-for", "forwarded"]


def scope(*lines: str | bytes, peer: Any = (PROXY, 1234), header: str = "x-forwarded-for") -> dict[str, Any]:
    raw = [line if isinstance(line, bytes) else line.encode("latin-1") for line in lines]
    return {"client": peer, "headers": [(b"accept", b"*/*"), *((header.encode(), line) for line in raw)]}


def clients(*, hops: int = 0, header: HeaderName = "x-forwarded-for", prefix: int = 64) -> ClientIP:
    proxies = () if hops else TRUSTED
    return ClientIP(Identity(trusted_proxies=proxies, trusted_hops=hops, header=header, ipv6_prefix=prefix))


def found(*lines: str | bytes, **changes: Any) -> str:
    """The address found behind a trusted proxy that sent ``lines``."""
    header: HeaderName = changes.pop("header", "x-forwarded-for")
    hops: int = changes.pop("hops", 0)
    return show_address(clients(hops=hops, header=header).resolve(scope(*lines, header=header, **changes)))


# Addresses

ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))


def canonical(address: IPv4Address | IPv6Address) -> bytes:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).packed


@given(ADDRESSES, st.integers(0, 65_535))
def test_all_spellings_of_an_address_are_one(address: IPv4Address | IPv6Address, port: int) -> None:
    spellings = [str(address)]
    if isinstance(address, IPv4Address):
        value = int(address)
        mapped = [f"::ffff:{address}", f"::FFFF:{value >> 16:x}:{value & 0xFFFF:x}", f"0:0:0:0:0:ffff:{address}"]
        spellings += [f"{address}:{port}", *mapped, *(f"[{text}]:{port}" for text in mapped)]
    else:
        long = address.exploded
        spellings += [
            long,
            long.upper(),
            f"{address}%eth0",
            f"[{long}]",
            f"[{address}]:{port}",
            f"[{address}%1]:{port}",
        ]
    assert {parse_address(text) for text in spellings} == {canonical(address)}


@given(ADDRESSES, ADDRESSES)
def test_two_addresses_are_two(one: IPv4Address | IPv6Address, other: IPv4Address | IPv6Address) -> None:
    assert (parse_address(str(one)) == parse_address(str(other))) == (canonical(one) == canonical(other))


@given(ADDRESSES)
def test_an_address_is_shown_as_people_write_it(address: IPv4Address | IPv6Address) -> None:
    assert ip_address(show_address(canonical(address))) == ip_address(canonical(address))
    assert show_address(UNKNOWN) == "unknown"


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "unknown", "_hidden", "localhost", "testclient", "/run/app.sock", "1", "1.2.3", "1.2.3.4.5",
        "1.2.3.256", "01.2.3.4", "1.2.3.4:", "1.2.3.4:x", "1.2.3.4:80:90", "1.2.3.4\x00", "[1.2.3.4]", "[::1", "::1]",
        "[::1]80", "[::1]:", "[::1]:x", "[::1]:-1", "[]", "[", ":", "::1%", "1.2.3.4%eth0", "::1::2", "12345::",
        "fe80::1 ", "0x7f.1", "127.1", "\uff11.2.3.4", "::1\ud800", "\ud800", "1.2.3.4\n", ":80",
        "x" * 100_000, "::" * 50_000,
    ],
)  # fmt: skip
def test_what_is_no_address_is_none(text: str) -> None:
    expected = IPv6Address("::1").packed if text == "::1%" else None
    assert parse_address(text) == expected


@given(st.one_of(st.text(max_size=60), st.text(alphabet="0123456789abcdef:.[]%/ ", max_size=50)))
def test_no_text_breaks_the_parser(text: str) -> None:
    parsed = parse_address(text)
    assert parsed is None or len(parsed) in (4, 16)
    bare = text.partition("%")[0]
    try:
        known: bytes | None = canonical(ip_address(bare))
    except ValueError:
        known = None
    assert known is None or "%" in text or parsed == known


NETWORKS = st.one_of(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(lambda n: ip_network((n[0], n[1]), strict=False)),
    st.tuples(st.integers(0, 2**128 - 1), st.integers(0, 128)).map(
        lambda n: ip_network((n[0].to_bytes(16), n[1]), strict=False)
    ),
    st.tuples(st.integers(0, 2**32 - 1), st.integers(96, 128)).map(
        lambda n: ip_network(((0xFFFF << 32 | n[0]).to_bytes(16), n[1]), strict=False)
    ),
)


@given(st.lists(NETWORKS, max_size=6), ADDRESSES, st.data())
def test_a_set_of_networks_holds_what_the_standard_library_says(
    networks: list[Any], address: IPv4Address | IPv6Address, data: st.DataObject
) -> None:
    """Also where a network is written as IPv4 inside IPv6: it is the IPv4 network."""
    inside = data.draw(st.sampled_from([None, *networks]))
    if inside is not None:
        offset = data.draw(st.integers(0, inside.num_addresses - 1))
        address = ip_address((int(inside.network_address) + offset).to_bytes(inside.max_prefixlen // 8))
    packed = canonical(address)
    unwrapped = ip_address(packed)
    expected = False
    for network in networks:
        mapped = network.version == 6 and network.prefixlen >= 96 and network.network_address.ipv4_mapped
        plain = ip_network((mapped, network.prefixlen - 96)) if mapped else network
        expected = expected or unwrapped in plain
    held = NetworkSet(networks)
    assert (packed in held) == expected
    assert bool(held) == bool(networks)
    assert UNKNOWN not in held


def test_one_address_is_one_bucket_and_an_ipv6_network_too() -> None:
    """S3: a /64 is one household. IPv4 is unwrapped before the mask, or all of it would be one."""
    one = clients()
    keys = [one.bucket(parse_address(f"2001:db8:0:1:{n:x}::{n:x}") or b"") for n in range(50)]
    assert set(keys) == {IPv6Address("2001:db8:0:1::").packed}
    assert one.bucket(IPv6Address("2001:db8:0:2::1").packed) != keys[0]
    mapped = [one.key(scope(peer=(f"::ffff:192.0.2.{n}", 1))) for n in range(50)]
    assert mapped == [bytes([192, 0, 2, n]) for n in range(50)]


@given(st.ip_addresses(v=6), st.integers(1, 128))
def test_the_prefix_is_the_one_configured(address: IPv6Address, prefix: int) -> None:
    key = clients(prefix=prefix).bucket(address.packed)
    assert key == ip_network((address, prefix), strict=False).network_address.packed


@given(st.ip_addresses(v=4), st.ip_addresses(v=4), st.integers(1, 128), st.booleans())
def test_two_ipv4_callers_never_share(one: IPv4Address, other: IPv4Address, prefix: int, mapped: bool) -> None:
    """CVE-2026-45364, CVE-2026-30827: mapped into IPv6 and masked, all of them were one caller."""
    resolver = ClientIP(Identity(ipv6_prefix=prefix))
    form = "::ffff:{}" if mapped else "{}"
    keys = {resolver.key(scope(peer=(form.format(address), 1))) for address in (one, other)}
    assert len(keys) == len({one, other})
    assert {resolver.key(scope(peer=(str(address), 1))) for address in (one, other)} == keys


@pytest.mark.parametrize(
    "peer",
    [None, (), ("",), ("", 0), ("/run/app.sock", None), ("testclient", 50_000), (None, 0), (b"1.2.3.4", 1), (1, 2)],
)
@pytest.mark.parametrize("resolver", [ClientIP(Identity()), clients(), clients(prefix=128)])
def test_callers_without_an_address_share_one_bucket(resolver: ClientIP, peer: Any) -> None:
    """S2: unix sockets, test clients, servers that tell nothing. Nobody of them is a trusted proxy."""
    assert resolver.key(scope("192.0.2.1", peer=peer)) == UNKNOWN
    assert resolver.peer({}) == UNKNOWN


def test_hops_are_counted_behind_a_unix_socket_too() -> None:
    assert found("192.0.2.1", hops=1, peer=None) == "192.0.2.1"


def test_nobody_is_believed_who_is_not_trusted() -> None:
    """CVE-2025-46814, CVE-2024-45410: by default the peer is the caller, whatever headers say."""
    assert show_address(ClientIP(Identity()).resolve(scope("6.6.6.6"))) == PROXY
    assert ClientIP(Identity()).key(scope("6.6.6.6")) == bytes([10, 0, 0, 1])
    assert found("6.6.6.6", peer=("192.0.2.9", 1)) == "192.0.2.9"
    assert ClientIP(Identity()).trusts_nobody
    assert not clients().trusts_nobody
    assert [clients().trusts(bytes([n, 0, 0, 1])) for n in (10, 11)] == [True, False]
    assert clients(hops=1).trusts(bytes([11, 0, 0, 1]))


@pytest.mark.parametrize(
    ("lines", "address"),
    [
        (["192.0.2.1"], "192.0.2.1"),
        (["6.6.6.6, 192.0.2.1"], "192.0.2.1"),
        (["6.6.6.6, 192.0.2.1, 10.0.0.2"], "192.0.2.1"),
        (["6.6.6.6", "192.0.2.1", "10.0.0.2"], "192.0.2.1"),  # repeated lines are one list
        (["6.6.6.6,192.0.2.1", "10.0.0.2,10.0.0.3"], "192.0.2.1"),
        (["10.0.0.3, 10.0.0.2"], "10.0.0.3"),  # all are proxies: the furthest is the caller
        (["192.0.2.1:4711 ,\t10.0.0.2"], "192.0.2.1"),
        (["[2001:db8::1]:443, fd00::1"], "2001:db8::1"),
        (["::ffff:192.0.2.1, ::ffff:10.0.0.2"], "192.0.2.1"),
        # What cannot be read, or is missing, stops the walk at the last good one.
        ([], PROXY),
        ([""], PROXY),
        (["192.0.2.1, nonsense"], PROXY),
        (["192.0.2.1,"], PROXY),
        (["192.0.2.1", ""], PROXY),
        (["192.0.2.1, , 10.0.0.2"], "10.0.0.2"),
        (["192.0.2.1, unknown, 10.0.0.2"], "10.0.0.2"),
        (["nonsense, 192.0.2.1"], "192.0.2.1"),  # only walked hops must parse
        ([b"\xff\xfe\x00, 192.0.2.1"], "192.0.2.1"),
    ],
)
def test_proxies_are_walked_from_the_right(lines: list[str | bytes], address: str) -> None:
    assert found(*lines) == address


@pytest.mark.parametrize(
    ("lines", "hops", "address"),
    [
        (["192.0.2.1"], 1, "192.0.2.1"),
        (["6.6.6.6, 192.0.2.1"], 1, "192.0.2.1"),
        (["6.6.6.6, 192.0.2.1, 203.0.113.7"], 2, "192.0.2.1"),
        (["6.6.6.6, 192.0.2.1", "203.0.113.7"], 2, "192.0.2.1"),
        (["192.0.2.1"], 2, PROXY),  # fewer hops: it did not come through the proxies
        ([], 1, PROXY),
        (["6.6.6.6, nonsense"], 1, PROXY),
        (["6.6.6.6, "], 1, PROXY),
        (["192.0.2.1, nonsense"], 2, "192.0.2.1"),
        ([", ".join(f"192.0.2.{n}" for n in range(40))], 32, "192.0.2.8"),
        ([", ".join(f"192.0.2.{n}" for n in range(31))], 32, PROXY),
    ],
)
def test_trusted_hops_take_the_nth_from_the_right(lines: list[str | bytes], hops: int, address: str) -> None:
    assert found(*lines, hops=hops) == address


@pytest.mark.parametrize(
    ("line", "address"),
    [
        ("for=192.0.2.1", "192.0.2.1"),
        ("For=192.0.2.1;proto=https;by=203.0.113.43", "192.0.2.1"),
        ("proto=https; by=10.0.0.2 ; FOR = 192.0.2.1", "192.0.2.1"),
        ('for="192.0.2.1:47011"', "192.0.2.1"),
        ('for="[2001:db8:cafe::17]:4711"', "2001:db8:cafe::17"),
        ("for=[2001:db8:cafe::17]", "2001:db8:cafe::17"),  # not allowed unquoted, but sent
        ("for=2001:db8:cafe::17", "2001:db8:cafe::17"),
        ("for=6.6.6.6, for=192.0.2.1, for=10.0.0.2", "192.0.2.1"),
        ("for=192.0.2.1;", "192.0.2.1"),
        (";;for=192.0.2.1", "192.0.2.1"),
        ("for=_hidden", PROXY),
        ("for=unknown", PROXY),
        ("for=unknown, for=10.0.0.2", "10.0.0.2"),
        ("for=", PROXY),
        ("proto=https", PROXY),
        ("192.0.2.1", PROXY),
        ("before=192.0.2.1", PROXY),
        ('for="192.0.2.1', PROXY),
        ('for=192.0.2.1"', PROXY),
        ("for=6.6.6.6;for=192.0.2.1", PROXY),  # one caller an element; who says two says nothing
        # What a proxy quotes may be the caller's own words.
        ('host="a;for=6.6.6.6";for=192.0.2.1', "192.0.2.1"),
        ('for=192.0.2.1;host="a;for=6.6.6.6"', "192.0.2.1"),
        ('for=192.0.2.1;host="a, for=6.6.6.6;"', PROXY),
        ('for=192.0.2.1;host="a, for=6.6.6.6;\\""', PROXY),
        ('for=192.0.2.1;host="a, for=6.6.6.6;b=\\"c\\""', PROXY),
        ('for=192.0.2.1;host="a, for=6.6.6.6, b"', PROXY),
        ('", for=192.0.2.1', "192.0.2.1"),  # a quote that a caller opens swallows nothing behind it
    ],
)
def test_forwarded_is_read_where_it_is_configured(line: str, address: str) -> None:
    assert found(line, header="forwarded") == address


def test_only_one_of_the_two_headers_is_read() -> None:
    """Reading both would let a caller add the one that its proxy does not set."""
    both = scope("6.6.6.6")
    both["headers"].append((b"forwarded", b"for=192.0.2.1"))
    assert show_address(clients(header="forwarded").resolve(both)) == "192.0.2.1"
    assert show_address(clients().resolve(both)) == "6.6.6.6"


SUFFIXES = st.tuples(
    st.one_of(st.ip_addresses(v=4, network="192.0.2.0/24"), st.ip_addresses(v=6, network="2001:db8::/32")),
    st.lists(
        st.one_of(st.ip_addresses(v=4, network="10.0.0.0/8"), st.ip_addresses(v=6, network="fd00::/8")), max_size=8
    ),
)
PREFIXES = st.lists(
    st.one_of(
        st.binary(max_size=60),
        st.text(alphabet='0123456789.,:;=" []%for', max_size=40).map(str.encode),
        st.sampled_from((b"", b",", b"6.6.6.6", b"10.0.0.9", b"x" * 3_000, b"10.1.1.1," * 500, b'for=6.6.6.6;by="')),
    ),
    max_size=4,
)


@given(PREFIXES, SUFFIXES, st.booleans(), st.sampled_from(("x-forwarded-for", "forwarded")), st.integers(0, 3))
def test_no_prefix_changes_who_the_caller_is(
    prefix: list[bytes], suffix: tuple[Any, list[Any]], own_line: bool, header: HeaderName, hops: int
) -> None:
    """S1: what a caller sends stands left of what proxies add, in own lines or in theirs, and counts for nothing."""
    addresses = [suffix[0], *suffix[1]]
    texts = [str(a) if header == "x-forwarded-for" else f'for="{a if a.version == 4 else f"[{a}]"}"' for a in addresses]
    trusted = ", ".join(texts).encode()
    forged = [*prefix, trusted] if own_line or not prefix else [*prefix[:-1], prefix[-1] + b"," + trusted]
    resolver = clients(header=header, hops=len(texts) if hops else 0)
    alone = resolver.key(scope(trusted, header=header))
    assert resolver.key(scope(*forged, header=header)) == alone
    assert resolver.resolve(scope(*forged, header=header)) == canonical(suffix[0])


@pytest.mark.parametrize("size", range(MAX_FORWARDED - 3, MAX_FORWARDED + 1))
@pytest.mark.parametrize("prefix", ["6.6.6.6", "1", "x" * 5_000, "6.6.6.6," * 400])
def test_a_suffix_of_up_to_two_kilobytes_is_read_whole(size: int, prefix: str) -> None:
    last = ",10.0.0.2"
    suffix = "192.0.2.1" + " " * (size - 9 - len(last)) + last
    assert len(suffix) == size
    assert found(suffix) == found(f"{prefix},{suffix}") == found(prefix, suffix) == "192.0.2.1"


def test_more_than_two_kilobytes_are_cut_at_a_comma() -> None:
    """Half an address may be another one: 192.0.2.1 must not become 2.0.2.1, nor 2.1 an address."""
    for padding in range(MAX_FORWARDED - 30, MAX_FORWARDED + 30):
        last = ",10.0.0.2" + " " * padding
        assert found("6.6.6.6,192.0.2.1" + last) in ("192.0.2.1", "10.0.0.2", PROXY)
    assert found("1" * 3_000) == PROXY
    assert found("192.0.2.1" + " " * 3_000) == PROXY


def test_thirty_two_hops_are_walked_and_no_more() -> None:
    chain = ["192.0.2.1", *(f"10.0.1.{n}" for n in range(MAX_HOPS - 1))]
    assert found(", ".join(chain)) == "192.0.2.1"
    assert found(*chain) == "192.0.2.1"
    assert found(", ".join([*chain, "10.0.2.1"])) == "10.0.1.0"
    assert found("6.6.6.6," * 10_000 + ",".join(chain)) == "192.0.2.1"


@given(
    st.lists(st.one_of(st.binary(max_size=80), st.text(alphabet='for=";,[]:.%_ 1a', max_size=60).map(str.encode))),
    st.sampled_from(("x-forwarded-for", "forwarded")),
    st.integers(0, 3),
)
@example([b""] * 3_000, "x-forwarded-for", 0)
@example([b"," * 70_000], "forwarded", 0)
@example([b";" * 70_000], "forwarded", 1)
@example([b'"' * 70_000, b"for=" * 500], "forwarded", 1)
def test_no_header_breaks_the_walk(lines: list[bytes], header: HeaderName, hops: int) -> None:
    address = clients(header=header, hops=hops).resolve(scope(*lines, header=header))
    assert len(address) in (4, 16)


# Tenants

DAY = 86_400 * SECOND


def source(
    *tenant: tuple[Literal["api_key", "state"], str], keys: Mapping[bytes, Key] | None = None
) -> tuple[TenantSource, ManualClock]:
    clock = ManualClock()
    return TenantSource(Identity(tenant=tenant), keys or {}, clock.wall_ns), clock


def request(*headers: tuple[str, str], state: object = None) -> dict[str, Any]:
    scope: dict[str, Any] = {"headers": [(name.encode(), value.encode("latin-1")) for name, value in headers]}
    return scope if state is None else {**scope, "state": state}


def digest(key: str) -> bytes:
    return sha256(key.encode()).digest()


def test_a_listed_key_is_its_tenant() -> None:
    source_, _ = source(("api_key", "x-api-key"), keys={digest("foo"): Key("acme"), digest("bar"): Key("globex")})
    assert source_.find(request(("x-api-key", "foo"))) == "acme"
    assert source_.find(request(("accept", "*/*"), ("x-api-key", "bar"))) == "globex"
    assert key_digest(b"foo") == digest("foo")


@pytest.mark.parametrize(
    "key", ["", " ", "foo ", "FOO", "fo", "unlisted", "acme", digest("foo").hex(), "x" * 65_536, "ÿ"]
)
def test_an_unlisted_key_yields_nothing(key: str) -> None:
    source_, _ = source(("api_key", "x-api-key"), keys={digest("foo"): Key("acme")})
    assert source_.find(request(("x-api-key", key))) is None
    assert source_.find(request(("x-other", "foo"))) is None


def test_several_keys_live_while_one_is_rotated_and_each_ends_at_its_instant() -> None:
    clock = ManualClock()
    end = clock.wall_ns() + DAY
    keys = {digest("old"): Key("acme", end), digest("new"): Key("acme"), digest("last"): Key("acme", end + DAY)}
    tenants = TenantSource(Identity(tenant=(("api_key", "x-api-key"),)), keys, clock.wall_ns)

    def live() -> list[str]:
        return [key for key in ("old", "new", "last") if tenants.find(request(("x-api-key", key))) == "acme"]

    assert live() == ["old", "new", "last"]
    clock.advance_ns(DAY - 1)
    assert live() == ["old", "new", "last"]
    clock.advance_ns(1)
    assert live() == ["new", "last"]
    clock.advance_ns(DAY)
    assert live() == ["new"]


@pytest.mark.parametrize(
    ("value", "tenant"),
    [
        ("Bearer foo", "acme"),
        ("bearer foo", "acme"),
        ("BEARER   foo ", "acme"),
        ("foo", "acme"),
        ("Basic foo", None),
        ("Bearer", None),
        ("Bearer ", None),
        ("Bearerfoo", None),
    ],
)
def test_authorization_is_read_without_its_bearer(value: str, tenant: str | None) -> None:
    source_, _ = source(("api_key", "authorization"), keys={digest("foo"): Key("acme")})
    assert source_.find(request(("authorization", value))) == tenant


def test_bearer_is_part_of_a_key_in_any_other_header() -> None:
    source_, _ = source(("api_key", "x-api-key"), keys={digest("foo"): Key("acme")})
    assert source_.find(request(("x-api-key", "Bearer foo"))) is None


def test_sources_are_tried_in_their_order() -> None:
    keys = {digest("foo"): Key("by-key"), digest("bar"): Key("by-token", 0)}
    first, _ = source(("api_key", "x-api-key"), ("api_key", "authorization"), ("state", "tenant"), keys=keys)
    state = {"tenant": "by-state"}
    assert first.find(request(("x-api-key", "foo"), state=state)) == "by-key"
    assert first.find(request(("x-api-key", "wrong"), ("authorization", "foo"), state=state)) == "by-key"
    assert first.find(request(("x-api-key", "wrong"), ("authorization", "bar"), state=state)) == "by-state"
    assert first.find(request(("x-api-key", "wrong"))) is None
    last, _ = source(("state", "tenant"), ("api_key", "x-api-key"), keys=keys)
    assert last.find(request(("x-api-key", "foo"), state=state)) == "by-state"
    assert last.find(request(("x-api-key", "foo"), state={})) == "by-key"
    assert last.find(request(("x-api-key", "foo"), state={"tenant": None})) == "by-key"
    assert source()[0].find(request(("x-api-key", "foo"), state=state)) is None


def test_the_first_line_of_a_repeated_key_header_counts() -> None:
    """Whatever order a proxy joins them in, a second line opens no second account."""
    source_, _ = source(("api_key", "x-api-key"), keys={digest("foo"): Key("acme")})
    assert source_.find(request(("x-api-key", "foo"), ("x-api-key", "wrong"))) == "acme"
    assert source_.find(request(("x-api-key", "wrong"), ("x-api-key", "foo"))) is None


@pytest.mark.parametrize(
    ("value", "tenant"),
    [
        (None, None), (False, None), ("", None), (" ", None), ("\t\n", None), ("acme", "acme"), (" acme", " acme"),
        (True, None), (b"acme", None), (object(), None), (0, "0"), (42, "42"),
        ("ü", "ü"), ("\ud800", bounded_id("\ud800")),
        ("x" * MAX_ID, "x" * MAX_ID),
    ],
)  # fmt: skip
def test_an_id_from_state_is_text(value: object, tenant: str | None) -> None:
    assert tenant_id(value) == tenant
    source_, _ = source(("state", "tenant"))
    assert source_.find(request(state={"tenant": value})) == tenant


@given(st.text(max_size=300), st.text(max_size=300))
def test_a_long_id_is_told_apart_and_kept_short(one: str, other: str) -> None:
    long = [text + "x" * MAX_ID for text in (one, other)]
    assert len(bounded_id(long[0])) <= MAX_ID
    assert (bounded_id(long[0]) == bounded_id(long[1])) == (one == other)
    assert len(bounded_id("\ud800" * 200)) <= MAX_ID


def test_forged_requests_leave_the_quota_of_whom_they_name_unchanged() -> None:
    """S4: a tenant is proven, never claimed; failed authentication is charged to the address it came from."""
    clock = ManualClock()
    identity = Identity(tenant=(("api_key", "x-api-key"), ("api_key", "authorization"), ("state", "tenant")))
    tenants = TenantSource(identity, {digest("foo"): Key("acme")}, clock.wall_ns)
    resolver, backend = ClientIP(identity), MemoryBackend(clock=clock, wall_clock=clock.wall_ns)
    plan = [backend.meter("quota", store, Quota(10_000, "day")) for store in ("tenant", "address")]

    def left(whose: str | bytes) -> int:
        meter = plan[isinstance(whose, bytes)]
        return backend.spend([(meter, whose, 0)]).left[0]

    for n in range(10_000):
        claims = [
            ("x-api-key", f"acme-{n}"),
            ("authorization", "Bearer acme"),
            ("x-tenant", "acme"),
            ("tenant", "acme"),
        ]
        forged = {**request(*claims), "client": ("192.0.2.66", n)}
        assert tenants.find(forged) is None
        backend.spend([(plan[1], resolver.key(forged), 1)])
    assert left("acme") == 10_000
    assert left(bytes([192, 0, 2, 66])) == 0
    backend.spend([(plan[0], tenants.find(request(("x-api-key", "foo"))) or "", 1)])
    assert left("acme") == 9_999


def test_rates_are_per_network_of_the_caller() -> None:
    """End to end in the small: rotating within a /64 finds the same bucket, a neighbour has its own."""
    clock = ManualClock()
    backend, resolver = MemoryBackend(clock=clock, wall_clock=clock.wall_ns), ClientIP(Identity())
    meter = backend.meter("rate", "address", Rate(3, SECOND))

    def admitted(host: str) -> bool:
        return backend.spend([(meter, resolver.key(scope(peer=(host, 1))), 1)]).admitted

    assert [admitted(f"2001:db8::{n:x}") for n in range(1, 6)] == [True, True, True, False, False]
    assert admitted("2001:db8:0:1::1")
