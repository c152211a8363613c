"""What holds where nobody says otherwise, and the file in which people say otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from beluga_airflow.config.settings import (
    ChainSettings,
    GraphSettings,
    LLMSettings,
    Settings,
    StateSettings,
    TemporalSettings,
    WorkflowSettings,
)

if TYPE_CHECKING:
    from beluga_airflow.config.reader import load_settings

__all__ = [
    "ChainSettings",
    "GraphSettings",
    "LLMSettings",
    "Settings",
    "StateSettings",
    "TemporalSettings",
    "WorkflowSettings",
    "load_settings",
]


def __getattr__(name: str) -> Any:
    if name == "load_settings":
        # not with the rest: a run without a file needs no YAML
        from beluga_airflow.config.reader import load_settings

        return load_settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
