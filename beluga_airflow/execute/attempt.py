"""One attempt of one step: the only place that calls users' code or a model."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

from beluga_airflow.errors import InvalidFlow, InvalidOutput, StepExited, StepTimeout
from beluga_airflow.execute.merge import merged
from beluga_airflow.execute.values import StepInputs, copied, rehydrated, to_json
from beluga_airflow.graph import Decision, Flow, Identity, Outcome, StepContext, Stop
from beluga_airflow.graph.check import function_of, wants_context
from beluga_airflow.graph.shape import Place
from beluga_airflow.llm.client import ModelClient
from beluga_airflow.llm.decide import decide
from beluga_airflow.resilience.bounded import bounded
from beluga_airflow.state import StateStore
from beluga_airflow.telemetry import step_span

__all__ = ["Resources", "attempt"]

T = TypeVar("T")

OWN_STATUSES = frozenset({"completed", "failed", "timed_out", "cancelled"})


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What steps need from outside.

    Args:
        state: where decision records are kept.
        model: the client for a connection id, or for the default one (None).
    """

    state: StateStore
    model: Callable[[str | None], Awaitable[ModelClient]]

    async def ready_for(self, flow: Flow) -> list[ModelClient]:
        """The models that the flow's decisions ask: what is wrong with their connections shows before anything runs.

        Raises:
            InvalidSetting: a connection is missing or cannot be used.
        """
        asked = {step.node.llm_conn_id for step in flow.steps.values() if isinstance(step.node, Decision)}
        return [await self.model(conn_id) for conn_id in sorted(asked, key=str)]


async def attempt(
    flow: Flow,
    place: Place,
    *,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Mapping[str, Any]],
    identity: Identity,
    resources: Resources,
    timeout: float | None,
    number: int = 1,
    last: bool = True,
) -> Outcome:
    """Run one step once.

    Args:
        flow: whose code runs; a checked flow that has the step.
        place: of the step, in the shape that the run began with.
        inputs: the flow's input, JSON.
        outputs: what the finished steps before it returned.
        identity: of the run.
        resources: for decisions.
        timeout: seconds for this attempt; None: no bound.
        number: which attempt this is, from 1.
        last: whether no other attempt follows; a decision then falls back.

    Raises:
        BelugaError: ours, or whatever the user's function raised.
    """
    step = place.step
    context = StepContext(
        flow=flow.name,
        step=step,
        idempotency_key=identity.key(step),
        attempt=number,
        generation=identity.generation,
    )
    with step_span(flow.name, step, attempt=number, key=context.idempotency_key):
        try:
            state = merged(flow, place, inputs, outputs)
            node, data = flow.steps[step].node, StepInputs(state, step)
            if isinstance(node, Decision):
                returned, record = await _decided(node, data, context, identity, resources, timeout, last)
            else:
                async with bounded(timeout, lambda: _too_slow(step, timeout)):
                    returned, record = await _called(node, data, context), None
            return _outcome(flow, place, returned, inputs, outputs, record)
        except SystemExit as error:
            raise StepExited(f"step {step!r} called sys.exit({error.code!r}); raise an error instead") from None
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise RuntimeError(f"step {step!r} awaited something that was cancelled; catch that in the step") from error


async def _decided(
    decision: Decision,
    data: StepInputs,
    context: StepContext,
    identity: Identity,
    resources: Resources,
    timeout: float | None,
    last: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answer as the step's output, and its record."""
    record = await decide(
        decision,
        {key: data[key] for key in decision.reads},
        key=identity.record(context.step),
        state=resources.state,
        model=resources.model,
        attempt=context.attempt,
        last=last,
        timeout=timeout,
    )
    return {str(decision.output_key): record.answer}, record.to_json()


def _too_slow(step: str, timeout: float | None) -> StepTimeout:
    return StepTimeout(f"step {step!r} took longer than its timeout of {timeout:g} s")


async def _called(node: Any, data: StepInputs, context: StepContext) -> Any:
    function = function_of(node)
    assert function is not None, "a checked flow has functions only"
    arguments = {"context": context} if wants_context(function) else {}
    value = rehydrated(function, data)
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return await function(value, **arguments)
    returned = await _in_thread(lambda: function(value, **arguments))
    return await returned if inspect.isawaitable(returned) else returned


async def _in_thread(call: Callable[[], T]) -> T:
    """Run ``call`` where it blocks nobody. Left behind when time is up: it has only copies.

    A thread of its own, and a daemon: a pool would wait for one that hangs before it let the process end.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except KeyboardInterrupt as error:  # the step's own; a real one reaches the main thread
            future.set_exception(SystemExit(repr(error)))
        except StopIteration as error:  # no future can carry it
            future.set_exception(RuntimeError(f"StopIteration: {error}"))
        except BaseException as error:
            future.set_exception(error)

    future.set_running_or_notify_cancel()
    Thread(target=copy_context().run, args=(work,), name="beluga-step", daemon=True).start()
    return await asyncio.wrap_future(future)


def _outcome(
    flow: Flow,
    place: Place,
    returned: Any,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Mapping[str, Any]],
    decision: dict[str, Any] | None,
) -> Outcome:
    step = place.step
    stop = _status(step, returned) if isinstance(returned, Stop) else None
    output = _output(step, returned)
    taken = () if stop else tuple(target for target in place.targets if _taken(flow, place, target, output))
    ends = stop is not None or not place.targets
    state = merged(flow, place, inputs, {**outputs, step: output}) if ends else None
    return Outcome(output=output, taken=taken, stop=stop, state=state, decision=decision)


def _status(step: str, stop: Stop) -> str:
    if isinstance(stop.status, str) and stop.status.strip() and stop.status not in OWN_STATUSES:
        return stop.status
    raise InvalidOutput(
        f"step {step!r} returned Stop({stop.status!r}); the status must be a word that is none of "
        f"{', '.join(sorted(OWN_STATUSES))}"
    )


def _taken(flow: Flow, place: Place, target: str, output: dict[str, Any]) -> bool:
    if place.targets[target] is None:
        return True
    for link in flow.links_from[place.step]:
        if link.target == target:
            return link.taken(StepInputs(copied(output), place.step))
    raise InvalidFlow(
        f"flow {flow.name!r} began with a condition ({place.targets[target]}) on {place.step!r} -> {target!r} that its "
        "code does not have any more; deploy the old code to finish this run"
    )


def _output(step: str, returned: Any) -> dict[str, Any]:
    value = returned.data if isinstance(returned, Stop) else returned
    if value is None:
        return {}
    if isinstance(value, Mapping) or any(
        hasattr(type(value), name) for name in ("__dataclass_fields__", "model_fields")
    ):
        output = to_json(value, f"what step {step!r} returned")
        if isinstance(output, dict):
            return output
    raise InvalidOutput(
        f"step {step!r} returned a {type(value).__name__}; return a mapping of what the step adds or changes, or None"
    )
