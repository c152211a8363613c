"""Checking a flow whole: what can be seen to go wrong at night is refused here.

An annotation that cannot be resolved is not: that would load pydantic wherever a DAG is parsed.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from beluga_airflow.errors import InvalidFlow
from beluga_airflow.graph.decision import Decision
from beluga_airflow.graph.retry import Retry

if TYPE_CHECKING:
    from beluga_airflow.graph.flow import Flow, Link, Step
    from beluga_airflow.graph.shape import Shape

__all__ = ["checked", "function_of", "wants_context"]

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
RESERVED = frozenset({"result", "undo"})
"""Step names that Airflow task groups need for their own last tasks."""


def checked(flow: Flow) -> Shape:
    """The shape of a sound flow.

    Raises:
        InvalidFlow: with every fault that was found.
    """
    steps, links = flow.definition
    names = [step.name for step in steps]
    faults = [*_faults_of_flow(flow), *_faults_of_steps(steps), *_faults_of_links(links, names)]
    order: list[str] = []
    if not faults:
        order = _topological(names, links)
        faults += _faults_of_order(flow, names, links, order)
    if faults:
        several = f"{len(faults)} faults: " if len(faults) > 1 else ""
        raise InvalidFlow(f"flow {flow.name!r} cannot run: {several}{'; '.join(faults)}")
    return flow.to_shape(order)


def _faults_of_flow(flow: Flow) -> Iterable[str]:
    if not isinstance(flow.name, str) or not NAME.fullmatch(flow.name):
        yield f"its name {flow.name!r} must be 1 to 100 letters, digits, '-' or '_'"
    if flow.timeout is not None and not 0 < flow.timeout < math.inf:
        yield f"its timeout is {flow.timeout:g} s, it must be above 0 and finite"
    if flow.max_workers is not None and (not isinstance(flow.max_workers, int) or flow.max_workers < 1):
        yield f"max_workers is {flow.max_workers!r}, it must be a whole number, 1 or more"
    if not flow.step_count:
        yield "it has no steps"
    for key, reducer in flow.reducers.items():
        if not callable(reducer):
            yield f"the reducer of {key!r} is {reducer!r}, it must be a function of two values"
    yield from (f"the retry of the flow: {fault}" for fault in _faults_of_retry(flow.retry))


def _faults_of_steps(steps: Iterable[Step]) -> Iterable[str]:
    for name, count in Counter(str(step.name) for step in steps).items():
        if count > 1:
            yield f"step {name!r} is defined {count} times"
    for step in steps:
        if not isinstance(step.name, str) or not NAME.fullmatch(step.name):
            yield f"the step name {step.name!r} must be 1 to 100 letters, digits, '-' or '_'"
        elif step.name in RESERVED:
            yield f"the step name {step.name!r} is reserved, choose another"
        if step.timeout is not None and not 0 < step.timeout < math.inf:
            yield f"the timeout of step {step.name!r} is {step.timeout:g} s, it must be above 0 and finite"
        if step.join not in ("all", "any"):
            yield f"the join of step {step.name!r} is {step.join!r}, it must be 'all' or 'any'"
        inner = step.node.faults() if isinstance(step.node, Decision) else _faults_of_function(step.node)
        inner = [*inner, *(f"retry: {fault}" for fault in _faults_of_retry(step.retry))]
        yield from (f"step {step.name!r}: {fault}" for fault in inner)


def _faults_of_retry(retry: Any) -> list[str]:
    if retry is None:
        return []
    return retry.faults() if isinstance(retry, Retry) else [f"it is {retry!r}, it must be a Retry"]


def _faults_of_function(node: Any) -> list[str]:
    if inspect.isclass(node):
        return [f"{node.__name__} is a class, give an instance of it"]
    function = function_of(node)
    if function is None:
        return [f"{node!r} is neither a function, nor an object with execute(inputs), nor a Decision"]
    try:
        inspect.signature(function).bind(None, **({"context": None} if wants_context(function) else {}))
    except TypeError:
        return [f"{_name(function)}{inspect.signature(function)} must take the data, and at most a context beside it"]
    except ValueError:
        return []  # builtins have no signature to look at
    return []


def _faults_of_links(links: Iterable[Link], names: list[str]) -> Iterable[str]:
    for (source, target), count in Counter((link.source, link.target) for link in links).items():
        arrow = f"the edge {source!r} -> {target!r}"
        if source == target:
            yield f"{arrow} leads back to its own step"
        if count > 1:
            yield f"{arrow} is defined {count} times"
        for end in (source, target):
            if end not in names:
                yield f"{arrow} names the step {end!r}, which does not exist"
    for link in links:
        yield from (f"the edge {link.source!r} -> {link.target!r}: {fault}" for fault in _faults_of_when(link.when))


def _faults_of_when(when: Any) -> Iterable[str]:
    if when is None or callable(when):
        return
    if not isinstance(when, Mapping):
        yield f"when={when!r} is neither a mapping nor a predicate"
        return
    for key, value in when.items():
        if not _is_json(value):
            yield f"when={{{key!r}: {value!r}}} can never hold, since a step's output is JSON and this value is not"


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _faults_of_order(flow: Flow, names: list[str], links: tuple[Link, ...], order: list[str]) -> Iterable[str]:
    if len(order) < len(names):
        left = [name for name in names if name not in order]
        yield f"its edges go round in a circle, so that these steps can never start: {', '.join(left)}"
        return
    starts = [name for name in names if all(link.target != name for link in links)]
    ends = [name for name in names if all(link.source != name for link in links)]
    yield from _faults_of_points("entry", flow.entry, starts, names, "leads into")
    yield from _faults_of_points("finish", flow.finish, ends, names, "leads out of")
    yield from _faults_of_reads(flow, links, order)


def _faults_of_points(
    what: str, named: tuple[str, ...] | None, real: list[str], names: list[str], leads: str
) -> Iterable[str]:
    if named is None:
        return
    for name in named:
        if name not in names:
            yield f"the {what} point {name!r} does not exist"
        elif name not in real:
            yield f"{name!r} is named as {what} point, but an edge {leads} it"
    for name in real:
        if name not in named:
            yield (
                f"step {name!r} is unreachable: no edge leads into it and it is not named as entry point"
                if what == "entry"
                else f"no edge leads out of step {name!r} and it is not named as finish point"
            )


def _faults_of_reads(flow: Flow, links: tuple[Link, ...], order: list[str]) -> Iterable[str]:
    if flow.inputs is None:
        return
    steps = {step.name: step for step in flow.definition[0]}
    known: dict[str, set[str] | None] = {}  # the keys there are after each step; None: nobody said which
    for name in order:
        before: set[str] | None = set(flow.inputs)
        for link in links:
            if link.target == name and before is not None:
                keys = known[link.source]
                before = None if keys is None else before | keys
        node = steps[name].node
        if isinstance(node, Decision) and before is not None:
            for key in node.reads:
                if key not in before:
                    yield f"step {name!r} reads {key!r}, which neither the input nor an earlier step provides"
        provides = steps[name].provides
        known[name] = None if before is None or provides is None else before | set(provides)


def _topological(names: list[str], links: tuple[Link, ...]) -> list[str]:
    # Kahn's order, always taking the step that was defined first: Python's graphlib gives no such promise
    place = {name: index for index, name in enumerate(names)}
    waits = {name: 0 for name in names}
    after: dict[str, list[str]] = {name: [] for name in names}
    for link in links:
        waits[link.target] += 1
        after[link.source].append(link.target)
    ready = [name for name in names if not waits[name]]
    order = []
    while ready:
        name = min(ready, key=place.__getitem__)
        ready.remove(name)
        order.append(name)
        for target in after[name]:
            waits[target] -= 1
            if not waits[target]:
                ready.append(target)
    return order


def function_of(node: Any) -> Callable[..., Any] | None:
    """What to call for a node: its ``execute`` where it has one, else itself; None when it cannot be called."""
    function = getattr(node, "execute", node)
    return function if callable(function) else None


def wants_context(function: Callable[..., Any]) -> bool:
    """Whether the function asks for the ``StepContext`` by a parameter named ``context``."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return False
    return "context" in parameters and next(iter(parameters)) != "context"


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
