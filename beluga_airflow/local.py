"""The in-process runtime: a short loop over ``Progress``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from secrets import token_hex
from typing import Any
from weakref import WeakKeyDictionary

from beluga_airflow.config import Settings
from beluga_airflow.errors import InvalidFlow, InvalidInput, StepTimeout
from beluga_airflow.execute import Resources, States, attempt, own_cancellation, to_json, undo_with_retries
from beluga_airflow.execute.checkpoints import Checkpoint, entry_names
from beluga_airflow.execute.status import RunOf, StatusWriter
from beluga_airflow.graph import Flow, FlowResult, Identity, Outcome, Shape
from beluga_airflow.graph.progress import IN_FLIGHT, Progress
from beluga_airflow.graph.shape import UNDO, GroupShape
from beluga_airflow.llm.client import Endpoint, ModelClient, OpenAIClient
from beluga_airflow.resilience.bounded import bounded, uncancelled
from beluga_airflow.resilience.retrying import judge, retrying
from beluga_airflow.state import StateStore, open_store
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.telemetry import finish_flow_span, flow_span

__all__ = ["run", "run_with"]

log = logging.getLogger(__name__)

LEAVING = 5.0
"""Seconds that cancelled steps have to come to an end."""


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
        endpoint: where decisions ask; without it as the settings say, with the key from ``OPENAI_API_KEY``.
        model: asks in place of ``endpoint``; not closed here.
        state: keeps decision records, and the run's status; without it, and a ``state.url``, they go with the run.
        settings: instead of the defaults; ``load_settings`` reads them from a file.

    Returns:
        how the flow ended; a flow that failed is a result, not an exception.

    Raises:
        InvalidFlow: the flow cannot mean anything.
        InvalidInput: the input is no mapping.
        InvalidOutput: something in the input is not JSON.
        StateUnavailable: a state store was given and cannot be reached.
    """
    clients: dict[str | None, ModelClient] = {}
    settings = settings or DEFAULTS
    own = open_store(settings.state.url) if state is None and settings.state.url else None
    state = state or own

    async def client_for(conn_id: str | None) -> ModelClient:
        if model is not None:
            return model
        return clients.setdefault(conn_id, OpenAIClient(endpoint or Endpoint(**vars(settings.llm))))

    identity = Identity(scope=f"{flow.name}/run/{token_hex(16)}") if key is None else Identity.of(flow.name, key)
    resources = Resources(state=state or MemoryStore(), model=client_for)
    status = None if state is None else StatusWriter(state, RunOf.nobody(flow.name, identity))
    try:
        return await run_with(flow, inputs, identity=identity, resources=resources, settings=settings, status=status)
    finally:
        for client in clients.values():
            await client.close()
        if own is not None:
            await own.close()


async def run_with(
    flow: Flow,
    inputs: Mapping[str, Any],
    *,
    identity: Identity,
    resources: Resources,
    settings: Settings,
    checkpoint: Checkpoint | None = None,
    kept: Mapping[str, Outcome] | None = None,
    gives_up: Callable[[], bool] = lambda: True,
    status: StatusWriter | None = None,
) -> FlowResult:
    """Run a flow in this process as a host (an operator, a batch on Temporal) wants it.

    Args:
        flow: a chain or a graph.
        inputs: its input.
        identity: of this run.
        resources: what its steps need.
        settings: for what the flow leaves open.
        checkpoint: where an earlier, lost run of the same identity kept how far it had come.
        kept: outcomes of another run, for steps that are not to run again.
        gives_up: asked when this is cancelled: whether the flow is, and is undone, or this process only.
        status: tells whoever looks how the run stands.

    Raises:
        InvalidFlow: the flow cannot mean anything.
        InvalidInput: the input is no mapping.
        InvalidOutput: something in the input is not JSON.
        StateUnavailable: checkpoints cannot be read or written; nothing is lost, run it again.
    """
    if not isinstance(flow, Flow):
        raise InvalidFlow(f"a {type(flow).__name__} is no flow; give a Chain or a Graph")
    shape = _settled(flow, settings)
    data = to_json(inputs, f"the input of flow {flow.name!r}")
    if not isinstance(data, dict):
        raise InvalidInput(f"the input of flow {flow.name!r} is a {type(inputs).__name__}; give a mapping")
    with flow_span(shape, "task") as span:
        known = {} if checkpoint is None else await checkpoint.load(entry_names(shape))
        outcomes = {step: Outcome.from_json(entry) for step, entry in known.items() if step in shape.order}
        task = _Run(
            flow=flow,
            inputs=data,
            identity=identity,
            resources=resources,
            checkpoint=checkpoint,
            gives_up=gives_up,
            progress=Progress(shape, {**(kept or {}), **outcomes}),
            traced=span.is_recording(),
        )
        try:
            work = partial(task.to_end, known)
            result = await (work() if status is None else status.through(work, task.progress, gives_up))
        except asyncio.CancelledError:
            finish_flow_span(span, FlowResult(status="cancelled"))
            raise
        finish_flow_span(span, result)
        return result


DEFAULTS = Settings()
_shapes: WeakKeyDictionary[Flow, tuple[Settings, Shape]] = WeakKeyDictionary()


def _settled(flow: Flow, settings: Settings) -> Shape:
    """The settled shape of a flow: the same object for its next run, with what it has worked out by then."""
    kept = _shapes.get(flow)
    if kept is None or (kept[0] is not settings and kept[0] != settings):
        kept = _shapes[flow] = (settings, settings.settle(flow.check()))
    return kept[1]


@dataclass(kw_only=True)
class _Run:
    """One run of one flow."""

    flow: Flow
    inputs: dict[str, Any]
    identity: Identity
    resources: Resources
    checkpoint: Checkpoint | None
    gives_up: Callable[[], bool]
    progress: Progress
    traced: bool
    states: States = field(init=False)
    shape: Shape = field(init=False)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    is_left: bool = False
    between_attempts: set[str] = field(default_factory=set)
    context: Context = field(default_factory=copy_context)
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    loop: asyncio.AbstractEventLoop = field(init=False)
    over: asyncio.Future[GroupShape | None] = field(init=False)

    def __post_init__(self) -> None:
        self.shape = self.progress.shape
        self.states = States(self.flow, self.shape.sources, self.inputs, self.progress.outputs)

    async def to_end(self, known: Mapping[str, dict[str, Any]]) -> FlowResult:
        """Run to the end; ``known``: what the checkpoint holds."""
        if UNDO in known:
            result = FlowResult.from_json(known[UNDO])
            self._take_undone(result, known)
            return await self._undone(result)
        try:
            result = await self._forward()
        except asyncio.CancelledError:
            if self.gives_up():
                await self._undone(FlowResult(status="cancelled", error="the run was cancelled"))
            raise
        return result if result.ok else await self._undone(result)

    async def _forward(self) -> FlowResult:
        late: GroupShape | None = None
        ran: list[str] | None = None
        try:
            with bounded(self.shape.timeout, _OutOfTimeError):
                late = await self._to_a_stop()
        except _OutOfTimeError:
            ran = [*self.progress.running]
        finally:
            # out of the bounds: no second timeout, and no second cancellation, must cut this short
            ran = await uncancelled(self._abandoned()) if self.tasks else ran
        if late is not None or ran is not None:
            return self.progress.timed_out(late, running=ran)
        step = self.progress.skipped_end
        if step is None:
            return self.progress.result()
        try:
            return self.progress.result(self.states.before(step))
        except Exception as error:  # a conflict, or the code of a reducer
            self.progress.failures[step] = judge(error, self.shape.by_name[step].retries).message
            return self.progress.result()

    async def _to_a_stop(self) -> GroupShape | None:
        """Run until nothing runs any more; returns a nested flow that used up its time, if one did."""
        self.loop = asyncio.get_running_loop()
        self.over = self.loop.create_future()
        try:
            self._start()
            return await self.over
        finally:
            for timer in self.timers:
                timer.cancel()

    async def _abandoned(self) -> list[str]:
        """Cancel what still runs: those steps. One that takes no notice is left to itself."""
        ran, tasks = [*self.progress.running], dict(self.tasks)
        for task in tasks.values():
            task.cancel()
        ended, left = await asyncio.wait(tasks.values(), timeout=LEAVING)
        await asyncio.gather(*ended, return_exceptions=True)  # their errors come too late for anybody
        self.is_left = True
        if left:
            log.error(
                "flow %r leaves behind what goes on although it is cancelled: step %s; let CancelledError pass there",
                self.flow.name,
                ", ".join(repr(step) for step, task in tasks.items() if task in left),
            )
        self.progress.cut_off([step for step in ran if step not in self.between_attempts])
        return ran

    def _start(self) -> None:
        """Start what may start; where nothing runs any more, the run is over."""
        for step in self.progress.start():
            # a context of its own each: what a step sets there is no data
            # and no task factory, which might begin it before it is among the tasks
            self.tasks[step] = asyncio.Task(self._step(step), loop=self.loop, context=self.context.copy())
        for group in self.progress.begun() if self.shape.groups else ():
            self.timers.append(self.loop.call_later(group.timeout or 0, self._late, group))
        if not self.tasks and not self.over.done():
            self.over.set_result(None)

    def _late(self, group: GroupShape) -> None:
        if not self.progress.closed(group) and not self.over.done():
            self.over.set_result(group)

    async def _step(self, step: str) -> None:
        """Run a step to its end, and start what follows."""
        try:
            ended = await self._ended(step)
        except asyncio.CancelledError:
            self.over.cancel()
            raise
        except BaseException as error:  # its checkpoint is lost, or the host ends the task
            if self.over.done():
                raise
            self.over.set_exception(error)
            return
        if self.is_left:
            return
        del self.tasks[step]
        # also when the run is over: it may be among what is to be undone
        self.progress.end(step, ended)
        if not self.over.done():
            self._start()

    async def _ended(self, step: str) -> Outcome | str:
        retry = self.shape.by_name[step].retries

        def once(number: int) -> Awaitable[Outcome]:
            if self.over.done():
                raise asyncio.CancelledError  # the step made another error of it
            if number > 1:
                self.between_attempts.discard(step)
            return attempt(
                self.flow,
                step,
                targets=self.shape.conditions[step],
                states=self.states,
                identity=self.identity,
                resources=self.resources,
                timeout=self.shape.by_name[step].timeout,
                number=number,
                last=number >= retry.maximum_attempts,
                traced=self.traced,
            )

        try:
            outcome = await retrying(once, retry, waits=partial(self._waits, step))
        except asyncio.CancelledError:
            if self.over.done():
                raise
            return judge(own_cancellation(step), retry).message
        except Exception as error:
            return judge(error, retry).message
        if self.checkpoint is not None:
            await self._keep(step, outcome)
        return outcome

    def _waits(self, step: str, error: BaseException) -> None:
        """Its attempt has failed and the next one begins later; one that was cut off may have done its work."""
        if not isinstance(error, StepTimeout) and not self.over.done():
            self.between_attempts.add(step)

    async def _keep(self, step: str, outcome: Outcome) -> None:
        assert self.checkpoint is not None, "kept where there is one"
        try:
            await self.checkpoint.save(step, outcome.to_json())
        except asyncio.CancelledError:
            if not self.over.done():  # the step had cancelled its own task
                await self.checkpoint.save(step, outcome.to_json())
                return
            # it has finished all the same, so it is among what is to be undone
            self.progress.end(step, outcome)
            raise

    async def _undone(self, result: FlowResult) -> FlowResult:
        for step, why in self.progress.undone.items():
            if why == IN_FLIGHT:
                log.error("step %r of flow %r could not be undone: %s", step, self.flow.name, why)
        if self.progress.to_undo:
            # a task of its own: whoever cancels this one, also for a second time, must not leave it half done
            task = asyncio.create_task(self._undo_all(result))
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                while self.gives_up() and not task.done():
                    # some cancel again at every turn
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([task])
                raise
            finally:
                task.cancel()
                (ended,) = await asyncio.gather(task, return_exceptions=True)
                if isinstance(ended, Exception):
                    left = ", ".join(map(repr, self.progress.to_undo))
                    log.error("flow %r: undoing broke off (%s); not undone: %s", self.flow.name, ended, left)
        return self.progress.after_undoing(result)

    async def _undo_all(self, result: FlowResult) -> None:
        if self.checkpoint is not None:
            # kept first: a run that begins to undo must never go forward again
            in_flight = {step: why for step, why in self.progress.undone.items() if why}
            await self._keep_undoing(replace(result, undone=in_flight))
        for step in self.progress.to_undo:
            error = await undo_with_retries(
                self.flow,
                self.shape.by_name[step],
                states=self.states,
                identity=self.identity,
                interrupts=self.resources.interrupts,
            )
            self.progress.undone[step] = error
            if self.checkpoint is not None:
                await self.checkpoint.save(f"{step}.{UNDO}", {"error": error})

    async def _keep_undoing(self, result: FlowResult) -> None:
        assert self.checkpoint is not None, "kept where there is one"
        try:
            await self.checkpoint.save(UNDO, result.to_json())
        except Exception:
            log.error(
                "flow %r ended (%s), and its finished steps are not undone, since that could not be noted: %s; a retry "
                "goes on behind them, or else they must be undone by hand",
                self.flow.name,
                result.error,
                ", ".join(map(repr, self.progress.to_undo)),
            )
            raise

    def _take_undone(self, result: FlowResult, known: Mapping[str, dict[str, Any]]) -> None:
        self.progress.undone.update(result.undone)
        for step in self.progress.to_undo:
            if f"{step}.{UNDO}" in known:
                self.progress.undone[step] = known[f"{step}.{UNDO}"]["error"]


class _OutOfTimeError(Exception):
    pass
