"""AI decisions and durable workflows for Apache Airflow.

A flow is defined once, as a ``Chain`` or a ``Graph`` of plain functions and ``Decision``s, and means the same in one
task, and on Temporal. Names are loaded when they are first used: importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beluga_airflow.errors import BelugaError, InvalidFlow, InvalidInput
    from beluga_airflow.graph import Budget, Chain, Decision, FlowResult, Graph, Memory, Retry, StepContext, Stop
    from beluga_airflow.local import run
    from beluga_airflow.resilience.breaker import CircuitBreaker
    from beluga_airflow.resilience.limits import RateLimit

__version__ = "0.1.0"

_HOMES = {
    "BelugaError": "beluga_airflow.errors",
    "InvalidFlow": "beluga_airflow.errors",
    "InvalidInput": "beluga_airflow.errors",
    "Budget": "beluga_airflow.graph",
    "Chain": "beluga_airflow.graph",
    "CircuitBreaker": "beluga_airflow.resilience.breaker",
    "Decision": "beluga_airflow.graph",
    "FlowResult": "beluga_airflow.graph",
    "Graph": "beluga_airflow.graph",
    "Memory": "beluga_airflow.graph",
    "RateLimit": "beluga_airflow.resilience.limits",
    "Retry": "beluga_airflow.graph",
    "StepContext": "beluga_airflow.graph",
    "Stop": "beluga_airflow.graph",
    "run": "beluga_airflow.local",
}

__all__ = [
    "BelugaError",
    "Budget",
    "Chain",
    "CircuitBreaker",
    "Decision",
    "FlowResult",
    "Graph",
    "InvalidFlow",
    "InvalidInput",
    "Memory",
    "RateLimit",
    "Retry",
    "StepContext",
    "Stop",
    "__version__",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
