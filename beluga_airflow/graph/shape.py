"""The shape of a flow: its steps and edges as plain data, and the one rule of what may run next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from textwrap import shorten
from typing import Any, Literal

from beluga_airflow.graph.retry import Retry

__all__ = ["RESULT", "UNDO", "Edge", "GroupShape", "Place", "Shape", "StepShape"]

RESULT, UNDO = "result", "undo"
"""Names that no step may have: the end of a nested flow, what undoes a step, and a task group's last two tasks."""
Kind = Literal["chain", "graph"]
Join = Literal["all", "any"]


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a runtime needs to know of a step without having its code.

    Args:
        name: its path in the flow.
        kind: ``flow`` is the end of a nested flow.
        join: of its incoming edges.
        timeout: seconds for one attempt.
        retry: None: the setting in force.
        undo: whether it can be undone.
    """

    name: str
    kind: Literal["function", "decision", "flow"] = "function"
    join: Join = "all"
    timeout: float | None = None
    retry: Retry | None = None
    undo: bool = False

    @property
    def retries(self) -> Retry:
        """How often it is tried; of a settled shape."""
        assert self.retry is not None, "a settled shape has retries"
        return self.retry

    @property
    def time(self) -> float:
        """Seconds for one attempt; of a settled shape."""
        assert self.timeout is not None, "a settled shape has timeouts"
        return self.timeout


@dataclass(frozen=True, kw_only=True)
class GroupShape:
    """A nested flow.

    Args:
        path: of its node; its steps' paths begin with it.
        flow: its name.
        kind, parallel, max_workers, timeout: as in ``Shape``; where None, only what holds for the outer flow holds.
    """

    path: str
    flow: str
    kind: Kind
    parallel: bool | None = None
    max_workers: int | None = None
    timeout: float | None = None


@dataclass(frozen=True, kw_only=True)
class Edge:
    """From one step to another; ``when`` is the text of its condition, if it has one."""

    source: str
    target: str
    when: str | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one step stands in its flow: all of the shape that one attempt needs.

    Args:
        step: the step's name.
        sources: the steps before it, in topological order, and itself, each with the steps directly before it.
        targets: the steps directly after it, each with the text of the edge's condition.
    """

    step: str
    sources: Mapping[str, Sequence[str]]
    targets: Mapping[str, str | None]

    def to_json(self) -> dict[str, Any]:
        """This place as JSON."""
        # pairs, since their order matters and whoever carries JSON may sort the keys of objects
        return {
            "step": self.step,
            "sources": [[name, list(names)] for name, names in self.sources.items()],
            "targets": [[name, when] for name, when in self.targets.items()],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Place:
        """The place that ``to_json`` wrote."""
        return cls(step=data["step"], sources=dict(data["sources"]), targets=dict(data["targets"]))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A checked flow as data. It travels in a workflow's input, so that changed code breaks no run in flight.

    Args:
        flow: the flow's name.
        kind: which defaults hold for what is None.
        steps: in topological order, ties in the order of definition.
        edges: in the order of definition.
        parallel: whether independent steps may run side by side; None: the setting in force.
        max_workers: how many steps may run at once; None: the setting in force.
        timeout: seconds for the whole flow; None: the setting in force.
        groups: the nested flows, each after the one it is in.
    """

    flow: str
    kind: Kind
    steps: tuple[StepShape, ...]
    edges: tuple[Edge, ...]
    parallel: bool | None = None
    max_workers: int | None = None
    timeout: float | None = None
    groups: tuple[GroupShape, ...] = ()

    @cached_property
    def order(self) -> dict[str, int]:
        """Each step's place in the topological order."""
        return {step.name: place for place, step in enumerate(self.steps)}

    @cached_property
    def by_name(self) -> dict[str, StepShape]:
        """The steps by name."""
        return {step.name: step for step in self.steps}

    @cached_property
    def sources(self) -> dict[str, tuple[str, ...]]:
        """The steps directly before each step."""
        return self._neighbours(lambda edge: (edge.target, edge.source))

    @cached_property
    def targets(self) -> dict[str, tuple[str, ...]]:
        """The steps directly after each step."""
        return self._neighbours(lambda edge: (edge.source, edge.target))

    def _neighbours(self, ends: Any) -> dict[str, tuple[str, ...]]:
        found: dict[str, list[str]] = {step.name: [] for step in self.steps}
        for edge in self.edges:
            of, neighbour = ends(edge)
            found[of].append(neighbour)
        return {name: tuple(names) for name, names in found.items()}

    @cached_property
    def entries(self) -> tuple[str, ...]:
        """The steps that start the flow, in topological order."""
        return tuple(step.name for step in self.steps if not self.sources[step.name])

    @cached_property
    def finish(self) -> tuple[str, ...]:
        """The steps that end the flow, in topological order."""
        return tuple(step.name for step in self.steps if not self.targets[step.name])

    @cached_property
    def ancestors(self) -> dict[str, tuple[str, ...]]:
        """All steps before each step, in topological order."""
        before: dict[str, set[str]] = {}
        for step in self.steps:
            sources = self.sources[step.name]
            before[step.name] = set(sources).union(*(before[source] for source in sources))
        return {name: tuple(sorted(names, key=self.order.__getitem__)) for name, names in before.items()}

    @cached_property
    def conditions(self) -> dict[str, dict[str, str | None]]:
        """The steps directly after each step, with the texts of the edges' conditions."""
        found: dict[str, dict[str, str | None]] = {step.name: {} for step in self.steps}
        for edge in self.edges:
            found[edge.source][edge.target] = edge.when
        return found

    @cached_property
    def around(self) -> dict[str, tuple[GroupShape, ...]]:
        """The nested flows that each step is in, the outermost first."""
        return {
            step.name: tuple(group for group in self.groups if step.name.startswith(f"{group.path}."))
            for step in self.steps
        }

    @property
    def count(self) -> int:
        """How many steps it has, the ends of nested flows aside."""
        return sum(step.kind != "flow" for step in self.steps)

    def place(self, step: str) -> Place:
        """A step's place."""
        return Place(
            step=step,
            sources={name: self.sources[name] for name in (*self.ancestors[step], step)},
            targets=self.conditions[step],
        )

    def rerun_from(self, step: str) -> frozenset[str]:
        """The step and all that follow from it: what runs again when a run is repeated from there.

        A nested flow's node means all its steps; what is neither, nothing.
        """
        first = {name for name in self.order if name == step or name.startswith(f"{step}.")}
        return frozenset(first.union(name for name, before in self.ancestors.items() if not first.isdisjoint(before)))

    def ready(self, done: Mapping[str, Collection[str]], after: str | None = None) -> tuple[list[str], list[str]]:
        """What may run next, and what never will.

        A step is decided when all steps before it are: it runs when all its incoming edges are taken (``join="any"``:
        one of them), and is skipped otherwise. Nothing else is asked, so every runtime decides alike.

        Args:
            done: finished and skipped steps, each with the targets of its taken edges (none for a skipped step).
            after: the step that was added to ``done`` since the last call; only what follows from it is
                returned. None: everything that can be decided now.

        Returns:
            the steps to run and the steps to skip, each in topological order.
        """
        if after is not None and len(self.targets[after]) == 1:
            # in a row: nothing to put in order, and mostly nothing to skip
            (name,) = self.targets[after]
            if name not in done and self._taken(name, done, {}):
                return [name], []
        run: list[str] = []
        skipped: dict[str, Collection[str]] = {}
        candidates = list(self.order) if after is None else [*self.targets[after]]
        for name in candidates:  # which grows: what is skipped decides what follows
            if name in done or name in skipped or name in run:
                continue
            taken = self._taken(name, done, skipped)
            if taken is None:
                continue
            if taken:
                run.append(name)
            else:
                skipped[name] = ()
                candidates += self.targets[name]
        return self._in_order(run), self._in_order(skipped)

    def _taken(
        self, step: str, done: Mapping[str, Collection[str]], skipped: Mapping[str, Collection[str]]
    ) -> bool | None:
        """Whether the edges into a step let it run; None while one of them is not decided."""
        sources = self.sources[step]
        if len(sources) == 1 and sources[0] in done:
            return step in done[sources[0]]
        taken = 0
        for source in sources:
            if source in done:
                taken += step in done[source]
            elif source not in skipped:
                return None
        return taken > 0 or not sources if self.by_name[step].join == "any" else taken == len(sources)

    def _in_order(self, names: Collection[str]) -> list[str]:
        return sorted(names, key=self.order.__getitem__) if len(names) > 1 else [*names]

    @property
    def time(self) -> float:
        """Seconds for the whole flow; of a settled shape."""
        assert self.timeout is not None, "a settled shape has timeouts"
        return self.timeout

    @property
    def longest_undoing(self) -> float:
        """Seconds that undoing takes at the most, after the flow has failed; of a settled shape."""
        undos = [(step.time, step.retries) for step in self.steps if step.undo]
        return sum(
            retry.maximum_attempts * timeout + (retry.maximum_attempts - 1) * retry.longest_delay
            for timeout, retry in undos
        )

    @cached_property
    def fingerprint(self) -> str:
        """Differs where outcomes of the one flow could mislead the other: 16 hexadecimal digits.

        Timeouts, retries and caps are not in it.
        """
        steps = [[step.name, step.kind, step.join, step.undo] for step in self.steps]
        edges = [[edge.source, edge.target, edge.when] for edge in self.edges]
        return hashlib.sha256(json.dumps([self.flow, steps, edges]).encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        steps = ", ".join(step.name for step in self.steps)
        edges = ", ".join(f"{edge.source} -> {edge.target}" for edge in self.edges) or "no edges"
        told = "; ".join(shorten(part, 200, placeholder=" ...") for part in (steps, edges))
        return f"Shape({self.flow!r}, {self.kind}, {len(self.steps)} steps: {told})"

    def to_json(self) -> dict[str, Any]:
        """This shape as JSON."""
        data = asdict(self)
        data["steps"] = [{**asdict(step), "retry": step.retry.to_json() if step.retry else None} for step in self.steps]
        data["edges"] = [asdict(edge) for edge in self.edges]
        data["groups"] = [asdict(group) for group in self.groups]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Shape:
        """The shape that ``to_json`` wrote."""
        steps = tuple(
            StepShape(**{**step, "retry": Retry.from_json(step["retry"]) if step["retry"] else None})
            for step in data["steps"]
        )
        edges = tuple(Edge(**edge) for edge in data["edges"])
        groups = tuple(GroupShape(**group) for group in data.get("groups", ()))
        return cls(**{**data, "steps": steps, "edges": edges, "groups": groups})
