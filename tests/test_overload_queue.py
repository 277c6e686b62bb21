"""Who waits behind whom, who is refused at the door, and when the refused may come back: against plain models."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from inspect import signature
from math import ceil, log

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from seawall.overload.queue import DONE, WAITING, Claim, Usage, WaitingLine
from seawall.overload.retry import MOST, RetryAfter
from seawall.overload.thresholds import MOST_OWNERS, SLACK, Thresholds, max_min

MS = 1_000_000


def claim(owner: str = "acme", klass: int = 0) -> Claim:
    made = Claim()
    made.owner, made.klass, made.group, made.deadline = owner, klass, 0, 0
    made.state = DONE
    return made


def line_of(*owners: str, usage: Usage | None = None) -> tuple[WaitingLine, list[Claim]]:
    line = WaitingLine(1, Usage() if usage is None else usage)
    claims = [claim(owner) for owner in owners]
    for now, one in enumerate(claims):
        line.add(one, now)
    return line, claims


def emptied(line: WaitingLine, *, newest: bool, usage: Usage | None = None) -> list[Claim]:
    """All waiters of the first class in the order in which they go; who goes has used something."""
    found = []
    while line:
        found.append(line.take(0, newest=newest))
        if usage is not None:
            usage.add(found[-1].owner)
    return found


# The line


@pytest.mark.parametrize("newest", [False, True])
def test_requests_of_one_owner_go_oldest_first_or_newest_first(newest: bool) -> None:
    line, claims = line_of("a", "a", "a")
    assert emptied(line, newest=newest) == (claims[::-1] if newest else claims)


def test_the_owner_that_has_used_least_goes_first() -> None:
    usage = Usage()
    for owner in "aaabb":
        usage.add(owner)
    line, (a, b, c) = line_of("a", "b", "c", usage=usage)
    assert emptied(line, newest=False) == [c, b, a]


def test_owners_who_pay_for_what_they_get_take_turns() -> None:
    """However many one of them sends, and however early."""
    usage = Usage()
    line, _ = line_of(*"aaaaaabbc", usage=usage)
    assert "".join(str(one.owner) for one in emptied(line, newest=False, usage=usage)) == "abcabaaaa"


def test_of_owners_who_have_used_alike_the_one_that_waits_longest_goes_first() -> None:
    line, claims = line_of("b", "a", "c")
    assert emptied(line, newest=False) == claims


def test_the_worst_is_the_newest_of_the_heaviest_owner_of_the_lowest_class() -> None:
    usage = Usage()
    line = WaitingLine(3, usage)
    for owner in "aab":
        usage.add(owner)
    first, a1, a2, b = claim("heavy", 0), claim("a", 1), claim("a", 1), claim("b", 1)
    for _ in range(9):
        usage.add("heavy")
    for one in (first, a1, a2, b):
        line.add(one, 0)
    worst = []
    while line:
        worst.append(line.worst())
        line.remove(worst[-1])
    assert worst == [a2, a1, b, first]


def test_a_class_is_without_waiters_until_the_one_that_waits_came() -> None:
    """By this the standing of a queue is told: one that is emptied now and then does not stand."""
    line = WaitingLine(2, Usage())
    line.add(claim(), 5)
    line.add(claim(), 9)
    assert line.since[0] == 5
    line.take(0, newest=False)
    line.add(claim(), 11)
    assert line.since[0] == 5
    emptied(line, newest=False)
    line.add(claim(), 20)
    assert line.since[0] == 20
    line.add(claim("acme", 1), 30)
    assert line.since == [20, 30]


def test_an_operator_sees_how_many_of_each_class_wait() -> None:
    line = WaitingLine(3, Usage())
    for klass in (0, 2, 2):
        line.add(claim(klass=klass), 0)
    assert repr(line) == "<WaitingLine 1/0/2>"


class LineAgainstAList(RuleBasedStateMachine):
    """The line, beside a list in the order of arrival and a count of what everybody has used."""

    CLASSES = 3
    OWNERS = ("a", "b", "c", "d")

    @initialize()
    def start(self) -> None:
        self.usage = Usage()
        self.line = WaitingLine(self.CLASSES, self.usage)
        self.model: list[Claim] = []
        self.used = dict.fromkeys(self.OWNERS, 0)
        self.now = 0

    def of(self, klass: int) -> list[Claim]:
        return [one for one in self.model if one.klass == klass]

    @rule(owner=st.sampled_from(OWNERS), klass=st.integers(0, CLASSES - 1))
    def add(self, owner: str, klass: int) -> None:
        one = claim(owner, klass)
        one.state = WAITING
        self.now += 1
        self.line.add(one, self.now)
        self.model.append(one)

    @rule(owner=st.sampled_from(OWNERS))
    def use(self, owner: str) -> None:
        self.usage.add(owner)
        self.used[owner] += 1

    @rule()
    def fade(self) -> None:
        """All alike, so it changes no order among what was used before it; nothing is used after it here."""
        if not any(self.used.values()):
            self.usage.tick()

    @precondition(lambda self: self.model)
    @rule(data=st.data(), newest=st.booleans())
    def take(self, data: st.DataObject, newest: bool) -> None:
        klass = data.draw(st.sampled_from(sorted({one.klass for one in self.model})))
        taken = self.line.take(klass, newest=newest)
        waiting = self.of(klass)
        assert self.used[str(taken.owner)] == min(self.used[str(one.owner)] for one in waiting)
        own = [one for one in waiting if one.owner == taken.owner]
        assert taken is own[-1 if newest else 0]
        self.model.remove(taken)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.model))
        self.line.remove(gone)
        self.model.remove(gone)

    @precondition(lambda self: self.model)
    @rule()
    def evict(self) -> None:
        worst = self.line.worst()
        waiting = self.of(max(one.klass for one in self.model))
        assert worst.klass == waiting[0].klass
        assert self.used[str(worst.owner)] == max(self.used[str(one.owner)] for one in waiting)
        assert worst is [one for one in waiting if one.owner == worst.owner][-1]
        self.line.remove(worst)
        self.model.remove(worst)

    @invariant()
    def it_holds_what_the_list_holds(self) -> None:
        assert len(self.line) == len(self.model)
        assert sorted(map(id, self.line)) == sorted(map(id, self.model))
        assert [self.line.length(klass) for klass in range(self.CLASSES)] == [
            len(self.of(klass)) for klass in range(self.CLASSES)
        ]


TestLineAgainstAList = LineAgainstAList.TestCase


# What owners have used


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 30))
def test_a_tenth_of_what_was_used_fades_with_every_tick(before: int, after: int, ticks: int) -> None:
    usage = Usage()
    for _ in range(before):
        usage.add("early")
    for _ in range(ticks):
        usage.tick()
    for _ in range(after):
        usage.add("late")
    assert usage.of("early") / usage.of("late") == pytest.approx(before * Usage.FADE**ticks / after)


def test_who_is_not_known_has_used_nothing() -> None:
    usage = Usage()
    assert usage.of("nobody") == 0
    usage.add("a")
    usage.clear()
    assert (usage.of("a"), len(usage)) == (0, 0)


def test_an_hour_of_ticks_keeps_numbers_small_and_orders_as_they_were() -> None:
    usage = Usage()
    for tick in range(36_000):
        usage.add("steady")
        if tick % 2:
            usage.add("half")
        usage.tick()
        assert usage.of("steady") < 1e15
    assert usage.of("half") / usage.of("steady") == pytest.approx(0.5, rel=0.06)
    assert (usage.of("half") < usage.of("steady"), len(usage)) == (True, 2)


def test_only_the_heaviest_owners_are_remembered() -> None:
    usage = Usage(most=100)
    for number in range(101):
        for _ in range(1 + number % 50):
            usage.add(f"o{number}")
    kept = sorted((usage.of(f"o{number}") for number in range(101)), reverse=True)[:50]
    usage.tick()
    assert sorted(used for number in range(101) if (used := usage.of(f"o{number}"))) == kept[::-1]
    assert len(usage) <= 100


# The thresholds


def tick(thresholds: Thresholds, *, arrivals: int, admitted: int, overloaded: bool) -> None:
    """A window of one second has ended, so that counts are rates; nothing is known of the time before."""
    told = {"seconds": 1.0, "arrivals": arrivals, "admitted": admitted, "overloaded": overloaded}
    names = list(signature(Thresholds.tick).parameters)[1:]
    thresholds.tick(**{name: told.get(name, 0.0) for name in names})


CLASSES = 3
ASKS = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.sampled_from("abcdefgh")), max_size=60)
WINDOWS = st.lists(st.tuples(ASKS, st.booleans(), st.integers(0, 60)), min_size=1, max_size=30)


@given(WINDOWS)
def test_nobody_is_shed_by_priority_while_a_lower_class_is_admitted(
    windows: list[tuple[list[tuple[int, str]], bool, int]],
) -> None:
    thresholds = Thresholds(CLASSES)
    for asks, overloaded, capacity in windows:
        answers = [(klass, thresholds.ask(klass, owner)) for klass, owner in asks]
        refused = [klass for klass, welcome in answers if not welcome]
        admitted = [klass for klass, welcome in answers if welcome]
        assert not refused or max(admitted, default=0) <= min(refused)
        tick(thresholds, arrivals=len(asks), admitted=min(capacity, len(admitted)), overloaded=overloaded)


@given(WINDOWS, st.integers(0, 60))
def test_thresholds_open_by_themselves_when_it_is_calm(
    windows: list[tuple[list[tuple[int, str]], bool, int]], load: int
) -> None:
    """From any state, and although as many come as before: at 1.1 a window ``cap`` passes what comes, and ``KEPT``
    forgets what came."""
    thresholds = Thresholds(CLASSES)
    for asks, overloaded, capacity in windows:
        answers = [thresholds.ask(klass, owner) for klass, owner in asks]
        tick(thresholds, arrivals=len(asks), admitted=min(capacity, sum(answers)), overloaded=overloaded)
    passed = 0
    for window in range(ceil(log(60) / log(1.1)) + 30):
        answers = [thresholds.ask(window % CLASSES, f"o{number % 7}") for number in range(load)]
        passed += 1 + sum(answers)
        tick(thresholds, arrivals=load, admitted=sum(answers), overloaded=False)
    assert thresholds.klass is None
    assert repr(thresholds) == "<Thresholds open>"
    assert all(thresholds.ask(klass, "new") for klass in range(CLASSES))


def asked(thresholds: Thresholds, **counts: int) -> list[int]:
    """How many of each owner are let through, of requests of the first class that come by turns."""
    waves = [owner for turn in range(max(counts.values())) for owner, count in counts.items() if turn < count]
    answers = [(owner, thresholds.ask(0, owner)) for owner in waves]
    return [sum(welcome for who, welcome in answers if who == owner) for owner in counts]


def test_the_cap_follows_its_formula() -> None:
    thresholds = Thresholds(1)
    asked(thresholds, a=100)
    tick(thresholds, arrivals=100, admitted=90, overloaded=False)
    assert thresholds.cap is None  # nothing is limited before the first overload
    steps = [
        # (arrivals, admitted, overloaded, cap)
        (100, 40, True, 40.0),
        (100, 60, True, 0.8 * 40 + 0.2 * 60),
        (100, 50, False, 44 * 1.1),
        (100, 50, False, 48.4 * 1.1),
        (20, 20, False, 40.0),  # at most twice what comes, or is admitted
        (5, 30, True, 0.8 * 40 + 0.2 * 30),
        (0, 0, False, 1.0),
    ]
    for arrivals, admitted, overloaded, cap in steps:
        asked(thresholds, a=arrivals)
        tick(thresholds, arrivals=arrivals, admitted=admitted, overloaded=overloaded)
        assert thresholds.cap == pytest.approx(cap)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 90), st.booleans()), max_size=30))
def test_the_cap_is_never_more_than_twice_what_comes(windows: list[tuple[int, int, bool]]) -> None:
    """Unclamped it takes half a minute to bite after a calm minute."""
    thresholds = Thresholds(2)
    for arrivals, admitted, overloaded in windows:
        asked(thresholds, a=arrivals)
        tick(thresholds, arrivals=arrivals, admitted=admitted, overloaded=overloaded)
        assert thresholds.cap is None or 1 <= thresholds.cap <= max(1, 2 * max(arrivals, admitted))


def steady(thresholds: Thresholds, capacity: int, windows: int, **counts: int) -> list[float]:
    """The mean let through of each owner a window, over the last half of these windows of overload."""
    total = [0] * len(counts)
    for window in range(windows):
        passed = asked(thresholds, **counts)
        if window >= windows // 2:
            total = [sum(pair) for pair in zip(total, passed, strict=True)]
        tick(thresholds, arrivals=sum(counts.values()), admitted=min(capacity, sum(passed)), overloaded=True)
    return [count / (windows - windows // 2) for count in total]


@pytest.mark.parametrize("load", [60, 100, 400])
def test_under_overload_a_little_more_than_fits_is_let_through(load: int) -> None:
    (passed,) = steady(Thresholds(1), 50, 100, a=load)
    assert 1 <= passed / 50 <= 1.2


def test_under_overload_a_twentieth_more_than_fits_is_let_through() -> None:
    (passed,) = steady(Thresholds(1), 50, 100, a=400)
    assert passed == pytest.approx(50 * SLACK, rel=0.03)


def test_who_asks_for_less_than_its_share_gets_all_of_it() -> None:
    """Max-min fairness: light ones are never refused, and those who want all of it get the same."""
    light, middling, heavy, heavier = steady(Thresholds(1), 50, 100, light=3, middling=7, heavy=100, heavier=300)
    assert (light, middling) == (3, 7)
    assert heavy == pytest.approx(heavier, rel=0.05)
    assert 50 <= light + middling + heavy + heavier <= 60


def test_the_class_that_does_not_fit_is_cut_and_those_below_get_nothing() -> None:
    thresholds = Thresholds(3)
    passed = [0, 0, 0]
    for window in range(100):
        count = [0, 0, 0]
        for turn in range(40):
            for klass in range(3):
                count[klass] += thresholds.ask(klass, f"o{turn % 8}")
        tick(thresholds, arrivals=120, admitted=min(50, sum(count)), overloaded=True)
        if window >= 50:
            passed = [sum(pair) for pair in zip(passed, count, strict=True)]
    assert (passed[0], passed[2]) == (40 * 50, 0)
    assert 10 <= passed[1] / 50 <= 20
    assert repr(thresholds).startswith("<Thresholds class 1 up to ")


def test_what_a_light_owner_sends_now_and_then_is_not_held_against_it() -> None:
    """Not judged by the one request that it happens to send in a window."""
    thresholds = Thresholds(1)
    refused = 0
    for window in range(200):
        if window % 7 == 0:
            refused += not thresholds.ask(0, "rare")
        asked(thresholds, a=90, b=90)
        tick(thresholds, arrivals=181, admitted=50, overloaded=True)
    assert refused == 0


def test_a_share_is_let_through_evenly_and_not_by_chance() -> None:
    """By chance, of two thousand at two fifths, somebody is refused ten times in a row."""
    thresholds = Thresholds(1)
    answers: list[bool] = []
    for window in range(80):
        found = [thresholds.ask(0, "a") for _ in range(100)]
        tick(thresholds, arrivals=100, admitted=min(40, sum(found)), overloaded=True)
        answers += found if window >= 60 else []
    assert 0.4 <= sum(answers) / len(answers) <= 0.5
    runs = "".join("+" if welcome else "-" for welcome in answers).split("+")
    assert max(map(len, runs)) <= 3


def test_owners_beyond_those_that_are_told_apart_are_together_one_crowd() -> None:
    """Memory is bounded, and a caller of many names does not take the place of those that are known."""
    thresholds = Thresholds(1)
    crowd = MOST_OWNERS + 500
    passed = 0
    for _ in range(30):
        answers = [thresholds.ask(0, f"o{number}") for number in range(crowd)]
        passed = sum(answers)
        tick(thresholds, arrivals=crowd, admitted=min(300, passed), overloaded=True)
    assert 300 <= passed <= 360


def test_opening_forgets_everything() -> None:
    thresholds = Thresholds(1)
    steady(thresholds, 10, 20, a=100)
    assert thresholds.klass == 0
    thresholds.open()
    assert (thresholds.klass, thresholds.cap, repr(thresholds)) == (None, None, "<Thresholds open>")
    assert asked(thresholds, a=100) == [100]
    tick(thresholds, arrivals=100, admitted=100, overloaded=False)
    assert thresholds.klass is None


WANTED = st.lists(st.one_of(st.floats(0.1, 50), st.sampled_from([1.0, 0.8, 1.64, 5.0])), max_size=20).map(sorted)


def taken(wanted: Sequence[float], ones: float, share: float) -> float:
    """What is handed out if everybody gets at most ``share``."""
    return sum(min(want, share) for want in wanted) + ones * min(1.0, share)


@given(WANTED, st.one_of(st.just(0.0), st.floats(0.1, 30)), st.floats(0, 0.999))
def test_the_largest_share_that_fits_is_found(wanted: list[float], ones: float, part: float) -> None:
    """Against bisection: whoever wants less gets that, all others the same, and nothing is left."""
    total = sum(wanted) + ones
    budget = total * part
    low, high = 0.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if taken(wanted, ones, middle) <= budget else (low, middle)
    found = max_min(wanted, ones, budget)
    assert taken(wanted, ones, found) == pytest.approx(budget, rel=1e-6, abs=1e-6)
    if total:
        assert found == pytest.approx(low, rel=1e-6, abs=1e-6)


def test_shares_with_numbers() -> None:
    assert max_min([1, 2, 10], 0, 9) == 6
    assert max_min([2, 10], 1, 9) == 6
    assert max_min([5, 5], 0, 4) == 2
    assert max_min([5, 5], 6, 4) == 0.5
    assert max_min([], 8, 4) == 0.5
    assert max_min([], 0, 4) == 0


# When to come back


@pytest.mark.parametrize(
    ("seconds", "refused", "after"),
    [
        (1, 0, 1),
        (1, 2, 1),
        (1, 3, 2),
        (4, 11, 4),
        (4, 12, 5),
        (4, 4, 4),
        (4, 3, 2),
        (5, 0, 2),
        (MOST, 3 * MOST, MOST),
        (MOST, MOST - 1, MOST // 2),
    ],
)
def test_the_announcement_grows_by_one_and_shrinks_by_half(seconds: int, refused: int, after: int) -> None:
    retry = RetryAfter()
    retry.seconds, retry.refused = seconds, refused
    retry.tick()
    assert (retry.seconds, retry.refused) == (after, 0)


@given(st.lists(st.integers(0, 200), max_size=120))
def test_the_announcement_stays_between_1_and_32_and_relaxes(seconds: list[int]) -> None:
    retry = RetryAfter()
    for refused in seconds:
        retry.refused = refused
        retry.tick()
        assert 1 <= retry.seconds <= MOST == 32
    for _ in range(6):
        retry.tick()
    assert retry.seconds == 1


@given(st.integers(1, MOST), st.floats(0, 1, exclude_max=True))
def test_what_is_drawn_is_never_less_than_announced_and_never_one_value_alone(seconds: int, chance: float) -> None:
    retry = RetryAfter()
    retry.seconds = seconds
    assert seconds <= retry.draw(lambda: chance) <= seconds + max(1, ceil(seconds / 5))
    assert retry.draw(lambda: 0.0) < retry.draw(lambda: 0.999_999)


SERVED = 100


def crowd(draw: Callable[[], float], clients: int = 5_000) -> list[tuple[int, int]]:
    """Obedient clients, all refused in one second, come back after exactly what they were told: for each second how
    many come and how many are still not served after it."""
    retry, left, now = RetryAfter(), clients, 0
    coming = {0: clients}
    seconds = []
    while left and now < 600:
        came = coming.pop(now, 0)
        left -= min(came, SERVED)
        for _ in range(max(0, came - SERVED)):
            retry.refused += 1
            at = now + retry.draw(draw)
            coming[at] = coming.get(at, 0) + 1
        seconds.append((came, left))
        retry.tick()
        now += 1
    return seconds


def together(seconds: list[tuple[int, int]], after: int = 8) -> float:
    """The largest part of all who are not served yet that comes in one second, once the announcement has grown."""
    return max(came / (left + min(came, SERVED)) for came, left in seconds[after:] if left > 10 * SERVED)


def test_five_thousand_obedient_clients_do_not_come_back_together() -> None:
    """D9. Without the draw all of them are back every few seconds, for a minute and more."""
    for seed in range(3):
        seconds = crowd(random.Random(seed).random)
        assert together(seconds) < 1 / 4
        assert len(seconds) < 120  # and the service is kept busy meanwhile: 50 s is the least there is
    assert together(crowd(lambda: 0.0)) > 0.9
