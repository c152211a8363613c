"""The shape of a flow: its steps and edges as plain data, and the one rule of what may run next."""

from __future__ import annotations

import hashlib
import json
from collections import ChainMap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from beluga_airflow.graph.retry import Retry

__all__ = ["Edge", "Place", "Shape", "StepShape"]

Kind = Literal["chain", "graph"]
Join = Literal["all", "any"]


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a runtime needs to know of a step without having its code. ``timeout`` is in seconds."""

    name: str
    kind: Literal["function", "decision"] = "function"
    join: Join = "all"
    timeout: float | None = None
    retry: Retry | None = None


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

    @cached_property
    def ancestors(self) -> dict[str, frozenset[str]]:
        """All steps before each of ``sources``."""
        found: dict[str, frozenset[str]] = {}
        for name, sources in self.sources.items():
            found[name] = frozenset(sources).union(*(found[source] for source in sources))
        return found

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
    """

    flow: str
    kind: Kind
    steps: tuple[StepShape, ...]
    edges: tuple[Edge, ...]
    parallel: bool | None = None
    max_workers: int | None = None
    timeout: float | None = None

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
    def places(self) -> dict[str, Place]:
        """Each step's place."""
        conditions: dict[str, dict[str, str | None]] = {step.name: {} for step in self.steps}
        for edge in self.edges:
            conditions[edge.source][edge.target] = edge.when
        return {
            name: Place(
                step=name,
                sources={step: self.sources[step] for step in (*before, name)},
                targets=conditions[name],
            )
            for name, before in self.ancestors.items()
        }

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
        run: list[str] = []
        skipped: dict[str, Collection[str]] = {}
        decided = ChainMap(skipped, dict(done) if after is None else done)  # type: ignore[arg-type]  # only read
        candidates = list(self.order) if after is None else self._in_order(self.targets[after])
        while candidates:
            name = candidates.pop(0)
            sources = self.sources[name]
            if name in decided or name in run or any(source not in decided for source in sources):
                continue
            taken = [name in decided[source] for source in sources]
            if not taken or (any(taken) if self.by_name[name].join == "any" else all(taken)):
                run.append(name)
            else:
                skipped[name] = ()
                candidates = self._in_order({*candidates, *self.targets[name]})
        return self._in_order(run), self._in_order(skipped)

    def _in_order(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=self.order.__getitem__)

    @cached_property
    def fingerprint(self) -> str:
        """Differs where the shape differs: 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """This shape as JSON."""
        data = asdict(self)
        data["steps"] = [{**asdict(step), "retry": step.retry.to_json() if step.retry else None} for step in self.steps]
        data["edges"] = [asdict(edge) for edge in self.edges]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Shape:
        """The shape that ``to_json`` wrote."""
        steps = tuple(
            StepShape(**{**step, "retry": Retry.from_json(step["retry"]) if step["retry"] else None})
            for step in data["steps"]
        )
        edges = tuple(Edge(**edge) for edge in data["edges"])
        return cls(**{**data, "steps": steps, "edges": edges})
