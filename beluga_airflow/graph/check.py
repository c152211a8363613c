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
from contextvars import ContextVar
from itertools import accumulate
from textwrap import shorten
from typing import Any

from beluga_airflow.errors import InvalidFlow
from beluga_airflow.graph.callee import function_of, is_async, is_generator, signature_of, wants_context
from beluga_airflow.graph.decision import Decision
from beluga_airflow.graph.flow import Flow
from beluga_airflow.graph.nest import laid_flat
from beluga_airflow.graph.parts import Definition, Link, Step, fault_of_guard, told
from beluga_airflow.graph.retry import Retry, is_duration, is_whole
from beluga_airflow.graph.shape import RESULT, UNDO, Edge, Shape, StepShape

__all__ = ["checked"]

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
RESERVED = frozenset({RESULT, UNDO})
NAME_RULE = "must be 1 to 100 letters, digits, '-' or '_'"
NESTING = 50
"""How many flows a flow may be inside of."""

_under_check: ContextVar[tuple[Flow, ...]] = ContextVar("_under_check", default=())


def checked(flow: Flow) -> tuple[Shape, Definition]:
    """The shape of a sound flow, and its definition laid flat.

    Raises:
        InvalidFlow: with every fault that was found.
    """
    token = _under_check.set((*_under_check.get(), flow))
    try:
        faults = [*_faults_of_own(flow), *_faults_of_nested(flow)]
        if not faults:
            flat = laid_flat(flow)
            order = _topological([step.name for step in flat.steps], flat.links)
            faults += _faults_of_reads(flow, flat, order)
    finally:
        _under_check.reset(token)
    if faults:
        several = f"{len(faults)} faults: " if len(faults) > 1 else ""
        raise InvalidFlow(f"flow {told(flow.name)} cannot run: {several}{'; '.join(faults)}")
    return _shape(flow, flat, order), flat


def _shape(flow: Flow, flat: Definition, order: Iterable[str]) -> Shape:
    return Shape(
        flow=flow.name,
        kind=flow.kind,
        steps=tuple(_step_shape(flat.by_name[name], flow.retry) for name in order),
        edges=tuple(Edge(source=link.source, target=link.target, when=link.text) for link in flat.links),
        parallel=flow.parallel,
        max_workers=flow.max_workers,
        timeout=flow.timeout,
        groups=flat.groups,
    )


def _step_shape(step: Step, retry: Retry | None) -> StepShape:
    return StepShape(
        name=step.name,
        kind="flow" if step.node is None else "decision" if isinstance(step.node, Decision) else "function",
        join=step.join,
        timeout=step.timeout,
        retry=step.retry or retry,
        undo=step.compensate is not None,
    )


def _faults_of_own(flow: Flow) -> list[str]:
    steps, links = flow.definition
    names = [step.name for step in steps]
    faults = [*_faults_of_flow(flow), *_faults_of_steps(steps), *_faults_of_links(links, names)]
    return faults or [*_faults_of_order(flow, names, links)]


def _faults_of_nested(flow: Flow) -> Iterable[str]:
    outer = _under_check.get()
    for step in flow.definition[0]:
        if not isinstance(step.node, Flow):
            continue
        name = told(step.name)
        if step.node in outer:
            yield f"step {name} is flow {told(step.node.name)}, which this flow is inside of already"
        elif len(outer) > NESTING:
            yield f"step {name} is a flow inside of {NESTING} others, which is as deep as it goes"
        else:
            yield from (f"step {name}: {fault}" for fault in _faults_of_inner(step.node, step.provides))


def _faults_of_inner(node: Flow, claim: Iterable[Any] | None) -> Iterable[str]:
    """What is wrong with a nested flow, and with what its node says that it provides."""
    try:
        node.check()
    except InvalidFlow as error:
        yield str(error)
        return
    real = _together(*(_provided(step) for step in node.definition[0]))
    for key in claim or ():
        if real is not None and isinstance(key, str) and key not in real:
            there = shorten(", ".join(sorted(real)), 200, placeholder=" ...") or "nothing"
            yield f"it provides {told(key)}, which no step of flow {node.name!r} does; they provide {there}"


def _provided(step: Step) -> set[str] | None:
    """The keys that a step returns; None: nobody said which."""
    if step.provides is None and isinstance(step.node, Flow):
        return _together(*(_provided(inner) for inner in step.node.definition[0]))
    return _together(step.provides)


def _together(*several: Iterable[str] | None) -> set[str] | None:
    """All these keys; None: nobody said which."""
    return set().union(*several) if None not in several else None  # type: ignore[arg-type]  # None is not among them


def _faults_of_flow(flow: Flow) -> Iterable[str]:
    if not isinstance(flow.name, str) or not NAME.fullmatch(flow.name):
        yield f"its name {told(flow.name)} {NAME_RULE}"
    yield from (f"its timeout is {fault}" for fault in _faults_of_timeout(flow.timeout))
    if flow.parallel is not None and not isinstance(flow.parallel, bool):
        yield f"parallel is {told(flow.parallel)}, it must be True or False"
    if flow.max_workers is not None and (not is_whole(flow.max_workers) or flow.max_workers < 1):
        yield f"max_workers is {told(flow.max_workers)}, it must be a whole number, 1 or more"
    if not flow.step_count:
        yield "it has no steps"
    yield from _faults_of_keys("inputs", flow.inputs)
    yield from _faults_of_reducers(flow.reducers)
    yield from (f"the retry of the flow: {fault}" for fault in _faults_of_retry(flow.retry))


def _faults_of_timeout(timeout: Any) -> Iterable[str]:
    if timeout is None:
        return
    if not is_duration(timeout):
        yield f"{told(timeout)}, it must be seconds or a timedelta, above 0 and finite"
    elif not 0 < timeout < math.inf:
        yield f"{timeout:g} s, it must be above 0 and finite"


def _faults_of_keys(what: str, keys: Iterable[Any] | None) -> Iterable[str]:
    for key in keys or ():
        if not isinstance(key, str):
            yield f"{what} names {told(key)}, it must name keys, which are texts"


def _faults_of_reducers(reducers: Any) -> Iterable[str]:
    if not isinstance(reducers, Mapping):
        yield f"reducers is {told(reducers)}, it must be a mapping of keys to functions of two values"
        return
    for key, reducer in reducers.items():
        of = f"the reducer of {told(key)}"
        if not isinstance(key, str):
            yield f"{of} can never be asked, since keys are texts"
        if not callable(reducer):
            yield f"{of} is {told(reducer)}, it must be a function of two values"
        elif odd := _odd(reducer):
            yield f"{of} is {odd}: give a plain function"
        elif not _takes(reducer, 2):
            yield f"{of} is {_called(reducer)}, it must be a function of two values"


def _faults_of_steps(steps: Iterable[Step]) -> Iterable[str]:
    for name, count in Counter(told(step.name) for step in steps).items():
        if count > 1:
            yield f"step {name} is defined {count} times"
    for step in steps:
        name = told(step.name)
        if not isinstance(step.name, str) or not NAME.fullmatch(step.name):
            yield f"the step name {name} {NAME_RULE}"
        elif step.name in RESERVED:
            yield f"the step name {name} is reserved, choose another"
        yield from (f"the timeout of step {name} is {fault}" for fault in _faults_of_timeout(step.timeout))
        if not isinstance(step.join, str) or step.join not in ("all", "any"):
            yield f"the join of step {name} is {told(step.join)}, it must be 'all' or 'any'"
        inner = [*_faults_of_node(step.node), *(f"retry: {fault}" for fault in _faults_of_retry(step.retry))]
        inner += _faults_of_keys("provides", step.provides)
        inner += _faults_of_guards(step)
        if step.compensate is not None:
            inner += (f"compensate: {fault}" for fault in _faults_of_function(step.compensate))
        yield from (f"step {name}: {fault}" for fault in inner)


def _faults_of_guards(step: Step) -> Iterable[str]:
    for kind, guard in (("breaker", step.breaker), ("limit", step.limit)):
        if fault := fault_of_guard(guard, kind):
            yield fault
        elif guard is not None and isinstance(step.node, Flow):
            yield f"it has a {kind}, but is a flow, and what is guarded is one call: give the {kind} to its steps"


def _faults_of_retry(retry: Any) -> list[str]:
    if retry is None:
        return []
    return retry.faults() if isinstance(retry, Retry) else [f"it is {told(retry)}, it must be a Retry"]


def _faults_of_node(node: Any) -> Iterable[str]:
    if isinstance(node, Flow):
        return []  # checked as a whole
    return node.faults() if isinstance(node, Decision) else _faults_of_function(node, ", nor a Decision, nor a flow")


def _faults_of_function(node: Any, nor: str = "") -> list[str]:
    if inspect.isclass(node):
        return [f"{node.__name__} is a class, give an instance of it"]
    function = function_of(node)
    if function is None:
        return [f"{told(node)} is neither a function, nor an object with execute(inputs){nor}"]
    if is_generator(function):
        return [f"{_name(function)} is a generator: return a mapping instead of yielding"]
    if not _takes(function, 1, **({"context": None} if wants_context(function) else {})):
        return [f"{_called(function)} must take the data, and at most a context beside it"]
    return []


def _takes(function: Callable[..., Any], count: int, **named: Any) -> bool:
    """Whether it can be called with so many values; one that does not tell its signature may be."""
    signature = signature_of(function)
    try:
        return signature is None or bool(signature.bind(*[None] * count, **named))
    except TypeError:
        return False


def _odd(function: Callable[..., Any]) -> str | None:
    """Why calling it gives no value yet."""
    return "async" if is_async(function) else "a generator" if is_generator(function) else None


def _faults_of_links(links: Iterable[Link], names: list[str]) -> Iterable[str]:
    known = {told(name) for name in names}
    for (source, target), count in Counter((told(link.source), told(link.target)) for link in links).items():
        arrow = f"the edge {source} -> {target}"
        if source == target:
            yield f"{arrow} leads back to its own step"
        if count > 1:
            yield f"{arrow} is defined {count} times"
        for end in (source, target):
            if end not in known:
                yield f"{arrow} names the step {end}, which does not exist"
    for link in links:
        arrow = f"the edge {told(link.source)} -> {told(link.target)}"
        yield from (f"{arrow}: {fault}" for fault in _faults_of_when(link.when))


def _faults_of_when(when: Any) -> Iterable[str]:
    if when is None:
        return
    if callable(when):
        if odd := _odd(when):
            yield f"when={_name(when)} is {odd}, and what it returns would always hold: give a plain function"
        elif not _takes(when, 1):
            yield f"when={_called(when)} must take one value, the source step's output"
    elif isinstance(when, Mapping):
        for key, value in when.items():
            if not _is_json({key: value}):
                yield (
                    f"when={{{told(key)}: {told(value)}}} can never hold, since a step's output is JSON and this is not"
                )
    else:
        yield f"when={told(when)} is neither a mapping nor a predicate"


def _is_json(value: Any) -> bool:
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        return bool(json.loads(text.encode()) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _faults_of_order(flow: Flow, names: list[str], links: tuple[Link, ...]) -> Iterable[str]:
    order = _topological(names, links)
    if len(order) < len(names):
        left = [name for name in names if name not in order]
        yield f"its edges go round in a circle, so that these steps can never start: {', '.join(left)}"
        return
    sources, targets = {link.source for link in links}, {link.target for link in links}
    starts = [name for name in names if name not in targets]
    ends = [name for name in names if name not in sources]
    yield from _faults_of_points("entry", flow.entry, starts, names, "leads into")
    yield from _faults_of_points("finish", flow.finish, ends, names, "leads out of")


def _faults_of_points(
    what: str, named: tuple[str, ...] | None, real: list[str], names: list[str], leads: str
) -> Iterable[str]:
    if named is None:
        return
    for name in named:
        if name not in names:
            yield f"the {what} point {told(name)} does not exist"
        elif name not in real:
            yield f"{name!r} is named as {what} point, but an edge {leads} it"
    for name in real:
        if name not in named:
            yield (
                f"step {name!r} is unreachable: no edge leads into it and it is not named as entry point"
                if what == "entry"
                else f"no edge leads out of step {name!r} and it is not named as finish point"
            )


def _faults_of_reads(flow: Flow, flat: Definition, order: Iterable[str]) -> Iterable[str]:
    if flow.inputs is None:
        return
    sources: dict[str, list[str]] = {step.name: [] for step in flat.steps}
    for link in flat.links:
        sources[link.target].append(link.source)
    known: dict[str, set[str] | None] = {}  # the keys there are after each step; None: nobody said which
    entered: dict[str, set[str] | None] = {}  # and before each nested flow
    for name in order:
        step = flat.by_name[name]
        before = _together(flow.inputs, *(known[source] for source in sources[name]))
        if isinstance(step.node, Decision) and before is not None:
            for key in step.node.reads:
                if key not in before:
                    yield f"step {name!r} reads {told(key)}, which neither the input nor an earlier step provides"
            memory = step.node.memory
            if memory is not None and memory.key not in before:
                yield (
                    f"step {name!r} finds its conversation by {told(memory.key)}, which neither the input nor an "
                    "earlier step provides"
                )
        for path in accumulate(name.split(".")[:-1], "{}.{}".format):
            entered.setdefault(path, before)
        if step.node is not None:
            known[name] = _together(before, step.provides)
        elif before is not None or step.provides is None:
            known[name] = before
        else:  # its steps did not all say, but its node did
            known[name] = _together(entered[name.rpartition(".")[0]], step.provides)


def _topological(names: list[str], links: Iterable[Link]) -> list[str]:
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


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _called(function: Callable[..., Any]) -> str:
    return shorten(f"{_name(function)}{inspect.signature(function)}", 200, placeholder=" ...")
