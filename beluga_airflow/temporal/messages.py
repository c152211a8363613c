"""What travels between Airflow, workflows and activities: JSON, and never a secret."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from temporalio.api.common.v1 import Payload
from temporalio.converter import (
    AdvancedJSONEncoder,
    CompositePayloadConverter,
    DataConverter,
    DefaultPayloadConverter,
    JSONPlainPayloadConverter,
)
from temporalio.exceptions import ApplicationError

__all__ = [
    "BATCH_WORKFLOW",
    "DATA_CONVERTER",
    "DECISION_ACTIVITY",
    "FLOW_WORKFLOW",
    "ITEM_ACTIVITY",
    "MERGE_ACTIVITY",
    "PREPARE_ACTIVITY",
    "STATUS_ACTIVITY",
    "STEP_ACTIVITY",
    "UNDO_ACTIVITY",
    "BatchCall",
    "DecisionCall",
    "FlowCall",
    "ItemCall",
    "RunCall",
    "StatusCall",
    "StepCall",
    "run_name",
]

FLOW_WORKFLOW = "beluga.flow"
BATCH_WORKFLOW = "beluga.batch"
STEP_ACTIVITY = "beluga.step"
MERGE_ACTIVITY = "beluga.merge"
UNDO_ACTIVITY = "beluga.undo"
STATUS_ACTIVITY = "beluga.status"
PREPARE_ACTIVITY = "beluga.prepare"
ITEM_ACTIVITY = "beluga.item"
DECISION_ACTIVITY = "beluga.decision"

PAYLOAD_LIMIT = 2_000_000
"""Bytes of JSON in one piece; the server refuses more than 2 MiB."""


class _BoundedJSON(JSONPlainPayloadConverter):
    """JSON whose keys keep their order, as on every other runtime (the SDK's own sorts them), and that can be carried.

    A workflow that tried to send more would do so for ever.
    """

    def to_payload(self, value: Any) -> Payload:
        text = json.dumps(value, cls=AdvancedJSONEncoder, separators=(",", ":"))
        if len(text) > PAYLOAD_LIMIT:
            raise ApplicationError(
                f"TooLarge: {len(text) / 1e6:.1f} MB of data in one piece, and Temporal carries "
                f"{PAYLOAD_LIMIT / 1e6:g} MB; keep what is large in a file or a table, and pass its name",
                type="TooLarge",
                non_retryable=True,
            )
        return Payload(metadata={"encoding": self.encoding.encode()}, data=text.encode())


class _PayloadConverter(CompositePayloadConverter):
    def __init__(self) -> None:
        *others, _ = DefaultPayloadConverter.default_encoding_payload_converters
        super().__init__(*others, _BoundedJSON())


DATA_CONVERTER = replace(DataConverter.default, payload_converter_class=_PayloadConverter)
"""For every client of ours, the worker's too."""


def run_name(workflow_id: str, run_id: str) -> str:
    """What names a run of a workflow in the status of its flow."""
    return f"{workflow_id}/{run_id}"


@dataclass(frozen=True, kw_only=True)
class FlowCall:
    """The input of a flow's workflow.

    Args:
        path: the flow's import path, by which a worker finds the code of its steps.
        shape: the settled shape, as JSON.
        inputs: the flow's input.
        scope, generation, run: the run's identity.
        llm_conn_id, state_conn_id: names of connections; what they hold stays on the worker.
        kept: outcomes of another run, as JSON, for steps that are not to run again.
    """

    path: str
    shape: dict[str, Any]
    inputs: dict[str, Any]
    scope: str
    generation: int = 0
    run: str = ""
    llm_conn_id: str | None = None
    state_conn_id: str | None = None
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunCall:
    """What an activity needs to tell of the run that it is a part of; its workflow it knows itself.

    Args:
        flow: the flow's name.
        total: how many steps it has.
        started: when the workflow began: seconds since 1970.
    """

    flow: str
    total: int
    started: float


@dataclass(frozen=True, kw_only=True)
class StatusCall:
    """The input of the activity that tells how a flow's run ended.

    Args:
        of: the run.
        scope, generation: of its identity.
        status, error, steps, undone: of its ``FlowResult``.
    """

    of: RunCall
    scope: str
    generation: int
    state_conn_id: str | None
    status: str
    error: str | None
    steps: dict[str, str]
    undone: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class StepCall:
    """The input of the activity that runs one attempt of one step, or undoes it once."""

    of: RunCall
    path: str
    place: dict[str, Any]
    retry: dict[str, Any]
    timeout: float | None
    inputs: dict[str, Any]
    outputs: dict[str, dict[str, Any]]
    scope: str
    generation: int
    run: str
    llm_conn_id: str | None
    state_conn_id: str | None


@dataclass(frozen=True, kw_only=True)
class BatchCall:
    """The input of a batch's workflow. The items themselves lie in the state store.

    Args:
        path: the flow's import path.
        batch: names the batch in the state store.
        total: how many items it has.
        item_timeout: seconds for one item, retries and waits included.
        max_in_flight: how many items run at once.
        generation: of the batch's task.
        page: items of one run; then the workflow continues as new, before its history grows.
        offset, statuses, lost: what earlier runs of this workflow have done.
    """

    path: str
    batch: str
    total: int
    item_timeout: float
    max_in_flight: int
    generation: int = 0
    llm_conn_id: str | None = None
    state_conn_id: str | None = None
    page: int = 1_000
    offset: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ItemCall:
    """The input of the activity that runs one item of a batch to its end."""

    path: str
    batch: str
    index: int
    generation: int
    llm_conn_id: str | None
    state_conn_id: str | None


@dataclass(frozen=True, kw_only=True)
class DecisionCall:
    """The input of the activity that comes to a decision for a hand-written workflow.

    Args:
        decision: the name under which the worker's ``BelugaPlugin`` has it, or its import path, ``module:name``.
        data: an object with the keys that it reads.
        key: what, beside the workflow's id, names the record; the activity's id when left out.
    """

    decision: str
    data: Any
    key: str | None = None
