"""Flows as their authors write them: ``Chain`` and ``Graph``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from textwrap import shorten
from typing import Any, Self, TypeVar

from beluga_airflow.errors import InvalidFlow
from beluga_airflow.graph.decision import Decision
from beluga_airflow.graph.parts import Definition, Guard, Link, Reducer, Step, When, told
from beluga_airflow.graph.retry import Retry, is_duration, seconds
from beluga_airflow.graph.shape import Join, Kind, Shape

__all__ = ["Chain", "Flow", "Graph"]

T = TypeVar("T")


class Flow:
    """What chains and graphs share: named steps, edges, and being checked whole.

    Args:
        name: the flow's name; letters, digits, ``-`` and ``_``.
        timeout: seconds or a timedelta for the whole flow, retries and waits included. When left out, the
            setting in force where the flow starts: a chain 300 s, a graph 600 s, on Temporal 3600 s.
        retry: for the steps that have none of their own. When left out, the setting in force: a chain's steps 4
            attempts, a graph's 3.
        inputs: the keys that the flow's input has. Where given, what decisions read is checked against it.
        reducers: for a key that parallel branches set: ``fn(earlier, later)`` gives the merged value.
    """

    kind: Kind

    def __init__(
        self,
        name: str,
        *,
        timeout: float | timedelta | None = None,
        retry: Retry | None = None,
        inputs: Sequence[str] | None = None,
        reducers: Mapping[str, Reducer] | None = None,
    ) -> None:
        self.name = _plain(name)
        self.timeout = _seconds(timeout)
        self.retry = retry
        self.inputs = _names(inputs)
        self.reducers: Mapping[str, Reducer] = _copied(reducers)
        self.parallel: bool | None = None
        self.max_workers: int | None = None
        self.entry: tuple[str, ...] | None = None
        self.finish: tuple[str, ...] | None = None
        self._steps: list[Step] = []
        self._links: list[Link] = []
        self._checked: tuple[Shape, Definition] | None = None
        self._module = _module_of_caller()

    @property
    def step_count(self) -> int:
        """How many steps the flow has."""
        return len(self._steps)

    @property
    def definition(self) -> tuple[tuple[Step, ...], tuple[Link, ...]]:
        """The steps and links in the order they were added, faults included."""
        return tuple(self._steps), tuple(self._links)

    @property
    def module(self) -> str:
        """The module in which the flow was made."""
        return self._module

    def check(self) -> Shape:
        """Check the flow whole and freeze it, and the flows inside it.

        Returns:
            its shape; the same object every time.

        Raises:
            InvalidFlow: the flow cannot mean anything; the message lists every fault.
        """
        if self._checked is None:
            # imported here because the checker reads this module's classes
            from beluga_airflow.graph.check import checked

            self._checked = checked(self)
        return self._checked[0]

    @property
    def flat(self) -> Definition:
        """The definition of the checked flow, with the flows inside it laid flat."""
        if self._checked is None:
            self.check()
            assert self._checked is not None, "checked"
        return self._checked[1]

    @property
    def steps(self) -> dict[str, Step]:
        """The steps of the checked flow by path, those of nested flows too."""
        return self.flat.by_name

    def to_mermaid(self) -> str:
        """The checked flow as a Mermaid flowchart, for a README or a notebook."""
        from beluga_airflow.graph.picture import mermaid

        return mermaid(self.check())

    def _change(self, what: str) -> None:
        if self._checked is not None:
            raise InvalidFlow(
                f"flow {self.name!r} is in use and cannot be changed any more ({what}); "
                "finish its definition before it is handed to an operator or run"
            )

    def _add(self, step: Step) -> None:
        self._change(f"adding step {told(step.name)}")
        self._steps.append(step)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Airflow copies operators; a flow that an operator has is frozen, and its identity finds its import path
        return self if self._checked is not None else _copy(self, memo)

    def __repr__(self) -> str:
        in_line = isinstance(self, Chain)
        steps = (" -> " if in_line else ", ").join(str(step.name) for step in self._steps) or "no steps"
        edges = "" if in_line else ", ".join(f"{link.source} -> {link.target}" for link in self._links) or "no edges"
        told = "; ".join(shorten(part, 200, placeholder=" ...") for part in (steps, edges) if part)
        return f"{type(self).__name__}({self.name!r}: {told})"


class Chain(Flow):
    """Steps one after the other. See ``Flow`` for the arguments."""

    kind = "chain"

    def add_step(
        self,
        name: str,
        step: Any,
        *,
        timeout: float | timedelta | None = None,
        retry: Retry | None = None,
        provides: Sequence[str] | None = None,
        compensate: Any = None,
        breaker: Guard | None = None,
        limit: Guard | None = None,
    ) -> Self:
        """Add the next step.

        Args:
            name: unique in the flow.
            step: a function of the data, an object with ``execute(inputs)``, a ``Decision``, or another flow, whose
                steps are then called ``name.step``; functions may be sync or async, and may have a parameter
                ``context`` for the ``StepContext``.
            timeout: seconds or a timedelta for one attempt, 60 s when left out; for a flow, the whole of it.
            retry: instead of the flow's.
            provides: the keys that the step returns, for the check of what decisions read. Of a flow it is needed only
                where its own steps do not say.
            compensate: undoes the finished step when the flow fails for good or is cancelled: a function of the data
                as it was after the step. It has an idempotency key of its own, and the step's timeout and retry.
            breaker: a ``CircuitBreaker`` that each attempt goes past, or, of a decision, each time it asks its model.
                Without a store of its own it is kept in the run's. It does not guard ``compensate``.
            limit: a ``RateLimit``, in the same way, behind the breaker. What an attempt waits for it counts in its
                timeout.
        """
        before = self._steps[-1].name if self._steps else None
        self._add(_step(name, step, timeout, retry, "all", provides, compensate, breaker, limit))
        if before is not None:
            self._links.append(Link(source=before, target=name))
        return self


class Graph(Flow):
    """Steps with edges between them; independent steps run side by side.

    Args:
        name, timeout, retry, inputs, reducers: see ``Flow``.
        parallel: False runs one step at a time, in topological order.
        max_workers: how many steps may run at once; 10 when left out.
    """

    kind = "graph"

    def __init__(
        self,
        name: str,
        *,
        parallel: bool | None = None,
        max_workers: int | None = None,
        timeout: float | timedelta | None = None,
        retry: Retry | None = None,
        inputs: Sequence[str] | None = None,
        reducers: Mapping[str, Reducer] | None = None,
    ) -> None:
        super().__init__(name, timeout=timeout, retry=retry, inputs=inputs, reducers=reducers)
        self.parallel = parallel
        self.max_workers = max_workers

    def add_node(
        self,
        name: str,
        node: Any,
        *,
        timeout: float | timedelta | None = None,
        retry: Retry | None = None,
        join: Join = "all",
        provides: Sequence[str] | None = None,
        compensate: Any = None,
        breaker: Guard | None = None,
        limit: Guard | None = None,
    ) -> Self:
        """Add a step; ``join="any"`` runs it when one incoming edge is taken. The rest as ``Chain.add_step``."""
        self._add(_step(name, node, timeout, retry, join, provides, compensate, breaker, limit))
        return self

    def add_edge(self, source: str, target: str, *, when: When | None = None) -> Self:
        """Let ``target`` wait for ``source``.

        Args:
            source: a step.
            target: another step.
            when: the edge is taken only if the source step's output has these values, or this predicate holds of it.
        """
        self._change(f"adding edge {told(source)} -> {told(target)}")
        self._links.append(Link(source=_plain(source), target=_plain(target), when=when))
        return self

    def set_entry_point(self, names: str | Iterable[str]) -> Self:
        """Name the steps that start the graph; they follow from the edges, so this only checks them."""
        self._change("setting entry points")
        self.entry = _names(names)
        return self

    def set_finish_point(self, names: str | Iterable[str]) -> Self:
        """Name the steps that end the graph; they follow from the edges, so this only checks them."""
        self._change("setting finish points")
        self.finish = _names(names)
        return self


def _step(
    name: str,
    node: Any,
    timeout: float | timedelta | None,
    retry: Retry | None,
    join: Join,
    provides: Sequence[str] | None,
    compensate: Any,
    breaker: Guard | None,
    limit: Guard | None,
) -> Step:
    name = _plain(name)
    if isinstance(node, Decision):
        node = node.named(name)
        # what is no key is refused by the check
        provides = (str(node.output_key),) if isinstance(node.output_key, str) else None
    return Step(
        name=name,
        node=node,
        timeout=_seconds(timeout),
        retry=retry,
        join=join,
        provides=_names(provides),
        compensate=compensate,
        breaker=breaker,
        limit=limit,
    )


# What is of no use at all is kept as it is, for the check to refuse it by name.


def _names(names: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    # a text is one name: the comma of a tuple of one is easily forgotten
    several = [names] if isinstance(names, str) or not isinstance(names, Iterable) else names
    return tuple(_plain(name) for name in several)


def _plain(name: str) -> str:
    # a subclass may print as something else: an Enum's text as the name of its member
    return "".join(name) if isinstance(name, str) else name


def _seconds(timeout: float | timedelta | None) -> float | None:
    return seconds(timeout) if timeout is not None and is_duration(timeout) else timeout  # type: ignore[return-value]


def _copied(reducers: Mapping[str, Reducer] | None) -> Mapping[str, Reducer]:
    return {} if reducers is None else dict(reducers) if isinstance(reducers, Mapping) else reducers


def _copy(flow: T, memo: dict[int, Any]) -> T:
    twin = object.__new__(type(flow))
    memo[id(flow)] = twin
    for name, value in vars(flow).items():
        setattr(twin, name, list(value) if isinstance(value, list) else value)
    return twin


def _module_of_caller() -> str:
    # the module that defines the flow is where a worker will look for it
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") == __name__ and frame.f_back is not None:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "__main__"))
