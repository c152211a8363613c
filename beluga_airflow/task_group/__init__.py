"""A flow as Airflow tasks: one for each step, so that every step is seen, retried and cleared on its own."""

from __future__ import annotations

from beluga_airflow.task_group.group import GraphTaskGroup

__all__ = ["GraphTaskGroup"]
