"""One attempt of one step: the only place that calls users' code or a model."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from opentelemetry.trace import Span

from beluga_airflow.errors import InvalidFlow, InvalidOutput, StepExited, StepTimeout
from beluga_airflow.execute.merge import States
from beluga_airflow.execute.values import StepInputs, copied, rehydrated, to_json
from beluga_airflow.graph import Decision, Flow, Identity, Outcome, Retry, StepContext, Stop
from beluga_airflow.graph.callee import Callee
from beluga_airflow.graph.shape import UNDO
from beluga_airflow.llm.budget import purses_of
from beluga_airflow.llm.client import ModelClient
from beluga_airflow.llm.decide import decide
from beluga_airflow.llm.memory import Conversation
from beluga_airflow.resilience.bounded import bounded
from beluga_airflow.resilience.calling import WAITING, guarded, in_thread
from beluga_airflow.resilience.retrying import judge
from beluga_airflow.state import StateStore
from beluga_airflow.telemetry import step_span

if TYPE_CHECKING:
    from beluga_airflow.resilience.limits import Booking

__all__ = ["Resources", "attempt", "in_own_task", "own_cancellation", "undo"]

T = TypeVar("T")

_NO_RETRY = Retry(maximum_attempts=1)
OWN_STATUSES = frozenset({"completed", "failed", "timed_out", "cancelled"})


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What steps need from outside.

    Args:
        state: where decision records are kept, and the guards of steps that have no store of their own.
        model: the client for a connection id, or for the default one (None).
        interrupts: what the host raises, wherever a step may be, to end the task; no failure of that step.
        again: what the host raises in place of the error of a last attempt, where it runs the flow again by itself, so
            that this attempt is not the last; None for an error that another attempt would not help.
    """

    state: StateStore
    model: Callable[[str | None], Awaitable[ModelClient]]
    interrupts: tuple[type[BaseException], ...] = ()
    again: Callable[[Exception], BaseException | None] | None = None

    async def ready_for(self, flow: Flow) -> list[ModelClient]:
        """The models that the flow's decisions ask: what is wrong with their connections shows before anything runs.

        Raises:
            InvalidSetting: a connection is missing or cannot be used.
        """
        asked = {step.node.llm_conn_id for step in flow.steps.values() if isinstance(step.node, Decision)}
        return [await self.model(conn_id) for conn_id in sorted(asked, key=str)]


def attempt(
    flow: Flow,
    step: str,
    *,
    targets: Mapping[str, str | None],
    states: States,
    identity: Identity,
    resources: Resources,
    timeout: float | None,
    number: int = 1,
    last: bool = True,
    traced: bool = True,
) -> Coroutine[Any, Any, Outcome]:
    """Run one step once: a coroutine of its outcome.

    Args:
        flow: whose code runs; a checked flow that has the step.
        step: its path.
        targets: the steps directly after it, with the texts of the edges' conditions, in the shape that the run
            began with.
        states: the data of this run.
        identity: of the run.
        resources: for decisions.
        timeout: seconds for this attempt; None: no bound.
        number: which attempt this is, from 1.
        last: whether no other attempt follows; a decision then falls back.
        traced: whether it has a span of its own.

    Returns:
        its outcome: with a ``fault`` where the step is done and a condition behind it could not be decided.

    Raises:
        Exception: the attempt failed: ours, or whatever the user's function raised. What is no ``Exception`` comes
            from outside and says nothing about the step.
    """
    run = _attempted(flow, step, targets, states, identity, resources, timeout, number, last)
    return _traced(run, step_span(flow.name, step, attempt=number, identity=identity)) if traced else run


async def _traced(run: Coroutine[Any, Any, Outcome], span: AbstractContextManager[Span]) -> Outcome:
    with span:
        return await run


async def _attempted(
    flow: Flow,
    step: str,
    targets: Mapping[str, str | None],
    states: States,
    identity: Identity,
    resources: Resources,
    timeout: float | None,
    number: int,
    last: bool,
) -> Outcome:
    part = flow.flat.by_name[step]
    record = None
    try:
        is_conditional = any(targets.values())
        if is_conditional:
            _check_conditions(flow, step, targets)
        if part.node is None:
            output, stop = states.added(step), None
        else:
            data = StepInputs(states.before(step), step)
            guard = None
            if part.breaker is not None or part.limit is not None:
                retry, within = part.retry or flow.retry, timeout and WAITING * timeout
                guard = partial(guarded, part.breaker, part.limit, resources.state, retry=retry, within=within)
            if isinstance(part.node, Decision):
                returned, record = await _decided(
                    flow.name, part.node, data, identity, resources, timeout, number, last, guard
                )
            elif guard is None:
                returned = await _called(part.callee, data, timeout, _context(flow, step, identity, number))
            else:
                async with guard() as booking:
                    context = _context(flow, step, identity, number)
                    returned = await _called(part.callee, data, timeout, context, booking.waited if booking else 0.0)
            stop = _status(step, returned) if isinstance(returned, Stop) else None
            output = _output(step, returned)
        taken: tuple[str, ...] = ()
        fault = None
        if not stop:
            if is_conditional:
                taken, fault = _taken(flow, step, targets, output, resources.interrupts)
            else:
                taken = tuple(targets)
        state = states.after(step, output) if stop or not targets else None
        return Outcome(output=output, taken=taken, stop=stop, state=state, decision=record, fault=fault)
    except Exception as error:
        other = resources.again(error) if last and resources.again is not None else None
        if other is not None:
            raise other from error
        raise
    except BaseException as error:
        _contain(step, error, resources.interrupts)
        raise


async def undo(
    flow: Flow,
    step: str,
    *,
    states: States,
    identity: Identity,
    timeout: float | None,
    number: int = 1,
    interrupts: tuple[type[BaseException], ...] = (),
) -> None:
    """Undo one finished step, once; what its function returns is not looked at.

    Args:
        flow: whose code runs; a checked flow whose step can be undone.
        step: its path.
        states: the data of the run, with what the step returned.
        identity: of the run.
        timeout: seconds for this attempt; None: no bound.
        number: which attempt this is, from 1.
        interrupts: as in ``Resources``.

    Raises:
        Exception: ours, or whatever the user's function raised.
    """
    name = f"{step}.{UNDO}"
    callee = flow.flat.by_name[step].undoing

    async def once() -> None:
        try:
            data = StepInputs(states.after(step), name)
            await _called(callee, data, timeout, _context(flow, name, identity, number))
        except Exception:
            raise
        except BaseException as error:
            _contain(name, error, interrupts)
            raise

    with step_span(flow.name, name, attempt=number, identity=identity):
        await in_own_task(once(), name)


def _context(flow: Flow, step: str, identity: Identity, number: int) -> Callable[[], StepContext]:
    return lambda: StepContext(
        flow=flow.name,
        step=step,
        idempotency_key=identity.key(step),
        attempt=number,
        generation=identity.generation,
    )


async def in_own_task(work: Coroutine[Any, Any, T], step: str) -> T:
    """Do what a step does in a task of its own, so that a step which cancels its task cancels nothing else."""
    task = asyncio.create_task(work)
    try:
        return await task
    except asyncio.CancelledError:
        waiting = asyncio.current_task()
        if waiting is None or waiting.cancelling():
            raise
        raise own_cancellation(step) from None


def own_cancellation(step: str) -> StepExited:
    """The error of a step whose task was cancelled by nobody else."""
    return StepExited(f"step {step!r} cancelled its own task; raise an error instead")


def _contain(step: str, error: BaseException, interrupts: tuple[type[BaseException], ...]) -> None:
    """Turn what a step's code must not do to its worker into an error of the step; what comes from outside is none."""
    if isinstance(error, SystemExit):
        raise StepExited(f"step {step!r} called sys.exit({error.code!r}); raise an error instead") from None
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is not None and not task.cancelling():
            raise RuntimeError(f"step {step!r} awaited something that was cancelled; catch that in the step") from error
    elif not isinstance(error, (KeyboardInterrupt, GeneratorExit, *interrupts)):
        told = judge(error, _NO_RETRY).message
        raise StepExited(f"step {step!r} raised {told}; raise an Exception instead") from error


async def _decided(
    flow: str,
    decision: Decision,
    data: StepInputs,
    identity: Identity,
    resources: Resources,
    timeout: float | None,
    number: int,
    last: bool,
    guard: Callable[..., AbstractAsyncContextManager[Booking | None]] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answer as the step's output, and its record."""
    conversation = None
    if decision.memory is not None:
        conversation = Conversation.of(
            decision.memory, data, flow=flow, step=data.step, identity=identity, state=resources.state
        )
    record = await decide(
        decision,
        {key: data[key] for key in decision.reads},
        key=identity.record(data.step),
        state=resources.state,
        model=resources.model,
        attempt=number,
        last=last and resources.again is None,
        timeout=timeout,
        conversation=conversation,
        guard=guard,
        purses=purses_of(decision.budgets, flow=flow, identity=identity, state=resources.state),
    )
    return {str(decision.output_key): record.answer}, record.to_json()


async def _called(
    callee: Callee, data: StepInputs, timeout: float | None, context: Callable[[], StepContext], waited: float = 0.0
) -> Any:
    arguments = {"context": context()} if callee.takes_context else {}
    with bounded(timeout and timeout - waited, lambda: _too_slow(data.step, timeout)):
        value = rehydrated(callee.function, data)
        if callee.is_async:
            return await callee.function(value, **arguments)
        returned = await in_thread(lambda: callee.function(value, **arguments))
        return await returned if inspect.isawaitable(returned) else returned


def _too_slow(step: str, timeout: float | None) -> StepTimeout:
    return StepTimeout(f"step {step!r} took longer than its timeout of {timeout:g} s")


def _status(step: str, stop: Stop) -> str:
    if isinstance(stop.status, str) and stop.status.strip() and stop.status not in OWN_STATUSES:
        return stop.status
    raise InvalidOutput(
        f"step {step!r} returned Stop({stop.status!r}); the status must be a word that is none of "
        f"{', '.join(sorted(OWN_STATUSES))}"
    )


def _check_conditions(flow: Flow, step: str, targets: Mapping[str, str | None]) -> None:
    links = {link.target for link in flow.flat.links_from[step]}
    for target, when in targets.items():
        if when is not None and target not in links:
            raise InvalidFlow(
                f"flow {flow.name!r} began with a condition ({when}) on {step!r} -> {target!r} that its code does not "
                "have any more; deploy the old code and run it again"
            )


def _taken(
    flow: Flow,
    step: str,
    targets: Mapping[str, str | None],
    output: dict[str, Any],
    interrupts: tuple[type[BaseException], ...],
) -> tuple[tuple[str, ...], str | None]:
    """The targets of the taken edges, or why that cannot be said: the step is done all the same.

    On the event loop: an await would be a moment in which a done step could be cancelled, and nobody would undo it.
    """
    links = {link.target: link for link in flow.flat.links_from[step]}
    answers: dict[int, bool] = {}  # an edge into a nested flow is several, and its predicate is asked once
    for target, when in targets.items():
        if when is None or id(links[target].when) in answers:
            continue
        link = links[target]
        try:
            answers[id(link.when)] = link.taken(StepInputs(copied(output), step))
        except BaseException as error:  # whatever it is, the step is done
            if isinstance(error, (KeyboardInterrupt, GeneratorExit, *interrupts)):
                raise
            told = judge(error, _NO_RETRY).message
            return (), f"the step is done, but its condition on {step!r} -> {target!r} raised {told}"
    return tuple(name for name, when in targets.items() if when is None or answers[id(links[name].when)]), None


def _output(step: str, returned: Any) -> dict[str, Any]:
    value = returned.data if isinstance(returned, Stop) else returned
    if value is None:
        return {}
    if (
        type(value) is dict
        or isinstance(value, Mapping)
        or any(hasattr(type(value), name) for name in ("__dataclass_fields__", "model_fields"))
    ):
        output = to_json(value, f"what step {step!r} returned")
        if isinstance(output, dict):
            return output
    raise InvalidOutput(
        f"step {step!r} returned a {type(value).__name__}; return a mapping of what the step adds or changes, or None"
    )
