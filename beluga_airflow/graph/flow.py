"""Flows as their authors write them: ``Chain`` and ``Graph``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, Self, TypeVar

from beluga_airflow.errors import InvalidFlow
from beluga_airflow.graph.decision import Decision
from beluga_airflow.graph.retry import Retry, seconds
from beluga_airflow.graph.shape import Edge, Join, Kind, Shape, StepShape

__all__ = ["Chain", "Flow", "Graph", "Link", "Step", "When"]

When = Mapping[str, Any] | Callable[[dict[str, Any]], bool]
Reducer = Callable[[Any, Any], Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One node of a flow as its author gave it. ``timeout`` is in seconds."""

    name: str
    node: Any
    timeout: float | None = None
    retry: Retry | None = None
    join: Join = "all"
    provides: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Link:
    """One edge of a flow as its author gave it."""

    source: str
    target: str
    when: When | None = None

    def taken(self, output: dict[str, Any]) -> bool:
        """Whether this edge is taken after its source step returned ``output``."""
        if self.when is None:
            return True
        if callable(self.when):
            return bool(self.when(output))
        return all(key in output and output[key] == value for key, value in self.when.items())

    @property
    def text(self) -> str | None:
        """The condition, for a reader."""
        if self.when is None:
            return None
        if callable(self.when):
            return getattr(self.when, "__name__", "predicate")
        return ", ".join(f"{key}={value!r}" for key, value in self.when.items())


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
        self.name = name
        self.timeout = None if timeout is None else seconds(timeout)
        self.retry = retry
        self.inputs = _names(inputs)
        self.reducers = dict(reducers or {})
        self.parallel: bool | None = None
        self.max_workers: int | None = None
        self.entry: tuple[str, ...] | None = None
        self.finish: tuple[str, ...] | None = None
        self._steps: list[Step] = []
        self._links: list[Link] = []
        self._shape: Shape | None = None
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
        """Check the flow whole and freeze it.

        Returns:
            its shape; the same object every time.

        Raises:
            InvalidFlow: the flow cannot mean anything; the message lists every fault.
        """
        if self._shape is None:
            # imported here because the checker reads this module's classes
            from beluga_airflow.graph.check import checked

            self._shape = checked(self)
        return self._shape

    @cached_property
    def steps(self) -> dict[str, Step]:
        """The steps of the checked flow by name."""
        self.check()
        return {step.name: step for step in self._steps}

    @cached_property
    def links_from(self) -> dict[str, list[Link]]:
        """The outgoing edges of each step of the checked flow."""
        found: dict[str, list[Link]] = {name: [] for name in self.steps}
        for link in self._links:
            found[link.source].append(link)
        return found

    def _change(self, what: str) -> None:
        if self._shape is not None:
            raise InvalidFlow(
                f"flow {self.name!r} is in use and cannot be changed any more ({what}); "
                "finish its definition before it is handed to an operator or run"
            )

    def _add(self, step: Step) -> None:
        self._change(f"adding step {step.name!r}")
        self._steps.append(step)

    def to_shape(self, order: Iterable[str]) -> Shape:
        """The shape of this flow with its steps in ``order``. Use ``check``, which calls this."""
        steps = {step.name: step for step in self._steps}
        return Shape(
            flow=self.name,
            kind=self.kind,
            steps=tuple(
                StepShape(
                    name=name,
                    kind="decision" if isinstance(steps[name].node, Decision) else "function",
                    join=steps[name].join,
                    timeout=steps[name].timeout,
                    retry=steps[name].retry or self.retry,
                )
                for name in order
            ),
            edges=tuple(Edge(source=link.source, target=link.target, when=link.text) for link in self._links),
            parallel=self.parallel,
            max_workers=self.max_workers,
            timeout=self.timeout,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Airflow copies operators; a flow that an operator has is frozen, and its identity finds its import path
        return self if self._shape is not None else _copy(self, memo)

    def __repr__(self) -> str:
        names = [step.name for step in self._steps]
        return f"{type(self).__name__}({self.name!r}, steps={names})"


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
    ) -> Self:
        """Add the next step.

        Args:
            name: unique in the flow.
            step: a function of the data, an object with ``execute(inputs)``, or a ``Decision``; sync or async; it may
                have a parameter ``context`` for the ``StepContext``.
            timeout: seconds or a timedelta for one attempt; 60 s when left out.
            retry: instead of the flow's.
            provides: the keys that the step returns, for the check of what decisions read.
        """
        before = self._steps[-1].name if self._steps else None
        self._add(_step(name, step, timeout, retry, "all", provides))
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
    ) -> Self:
        """Add a step; ``join="any"`` runs it when one incoming edge is taken. The rest as ``Chain.add_step``."""
        self._add(_step(name, node, timeout, retry, join, provides))
        return self

    def add_edge(self, source: str, target: str, *, when: When | None = None) -> Self:
        """Let ``target`` wait for ``source``.

        Args:
            source: a step.
            target: another step.
            when: the edge is taken only if the source step's output has these values, or this predicate holds of it.
        """
        self._change(f"adding edge {source!r} -> {target!r}")
        self._links.append(Link(source=source, target=target, when=when))
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
) -> Step:
    if isinstance(node, Decision):
        node = node.named(name)
        provides = (str(node.output_key),)
    return Step(
        name=name,
        node=node,
        timeout=None if timeout is None else seconds(timeout),
        retry=retry,
        join=join,
        provides=_names(provides),
    )


def _names(names: str | Iterable[str] | None) -> tuple[str, ...] | None:
    # a text is one name: the comma of a tuple of one is easily forgotten
    return (names,) if isinstance(names, str) else None if names is None else tuple(names)


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
