"""For hand-written workflows: a decision as one line of their code."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from temporalio import workflow
from temporalio.common import RetryPolicy

with workflow.unsafe.imports_passed_through():
    from beluga_airflow.llm.decide import DecisionRecord
    from beluga_airflow.temporal.messages import DECISION_ACTIVITY, DecisionCall

if TYPE_CHECKING:
    from typing import Unpack

__all__ = ["DecisionRecord", "decide"]

START_TO_CLOSE = timedelta(seconds=60)
HEARTBEAT = timedelta(seconds=10)
"""How long a worker may be silent before its decision is given to another: the activity heartbeats by itself."""
ATTEMPTS = 3


async def decide(
    decision: str,
    data: Mapping[str, Any] | Any,
    *,
    key: str | None = None,
    **options: Unpack[workflow.ActivityConfig],
) -> DecisionRecord:
    """Come to a decision, in a workflow: an activity of a worker that has a ``BelugaPlugin``.

    It retries as its retry policy says, 3 attempts when left out; no other layer retries. The last attempt takes the
    decision's fallback where the model cannot be reached. An answer is on record before the activity ends, so that
    another attempt, or another run of this workflow, does not pay for it again.

    Args:
        decision: the name under which the plugin has it, or its import path, ``module:name``.
        data: with the keys that it reads: a mapping, or what your data converter writes as one. It is an input of the
            activity, and so in the workflow's history.
        key: names the record, beside the workflow's id and the decision; and the activity, so that no two under way at
            once may have the same. Left out, the activity's number does.
        options: of the activity, as ``workflow.execute_activity`` takes them; 60 s an attempt where they say nothing.

    Raises:
        temporalio.exceptions.ActivityError: it came to none; its cause has our error's name as its type.
    """
    named = {"summary": decision} if key is None else {"summary": decision, "activity_id": f"{decision}/{key}"}
    given: dict[str, Any] = {
        "start_to_close_timeout": START_TO_CLOSE,
        "heartbeat_timeout": HEARTBEAT,
        "retry_policy": RetryPolicy(maximum_attempts=ATTEMPTS),
        # a replay compares the id: by their order alone one decision would pass for another
        **named,
        **options,
    }
    record: DecisionRecord = await workflow.execute_activity(
        DECISION_ACTIVITY,
        DecisionCall(decision=decision, data=data, key=key),
        result_type=DecisionRecord,
        **given,
    )
    return record
