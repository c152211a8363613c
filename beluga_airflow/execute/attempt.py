"""One attempt of one step: the only place that calls users' code or a model."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from anyio import CapacityLimiter, to_thread

from beluga_airflow.errors import InvalidFlow, InvalidOutput, StepExited, StepTimeout
from beluga_airflow.execute.merge import merged
from beluga_airflow.execute.values import StepInputs, copied, missing, rehydrated, to_json
from beluga_airflow.graph import Decision, Flow, Identity, Outcome, StepContext, Stop
from beluga_airflow.graph.check import function_of, wants_context
from beluga_airflow.graph.shape import Place
from beluga_airflow.llm.client import ModelClient
from beluga_airflow.llm.decide import decide
from beluga_airflow.state import StateStore
from beluga_airflow.telemetry import step_span

__all__ = ["Resources", "attempt"]

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
        state = merged(flow, place, inputs, outputs)
        node = flow.steps[step].node
        async with _bounded(step, timeout):
            if isinstance(node, Decision):
                data = {key: state[key] if key in state else _lacking(step, key, state) for key in node.reads}
                record = await decide(
                    node,
                    data,
                    key=identity.record(step),
                    state=resources.state,
                    model=resources.model,
                    attempt=number,
                    last=last,
                )
                answer = {str(node.output_key): record.answer}
                return _outcome(flow, place, answer, inputs, outputs, record.to_json())
            returned = await _called(node, StepInputs(state, step), context)
        return _outcome(flow, place, returned, inputs, outputs, None)


def _lacking(step: str, key: str, state: Mapping[str, Any]) -> Any:
    raise missing(step, key, state)


@asynccontextmanager
async def _bounded(step: str, timeout: float | None) -> AsyncIterator[None]:
    scope = asyncio.timeout(timeout)
    try:
        async with scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise  # the user's code's own
        raise StepTimeout(f"step {step!r} took longer than its timeout of {timeout:g} s") from None


async def _called(node: Any, data: StepInputs, context: StepContext) -> Any:
    function = function_of(node)
    assert function is not None, "a checked flow has functions only"
    arguments = {"context": context} if wants_context(function) else {}
    value = rehydrated(function, data)
    try:
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            return await function(value, **arguments)
        # a thread of its own, so that a sync step blocks nobody; abandoned when time is up, and it has only copies
        returned = await to_thread.run_sync(
            lambda: function(value, **arguments), abandon_on_cancel=True, limiter=CapacityLimiter(1)
        )
        return await returned if inspect.isawaitable(returned) else returned
    except SystemExit as error:
        raise StepExited(f"step {context.step!r} called sys.exit({error.code!r}); raise an error instead") from None


def _outcome(
    flow: Flow,
    place: Place,
    returned: Any,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Mapping[str, Any]],
    decision: dict[str, Any] | None,
) -> Outcome:
    step = place.step
    stop = returned.status if isinstance(returned, Stop) else None
    if stop is not None and (not isinstance(stop, str) or not stop or stop in OWN_STATUSES):
        raise InvalidOutput(
            f"step {step!r} returned Stop({stop!r}); the status must be a word that is none of "
            f"{', '.join(sorted(OWN_STATUSES))}"
        )
    output = to_json(_mapping(step, returned), f"what step {step!r} returned")
    taken = () if stop else tuple(target for target in place.targets if _taken(flow, place, target, output))
    ends = stop is not None or not place.targets
    state = merged(flow, place, inputs, {**outputs, step: output}) if ends else None
    return Outcome(output=output, taken=taken, stop=stop, state=state, decision=decision)


def _taken(flow: Flow, place: Place, target: str, output: dict[str, Any]) -> bool:
    if place.targets[target] is None:
        return True
    for link in flow.links_from[place.step]:
        if link.target == target:
            return link.taken(copied(output))
    raise InvalidFlow(
        f"flow {flow.name!r} began with a condition ({place.targets[target]}) on {place.step!r} -> {target!r} that its "
        "code does not have any more; deploy the old code to finish this run"
    )


def _mapping(step: str, returned: Any) -> Any:
    value = returned.data if isinstance(returned, Stop) else returned
    if value is None:
        return {}
    if isinstance(value, Mapping) or hasattr(value, "__dataclass_fields__") or hasattr(type(value), "model_fields"):
        return value
    raise InvalidOutput(
        f"step {step!r} returned a {type(value).__name__}; return a mapping of what the step adds or changes, or None"
    )
