"""One attempt of one step, on every runtime: copies, merging, the call, the timeout, JSON."""

from __future__ import annotations

from beluga_airflow.execute.attempt import Resources, attempt
from beluga_airflow.execute.merge import merged
from beluga_airflow.execute.values import to_json

__all__ = ["Resources", "attempt", "merged", "to_json"]
