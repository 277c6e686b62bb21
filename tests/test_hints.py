"""What a request says about itself: every form by table, nonsense at random, and callers who would like to be first."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable, Mapping
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from seawall.hints import (
    GOOGLE,
    MAX_AHEAD,
    MAX_BAGGAGE,
    MAX_NAME,
    MAX_NUMBER,
    MAX_TIMEOUT,
    MAX_WAITED,
    NETFLIX,
    Hint,
    Hints,
    class_ranks,
    criticality,
)
from seawall.identity import ClientIP
from seawall.policy import Identity, Policy, Priority, PriorityHeader
from seawall.rate import SECOND
from seawall.testing import ManualClock

MS = 1_000_000
HOUR = 3_600 * SECOND
NOW = 5_000 * SECOND
AT = "2026-01-01T00:00:00Z"
EPOCH = 1_767_225_600  # of AT, in seconds

GRPC, ENVOY, TIMEOUT, START = (
    "grpc-timeout",
    "x-envoy-expected-rq-timeout-ms",
    "x-request-timeout-ms",
    "x-request-start",
)
HEADER, BAGGAGE = "x-request-priority", "baggage"
NAMES = (GRPC, ENVOY, TIMEOUT, START, HEADER, BAGGAGE)

GATEWAY, STRANGER = "10.2.0.7", "203.0.113.9"
RAISING = PriorityHeader(HEADER, (ip_network("10.2.0.0/16"), ip_network("fd00::/8")))
FOUR = ("critical", "normal", "low", "background")

Header = tuple[str, str | bytes]


def policy(classes: Iterable[str] = FOUR, header: PriorityHeader | None = None) -> Policy:
    return Policy(priorities=tuple(map(Priority, classes)), priority_header=header)


def reader(
    classes: Iterable[str] = FOUR, header: PriorityHeader | None = None, clock: ManualClock | None = None
) -> Hints:
    return Hints(policy(classes, header), ClientIP(Identity()).peer, (clock or ManualClock(AT)).wall_ns)


def scope(*headers: Header, peer: str | None = STRANGER) -> dict[str, Any]:
    raw = [(name.encode(), value if isinstance(value, bytes) else value.encode("latin-1")) for name, value in headers]
    return {"type": "http", "headers": [(b"host", b"x"), *raw], "client": peer and (peer, 1234)}


def read(*headers: Header, now: int = NOW, hints: Hints | None = None, peer: str | None = STRANGER) -> Hint | None:
    return (hints or reader()).read(scope(*headers, peer=peer), now)


# Nothing said


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"accept": "*/*", "priority": "u=0", "x-forwarded-for": "192.0.2.1"},
        {START: f"t={EPOCH}.000"},
        {START: "nonsense, but there is no timeout to take it off"},
        {ENVOY: "0"},
        {BAGGAGE: "user=foo,server=bar;prop=criticality"},
        {BAGGAGE: ""},
        {TIMEOUT: str(2**63 - 1)},
    ],
)
def test_a_request_that_says_nothing_costs_no_hint(headers: Mapping[str, str]) -> None:
    assert read(*headers.items()) is None


def test_the_headers_that_may_be_named_as_nonsense_are_known_beforehand() -> None:
    assert reader().headers == tuple(sorted(NAMES))
    assert reader(header=PriorityHeader("x-class")).headers == tuple(sorted({*NAMES, "x-class"} - {HEADER}))


# Deadlines


@pytest.mark.parametrize(
    ("name", "value", "timeout"),
    [
        (GRPC, "1H", HOUR),
        (GRPC, "2M", 120 * SECOND),
        (GRPC, "3S", 3 * SECOND),
        (GRPC, "4m", 4 * MS),
        (GRPC, "5u", 5_000),
        (GRPC, "6n", 6),
        (GRPC, "99999999u", 99_999_999_000),
        (GRPC, "00000001S", SECOND),
        (GRPC, "0n", 0),
        (GRPC, " 1S\t", SECOND),
        (ENVOY, "1", MS),
        (ENVOY, "15000", 15 * SECOND),
        (TIMEOUT, "0", 0),
        (TIMEOUT, "250", 250 * MS),
        (TIMEOUT, "000000000000000250", 250 * MS),
        (TIMEOUT, " 250 ", 250 * MS),
        (TIMEOUT, str(MAX_TIMEOUT // MS), MAX_TIMEOUT),
    ],
)
def test_a_timeout_counts_from_the_arrival(name: str, value: str, timeout: int) -> None:
    assert read((name, value)) == Hint(deadline_ns=NOW + timeout)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (GRPC, "24H"),
        (GRPC, "86400S"),
        (TIMEOUT, "86400000"),
        (ENVOY, "86400000"),
    ],
)
def test_a_day_is_the_longest_timeout_there_is(name: str, value: str) -> None:
    assert read((name, value)) == Hint(deadline_ns=NOW + MAX_TIMEOUT)
    digits = value.rstrip("HS")
    longer = value.replace(digits, str(int(digits) + 1))
    assert read((name, longer)) is None


@pytest.mark.parametrize("value", ["99999999H", "25H", "1441M"])
def test_a_timeout_of_more_than_a_day_is_none_and_no_nonsense(value: str) -> None:
    assert read((GRPC, value)) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (GRPC, ""),
        (GRPC, "S"),
        (GRPC, "5"),
        (GRPC, "5s"),
        (GRPC, "5h"),
        (GRPC, "123456789n"),
        (GRPC, "-1S"),
        (GRPC, "+1S"),
        (GRPC, "1.5S"),
        (GRPC, "1 S"),
        (GRPC, "1_0S"),
        (GRPC, "infS"),
        (GRPC, b"\xb2S"),
        (GRPC, "1S, 1S"),
        *(
            (name, value)
            for name in (ENVOY, TIMEOUT)
            for value in (
                "",
                " ",
                "-1",
                "+1",
                "1.0",
                "1e3",
                "1_000",
                "0x10",
                "nan",
                "NaN",
                "inf",
                "-Infinity",
                "500ms",
                "5, 5",
                "9" * 21,
                " " * MAX_NUMBER + "5",
                b"\x00",
                b"\xb2",
                b"\xd9\xa1",
                b"\xff" * 8,
            )
        ),
    ],
)
def test_a_timeout_that_is_nonsense_is_ignored_and_named(name: str, value: str | bytes) -> None:
    assert read((name, value)) == Hint(ignored=(name,))


def test_the_earliest_of_several_deadlines_counts() -> None:
    assert read((GRPC, "3S"), (TIMEOUT, "2000"), (ENVOY, "1000")) == Hint(NOW + SECOND)
    assert read((GRPC, "1S"), (TIMEOUT, "2000"), (ENVOY, "3000")) == Hint(NOW + SECOND)
    assert read((GRPC, "3S"), (TIMEOUT, "1000"), (ENVOY, "0")) == Hint(NOW + SECOND)


def test_nonsense_in_one_header_leaves_what_another_says() -> None:
    assert read((TIMEOUT, "soon"), (GRPC, "1S")) == Hint(NOW + SECOND, ignored=(TIMEOUT,))


@pytest.mark.parametrize("name", [GRPC, ENVOY, TIMEOUT])
def test_a_timeout_said_twice_counts_if_it_is_the_same(name: str) -> None:
    one, other = ("1S", "2S") if name == GRPC else ("1000", "2000")
    assert read((name, one), (name, one)) == Hint(NOW + SECOND)
    assert read((name, one), (name, other)) == Hint(ignored=(name,))
    assert read((name, one), (name, other), (name, one)) == Hint(ignored=(name,))


def test_an_expired_request_at_the_zero_of_the_clock_is_not_one_without_a_deadline() -> None:
    assert read((TIMEOUT, "0"), now=0) == Hint(deadline_ns=-1)
    assert read((TIMEOUT, "1"), now=-MS) == Hint(deadline_ns=-1)


# What a proxy has used up


@pytest.mark.parametrize(
    "value",
    [
        f"t={EPOCH}.000",
        f"{EPOCH}.0",
        f"t={EPOCH}000",
        f"{EPOCH}000",
        f"{EPOCH}000.000",
        f"t={EPOCH}000000",
        f"{EPOCH}000000",
        f"t={EPOCH}000000000",
        f" t={EPOCH}.000000000\t",
    ],
)
def test_the_time_in_a_proxy_is_taken_off_the_timeout_in_every_unit(value: str) -> None:
    clock = ManualClock(AT)
    clock.advance(0.3)
    assert read((START, value), (TIMEOUT, "1000"), hints=reader(clock=clock)) == Hint(NOW + 700 * MS)


def test_a_request_whose_timeout_has_gone_by_in_the_proxy_has_expired() -> None:
    clock = ManualClock(AT)
    clock.advance(5)
    assert read((TIMEOUT, "1000"), (START, f"t={EPOCH}.000"), hints=reader(clock=clock)) == Hint(NOW - 4 * SECOND)
    assert read((GRPC, "5S"), (START, f"t={EPOCH}.000"), hints=reader(clock=clock)) == Hint(NOW)


@given(
    waited=st.integers(0, MAX_WAITED),
    timeout=st.integers(0, MAX_TIMEOUT // MS),
    resolution=st.sampled_from((SECOND, MS, 1_000, 1)),
    prefix=st.sampled_from(("", "t=")),
)
def test_a_deadline_is_the_start_and_the_timeout(waited: int, timeout: int, resolution: int, prefix: str) -> None:
    clock = ManualClock(AT)
    start = clock.wall_ns()
    clock.advance_ns(waited)
    # A proxy writes seconds with three decimals, and else a whole number of its unit; all start on such a one here.
    text = f"{start // SECOND}.000" if resolution == SECOND else str(start // resolution)
    hint = read((TIMEOUT, str(timeout)), (START, prefix + text), hints=reader(clock=clock))
    assert hint == Hint(NOW + timeout * MS - waited)


@given(nanoseconds=st.integers(0, SECOND - 1), digits=st.integers(1, 9))
def test_the_decimals_of_a_start_are_exact(nanoseconds: int, digits: int) -> None:
    clock = ManualClock(AT)
    clock.advance(1)
    decimals = f"{nanoseconds:09d}"[:digits]
    start = int(decimals.ljust(9, "0"))
    hint = read((TIMEOUT, "5000"), (START, f"t={EPOCH}.{decimals}"), hints=reader(clock=clock))
    assert hint == Hint(NOW + 4 * SECOND + start)


def test_a_proxy_may_be_ahead_by_a_second_and_an_hour_late() -> None:
    def with_start(ns: int) -> Hint | None:
        return read((TIMEOUT, "60000"), (START, str(ns)))

    wall = EPOCH * SECOND
    full = Hint(NOW + 60 * SECOND)
    assert with_start(wall + 1) == full
    assert with_start(wall + MAX_AHEAD) == full
    assert with_start(wall + MAX_AHEAD + 1) == Hint(full.deadline_ns, ignored=(START,))
    assert with_start(wall - MAX_WAITED) == Hint(full.deadline_ns - MAX_WAITED)
    assert with_start(wall - MAX_WAITED - 1) == Hint(full.deadline_ns, ignored=(START,))


@pytest.mark.parametrize(
    "value",
    [
        "",
        "t=",
        "now",
        "t=nan",
        "0",
        f"{EPOCH}",  # whole seconds: up to one too many
        f"t={EPOCH}.",
        f"-{EPOCH}000",
        f"t={EPOCH}.-1",
        f"t={EPOCH}.1.2",
        f"t=t={EPOCH}.000",
        f"start={EPOCH}.000",
        f"0{EPOCH}000",
        f"{EPOCH}00",
        f"{EPOCH}.{'0' * 30}",
        "9" * 19,
        b"\xff" * 13,
        b"\xb2" * 13,
    ],
)
def test_a_start_that_is_nonsense_takes_nothing_off(value: str | bytes) -> None:
    assert read((TIMEOUT, "1000"), (START, value)) == Hint(NOW + SECOND, ignored=(START,))


def test_two_starts_that_differ_take_nothing_off() -> None:
    clock = ManualClock(AT)
    clock.advance(0.5)
    hints = reader(clock=clock)
    one, other = (START, f"t={EPOCH}.000"), (START, f"t={EPOCH}.250")
    assert read((TIMEOUT, "1000"), one, one, hints=hints) == Hint(NOW + SECOND // 2)
    assert read((TIMEOUT, "1000"), one, other, hints=hints) == Hint(NOW + SECOND, ignored=(START,))


def test_what_envoy_has_left_already_is_what_is_left() -> None:
    clock = ManualClock(AT)
    clock.advance(0.5)
    start = (START, f"t={EPOCH}.000")
    assert read((ENVOY, "1000"), start, hints=reader(clock=clock)) == Hint(NOW + SECOND)
    assert read((ENVOY, "1000"), (GRPC, "1S"), start, hints=reader(clock=clock)) == Hint(NOW + SECOND // 2)


def test_a_start_is_not_looked_at_where_there_is_no_timeout() -> None:
    assert read((START, "nonsense"), (HEADER, "low")) == Hint(priority="low")
    assert read((START, "nonsense"), (TIMEOUT, "nonsense")) == Hint(ignored=(TIMEOUT,))
    assert read((START, "nonsense"), (GRPC, "99999999H")) is None


# Priorities


@pytest.mark.parametrize("value", [*FOUR, "LOW", "Normal", " low ", "\tlow"])
def test_a_class_is_asked_for_by_its_name_in_any_case(value: str) -> None:
    assert read((HEADER, value)) == Hint(priority=value.strip().lower())


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        # Google's four, then Netflix's four.
        (["only"], [0, 0, 0, 0, 0, 0, 0, 0]),
        (["first", "second"], [0, 0, 1, 1, 0, 0, 1, 1]),
        (["gold", "silver", "bronze"], [0, 0, 1, 2, 0, 1, 1, 2]),
        (["a", "b", "c", "d"], [0, 0, 2, 3, 0, 1, 2, 3]),
        (["a", "b", "c", "d", "e"], [0, 0, 3, 4, 0, 1, 3, 4]),
        ([f"c{n}" for n in range(16)], [0, 0, 10, 15, 0, 5, 10, 15]),
        (["critical", "normal", "low"], [0, 0, 1, 2, 0, 1, 1, 2]),
        (["vital", "critical", "rest"], [0, 1, 1, 2, 1, 1, 1, 2]),
        (["critical_plus", "critical", "sheddable_plus", "sheddable"], [0, 1, 2, 3, 1, 1, 2, 3]),
        (["bulk", "other"], [0, 0, 1, 1, 0, 0, 1, 0]),
    ],
)
def test_the_words_of_google_and_netflix_are_spread_over_the_classes(classes: list[str], expected: list[int]) -> None:
    ranks = class_ranks(classes)
    assert [ranks[word.lower().encode()] for word in (*GOOGLE, *NETFLIX)] == expected
    asked = [read((HEADER, word), hints=reader(classes)) for word in (*GOOGLE, *NETFLIX)]
    assert asked == [Hint(priority=classes[rank]) for rank in expected]


@given(st.lists(st.from_regex(r"\Ax[a-z]{0,5}\Z"), min_size=1, max_size=16, unique=True))
def test_the_words_of_each_list_keep_their_order_and_reach_both_ends(classes: list[str]) -> None:
    ranks = class_ranks(classes)
    for words in (GOOGLE, NETFLIX):
        found = [ranks[word.lower().encode()] for word in words]
        assert found == sorted(found)
        assert (found[0], found[-1]) == (0, len(classes) - 1)


@pytest.mark.parametrize("value", ["", "urgent", "u=0", "0", "low, low", b"\xff", "low" + " " * MAX_NAME])
def test_an_unknown_class_is_ignored_and_named(value: str | bytes) -> None:
    assert read((HEADER, value)) == Hint(ignored=(HEADER,))


def test_a_class_with_the_longest_name_can_be_asked_for() -> None:
    name = "x" * MAX_NAME
    assert read((HEADER, name), hints=reader([name, "low"])) == Hint(priority=name)


def test_a_priority_said_twice_counts_if_it_is_the_same() -> None:
    assert read((HEADER, "low"), (HEADER, "low")) == Hint(priority="low")
    assert read((HEADER, "low"), (HEADER, "normal")) == Hint(ignored=(HEADER,))


def test_the_configured_header_is_read_instead() -> None:
    hints = reader(header=PriorityHeader("x-class"))
    assert read(("x-class", "low"), (HEADER, "background"), hints=hints) == Hint(priority="low")
    assert read((BAGGAGE, "criticality=low"), hints=hints) == Hint(priority="low")


@pytest.mark.parametrize("name", [GRPC, ENVOY, TIMEOUT, START, BAGGAGE])
def test_a_header_with_a_meaning_of_its_own_keeps_it_and_raises_nothing(name: str) -> None:
    hints = reader(header=PriorityHeader(name, RAISING.raise_from))
    assert set(hints.headers) == {GRPC, ENVOY, TIMEOUT, START, BAGGAGE}
    value = {GRPC: "1S", BAGGAGE: "criticality=critical"}.get(name, "1000")
    assert read((name, value), hints=hints, peer=GATEWAY) == read((name, value))
    hint = read((name, "critical"), hints=hints, peer=GATEWAY)
    assert hint is None or hint.priority is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("criticality=low", "low"),
        ("criticality=BULK", "background"),
        ("user=foo,criticality=low,server=bar", "low"),
        ("user=foo , criticality = low ;ttl=1;x , server=bar", "low"),
        ("criticality=l%6Fw", "low"),
        ("criticality=%20low", "low"),
        ("criticality=low,criticality=low", "low"),
        ("xcriticality=low,criticality=normal", "normal"),
    ],
)
def test_the_criticality_is_found_in_the_baggage(value: str, expected: str) -> None:
    assert read((BAGGAGE, value)) == Hint(priority=expected)


@pytest.mark.parametrize(
    "value",
    [
        "criticality",
        "criticality=",
        "criticality=;low",
        "criticality=high",
        "criticality=low=low",
        "criticality=%",
        "criticality=%zz",
        "criticality=%FF",
        "criticality=low,criticality=normal",
        "criticality=" + "%6C" * 200,
        b"criticality=\xff",
    ],
)
def test_a_criticality_that_is_nonsense_is_ignored_and_named(value: str | bytes) -> None:
    assert read((BAGGAGE, value)) == Hint(ignored=(BAGGAGE,))


@pytest.mark.parametrize(
    "value", ["Criticality=low", "user=criticality=low", "user=a;criticality=low", "%63riticality=low"]
)
def test_another_key_of_the_baggage_is_not_the_criticality(value: str) -> None:
    assert read((BAGGAGE, value)) is None


def test_baggage_on_several_lines_is_one_list() -> None:
    assert read((BAGGAGE, "user=foo"), (BAGGAGE, "criticality=low")) == Hint(priority="low")
    assert read((BAGGAGE, "criticality=low"), (BAGGAGE, "criticality=normal")) == Hint(ignored=(BAGGAGE,))


def test_baggage_is_looked_at_up_to_a_bound_and_never_up_to_half_a_value() -> None:
    member = "criticality=critical_plus"
    for kept in range(len(member) + 2):
        # So much of the member lies within the bound, with its comma.
        before = "a" * (MAX_BAGGAGE - kept - 1) + ","
        found = criticality(f"{before}{member},{'b' * 100}".encode())
        assert found == (b"critical_plus" if kept >= len(member) else None)
    assert criticality(b"a" * MAX_BAGGAGE + b"criticality=low") is None


def test_lines_of_baggage_beyond_the_bound_are_not_collected() -> None:
    hints = reader()
    asked = scope((BAGGAGE, "criticality=low"), *[(BAGGAGE, "a" * MAX_BAGGAGE)] * 100, (BAGGAGE, "criticality=normal"))
    tracemalloc.start()
    try:
        hint = hints.read(asked, NOW)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert hint == Hint(priority="low")
    assert peak < 10 * MAX_BAGGAGE


def test_the_lowest_of_several_priorities_counts() -> None:
    assert read((HEADER, "normal"), (BAGGAGE, "criticality=low")) == Hint(priority="low")
    assert read((HEADER, "low"), (BAGGAGE, "criticality=normal")) == Hint(priority="low")
    assert read((HEADER, "odd"), (BAGGAGE, "criticality=low")) == Hint(priority="low", ignored=(HEADER,))
    assert read((HEADER, "low"), (BAGGAGE, "criticality=odd")) == Hint(priority="low", ignored=(BAGGAGE,))


def test_deadline_and_priority_are_read_together() -> None:
    hint = read((HEADER, "low"), ("accept", "*/*"), (TIMEOUT, "250"), (GRPC, "?"))
    assert hint == Hint(NOW + 250 * MS, "low", ignored=(GRPC,))


# Who may raise


@pytest.mark.parametrize("peer", [GATEWAY, f"::ffff:{GATEWAY}", "fd00::1"])
def test_a_named_peer_may_raise(peer: str) -> None:
    assert read((HEADER, "critical"), hints=reader(header=RAISING), peer=peer) == Hint(priority="critical", raises=True)


@pytest.mark.parametrize("peer", [STRANGER, "10.3.0.7", "not an address", None])
def test_any_other_peer_may_not(peer: str | None) -> None:
    assert read((HEADER, "critical"), hints=reader(header=RAISING), peer=peer) == Hint(priority="critical")


@pytest.mark.parametrize("header", [None, PriorityHeader(HEADER)])
def test_nobody_may_raise_where_nobody_is_named(header: PriorityHeader | None) -> None:
    assert read((HEADER, "critical"), hints=reader(header=header), peer=GATEWAY) == Hint(priority="critical")


def test_a_resolver_that_finds_no_peer_raises_nothing() -> None:
    hints = Hints(policy(header=RAISING), lambda scope: None, ManualClock().wall_ns)
    assert read((HEADER, "critical"), hints=hints, peer=GATEWAY) == Hint(priority="critical")


@pytest.mark.parametrize("trace", ["x-forwarded-for", "x-forwarded-host", "forwarded", "via", "x-real-ip"])
def test_a_request_that_a_named_peer_forwards_may_not_raise(trace: str) -> None:
    hints = reader(header=RAISING)
    assert read((HEADER, "critical"), (trace, "x"), hints=hints, peer=GATEWAY) == Hint(priority="critical")


def test_baggage_never_raises() -> None:
    hints = reader(header=RAISING)
    asked = (BAGGAGE, "criticality=critical")
    assert read(asked, hints=hints, peer=GATEWAY) == Hint(priority="critical")
    assert read(asked, (HEADER, "odd"), hints=hints, peer=GATEWAY) == Hint(priority="critical", ignored=(HEADER,))
    for order in ([asked, (HEADER, "normal")], [(HEADER, "normal"), asked]):
        assert read(*order, hints=hints, peer=GATEWAY) == Hint(priority="normal", raises=True)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("own", FOUR)
def test_a_request_has_its_own_class_or_the_one_it_may_ask_for(own: str, raises: bool) -> None:
    hints = reader()
    assert hints.effective(None, own, raises) == own
    for asked in FOUR:
        lower = max(own, asked, key=FOUR.index)
        assert hints.effective(asked, own, raises) == (asked if raises else lower)


def test_a_class_that_the_policy_does_not_have_is_not_lowered() -> None:
    assert reader().effective("low", "unlisted", False) == "unlisted"


# Whatever is sent

CLASS_WORDS = st.sampled_from((*FOUR, *GOOGLE, *NETFLIX))
WORDS = st.one_of(CLASS_WORDS, st.sampled_from(("", "nan", "inf", "-1", "0", "1S", "99999999H", str(2**64 - 1))))
NUMBERS = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.integers(-(10**25), 10**25).map(str),
    st.floats().map(str),
    st.tuples(st.integers(0, 10**9), st.sampled_from("HMSmunhs")).map(lambda pair: f"{pair[0]}{pair[1]}"),
    st.integers(EPOCH * 10**9 - 2 * MAX_WAITED, EPOCH * 10**9 + 3 * SECOND).map(str),
    st.integers(EPOCH - 4_000, EPOCH + 3).map(lambda second: f"t={second}.5"),
)
VALUES = st.one_of(
    st.binary(max_size=80),
    WORDS.map(str.encode),
    NUMBERS.map(str.encode),
    WORDS.map(lambda word: f"a=b,criticality={word};c".encode()),
    st.binary(max_size=40).map(lambda value: b"criticality=" + value),
    st.integers(0, 3 * MAX_BAGGAGE).map(lambda length: b"," * length + b"criticality=low"),
)
FORWARDING = ("forwarded", "via", "x-forwarded-for", "x-real-ip")
SAID = st.lists(st.tuples(st.sampled_from((*NAMES, *FORWARDING)), VALUES), max_size=8)
ASKED = st.one_of(
    st.tuples(st.sampled_from((HEADER, "x-class")), CLASS_WORDS),
    st.tuples(st.just(BAGGAGE), CLASS_WORDS.map(lambda word: f"criticality={word}")),
    st.tuples(st.sampled_from((HEADER, "x-class", BAGGAGE, *FORWARDING)), VALUES),
)
CLASSES = st.lists(st.sampled_from((*FOUR, "gold", "bulk", "sheddable", "critical_plus")), min_size=1, unique=True)
PEERS = st.sampled_from((GATEWAY, STRANGER, None, "fd00::1", "", "x"))


@given(headers=SAID, noise=st.lists(st.tuples(st.binary(), st.binary())), now=st.integers(0, 10**18), peer=PEERS)
def test_nothing_that_is_sent_is_an_error(
    headers: list[Header], noise: list[tuple[bytes, bytes]], now: int, peer: str | None
) -> None:
    hints = reader(header=RAISING)
    asked = scope(*headers, peer=peer)
    asked["headers"] += noise
    hint = hints.read(asked, now)
    if hint is not None:
        assert hint != Hint()
        assert hint.deadline_ns == 0 or now - MAX_WAITED <= hint.deadline_ns <= now + MAX_TIMEOUT
        assert hint.priority is None or hint.priority in FOUR
        assert hint.raises <= (hint.priority is not None)
        assert set(hint.ignored) <= set(hints.headers)
        assert len(set(hint.ignored)) == len(hint.ignored)


@given(
    headers=st.lists(ASKED, max_size=5),
    classes=CLASSES,
    peer=PEERS,
    name=st.sampled_from((HEADER, BAGGAGE, "x-class", None)),
    rank=st.integers(0, 7),
)
@example(headers=[(HEADER, "critical")], classes=list(FOUR), peer=STRANGER, name=HEADER, rank=3)
@example(headers=[(HEADER, "critical")], classes=list(FOUR), peer=GATEWAY, name=None, rank=3)
@example(headers=[(HEADER, "critical"), ("via", "1.1 x")], classes=list(FOUR), peer=GATEWAY, name=HEADER, rank=3)
@example(headers=[(BAGGAGE, "criticality=critical")], classes=list(FOUR), peer=GATEWAY, name=HEADER, rank=3)
@example(headers=[(BAGGAGE, "criticality=critical")], classes=list(FOUR), peer=GATEWAY, name=BAGGAGE, rank=3)
def test_nobody_but_a_named_peer_by_the_named_header_gets_above_its_own_class(
    headers: list[Header], classes: list[str], peer: str | None, name: str | None, rank: int
) -> None:
    hints = reader(classes, PriorityHeader(name, RAISING.raise_from) if name else None)
    own = classes[rank % len(classes)]
    if peer in (GATEWAY, "fd00::1") and not any(sent in FORWARDING for sent, _ in headers) and name != BAGGAGE:
        headers = [(sent, value) for sent, value in headers if sent != name]
    hint = read(*headers, hints=hints, peer=peer)
    if hint is not None:
        got = hints.effective(hint.priority, own, hint.raises)
        assert classes.index(got) >= classes.index(own)


@given(own=st.sampled_from(FOUR), asked=st.sampled_from(FOUR), also=st.one_of(st.none(), st.sampled_from(FOUR)))
def test_a_named_peer_gets_what_it_asks_for_unless_the_baggage_asks_for_less(
    own: str, asked: str, also: str | None
) -> None:
    hints = reader(header=RAISING)
    baggage = [] if also is None else [(BAGGAGE, f"criticality={also}")]
    hint = read((HEADER, asked), *baggage, hints=hints, peer=GATEWAY)
    assert hint is not None
    lowest = max(asked, also or asked, key=FOUR.index)
    assert hints.effective(hint.priority, own, hint.raises) == lowest


@given(timeouts=st.dictionaries(st.sampled_from((GRPC, ENVOY, TIMEOUT)), NUMBERS))
def test_a_deadline_of_several_headers_is_the_earliest_that_one_of_them_sets(timeouts: dict[str, str]) -> None:
    alone = [hint for item in timeouts.items() if (hint := read(item)) is not None]
    together = read(*timeouts.items()) or Hint()
    assert together.deadline_ns == min((hint.deadline_ns for hint in alone if hint.deadline_ns), default=0)
    assert set(together.ignored) == {name for hint in alone for name in hint.ignored}


def test_it_says_what_it_reads() -> None:
    assert repr(reader()) == "<Hints x-request-priority, 4 classes>"
    assert repr(reader(header=RAISING)) == "<Hints x-request-priority, may raise, 4 classes>"
