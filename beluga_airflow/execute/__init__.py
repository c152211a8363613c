"""One attempt of one step, on every runtime: copies, merging, the call, the timeout, JSON."""

from __future__ import annotations

from beluga_airflow.execute.attempt import Resources, attempt, in_own_task, own_cancellation, undo
from beluga_airflow.execute.merge import States
from beluga_airflow.execute.undoing import undo_with_retries
from beluga_airflow.execute.values import to_json

__all__ = ["Resources", "States", "attempt", "in_own_task", "own_cancellation", "to_json", "undo", "undo_with_retries"]
