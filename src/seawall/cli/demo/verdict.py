"""Whether what happened is what the plans allow: arithmetic on counts, nothing measured, nothing tolerated.

A token bucket of ``burst`` and ``amount`` per ``period`` admits at most ``burst + amount / period * t`` in a time ``t``
(property G1), and never less than its burst. The client's ``t`` begins before the server saw the first request and
ends after it decided on the last, so the upper bound needs no tolerance; nor has a caller who asks for less than its
plan, and sends nothing twice, any reason to be refused once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

from seawall.cli.demo.callers import Tally
from seawall.cli.explanation import Explanation, Limit

_SAMPLE = re.compile(r"(\w+)\{([^}]*)\} ([0-9.e+-]+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@final
@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must be so, and whether it is."""

    ok: bool
    text: str


@final
@dataclass(frozen=True, slots=True)
class Account:
    """One address of a caller, what it got, and what its plan gives."""

    tally: Tally
    plan: str
    limits: tuple[Limit, ...]

    @property
    def at_most(self) -> int | None:
        """The requests that its limits admit in the time that it took; ``None`` without a limit."""
        return min((most(limit, self.tally.elapsed_ns) for limit in self.limits), default=None)

    @property
    def at_least(self) -> int:
        """The requests that full buckets admit at once, as far as it asked for them."""
        return min([self.tally.asked, *(_capacity(limit) // limit.cost for limit in self.limits)])


def caller_checks(group: Sequence[Account]) -> Iterable[Check]:
    """What must be so for one caller, whose accounts are those of its addresses. Where there are several, the check
    names the one that comes closest to its bound, so that all hold if it does.
    """
    caller = group[0].tally.caller
    fullest = max(group, key=lambda one: one.tally.admitted - (one.at_most or 0))
    if fullest.at_most is not None:
        admitted, seconds = fullest.tally.admitted, fullest.tally.elapsed_ns / 1e9
        who = _one_of(group, "fullest")
        text = f"{who}: {admitted} admitted, at most {fullest.at_most} in {seconds:.2f} s"
        yield Check(admitted <= fullest.at_most, text)
    if caller.polite:
        refused = sum(one.tally.refused.total() for one in group)
        asked = sum(one.tally.asked for one in group)
        yield Check(refused == 0, f"{caller.name}: within its plan, {refused} of {asked} refused")
    else:
        emptiest = min(group, key=lambda one: one.tally.admitted - one.at_least)
        who = _one_of(group, "emptiest")
        admitted, least = emptiest.tally.admitted, emptiest.at_least
        yield Check(admitted >= least, f"{who}: {admitted} admitted, at least its burst of {least}")
    errors = [one.tally for one in group if one.tally.errors]
    if errors:
        yield Check(False, f"{caller.name}: {sum(one.errors for one in errors)} requests failed ({errors[0].error})")


def _one_of(group: Sequence[Account], which: str) -> str:
    name = group[0].tally.caller.name
    return name if len(group) == 1 else f"{name}, the {which} of {len(group)} addresses"


def by_caller(accounts: Iterable[Account]) -> list[list[Account]]:
    """The accounts of each caller together, in their order."""
    groups: dict[str, list[Account]] = {}
    for one in accounts:
        groups.setdefault(one.tally.caller.name, []).append(one)
    return list(groups.values())


def account(tally: Tally, told: Explanation) -> Account:
    """The account of a caller, by what its request was explained to be."""
    return Account(tally, told.caller.plan or "", told.limits)


def most(limit: Limit, elapsed_ns: int) -> int:
    """The requests that ``limit`` admits in any time of ``elapsed_ns``, exactly."""
    if limit.burst is None:
        # A calendar window may end meanwhile, and the next begin.
        return 2 * limit.amount // limit.cost
    return (limit.burst * limit.period_ns + limit.amount * elapsed_ns) // (limit.period_ns * limit.cost)


def _capacity(limit: Limit) -> int:
    return limit.amount if limit.burst is None else limit.burst


def server_counts(scrape: str) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """What the server counted: requests by outcome, and refusals by plan and policy."""
    outcomes: Counter[str] = Counter()
    refusals: Counter[tuple[str, str]] = Counter()
    for line in scrape.splitlines():
        sample = _SAMPLE.fullmatch(line)
        if sample is None:
            continue
        labels = dict(_LABEL.findall(sample[2]))
        if sample[1] == "seawall_requests_total":
            outcomes[labels["outcome"]] += int(float(sample[3]))
        elif sample[1] == "seawall_rejections_total":
            refusals[labels["plan"], labels["policy"]] += int(float(sample[3]))
    return +outcomes, +refusals


def compare(accounts: Sequence[Account], scrape: str, exempt: int) -> Iterable[Check]:
    """Whether the server counted what its callers saw. ``exempt`` are the requests of the demo itself."""
    outcomes, refusals = server_counts(scrape)
    seen_outcomes = Counter(
        allowed=sum(one.tally.admitted for one in accounts),
        limited=sum(one.tally.refused.total() for one in accounts),
        exempt=exempt,
    )
    seen_refusals: Counter[tuple[str, str]] = Counter()
    for one in accounts:
        for policy, count in one.tally.refused.items():
            seen_refusals[one.plan, policy] += count
    yield _agree("requests by outcome", outcomes, +seen_outcomes)
    yield _agree("refusals by plan and policy", refusals, seen_refusals)


def _agree(what: str, server: Counter[Any], callers: Counter[Any]) -> Check:
    if server == callers:
        return Check(True, f"/metrics and the callers agree on {what}: {_listed(server)}")
    return Check(False, f"{what}: /metrics says {_listed(server)}; the callers saw {_listed(callers)}")


def _listed(counts: Counter[Any]) -> str:
    names = {key: key if isinstance(key, str) else "/".join(key) for key in counts}
    return ", ".join(f"{name} {counts[key]}" for key, name in sorted(names.items(), key=lambda pair: pair[1])) or "none"


def judge(accounts: Sequence[Account], scrape: str, exempt: int) -> list[Check]:
    """Everything that must be so at the end of a demo."""
    callers = [check for group in by_caller(accounts) for check in caller_checks(group)]
    return [*callers, *compare(accounts, scrape, exempt)]
