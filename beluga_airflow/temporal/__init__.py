"""Flows on Temporal: one workflow that runs any flow, one that runs a batch, and their worker.

For workflows and workers of one's own: ``decide``, ``DecisionRecord`` and ``BelugaPlugin``. They are loaded when they
are first used: what imports them where no workflow runs must not load temporalio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beluga_airflow.llm.decide import DecisionRecord
    from beluga_airflow.temporal.deciding import decide
    from beluga_airflow.temporal.plugin import BelugaPlugin

__all__ = ["BelugaPlugin", "DecisionRecord", "decide"]


def __getattr__(name: str) -> Any:
    # import statements, which Temporal's sandbox sees; importlib goes past it
    if name == "decide":
        from beluga_airflow.temporal.deciding import decide

        return decide
    if name == "DecisionRecord":
        from beluga_airflow.temporal.deciding import DecisionRecord

        return DecisionRecord
    if name == "BelugaPlugin":
        from beluga_airflow.temporal.plugin import BelugaPlugin

        return BelugaPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
