"""What travels between Airflow, workflows and activities: JSON, and never a secret."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "BATCH_WORKFLOW",
    "FLOW_WORKFLOW",
    "ITEM_ACTIVITY",
    "MERGE_ACTIVITY",
    "PREPARE_ACTIVITY",
    "STEP_ACTIVITY",
    "BatchCall",
    "FlowCall",
    "ItemCall",
    "StepCall",
]

FLOW_WORKFLOW = "beluga.flow"
BATCH_WORKFLOW = "beluga.batch"
STEP_ACTIVITY = "beluga.step"
MERGE_ACTIVITY = "beluga.merge"
PREPARE_ACTIVITY = "beluga.prepare"
ITEM_ACTIVITY = "beluga.item"


@dataclass(frozen=True, kw_only=True)
class FlowCall:
    """The input of a flow's workflow.

    Args:
        path: the flow's import path, by which a worker finds the code of its steps.
        shape: the settled shape, as JSON.
        inputs: the flow's input.
        scope, generation: the run's identity.
        llm_conn_id, state_conn_id: names of connections; what they hold stays on the worker.
    """

    path: str
    shape: dict[str, Any]
    inputs: dict[str, Any]
    scope: str
    generation: int = 0
    llm_conn_id: str | None = None
    state_conn_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class StepCall:
    """The input of the activity that runs one attempt of one step."""

    path: str
    place: dict[str, Any]
    retry: dict[str, Any]
    timeout: float | None
    inputs: dict[str, Any]
    outputs: dict[str, dict[str, Any]]
    scope: str
    generation: int
    llm_conn_id: str | None
    state_conn_id: str | None


@dataclass(frozen=True, kw_only=True)
class BatchCall:
    """The input of a batch's workflow. The items themselves lie in the state store.

    Args:
        path: the flow's import path.
        batch: names the batch in the state store.
        total: how many items it has.
        fingerprint: of the flow, so that checkpoints of changed code are not taken.
        item_timeout: seconds for one item, retries and waits included.
        max_in_flight: how many items run at once.
        generation: of the batch's task.
        offset, statuses, lost: what earlier runs of this workflow have done.
    """

    path: str
    batch: str
    total: int
    fingerprint: str
    item_timeout: float
    max_in_flight: int
    generation: int = 0
    llm_conn_id: str | None = None
    state_conn_id: str | None = None
    offset: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ItemCall:
    """The input of the activity that runs one item of a batch to its end."""

    path: str
    batch: str
    index: int
    fingerprint: str
    generation: int
    llm_conn_id: str | None
    state_conn_id: str | None
