"""For tests of DAGs, operators and flows: a runner for one operator, a scripted model, a real Temporal server.

With pytest they come as the fixtures of ``beluga_airflow.testing.plugin``, which is loaded by itself. Names are loaded
when they are first used: the runner imports Airflow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beluga_airflow.testing.deferral import Deferral
    from beluga_airflow.testing.operator_runner import OperatorRunner
    from beluga_airflow.testing.scripted_model import ScriptedModel, prompt_of, reply
    from beluga_airflow.testing.task_run import TaskRun
    from beluga_airflow.testing.temporal_server import TemporalServer

__all__ = ["Deferral", "OperatorRunner", "ScriptedModel", "TaskRun", "TemporalServer", "prompt_of", "reply"]

_HOMES = {
    "Deferral": "beluga_airflow.testing.deferral",
    "OperatorRunner": "beluga_airflow.testing.operator_runner",
    "ScriptedModel": "beluga_airflow.testing.scripted_model",
    "TaskRun": "beluga_airflow.testing.task_run",
    "TemporalServer": "beluga_airflow.testing.temporal_server",
    "prompt_of": "beluga_airflow.testing.scripted_model",
    "reply": "beluga_airflow.testing.scripted_model",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
