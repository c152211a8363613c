"""The workflow that runs a batch: its items are activities, each of which runs the whole flow for one item."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError

with workflow.unsafe.imports_passed_through():
    from beluga_airflow.graph import Retry
    from beluga_airflow.temporal.flow_workflow import HEARTBEAT, duration, message_of, policy
    from beluga_airflow.temporal.messages import (
        BATCH_WORKFLOW,
        ITEM_ACTIVITY,
        PREPARE_ACTIVITY,
        BatchCall,
        ItemCall,
    )

__all__ = ["ITEM_RETRY", "BatchWorkflow"]

GRACE = 60.0
"""Seconds beyond an item's own timeout before the server gives it up."""
LOST, LOST_LENGTH = 2_000, 500
"""Of how many lost items it is kept why, and in how many characters: it travels to the next run and to Airflow."""
ITEM_RETRY = Retry(maximum_attempts=10, initial_interval=1.0, maximum_interval=30.0)
"""Of what is around an item, the state store say; its steps have retries of their own. Bounded, as an item that takes
its worker down each time must not do so for ever."""


@workflow.defn(name=BATCH_WORKFLOW)
class BatchWorkflow:
    """Runs items, so many at once, and counts how they end. A failed item is a count, never a failure of the batch."""

    @workflow.init
    def __init__(self, call: BatchCall) -> None:
        self._call = call
        self._statuses = Counter(call.statuses)
        self._lost = dict(call.lost)
        self._in_flight = 0

    @workflow.query
    def progress(self) -> dict[str, Any]:
        """How far the batch is: counts of items."""
        return {
            "total": self._call.total,
            "ended": self._statuses.total(),
            "in_flight": self._in_flight,
            "statuses": dict(self._statuses),
        }

    @workflow.run
    async def run(self, call: BatchCall) -> dict[str, Any]:
        if call.offset == 0 and call.total:
            await self._prepare()
        end = min(call.offset + call.page, call.total)
        indexes = iter(range(call.offset, end))
        lanes = min(call.max_in_flight, end - call.offset)
        # each lane takes the next item as it ends one, so that a slow item holds back nobody
        await asyncio.gather(*(self._lane(indexes) for _ in range(lanes)))
        if end < call.total:
            workflow.continue_as_new(replace(call, offset=end, statuses=dict(self._statuses), lost=self._lost))
        return {"total": call.total, "statuses": dict(self._statuses), "lost": self._lost}

    async def _prepare(self) -> None:
        await workflow.execute_activity(
            PREPARE_ACTIVITY,
            self._item(0),
            start_to_close_timeout=timedelta(seconds=60),
            retry_policy=policy(ITEM_RETRY),
            activity_id="prepare",
            summary="prepare",
        )

    async def _lane(self, indexes: Any) -> None:
        for index in indexes:
            if workflow.cancellation_reason() is not None:
                # an item that ended all the same must not let its lane go on
                raise asyncio.CancelledError
            self._in_flight += 1
            try:
                status = await workflow.execute_activity(
                    ITEM_ACTIVITY,
                    self._item(index),
                    result_type=str,
                    start_to_close_timeout=duration(self._call.item_timeout + GRACE),
                    heartbeat_timeout=HEARTBEAT,
                    retry_policy=policy(ITEM_RETRY),
                    # a cancelled item undoes what its steps have done, and must hear that it is to
                    cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
                    activity_id=f"item-{index}",
                    summary=f"item {index}",
                )
            except ActivityError as error:
                if workflow.cancellation_reason() is not None:
                    raise
                status = "failed"
                if len(self._lost) < LOST:
                    self._lost[str(index)] = message_of(error)[:LOST_LENGTH]
            finally:
                self._in_flight -= 1
            self._statuses[status] += 1

    def _item(self, index: int) -> ItemCall:
        call = self._call
        return ItemCall(
            path=call.path,
            batch=call.batch,
            index=index,
            generation=call.generation,
            llm_conn_id=call.llm_conn_id,
            state_conn_id=call.state_conn_id,
        )
