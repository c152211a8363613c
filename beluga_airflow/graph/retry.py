"""How often a step is tried, and how long it waits in between."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

__all__ = ["RETRY_AFTER_BOUND", "Retry", "seconds"]

RETRY_AFTER_BOUND = 60.0
"""Seconds: the longest wait that a server's ``Retry-After`` can ask of a step."""


def seconds(duration: float | timedelta) -> float:
    """A duration as seconds."""
    return duration.total_seconds() if isinstance(duration, timedelta) else float(duration)


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Retrying one step, in Temporal's words. Durations are seconds or timedeltas.

    Args:
        maximum_attempts: attempts in all, the first included; 1 switches retrying off.
        initial_interval: the wait before the second attempt.
        backoff_coefficient: what each further wait is multiplied by.
        maximum_interval: no wait is longer, except where a server asks for more by ``Retry-After``
            (obeyed up to 60 s).
        non_retryable: exception classes, or their names, that end the step at once (subclasses too).
    """

    maximum_attempts: int = 3
    initial_interval: float | timedelta = 0.5
    backoff_coefficient: float = 2.0
    maximum_interval: float | timedelta = 5.0
    non_retryable: tuple[type[BaseException] | str, ...] = ()

    def faults(self) -> list[str]:
        """What makes this retry meaningless, as clauses of a sentence; empty when it is sound."""
        found = []
        if self.maximum_attempts < 1:
            found.append(f"maximum_attempts is {self.maximum_attempts}, it must be 1 or more")
        if seconds(self.initial_interval) < 0 or seconds(self.maximum_interval) < 0:
            found.append("its intervals must not be negative")
        if self.backoff_coefficient < 1:
            found.append(f"backoff_coefficient is {self.backoff_coefficient}, it must be 1 or more")
        return found

    def delay(self, attempt: int, retry_after: float | None = None) -> float:
        """Seconds to wait after the failed attempt number ``attempt`` (1 is the first)."""
        backoff = seconds(self.initial_interval) * self.backoff_coefficient ** (attempt - 1)
        wait = min(backoff, seconds(self.maximum_interval))
        return wait if retry_after is None else max(wait, min(retry_after, RETRY_AFTER_BOUND))

    def names(self) -> tuple[str, ...]:
        """The names in ``non_retryable``."""
        return tuple(kind if isinstance(kind, str) else kind.__name__ for kind in self.non_retryable)

    def to_json(self) -> dict[str, Any]:
        """This retry as JSON; classes by their names."""
        return {
            "maximum_attempts": self.maximum_attempts,
            "initial_interval": seconds(self.initial_interval),
            "backoff_coefficient": self.backoff_coefficient,
            "maximum_interval": seconds(self.maximum_interval),
            "non_retryable": list(self.names()),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Retry:
        """The retry that ``to_json`` wrote."""
        return cls(**{**data, "non_retryable": tuple(data["non_retryable"])})
