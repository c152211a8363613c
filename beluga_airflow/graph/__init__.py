"""What flows are: pure data, their check, and the rule of what runs next. Knows nothing of Airflow or Temporal."""

from __future__ import annotations

from beluga_airflow.graph.budget import Budget
from beluga_airflow.graph.decision import Decision
from beluga_airflow.graph.flow import Chain, Flow, Graph
from beluga_airflow.graph.memory import Memory
from beluga_airflow.graph.outcome import FlowResult, Identity, Outcome, StepContext, Stop
from beluga_airflow.graph.retry import Retry
from beluga_airflow.graph.shape import Shape

__all__ = [
    "Budget",
    "Chain",
    "Decision",
    "Flow",
    "FlowResult",
    "Graph",
    "Identity",
    "Memory",
    "Outcome",
    "Retry",
    "Shape",
    "StepContext",
    "Stop",
]
