"""The in-process runtime: a short loop over ``Shape.ready``."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from beluga_airflow.config import Settings
from beluga_airflow.errors import InvalidFlow, InvalidInput
from beluga_airflow.execute import Resources, attempt, merged, to_json
from beluga_airflow.graph import Flow, FlowResult, Identity, Outcome, Retry, Shape
from beluga_airflow.graph.progress import Progress
from beluga_airflow.llm.client import Endpoint, ModelClient, OpenAIClient
from beluga_airflow.resilience.retrying import judge, retrying
from beluga_airflow.state import StateStore, open_store
from beluga_airflow.telemetry import finish_flow_span, flow_span

__all__ = ["Checkpoint", "run", "run_with"]


class Checkpoint(Protocol):
    """Where the outcomes of finished steps are kept, so that a lost run goes on behind them."""

    async def load(self) -> dict[str, Outcome]:
        """The outcomes kept so far, by step."""
        ...

    async def save(self, step: str, outcome: Outcome) -> None:
        """Keep one; when this returns, it survives the loss of the process."""
        ...


async def run(
    flow: Flow,
    inputs: Mapping[str, Any],
    *,
    key: str | None = None,
    endpoint: Endpoint | None = None,
    model: ModelClient | None = None,
    state: StateStore | None = None,
    settings: Settings | None = None,
) -> FlowResult:
    """Run a flow in this process, with no Airflow and no Temporal.

    Args:
        flow: a chain or a graph.
        inputs: its input: JSON, or what can become JSON.
        key: the business key, from which idempotency keys are made; without it every run has keys of its own.
        endpoint: where decisions ask; without it ``openai``, ``gpt-4o``, the key from ``OPENAI_API_KEY``.
        model: asks in place of ``endpoint``; not closed here.
        state: keeps decision records; without it they go with the run.
        settings: instead of the defaults.

    Returns:
        how the flow ended; a flow that failed is a result, not an exception.

    Raises:
        InvalidFlow: the flow cannot mean anything.
        InvalidInput: the input is no mapping.
        InvalidOutput: something in the input is not JSON.
        StateUnavailable: a state store was given and cannot be reached.
    """
    clients: dict[str | None, ModelClient] = {}

    async def client_for(conn_id: str | None) -> ModelClient:
        if model is not None:
            return model
        return clients.setdefault(conn_id, OpenAIClient(endpoint or Endpoint()))

    parts = (flow.name, key) if key is not None else (flow.name, "run", uuid.uuid4())
    try:
        return await run_with(
            flow,
            inputs,
            identity=Identity.of(*parts),
            resources=Resources(state=state or open_store("memory://"), model=client_for),
            settings=settings or Settings(),
        )
    finally:
        for client in clients.values():
            await client.close()


async def run_with(
    flow: Flow,
    inputs: Mapping[str, Any],
    *,
    identity: Identity,
    resources: Resources,
    settings: Settings,
    checkpoint: Checkpoint | None = None,
) -> FlowResult:
    """Run a flow in this process as a host (an operator, a batch on Temporal) wants it.

    Args:
        flow: a chain or a graph.
        inputs: its input.
        identity: of this run.
        resources: what its steps need.
        settings: for what the flow leaves open.
        checkpoint: outcomes kept by an earlier, lost run of the same identity.

    Raises:
        InvalidFlow: the flow cannot mean anything.
        InvalidInput: the input is no mapping.
        InvalidOutput: something in the input is not JSON.
        StateUnavailable: checkpoints cannot be read or written; nothing is lost, run it again.
    """
    if not isinstance(flow, Flow):
        raise InvalidFlow(f"a {type(flow).__name__} is no flow; give a Chain or a Graph")
    shape = settings.settle(flow.check())
    data = to_json(inputs, f"the input of flow {flow.name!r}")
    if not isinstance(data, dict):
        raise InvalidInput(f"the input of flow {flow.name!r} is a {type(inputs).__name__}; give a mapping")
    with flow_span(shape, "task") as span:
        task = _Run(flow=flow, shape=shape, inputs=data, identity=identity, resources=resources, checkpoint=checkpoint)
        try:
            result = await task.to_end()
        except asyncio.CancelledError:
            finish_flow_span(span, FlowResult(status="cancelled"))
            raise
        finish_flow_span(span, result)
        return result


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run of one flow."""

    flow: Flow
    shape: Shape
    inputs: dict[str, Any]
    identity: Identity
    resources: Resources
    checkpoint: Checkpoint | None

    async def to_end(self) -> FlowResult:
        progress = Progress(self.shape, await self.checkpoint.load() if self.checkpoint else None)
        tasks: dict[asyncio.Task[Outcome], str] = {}
        scope = asyncio.timeout(self.shape.timeout)
        try:
            async with scope:
                await self._advance(progress, tasks)
        except BaseException as error:
            await _abandoned(tasks)
            if isinstance(error, TimeoutError) and scope.expired():
                return progress.timed_out()
            raise
        step = progress.skipped_end
        if step is None:
            return progress.result()
        outputs = {name: outcome.output for name, outcome in progress.outcomes.items()}
        try:
            return progress.result(merged(self.flow, self.shape.places[step], self.inputs, outputs))
        except Exception as error:  # a conflict, or the code of a reducer
            progress.failures[step] = judge(error, self._retry(step)).message
            return progress.result()

    async def _advance(self, progress: Progress, tasks: dict[asyncio.Task[Outcome], str]) -> None:
        while True:
            for step in progress.start():
                tasks[asyncio.create_task(self._step(step, progress.outputs_before(step)))] = step
            if not tasks:
                return
            finished, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            progress.finish({tasks[task]: self._ended(tasks[task], task) for task in finished})
            for task in finished:
                del tasks[task]

    def _ended(self, step: str, task: asyncio.Task[Outcome]) -> Outcome | str:
        error = task.exception()
        if error is None:
            return task.result()
        if isinstance(error, _CheckpointLost):
            raise error.cause
        return judge(error, self._retry(step)).message

    async def _step(self, step: str, outputs: Mapping[str, Mapping[str, Any]]) -> Outcome:
        retry = self._retry(step)

        async def once(number: int) -> Outcome:
            return await attempt(
                self.flow,
                self.shape.places[step],
                inputs=self.inputs,
                outputs=outputs,
                identity=self.identity,
                resources=self.resources,
                timeout=self.shape.by_name[step].timeout,
                number=number,
                last=number >= retry.maximum_attempts,
            )

        outcome = await retrying(once, retry)
        if self.checkpoint is not None:
            try:
                await self.checkpoint.save(step, outcome)
            except Exception as error:
                raise _CheckpointLost(error) from error
        return outcome

    def _retry(self, step: str) -> Retry:
        retry = self.shape.by_name[step].retry
        assert retry is not None, "a settled shape has retries"
        return retry


class _CheckpointLost(Exception):  # only carries its cause past the failures of steps
    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


async def _abandoned(tasks: Iterable[asyncio.Task[Outcome]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
