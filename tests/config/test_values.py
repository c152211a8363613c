from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow.config.values import READERS, Unfilled, filled, flag, seconds, variables, whole

HUSH = "hush-5e11"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("300s", 300),
        ("5m", 300),
        ("1h", 3_600),
        ("1h30m", 5_400),
        ("2d", 172_800),
        ("250ms", 0.25),
        ("1.5h", 5_400),
        ("300", 300),
        ("0.5", 0.5),
        ("PT5M", 300),
        ("PT1H30M", 5_400),
        ("P1DT1S", 86_401),
        ("P2W", 1_209_600),
        ("PT0.5S", 0.5),
    ],
)
def test_a_duration(text: str, expected: float) -> None:
    assert seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "s",
            "soon",
            "-5s",
            "+5s",
            "5 s",
            "5S",
            "5m 1s",
            "1:30",
            "1_000",
            "1e3",
            "nan",
            "inf",
            "0x10",
            ".5",
            "5.",
        ),
        *("P", "PT", "P1M", "P1Y", "P1Y2M3DT4H", "PT5", "pt5m", "PT-5M", "P2020-01-01", "٣s", "9" * 400 + "s"),
        *("2020-01-01", "PT" + "9" * 400 + "S", "PT9999999999S", "P1D/P2D", "now"),
    ],
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        seconds(text)


@given(st.integers(0, 10**9), st.sampled_from(["s", "m", "h"]))
def test_a_duration_is_its_number_of_units(number: int, unit: str) -> None:
    assert seconds(f"{number}{unit}") == number * {"s": 1, "m": 60, "h": 3_600}[unit]
    if number < 10**6:
        assert seconds(f"PT{number}{unit.upper()}") == seconds(f"{number}{unit}")


@given(st.text(max_size=20) | st.from_regex(r"P[0-9YMDTHS.]{0,12}", fullmatch=True))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in READERS.values():
        with suppress(ValueError):
            assert read(text) >= 0


def test_whole_numbers_and_flags() -> None:
    assert [whole(text) for text in ("0", "3", "010", "999999999")] == [0, 3, 10, 999_999_999]
    assert [flag(text) for text in ("true", "Yes", "ON", "false", "no", "off")] == [True] * 3 + [False] * 3
    for text in ("", "-1", "1.0", "1e3", "0x1", "1_0", "9" * 10, "²", "three"):
        with pytest.raises(ValueError, match="no whole number"):
            whole(text)
    for text in ("", "1", "0", "y", "maybe"):
        with pytest.raises(ValueError, match="neither"):
            flag(text)


def test_environment_variables_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "db.example")
    monkeypatch.setenv("PW", "p$${HOST}w")
    text = "postgresql://u:${PW}@${HOST}/x?a=$b&c=$$"
    assert filled(text) == "postgresql://u:p$${HOST}w@db.example/x?a=$b&c=$$", "what one holds is not filled in again"
    assert variables(text) == ("PW", "HOST")


def test_a_dollar_before_it_leaves_it_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "db.example")
    assert filled("$${HOST} ${HOST} $HOST $") == "${HOST} db.example $HOST $"
    assert filled("$${not a name") == "${not a name"
    assert variables("$${HOST}") == ()


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PW", HUSH)
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(Unfilled, match="environment variable NOT_SET, which is not set in this process") as caught:
        filled("redis://:${PW}@${NOT_SET}")
    assert HUSH not in str(caught.value)


@pytest.mark.parametrize("text", ["${}", "${1A}", "${A-b}", "${A:-" + HUSH + "}", "${A", "${", "x${" + HUSH])
def test_what_names_no_variable(text: str) -> None:
    with pytest.raises(Unfilled, match="without the name of an environment variable and a '}'") as caught:
        filled(text)
    assert HUSH not in str(caught.value)
