"""Any number of items through one flow on Temporal, as one Airflow task."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import Context

from beluga_airflow.errors import BelugaError, InvalidInput, InvalidSetting, TemporalError
from beluga_airflow.graph import FlowResult, Identity
from beluga_airflow.hooks.settings import settings_in_force
from beluga_airflow.operators.generation import generation
from beluga_airflow.operators.runs import run_name, run_parts
from beluga_airflow.operators.waiting import OnTemporal

if TYPE_CHECKING:
    from beluga_airflow.temporal.batch import Batch, Item
    from beluga_airflow.temporal.client import Run

__all__ = ["TemporalBatchOperator"]


class TemporalBatchOperator(OnTemporal):
    """Runs a flow for each of many items on Temporal; each comes to its own end, and none stops the others.

    The task stores the items in the state store, starts one workflow, and waits in the triggerer. When all have ended
    it writes a line a item to ``results_path``, in the order of the input, and returns a manifest: counts by status,
    decisions, tokens, cost, duration, the path. An Airflow retry goes on with what has not ended; a clear runs all
    again, once what ran before has ended, with the same idempotency keys.

    Args:
        flow: the flow, at the top level of a module that the worker can import, or its import path.
        items: a list (an XCom too), its JSON text, or the import path of a function that gives them; templated.
        items_args: keyword arguments for that function; templated.
        key: the field of each item that holds its business key; two items with one key are an error. Without it
            idempotency keys are made from dag, run, task, map index and the item's place.
        results_path: a local path; templated. When left out, a file under ``beluga/results`` beside the state store.
        max_in_flight: how many items run at once.
        task_queue, wait_timeout, temporal_conn_id, llm_conn_id, state_conn_id: as in ``TemporalWorkflowOperator``. The
            state store must be one that this task and the worker share; it keeps a batch for 30 days, within which it
            must end.
    """

    template_fields: Sequence[str] = ("items", "items_args", "results_path", "task_queue")
    template_fields_renderers: ClassVar[dict[str, str]] = {"items": "json", "items_args": "json"}

    def __init__(
        self,
        *,
        items: Sequence[Mapping[str, Any]] | str | Any,
        items_args: Mapping[str, Any] | None = None,
        key: str | None = None,
        results_path: str | None = None,
        max_in_flight: int = 50,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if max_in_flight < 1:
            raise InvalidSetting(f"max_in_flight is {max_in_flight}, it must be 1 or more")
        self.items = items
        self.items_args = items_args
        self.key = key
        self.results_path = results_path
        self.max_in_flight = max_in_flight

    async def started(self, context: Context) -> Any:
        from beluga_airflow.temporal.messages import BATCH_WORKFLOW, BatchCall

        shape = settings_in_force().settle(self.flow.check())
        async with generation(context) as number:
            name = f"{run_name(context)}@{number}"
            earlier = (f"{run_name(context)}@{cleared}" for cleared in reversed(range(number)))
            await self.end_earlier(context, number, earlier)
            call = BatchCall(
                path=self.flow_path,
                batch=name,
                total=await self._stage(context, name),
                item_timeout=shape.time + shape.longest_undoing,
                max_in_flight=self.max_in_flight,
                generation=number,
                llm_conn_id=self.llm_conn_id,
                state_conn_id=self.state_conn_id,
            )
            run = await self.start(context, number, BATCH_WORKFLOW, call, workflow_id=name)
            return await self.wait(context, run)

    async def completed(self, context: Context, run: Run, returned: Any) -> dict[str, Any]:  # noqa: ARG002  # for flows
        """Publish the results and return the manifest."""
        if returned.get("error"):
            raise TemporalError(f"the batch did not end: {returned['error']}")
        from beluga_airflow.hooks.backends import AirflowBackends
        from beluga_airflow.operators.items import published
        from beluga_airflow.temporal.batch import Batch

        async with AirflowBackends() as backends:
            store = await backends.store(self.state_conn_id)
            # not by today's name: somebody may have changed retries= meanwhile
            batch = Batch(store, run.workflow_id)
            path = self._path(store.url, batch.name)
            started = await batch.started()
            manifest = await published(batch.results(returned["total"], returned["lost"]), path)
        seconds = max(time.time() - started, 0.001)
        return {
            "workflow_id": run.workflow_id,
            "run_id": run.run_id,
            "flow": self.flow.name,
            **manifest.to_json(),
            "duration_seconds": round(seconds, 3),
            "items_per_second": round(manifest.statuses.total() / seconds, 3),
            "results": str(path),
        }

    async def _stage(self, context: Context, name: str) -> int:
        from beluga_airflow.hooks.backends import AirflowBackends
        from beluga_airflow.operators.items import check_place
        from beluga_airflow.temporal.batch import Batch

        async with AirflowBackends() as backends:
            store = await backends.store(self.state_conn_id)
            check_place(self._path(store.url, name))
            batch = Batch(store, name)
            staged = await batch.staged()
            if staged is None:
                # an attempt that was lost on the way may have seen other items
                await batch.forget()
                staged = await batch.put(self._items(context, batch), started=time.time())
            else:
                self.log.info("going on with the %d items that an earlier attempt stored", staged)
        if not staged:
            self.log.warning("items= gave no items: the batch will end at once")
        return staged

    async def _items(self, context: Context, batch: Batch) -> AsyncIterator[Item]:
        from beluga_airflow.execute.values import to_json
        from beluga_airflow.operators.items import items_of
        from beluga_airflow.temporal.batch import Item

        seen: set[str] = set()
        index = 0
        async for raw in items_of(self.items, self.items_args):
            try:
                data = to_json(raw, f"item {index}")
                if not isinstance(data, dict):
                    raise InvalidInput(f"it is a {type(raw).__name__}, it must be a mapping")
                key, scope = self._identity(context, data, index)
            except BelugaError as error:
                # one bad item is one failed line, and takes nobody else down
                failed = FlowResult(status="failed", error=f"item {index} cannot be run: {error}")
                item = Item(index=index, key=f"item {index}", scope="", data={})
                await batch.end(item, failed)
                yield item
                index += 1
                continue
            if key in seen:
                raise InvalidInput(f"two items have the key {key!r} ({self.key}); keys must be unique in a batch")
            seen.add(key)
            yield Item(index=index, key=key, scope=scope, data=data)
            index += 1

    def _identity(self, context: Context, data: Mapping[str, Any], index: int) -> tuple[str, str]:
        if self.key is None:
            return str(index), Identity.of(*run_parts(context), index).scope
        value = data.get(self.key)
        if value is None or str(value).strip() == "":
            raise InvalidInput(f"it has no {self.key!r}, which key= names as its business key")
        return str(value), Identity.of(self.flow.name, value).scope

    def _path(self, store_url: str, name: str) -> Path:
        if self.results_path:
            return Path(self.results_path).expanduser().absolute()
        scheme, _, file = store_url.partition(":///")
        if scheme != "sqlite":
            raise InvalidSetting("results_path= is needed: the state store is no file beside which results could lie")
        return Path(file).parent / "results" / f"{name}.jsonl"
