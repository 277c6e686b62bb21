"""What calls usually take, and states that come and go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from seawall.client.latency import KEPT, LEAST, SECOND, Latencies
from seawall.client.spell import QUIET, Spell


@given(st.lists(st.integers(0, 10**10), max_size=250))
def test_the_95th_percentile_is_that_of_the_last_hundred(took: list[int]) -> None:
    latencies = Latencies()
    for number, one in enumerate(took, 1):
        latencies.add(one)
        last = sorted(took[max(0, number - KEPT) : number])
        if number < LEAST:
            assert latencies.p95() is None
        else:
            usual = latencies.p95()
            assert usual is not None
            # As many as 95 of 100 took no longer, and not all of those took less.
            assert sum(one / SECOND <= usual for one in last) >= 0.95 * len(last)
            assert sum(one / SECOND < usual for one in last) < 0.95 * len(last)
    assert repr(latencies) == f"<Latencies of {min(len(took), KEPT)} calls>"


def test_a_spell_begins_at_once_and_ends_after_ten_seconds_without() -> None:
    spell = Spell()
    assert not spell.unseen(0)
    assert [spell.seen(now) for now in (0, 1, QUIET)] == [True, False, False]
    assert repr(spell) == "<Spell that lasts>"
    assert [spell.unseen(now) for now in (QUIET + 1, 2 * QUIET - 1, 2 * QUIET, 2 * QUIET)] == [
        False,
        False,
        True,
        False,
    ]
    assert repr(spell) == "<Spell that is over>"
    assert spell.seen(2 * QUIET)
