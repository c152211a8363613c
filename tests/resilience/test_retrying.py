from __future__ import annotations

import asyncio
import math
from datetime import timedelta
from typing import Any

import pytest
from pytest_mock import MockerFixture

from beluga_airflow import Retry
from beluga_airflow.errors import (
    FlowNotFound,
    InvalidFlow,
    InvalidInput,
    InvalidSetting,
    MergeConflict,
    MissingKey,
    ModelRefused,
    ModelUnavailable,
    StateError,
    StateUnavailable,
    StepExited,
    StepTimeout,
    TemporalUnavailable,
    Undecided,
)
from beluga_airflow.resilience.retrying import MESSAGE_LENGTH, judge, retrying


@pytest.fixture
def waits(mocker: MockerFixture) -> list[float]:
    """The waits between attempts, without waiting."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    mocker.patch("asyncio.sleep", sleep)
    return waited


class Attempts:
    """Raises each of its errors in turn, then returns the number of the attempt."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.numbers: list[int] = []

    async def __call__(self, number: int) -> int:
        self.numbers.append(number)
        if self.errors:
            raise self.errors.pop(0)
        return number


class PaymentError(OSError):
    pass


@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        (ValueError("any"), True),
        (KeyError("theirs"), True),
        (PaymentError("closed"), True),
        (StepTimeout("slow"), True),
        (ModelUnavailable("down"), True),
        (StateUnavailable("away"), True),
        (TemporalUnavailable("away"), True),
        (InvalidInput("empty"), False),
        (MissingKey("missing"), False),
        (MergeConflict("conflict"), False),
        (InvalidFlow("cycle"), False),
        (InvalidSetting("unknown provider"), False),
        (FlowNotFound("gone"), False),
        (ModelRefused("key refused"), False),
        (Undecided("no answer"), False),
        (StateError("damaged"), False),
        (StepExited("exited"), False),
    ],
)
def test_ours_say_whether_to_retry_and_all_others_may_be(error: Exception, retryable: bool) -> None:
    assert judge(error, Retry()).retryable is retryable


@pytest.mark.parametrize("listed", [PaymentError, "PaymentError", OSError, "OSError", Exception, "ModelUnavailable"])
def test_a_listed_class_or_a_subclass_of_it_is_not_retried(listed: Any) -> None:
    retry = Retry(non_retryable=(listed,))

    assert judge(PaymentError("closed"), retry).retryable is (listed == "ModelUnavailable")
    assert judge(ModelUnavailable("down"), retry).retryable is (listed not in (Exception, "ModelUnavailable"))


def test_listing_cannot_make_ours_retryable() -> None:
    assert not judge(InvalidInput("empty"), Retry(non_retryable=("ValueError",))).retryable


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("broken"), "ValueError: broken"),
        (PaymentError(), "PaymentError"),
        (KeyError("key"), "KeyError: 'key'"),
        (MissingKey("step 'a' reads 'b'"), "MissingKey: step 'a' reads 'b'"),
    ],
)
def test_a_failure_is_told_by_class_and_message(error: Exception, message: str) -> None:
    failure = judge(error, Retry())

    assert (failure.kind, failure.message) == (type(error).__name__, message)


def test_a_message_is_bounded_and_says_so() -> None:
    message = judge(ValueError("x" * 100_000), Retry()).message

    assert len(message) < MESSAGE_LENGTH + 100
    assert message.endswith("xxx… (100000 characters)")
    assert judge(ValueError("x" * MESSAGE_LENGTH), Retry()).message == f"ValueError: {'x' * MESSAGE_LENGTH}"


class Asking(Exception):
    def __init__(self, retry_after: Any) -> None:
        super().__init__("later")
        self.retry_after = retry_after


@pytest.mark.parametrize(
    ("asked", "understood"),
    [
        (7, 7.0),
        (0.5, 0.5),
        (0, 0.0),
        (None, None),
        ("7", None),
        (timedelta(seconds=7), None),
        (math.inf, None),
        (math.nan, None),
        (lambda: 7, None),
    ],
)
def test_what_a_server_asks_for_is_understood_when_it_is_a_number(asked: Any, understood: float | None) -> None:
    assert judge(Asking(asked), Retry()).retry_after == understood
    assert judge(ModelUnavailable("down", retry_after=3), Retry()).retry_after == 3


async def test_attempts_are_numbered_until_one_succeeds(waits: list[float]) -> None:
    attempts = Attempts(ValueError("1"), ValueError("2"))

    assert await retrying(attempts, Retry(maximum_attempts=5, initial_interval=1)) == 3
    assert attempts.numbers == [1, 2, 3]
    assert waits == [1.0, 2.0]


async def test_the_last_error_is_raised_as_it_is_when_attempts_are_used_up(waits: list[float]) -> None:
    errors = [ValueError(str(number)) for number in range(5)]
    attempts = Attempts(*errors)

    with pytest.raises(ValueError, match="2") as raised:
        await retrying(attempts, Retry(maximum_attempts=3))

    assert raised.value is errors[2]
    assert len(waits) == 2


async def test_one_attempt_waits_for_nothing(waits: list[float]) -> None:
    with pytest.raises(ValueError, match="flaky"):
        await retrying(Attempts(ValueError("flaky")), Retry(maximum_attempts=1))

    assert waits == []


async def test_what_cannot_be_helped_ends_the_attempts_at_once(waits: list[float]) -> None:
    attempts = Attempts(ValueError("flaky"), InvalidInput("order_id is empty"))

    with pytest.raises(InvalidInput, match="order_id is empty"):
        await retrying(attempts, Retry(maximum_attempts=9, initial_interval=0.5))

    assert (attempts.numbers, waits) == ([1, 2], [0.5])


async def test_a_server_stretches_a_wait_up_to_the_bound_and_never_shortens_it(waits: list[float]) -> None:
    attempts = Attempts(*(ModelUnavailable("busy", retry_after=after) for after in (20.0, 0.1, 3_600.0, None)))

    await retrying(attempts, Retry(maximum_attempts=5, initial_interval=1, maximum_interval=3))

    assert waits == [20.0, 2.0, 60.0, 3.0]


async def test_an_odd_wish_of_a_foreign_error_does_not_hide_the_error(waits: list[float]) -> None:
    with pytest.raises(Asking, match="later"):
        await retrying(Attempts(Asking("30"), Asking("30")), Retry(maximum_attempts=2))

    assert waits == [0.5]


async def test_errors_that_end_loops_are_errors_like_others(waits: list[float]) -> None:
    with pytest.raises(StopAsyncIteration):
        await retrying(Attempts(StopAsyncIteration(), StopAsyncIteration()), Retry(maximum_attempts=2))

    assert len(waits) == 1


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt(), SystemExit(3)])
async def test_what_is_no_failure_is_never_retried(waits: list[float], error: BaseException) -> None:
    attempts = Attempts(error)

    with pytest.raises(type(error)):
        await retrying(attempts, Retry(maximum_attempts=5))

    assert (attempts.numbers, waits) == ([1], [])


async def test_a_thousand_attempts_are_no_matter(waits: list[float]) -> None:
    attempts = Attempts(*(ValueError("flaky") for _ in range(1_500)))

    assert await retrying(attempts, Retry(maximum_attempts=2_000)) == 1_501
    assert waits[-1] == 5.0


async def test_a_cancelled_wait_starts_no_attempt() -> None:
    numbers: list[int] = []
    tried = asyncio.Event()

    async def attempt(number: int) -> None:
        numbers.append(number)
        tried.set()
        raise ValueError("flaky")

    task = asyncio.create_task(retrying(attempt, Retry(initial_interval=60, maximum_interval=60)))
    await tried.wait()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert numbers == [1]
