"""What keeps trouble small: retrying, circuit breakers, rate limits."""

from __future__ import annotations

from beluga_airflow.resilience.calling import call

__all__ = ["call"]
