"""How often a step is tried, and how long it waits in between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

__all__ = ["RETRY_AFTER_BOUND", "Retry", "is_duration", "is_number", "is_whole", "seconds"]

RETRY_AFTER_BOUND = 60.0
"""Seconds: the longest wait that a server's ``Retry-After`` can ask of a step."""


def seconds(duration: float | timedelta) -> float:
    """A duration as seconds."""
    try:
        return duration.total_seconds() if isinstance(duration, timedelta) else float(duration)
    except OverflowError:  # a whole number beyond every float
        return math.inf if duration > 0 else -math.inf  # type: ignore[operator]  # a timedelta has no such trouble


def is_duration(value: Any) -> bool:
    """Whether it is a number of seconds or a timedelta."""
    return isinstance(value, timedelta) or is_number(value)


def is_whole(value: Any) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, int) and is_number(value)


def is_number(value: Any) -> bool:
    """Whether it is a number; True and False are some to Python only."""
    return isinstance(value, int | float) and not isinstance(value, bool)


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
        if not is_whole(self.maximum_attempts) or self.maximum_attempts < 1:
            found.append(f"maximum_attempts is {self.maximum_attempts!r}, it must be a whole number, 1 or more")
        for name in ("initial_interval", "maximum_interval"):
            interval = getattr(self, name)
            if not is_duration(interval) or not 0 <= seconds(interval) < math.inf:
                found.append(f"{name} is {interval!r}, it must be seconds or a timedelta, finite and not negative")
        if not is_number(self.backoff_coefficient) or not 1 <= self.backoff_coefficient < math.inf:
            found.append(f"backoff_coefficient is {self.backoff_coefficient!r}, it must be a finite number, 1 or more")
        kinds = self.non_retryable
        if not isinstance(kinds, tuple | list) or not all(isinstance(kind, str) or _is_error(kind) for kind in kinds):
            found.append(f"non_retryable is {kinds!r}, it must be a tuple of exception classes or names")
        return found

    def delay(self, attempt: int, retry_after: float | None = None) -> float:
        """Seconds to wait after the failed attempt number ``attempt`` (1 is the first)."""
        initial, longest = seconds(self.initial_interval), seconds(self.maximum_interval)
        try:
            wait = min(initial * self.backoff_coefficient ** (attempt - 1), longest)
        except OverflowError:  # after a thousand attempts or so
            wait = longest if initial else 0.0
        return wait if retry_after is None else max(wait, min(retry_after, RETRY_AFTER_BOUND))

    @property
    def longest_delay(self) -> float:
        """Seconds that no wait exceeds, whatever a server asks."""
        return max(seconds(self.maximum_interval), RETRY_AFTER_BOUND)

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


def _is_error(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseException)
