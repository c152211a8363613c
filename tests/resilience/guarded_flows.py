"""Flows with guards: importable, as a worker needs them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from beluga_airflow import Chain, CircuitBreaker, InvalidInput, RateLimit, Retry

QUICK = Retry(maximum_attempts=3, initial_interval=0.01, maximum_interval=0.01)
LONG = 3600

calls: Counter[str] = Counter()
"""By the token in a flow's input."""


def answer(data: dict[str, Any]) -> dict[str, Any]:
    calls[data["token"]] += 1
    if data["answer"] == "nothing":
        raise OSError("no answer")
    if data["answer"] == "no such order":
        raise InvalidInput("no such order")
    return {"answered": data["answer"]}


guarded = Chain("guarded", retry=QUICK).add_step(
    "ask",
    answer,
    breaker=CircuitBreaker("shop", failure_threshold=2, recovery_timeout=LONG),
    limit=RateLimit("shop", requests_per_minute=1_000),
)
limited = Chain("limited", retry=Retry(maximum_attempts=1)).add_step(
    "ask",
    answer,
    timeout=0.5,
    breaker=CircuitBreaker("shop", failure_threshold=1),
    limit=RateLimit("shop", requests_per_minute=1, max_wait=100),
)
