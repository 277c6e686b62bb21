"""Retry-After and RateLimit: what a host says is believed where it makes sense, and does no harm where not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall.client.hints import LONGEST, hint, rate_limit, retry_after

NOW = 784_111_777.0
"""Sun, 06 Nov 1994 08:49:37 GMT, the date of RFC 9110."""


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        ("  7\t", 7.0),
        ("007", 7.0),
        ("31536000", 31_536_000.0),
        # not in RFC 9110, and sent by some
        ("0.65", 0.65),
        ("1.5", 1.5),
        # two headers, as a library joins them
        ("5, 10", 10.0),
        ("10,5,7", 10.0),
    ],
)
def test_seconds_are_what_they_say(value: str, seconds: float) -> None:
    assert retry_after(value, NOW) == seconds


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),  # IMF-fixdate
        ("Sun, 06 Nov 1994 08:49:47 GMT", 10.0),
        ("Sunday, 06-Nov-94 08:50:37 GMT", 60.0),  # RFC 850
        ("Sun Nov  6 08:49:47 1994", 10.0),  # asctime, which is in GMT
        ("Sun, 06 Nov 1994 08:49:47 -0000", 10.0),
        ("Sun, 06 Nov 1994 09:49:47 +0100", 10.0),
    ],
)
def test_dates_of_all_three_formats_are_waited_for(value: str, seconds: float) -> None:
    assert retry_after(value, NOW) == seconds


@pytest.mark.parametrize("value", ["Fri, 31 Dec 1999 23:59:59 GMT", "Thu, 01 Jan 1970 00:00:00 GMT"])
def test_a_date_of_the_past_is_no_wait(value: str) -> None:
    assert retry_after(value, NOW + 1e9) == 0.0


@pytest.mark.parametrize(
    "value",
    [
        "999999999999",
        "9" * 19,
        "9" * 400,
        "9" * 4_000,
        "Fri, 31 Dec 9999 23:59:59 GMT",
        "99999999999.5",
        "1," + "9" * 99,
    ],
)
def test_years_are_never_and_not_garbage(value: str) -> None:
    """Whoever is told to come back in ten years does not come back at once."""
    assert retry_after(value, NOW) == LONGEST


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "-5",
        "+5",
        "1e9",
        "0x10",
        "5s",
        "5,",
        ",",
        "5.",
        ".5",
        "1.5.5",
        "soon",
        "NaN",
        "inf",
        "\u0665",
        "\u00b2",
        "\x00",
        "\xff\xfe",
        "١٢٠",
        "Sun, 99 Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 99:49:37 GMT",
        "Sun, 06 Nov 99999 08:49:37 GMT",
        "Sun, 06 Nov 1994 08:49:37 +9999999999999",
        "Sun, 06 Nov " + "9" * 5_000 + " 08:49:37 GMT",
        "9" * 5_000,
    ],
)
def test_garbage_says_nothing(value: str) -> None:
    assert retry_after(value, NOW) is None


@given(st.text(), st.floats(0, 1e11))
def test_no_retry_after_raises_or_is_out_of_range(value: str, now: float) -> None:
    seconds = retry_after(value, now)
    assert seconds is None or 0 <= seconds <= LONGEST


DATES = st.from_regex(
    r"\A[A-Za-z]{0,9},? ?[0-9]{0,12}[ -]?[A-Za-z]{0,4}[ -]?[0-9]{0,20} [0-9:]{0,12} ?(GMT|[+-][0-9]{0,20})?\Z"
)


@given(DATES, st.floats(0, 1e11))
def test_nothing_that_looks_like_a_date_raises(value: str, now: float) -> None:
    seconds = retry_after(value, now)
    assert seconds is None or 0 <= seconds <= LONGEST


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ('"default";r=0;t=30', 30.0),
        ('"default";r=50;t=30', None),
        ('"burst";r=0;t=5, "daily";r=100;t=3600', 5.0),
        ('"burst";r=0;t=5, "daily";r=0;t=3600', 3_600.0),
        ('"burst";r=0;t=5\t ,\t "daily";r=0;t=3600 ', 3_600.0),
        ('"default";r=0', None),
        ('"default";t=30', None),
        ('"default"', None),
        ('"default";r=0;t=0', 0.0),
        ('"default";r=00;t=007', 7.0),
        # the order of parameters, their spaces, and what else there may be
        ('"default";t=30;r=0', 30.0),
        ('"default"; r=0;   t=30', 30.0),
        ('"default";r=0;t=30;pk=:cHJvamVjdC1hbmQtYS1sb25nLW5hbWUtb2YtaXQ=:', 30.0),
        ('"default";qu="content, bytes; and";r=0;t=30', 30.0),
        ('"default";flag;r=0;other=?1;when=@1659578233;share=0.25;t=30', 30.0),
        # names: strings with all that may be in them, and tokens
        (r'"a \"quoted\" \\ name, with; all";r=0;t=30', 30.0),
        ("default;r=0;t=30", 30.0),
        ("*a/b:c;r=0;t=30", 30.0),
        # the last of two counts (RFC 9651, section 3.1.2)
        ('"default";r=9;r=0;t=5;t=30', 30.0),
        # neither of these is an integer
        ('"default";r=0.0;t=30', None),
        ('"default";r="0";t=30', None),
        ('"default";r=0;t="30"', None),
        ('"default";r=0;t=-5', None),
        ('"default";r=-0;t=30', None),
        ('"default";r=0;t=999999999999999', LONGEST),
        # not a list of structured fields: the whole field is ignored
        ("", None),
        (",", None),
        ('"default";r=0;t=30,', None),
        ('"burst";r=0;t=5 "daily";r=0;t=60', None),
        ('"burst";r=0;t=5, ("a" "b");r=0;t=60', None),
        ('"default";R=0;T=30', None),
        ('"default" ;r=0;t=30', None),
        ('"default";r=0;t=9999999999999999', None),
        ('"open;r=0;t=30', None),
        ('"caf\u00e9";r=0;t=30', None),
        # the header of the same name in older drafts
        ("limit=100, remaining=0, reset=50", None),
        (", ".join(['"default";r=0;t=30'] * 500), None),
    ],
)
def test_the_rate_limit_of_an_answer(value: str, seconds: float | None) -> None:
    assert rate_limit(value) == seconds


@given(st.text(alphabet='"\\;=, rt019.-?:@*abc\t\u00e9()', max_size=80))
def test_no_rate_limit_raises_or_is_out_of_range(value: str) -> None:
    seconds = rate_limit(value)
    assert seconds is None or 0 <= seconds <= LONGEST


@pytest.mark.parametrize(
    "value", ['"' * 4_000, "a" * 4_000, '"a";' * 1_000, ";r=0" * 1_000, '"a";r=' * 600, '"\\' * 2_000]
)
def test_a_hostile_rate_limit_is_read_in_a_moment(value: str) -> None:
    """One that makes a regular expression try everything would take longer than the test may."""
    assert rate_limit(value) is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "5"}, 5.0),
        ({"ratelimit": '"a";r=0;t=7'}, 7.0),
        ({"retry-after": "5", "ratelimit": '"a";r=0;t=7'}, 5.0),
        ({"retry-after": "soon", "ratelimit": '"a";r=0;t=7'}, 7.0),
        ({"retry-after": "soon"}, None),
    ],
)
def test_retry_after_goes_before_rate_limit(headers: dict[str, str], seconds: float | None) -> None:
    assert hint(headers, NOW) == seconds
