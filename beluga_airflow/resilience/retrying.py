"""The one layer that retries: which failures deserve another attempt, and the loop that gives it."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from beluga_airflow.errors import BelugaError
from beluga_airflow.graph import Retry

__all__ = ["Failure", "judge", "retrying"]

T = TypeVar("T")

MESSAGE_LENGTH = 2_000
"""Characters of an error's message that are kept: it goes into logs, XComs and workflow histories."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What a failed attempt means.

    Args:
        kind: the class of the exception.
        message: class and message, bounded.
        retryable: whether another attempt may help.
        retry_after: seconds that a server asked to wait.
    """

    kind: str
    message: str
    retryable: bool
    retry_after: float | None = None


def judge(error: BaseException, retry: Retry) -> Failure:
    """What ``error`` means under ``retry``: ours say themselves whether to retry, all others may be retried."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    listed = any(kind in kinds for kind in retry.names())
    text = _text(error)
    if len(text) > MESSAGE_LENGTH:
        text = f"{text[:MESSAGE_LENGTH]}… ({len(text)} characters)"
    return Failure(
        kind=type(error).__name__,
        message=f"{type(error).__name__}: {text}" if text else type(error).__name__,
        retryable=not listed and (error.retryable if isinstance(error, BelugaError) else True),
        retry_after=_retry_after(error),
    )


def _text(error: BaseException) -> str:
    try:
        # halves of characters, which JSON lets in, go no further
        return str(error).encode("utf-8", "backslashreplace").decode()
    except Exception as fault:  # the error may be of anybody's making
        return f"(its text raised {type(fault).__name__})"


def _retry_after(error: BaseException) -> float | None:
    # errors of other libraries have attributes of this name that hold texts or moments
    wait = getattr(error, "retry_after", None)
    return float(wait) if isinstance(wait, int | float) and math.isfinite(wait) else None


async def retrying(
    attempt: Callable[[int], Awaitable[T]], retry: Retry, *, waits: Callable[[BaseException], None] = lambda _: None
) -> T:
    """Call ``attempt(1)``, ``attempt(2)``, ... until one succeeds or ``retry`` is used up; its last error is raised.

    ``waits`` is called with the error of a failed one when the wait for the next begins.
    """

    def wait(state: RetryCallState) -> float:
        error = _error(state)
        after = judge(error, retry).retry_after if error else None
        return retry.delay(state.attempt_number, after)

    def again(error: BaseException) -> bool:
        return isinstance(error, Exception) and judge(error, retry).retryable

    try:
        # nearly every step succeeds at once, and the loop costs more than all the rest around a step
        return await attempt(1)
    except Exception as error:
        if retry.maximum_attempts < 2 or not again(error):
            raise
        first = error
    loop = AsyncRetrying(
        stop=stop_after_attempt(retry.maximum_attempts),
        wait=wait,
        retry=retry_if_exception(again),
        before_sleep=lambda state: waits(failed) if (failed := _error(state)) else None,
        reraise=True,
    )
    numbers = count(1)

    async def once() -> T:
        number = next(numbers)
        if number == 1:
            raise first
        return await attempt(number)

    return await loop(once)


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None
