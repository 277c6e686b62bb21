"""Whether what happened is what the plans allow: arithmetic on counts, nothing measured, nothing tolerated.

A token bucket of ``burst`` and ``amount`` per ``period`` admits at most ``burst + amount / period * t`` in a time ``t``
(property G1), and never less than its burst. The client's ``t`` begins before the server saw the first request and
ends after it decided on the last, so the upper bound needs no tolerance; nor has a caller who asks for less than its
plan, and sends nothing twice, any reason to be refused once. While shared state is away, each process has its share of
a limit in addition (`seawall.backends.share`).

What depends on how busy the machine is has bounds that people would notice: `IN_TIME` and `GOODPUT` of an overload,
`PATIENCE` and `SPARE` of everything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

from seawall.admission import SHED
from seawall.cli.demo.callers import Answered, Tally
from seawall.cli.demo.scrape import Scrape, differing
from seawall.cli.explanation import Explanation, Limit
from seawall.rate import SECOND

IN_TIME = 0.5
"""Seconds within which an answer is worth having."""
GOODPUT = 0.8
"""The part of its requests of which a critical caller gets an answer in time, however much else comes."""
SPARE = 0.05
"""The part of all requests that a machine without time for them may shed where no overload was meant."""
PATIENCE = 1.0
"""Seconds that nobody waits for an answer because shared state is away; the time-out is a tenth of it."""

Counts = Counter[tuple[str, ...]]


@final
@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must be so, and whether it is."""

    ok: bool
    text: str


@final
@dataclass(frozen=True, slots=True)
class Account:
    """One address of a caller, what it got, and what its plan gives.

    ``shares`` are processes that may lose what they share, and then have a share of each limit by themselves.
    """

    tally: Tally
    plan: str
    priority: str
    limits: tuple[Limit, ...]
    shares: int = 0

    @property
    def at_most(self) -> int | None:
        """The requests that its limits admit in the time that it took; ``None`` without a limit."""
        return min((most(limit, self.tally.elapsed_ns, self.shares) for limit in self.limits), default=None)

    @property
    def at_least(self) -> int:
        """The requests that full buckets admit at once, as far as it asked for them."""
        return min([self.tally.asked, *(_capacity(limit) // limit.cost for limit in self.limits)])


@final
@dataclass(slots=True)
class Outage:
    """When shared state was away, in monotonic nanoseconds, from ``processes``.

    It is taken away at ``lost``, is given back at ``back``, and all processes are known to ask it at ``known``.
    """

    processes: int
    lost: int = 0
    back: int = 0
    known: int | None = None


def account(tally: Tally, told: Explanation, shares: int = 0) -> Account:
    """The account of a caller, by what its request was explained to be."""
    return Account(tally, told.caller.plan or "", told.priority, told.limits, shares)


def by_caller(accounts: Iterable[Account]) -> list[list[Account]]:
    """The accounts of each caller together, in their order."""
    groups: dict[str, list[Account]] = {}
    for one in accounts:
        groups.setdefault(one.tally.caller.name, []).append(one)
    return list(groups.values())


def most(limit: Limit, elapsed_ns: int, shares: int = 0) -> int:
    """The requests that ``limit`` admits in any time of ``elapsed_ns``, exactly.

    With ``shares`` it is what all together admit at most, whenever and however often they have to decide alone: a
    busy machine may make them, also where nobody has taken anything away.
    """
    if limit.burst is None:
        # A calendar window may end meanwhile, and the next begin.
        return 2 * limit.amount // limit.cost
    units = limit.burst * limit.period_ns + limit.amount * elapsed_ns
    if shares:
        units += shares * max(limit.burst // shares, limit.cost) * limit.period_ns + limit.amount * elapsed_ns
    return units // (limit.period_ns * limit.cost)


def _capacity(limit: Limit) -> int:
    return limit.amount if limit.burst is None else limit.burst


# The callers


def plans_held(accounts: Sequence[Account]) -> list[Check]:
    """What must be so for each caller, whose plan has not to be exceeded and not to be withheld."""
    groups = by_caller(accounts)
    checks = [check for group in groups for check in caller_checks(group)]
    tallies = [one.tally for group in groups for one in group]
    if shed := sum(one.shed.total() for one in tallies):
        asked = sum(one.asked for one in tallies)
        text = f"{shed} of {asked} were refused because this machine had no time for them, at most {SPARE:.0%}"
        checks.append(Check(shed <= SPARE * asked, text))
    return checks


def caller_checks(group: Sequence[Account]) -> Iterable[Check]:
    """What must be so for one caller, whose accounts are those of its addresses. Where there are several, the check
    names the one that comes closest to its bound, so that all hold if it does.
    """
    caller = group[0].tally.caller
    if caller.polite:
        refused = sum(one.tally.limited.total() for one in group)
        asked = sum(one.tally.asked for one in group)
        yield Check(refused == 0 < asked, f"{caller.name}: within its plan, {refused} of {asked} refused")
    else:
        fullest = max(group, key=lambda one: one.tally.admitted - (one.at_most or 0))
        if fullest.at_most is not None:
            admitted, seconds = fullest.tally.admitted, fullest.tally.elapsed_ns / SECOND
            who = _one_of(group, "fullest")
            text = f"{who}: {admitted} admitted, at most {fullest.at_most} in {seconds:.2f} s"
            yield Check(admitted <= fullest.at_most, text)
        emptiest = min(group, key=lambda one: one.tally.admitted - one.at_least)
        who = _one_of(group, "emptiest")
        admitted, least = emptiest.tally.admitted, emptiest.at_least
        yield Check(admitted >= least, f"{who}: {admitted} admitted, at least its burst of {least}")
    yield from failures(group)


def failures(group: Sequence[Account]) -> Iterable[Check]:
    """What failed, if anything did."""
    errors = [one.tally for one in group if one.tally.errors]
    if errors:
        name = group[0].tally.caller.name
        yield Check(False, f"{name}: {sum(one.errors for one in errors)} requests failed ({errors[0].error})")


def _one_of(group: Sequence[Account], which: str) -> str:
    name = group[0].tally.caller.name
    return name if len(group) == 1 else f"{name}, the {which} of {len(group)} addresses"


def only_these_refused(accounts: Iterable[Account], names: frozenset[str]) -> Check:
    """Whose plans refuse them: those callers, and nobody else."""
    refused = {one.tally.caller.name for one in accounts if one.tally.limited}
    expected = "" if refused == names else f"; to be expected: {listed_names(names)}"
    return Check(refused == names, f"refused by their plans: {listed_names(refused)}{expected}")


def listed_names(names: Iterable[str]) -> str:
    return " and ".join(sorted(names)) or "nobody"


# The servers


@final
@dataclass(frozen=True, slots=True)
class Compared:
    """One thing that both sides have counted."""

    what: str
    server: int
    callers: int


def compare(accounts: Sequence[Account], before: Scrape, after: Scrape, exempt: int) -> list[Compared]:
    """What the servers have counted between two scrapes, and their callers: requests by outcome, then refusals by plan
    and policy (or reason, where it was not a plan's). ``exempt`` are the requests of the demo itself.
    """
    name = "seawall_requests_total"
    outcomes = differing(before.by(name, "outcome"), after.by(name, "outcome"))
    tallies = [one.tally for one in accounts]
    seen: Counts = Counter(
        {
            ("allowed",): sum(tally.admitted for tally in tallies),
            ("limited",): sum(tally.limited.total() for tally in tallies),
            ("shed",): sum(tally.shed.total() for tally in tallies),
            ("exempt",): exempt,
        }
    )
    name = "seawall_rejections_total"
    labels = ("plan", "policy", "reason")
    refusals: Counts = Counter()
    for (plan, policy, reason), count in differing(before.by(name, *labels), after.by(name, *labels)).items():
        refusals[plan, reason if reason in SHED else policy] += count
    seen_refusals: Counts = Counter()
    for one in accounts:
        for why, count in one.tally.refused.items():
            seen_refusals[one.plan, why] += count
    return [*_beside("", outcomes, seen), *_beside("refused: ", refusals, seen_refusals)]


def _beside(kind: str, server: Counts, callers: Counts) -> Iterable[Compared]:
    for key in sorted({*+server, *+callers}):
        yield Compared(kind + "/".join(key), server[key], callers[key])


def agreement(compared: Sequence[Compared]) -> Check:
    """Whether the servers counted what their callers saw."""
    if disagreed := [one for one in compared if one.server != one.callers]:
        said = "; ".join(f"{one.what}: /metrics says {one.server}, the callers saw {one.callers}" for one in disagreed)
        return Check(False, said)
    return Check(True, "/metrics and the callers agree: " + ", ".join(f"{one.what} {one.server}" for one in compared))


# Overload


def in_time(tally: Tally) -> float:
    """The part of a caller's requests that were served within `IN_TIME`, 0 if it had none."""
    served = sum(one.outcome == "served" and one.took <= IN_TIME * SECOND for one in tally.answered)
    return served / tally.asked if tally.asked else 0.0


def overload_checks(accounts: Sequence[Account]) -> Iterable[Check]:
    """What must be so for callers of different classes, the first being the most important, who are too many."""
    shares = [in_time(one.tally) for one in accounts]
    first = accounts[0]
    yield Check(
        shares[0] >= GOODPUT,
        f"{first.tally.caller.name}: {shares[0]:.1%} of {first.tally.asked} served within {IN_TIME * 1e3:.0f} ms, "
        f"at least {GOODPUT:.0%}",
    )
    order = ", ".join(f"{one.priority} {share:.0%}" for one, share in zip(accounts, shares, strict=True))
    yield Check(shares == sorted(shares, reverse=True) and shares[0] > shares[-1], f"served in time by class: {order}")
    shed = sum(one.tally.shed.total() for one in accounts)
    yield Check(shed > 0, f"{shed} of {sum(one.tally.asked for one in accounts)} were refused")
    for group in by_caller(accounts):
        yield from failures(group)


# Shared state that is lost


def outage_checks(accounts: Sequence[Account], outage: Outage, failed_calls: int) -> Iterable[Check]:
    """What must be so for callers of several processes whose shared state was away for a while.

    The first caller's usage is followed: its limit is so large that what one process has of it is less than what is
    left in all, so that each answer tells who decided. ``failed_calls`` are calls to the store that were given up.
    """
    during = {one.tally.caller.name: answered_within(one.tally, outage) for one in accounts}
    silent = [name for name, answers in during.items() if not answers]
    answers = [one for these in during.values() for one in these]
    slowest = max((one.took for one in answers), default=0) / SECOND
    yield Check(
        not silent and slowest <= PATIENCE,
        f"while Redis was away {len(answers)} requests were answered, the slowest after {slowest * 1e3:.0f} ms"
        + (f", and none of {listed_names(silent)}" if silent else ""),
    )
    known = outage.known
    yield Check(
        known is not None,
        f"asked again by all processes {(known - outage.back) / SECOND:.2f} s after it was back"
        if known is not None
        else "it was not asked again by all processes",
    )
    yield usage_check(accounts[0], outage, failed_calls)


def answered_within(tally: Tally, outage: Outage) -> list[Answered]:
    """The requests that came, and were answered, while shared state was away."""
    return [one for one in tally.answered if outage.lost <= one.at and one.at + one.took <= outage.back]


def usage_check(one: Account, outage: Outage, failed_calls: int) -> Check:
    """Whether what is left of a caller's limit is what those requests have left of it that the store decided.

    A request that was under way when a call failed may have been charged or not, at most one for each call, and one
    for each process; and meanwhile the bucket fills.
    """
    limit = one.limits[0]
    burst = limit.burst or limit.amount
    shared, alone = decided(one, outage)
    if not shared or not alone or shared[-1].at < outage.back:
        return Check(False, f"{one.tally.caller.name}: {len(shared)} decided in Redis, {len(alone)} without")
    left = shared[-1].left or 0
    filled = limit.amount * one.tally.elapsed_ns // limit.period_ns + 1
    rest = burst - len(shared) * limit.cost
    unknown = (failed_calls + outage.processes) * limit.cost
    text = (
        f"{one.tally.caller.name}: {burst} - {len(shared) * limit.cost} decided in Redis = {rest} left, and Redis says "
        f"{left}; {len(alone)} were admitted by a process's share"
    )
    return Check(rest - unknown <= left <= rest + filled, text)


def decided(one: Account, outage: Outage) -> tuple[list[Answered], list[Answered]]:
    """The answers that the store decided, and those that a process's share did, by what they say is left."""
    limit = one.limits[0]
    share = (limit.burst or limit.amount) // outage.processes
    told = [answered for answered in one.tally.answered if answered.outcome == "served"]
    return [one for one in told if (one.left or 0) > share], [one for one in told if (one.left or 0) <= share]
