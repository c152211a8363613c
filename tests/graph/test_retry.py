from __future__ import annotations

import json
import math
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow import Retry
from beluga_airflow.graph.retry import RETRY_AFTER_BOUND

intervals = st.floats(0, 1e6)
retries = st.builds(
    Retry,
    maximum_attempts=st.integers(1, 10_000),
    initial_interval=intervals | st.timedeltas(timedelta(0), timedelta(days=1)),
    backoff_coefficient=st.floats(1, 1e6),
    maximum_interval=intervals,
    non_retryable=st.lists(st.sampled_from([ValueError, "KeyError", OSError]), max_size=3).map(tuple),
)


def test_waits_grow_by_the_coefficient_up_to_the_maximum() -> None:
    retry = Retry(initial_interval=0.5, backoff_coefficient=2.0, maximum_interval=5)

    assert [retry.delay(attempt) for attempt in range(1, 7)] == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]


def test_the_defaults_are_those_that_are_promised() -> None:
    retry = Retry()

    assert (retry.maximum_attempts, retry.initial_interval, retry.backoff_coefficient) == (3, 0.5, 2.0)
    assert (retry.maximum_interval, retry.non_retryable) == (5.0, ())


@pytest.mark.parametrize(
    ("retry_after", "wait"),
    [(None, 2.0), (0.0, 2.0), (1.0, 2.0), (30.0, 30.0), (59.0, 59.0), (RETRY_AFTER_BOUND + 1, 60.0), (-5.0, 2.0)],
)
def test_a_server_may_ask_for_a_longer_wait_up_to_a_bound(retry_after: float | None, wait: float) -> None:
    retry = Retry(initial_interval=timedelta(seconds=2), maximum_interval=timedelta(seconds=3))

    assert retry.delay(1, retry_after) == wait


@given(retries, st.integers(1, 1_000_000), st.none() | st.floats(-1e9, 1e9))
def test_a_wait_is_always_a_bounded_number(retry: Retry, attempt: int, retry_after: float | None) -> None:
    wait = retry.delay(attempt, retry_after)

    assert 0 <= wait <= max(float(retry.maximum_interval), RETRY_AFTER_BOUND)  # type: ignore[arg-type]
    assert retry.delay(attempt + 1, retry_after) >= wait


def test_a_wait_of_nothing_stays_nothing_however_many_attempts_there_are() -> None:
    assert Retry(maximum_attempts=9_999, initial_interval=0).delay(9_999) == 0


@given(retries)
def test_a_retry_survives_json(retry: Retry) -> None:
    twin = Retry.from_json(json.loads(json.dumps(retry.to_json())))

    assert twin.names() == retry.names()
    assert twin.maximum_attempts == retry.maximum_attempts
    assert [twin.delay(attempt) for attempt in (1, 2, 9)] == [retry.delay(attempt) for attempt in (1, 2, 9)]
    assert Retry.from_json(twin.to_json()) == twin


@given(retries)
def test_sound_retries_have_no_faults(retry: Retry) -> None:
    assert retry.faults() == []


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"maximum_attempts": 0}, "maximum_attempts is 0, it must be a whole number, 1 or more"),
        ({"maximum_attempts": 1.5}, "maximum_attempts is 1.5, it must be a whole number, 1 or more"),
        ({"maximum_attempts": "3"}, "maximum_attempts is '3', it must be a whole number, 1 or more"),
        (
            {"initial_interval": -1},
            "initial_interval is -1, it must be seconds or a timedelta, finite and not negative",
        ),
        ({"maximum_interval": timedelta(seconds=-1)}, "it must be seconds or a timedelta, finite and not negative"),
        ({"maximum_interval": math.inf}, "maximum_interval is inf, it must be seconds or a timedelta"),
        ({"initial_interval": math.nan}, "initial_interval is nan, it must be seconds or a timedelta"),
        ({"initial_interval": "1s"}, "initial_interval is '1s', it must be seconds or a timedelta"),
        ({"non_retryable": (ValueError(),)}, "it must be a tuple of exception classes or names"),
        ({"backoff_coefficient": 0.5}, "backoff_coefficient is 0.5, it must be a finite number, 1 or more"),
        ({"backoff_coefficient": math.nan}, "backoff_coefficient is nan, it must be a finite number, 1 or more"),
        ({"backoff_coefficient": "2"}, "backoff_coefficient is '2', it must be a finite number, 1 or more"),
        ({"backoff_coefficient": None}, "backoff_coefficient is None, it must be a finite number, 1 or more"),
        # a bool is a whole number to Python
        ({"maximum_attempts": True}, "maximum_attempts is True, it must be a whole number, 1 or more"),
        ({"initial_interval": True}, "initial_interval is True, it must be seconds or a timedelta"),
        ({"backoff_coefficient": True}, "backoff_coefficient is True, it must be a finite number, 1 or more"),
        ({"maximum_interval": 10**400}, "it must be seconds or a timedelta, finite and not negative"),
        ({"non_retryable": (int,)}, "it must be a tuple of exception classes or names"),
        (
            {"non_retryable": "KeyError"},
            "non_retryable is 'KeyError', it must be a tuple of exception classes or names",
        ),
        ({"non_retryable": KeyError}, "it must be a tuple of exception classes or names"),
    ],
)
def test_a_meaningless_retry_says_what_is_wrong(wrong: dict[str, Any], fault: str) -> None:
    (found,) = Retry(**wrong).faults()

    assert fault in found
