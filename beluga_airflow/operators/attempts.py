"""Attempts that Airflow's retries are: how long Airflow waits between them, and which is the last."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from airflow.sdk import Context
from airflow.sdk.definitions.retry_policy import RetryDecision, RetryPolicy

from beluga_airflow.graph import Retry
from beluga_airflow.graph.retry import RETRY_AFTER_BOUND

__all__ = ["AttemptFailed", "StepRetryPolicy", "TriedAgain", "is_last", "tried_by_airflow"]


class AttemptFailed(Exception):
    """An attempt of a step failed, and another one follows.

    It stands for the step's own error, which might be one that means something else to Airflow.

    Args:
        message: of the failure.
        wait: seconds until the next attempt; None: as long as Airflow waits by itself.
    """

    def __init__(self, message: str, wait: float | None) -> None:
        super().__init__(message)
        self.wait = wait


class StepRetryPolicy(RetryPolicy):
    """Waits as the attempt that failed says. Whatever else fails a task, a lost worker say, is left to Airflow."""

    def evaluate(
        self,
        exception: BaseException,
        try_number: int,  # noqa: ARG002  # Airflow's signature
        max_tries: int,  # noqa: ARG002
        context: Context | None = None,  # noqa: ARG002
    ) -> RetryDecision:
        """The wait before the next attempt."""
        if isinstance(exception, AttemptFailed):
            wait = None if exception.wait is None else timedelta(seconds=exception.wait)
            return RetryDecision.retry(wait, reason=str(exception))
        return RetryDecision.default()


def is_last(context: Context) -> bool:
    """Whether Airflow will not try again. Its count holds, for the flow may have been changed meanwhile."""
    return bool(context["ti"].try_number > context["ti"].max_tries)


class TriedAgain(BaseException):
    """Passes through whatever runs a flow, up to the operator, which makes an ``AttemptFailed`` of it.

    Args:
        message: of the failure.
        wait: as of ``AttemptFailed``.
    """

    def __init__(self, message: str, wait: float | None) -> None:
        super().__init__(message)
        self.wait = wait


def tried_by_airflow(context: Context, retry: Retry | None) -> Callable[[Exception], TriedAgain | None] | None:
    """What stands for the error of an attempt after which Airflow tries again; None where it does not."""
    if retry is None or retry.maximum_attempts > 1 or is_last(context):
        return None

    def again(error: Exception) -> TriedAgain | None:
        from beluga_airflow.resilience.retrying import judge

        failure = judge(error, retry)
        wait = None if failure.retry_after is None else min(failure.retry_after, RETRY_AFTER_BOUND)
        return TriedAgain(failure.message, wait) if failure.retryable else None

    return again
