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
    # halves of characters, which JSON lets in, go no further
    text = str(error).encode("utf-8", "backslashreplace").decode()
    if len(text) > MESSAGE_LENGTH:
        text = f"{text[:MESSAGE_LENGTH]}… ({len(text)} characters)"
    return Failure(
        kind=type(error).__name__,
        message=f"{type(error).__name__}: {text}" if text else type(error).__name__,
        retryable=not listed and (error.retryable if isinstance(error, BelugaError) else True),
        retry_after=_retry_after(error),
    )


def _retry_after(error: BaseException) -> float | None:
    # errors of other libraries have attributes of this name that hold texts or moments
    wait = getattr(error, "retry_after", None)
    return float(wait) if isinstance(wait, int | float) and math.isfinite(wait) else None


async def retrying(attempt: Callable[[int], Awaitable[T]], retry: Retry) -> T:
    """Call ``attempt(1)``, ``attempt(2)``, ... until one succeeds or ``retry`` is used up; its last error is raised."""

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        after = judge(error, retry).retry_after if error else None
        return retry.delay(state.attempt_number, after)

    def again(error: BaseException) -> bool:
        return isinstance(error, Exception) and judge(error, retry).retryable

    loop = AsyncRetrying(
        stop=stop_after_attempt(retry.maximum_attempts), wait=wait, retry=retry_if_exception(again), reraise=True
    )
    numbers = count(1)

    async def once() -> T:
        return await attempt(next(numbers))

    return await loop(once)
