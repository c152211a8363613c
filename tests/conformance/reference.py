"""What a flow means, said a second time and in few words: the judge of the random flows.

Steps run side by side, so what a failure or a stop leaves undone depends on who ended before it. `meaning` learns that
from `ends`, which says who of the running steps ends next. Then its answer is exact; nothing is left to be plausible.

- `Clock` lets every step take its ticks, no two sums of which are the same. `run()` takes as long in virtual time, and
  on Temporal the test lets the steps end in that order, so that it is certain who ends first, without any margin.
- A runtime that runs one step at a time, in an order of its own, is judged by the order in which it ran them: `starts`
  lets nobody start who may not.

A flow inside a flow is its steps, and one more of the name ``result``, which calls no function and follows when all of
them are decided, if any ran.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from tests.conformance.random_flows import Edge, Node, Plan, digits, seen_by

__all__ = ["Clock", "Meaning", "Tie", "meaning"]

WORKERS = 10


@dataclass(kw_only=True)
class Meaning:
    """How a flow must end.

    Args:
        status, data, steps: as the result has them.
        undone: each step that must be undone, and whether it can be.
        errors: the error must have all words of one of these.
        calls: each call of a function: the path, the number of the attempt, what it saw.
        trace: each step that ends, with all that are running then.
    """

    status: str = "completed"
    data: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)
    undone: dict[str, bool] = field(default_factory=dict)
    errors: list[tuple[str, ...]] = field(default_factory=list)
    calls: list[tuple[str, int, dict[str, Any]]] = field(default_factory=list)
    trace: list[tuple[str, frozenset[str]]] = field(default_factory=list)

    @property
    def functions(self) -> set[str]:
        """The steps whose function is called."""
        return {name for name, *_ in self.calls}


class Tie(Exception):
    """Two steps that take no time run at once: who ends first is not said."""


class Clock:
    """Every step takes its ticks."""

    def __init__(self) -> None:
        self.now = 0
        self.due: dict[str, int] = {}

    def __call__(self, running: Mapping[str, int]) -> str:
        for path, ticks in running.items():
            self.due.setdefault(path, self.now + ticks)
        first, *others = sorted(running, key=self.due.__getitem__)
        if others and self.due[others[0]] == self.due[first]:
            raise Tie
        self.now = self.due[first]
        return first


def meaning(
    plan: Plan,
    inputs: Mapping[str, Any],
    ends: Callable[[Mapping[str, int]], str] | None = None,
    starts: Callable[[Sequence[str]], Sequence[str]] = lambda ready: ready,
) -> Meaning:
    """How a flow ends. ``ends``: of the running steps and their ticks the next to end; ``starts``: who of the ready."""
    play = _Play(plan, inputs)
    play.forward(ends or Clock(), starts)
    play.end()
    return play.meaning


@dataclass(frozen=True)
class _Step:
    node: Node
    attempts: int
    join: str
    sources: Mapping[str, Edge | None]  # None: always taken
    around: Mapping[str, int]  # the flows it is in, by the beginning of their steps' paths, and their workers


def _steps(
    plan: Plan, prefix: str = "", around: Mapping[str, int] = {}, sources: Mapping[str, Any] = {}, join: str = "all"
) -> dict[str, _Step]:
    """By path, in topological order, ties as defined. ``sources`` and ``join`` are those of the flow itself."""
    found: dict[str, _Step] = {}
    left = list(plan.nodes)
    ends = {node.name: f"{prefix}{node.name}{'.result' if node.inside else ''}" for node in plan.nodes}
    around = {**around, prefix: (plan.max_workers or WORKERS) if plan.parallel else 1}
    while left:
        blocked = {edge.target for edge in plan.edges if edge.source in {node.name for node in left}}
        node = next(node for node in left if node.name not in blocked)
        left.remove(node)
        own = {ends[edge.source]: edge for edge in plan.edges if edge.target == node.name}
        step = _Step(node, plan.attempts, *((node.join, own) if own else (join, sources)), around)
        if node.inside is None:
            found[ends[node.name]] = step
        else:
            nested = _steps(node.inside, f"{prefix}{node.name}.", around, step.sources, step.join)
            found |= nested
            found[ends[node.name]] = _Step(node, plan.attempts, "any", dict.fromkeys(nested), around)
    return found


def _taken(edge: Edge, output: Mapping[str, Any]) -> bool:
    if edge.when is None:
        return True
    how, key, value = edge.when
    return key in output and (output[key] == value if how == "is" else output[key] > value)


class _Play:
    def __init__(self, plan: Plan, inputs: Mapping[str, Any]) -> None:
        self.steps, self.inputs = _steps(plan), inputs
        self.reduced = {"": plan.reduced} | {node.name: node.inside.reduced for node in plan.nodes if node.inside}
        self.before: dict[str, set[str]] = {}  # all ancestors
        for path, step in self.steps.items():
            self.before[path] = set(step.sources).union(*(self.before[source] for source in step.sources))
        self.outputs: dict[str, dict[str, Any]] = {}  # of the finished steps
        self.taken: dict[str, set[str]] = {}  # by finished and skipped steps: where one goes on
        self.failed: dict[str, list[tuple[str, ...]]] = {}
        self.running: dict[str, int] = {}
        self.meaning = Meaning()

    def forward(
        self, ends: Callable[[Mapping[str, int]], str], starts: Callable[[Sequence[str]], Sequence[str]]
    ) -> None:
        while True:
            for path in starts(self.ready()):
                caps = self.steps[path].around.items()
                if all(sum(name.startswith(flow) for name in self.running) < cap for flow, cap in caps):
                    self.start(path)
            if not self.running:
                return
            path = ends(self.running)
            self.meaning.trace.append((path, frozenset(self.running)))
            del self.running[path]
            self.finish(path)

    def ready(self) -> list[str]:
        """Who may start; after a failure or a stop only the ends of flows. Who never may is skipped."""
        found = []
        for path, step in self.steps.items():
            known = path in self.taken or path in self.failed or path in self.running
            if not known and self.taken.keys() >= step.sources.keys():
                ways = [path in self.taken[source] for source in step.sources]
                if all(ways) or (step.join == "any" and any(ways)):
                    found.append(path)
                else:
                    self.taken[path] = set()
        over = self.failed or self.stopped
        return [path for path in found if self.steps[path].node.inside] if over else found

    @property
    def stopped(self) -> list[str]:
        return [path for path, step in self.steps.items() if path in self.outputs and step.node.stop]

    def start(self, path: str) -> None:
        node, state = self.steps[path].node, self.state(path)
        if node.inside is not None or self.conflicts(path):
            self.running[path] = 0  # no function is called
        else:
            self.running[path] = node.ticks
            hopeless = node.refuses or not (node.needs is None or node.needs in state)
            self.call(path, path, state, 0 if hopeless else node.failures)

    def call(self, name: str, path: str, state: Mapping[str, Any], failures: int) -> None:
        numbers = range(1, 1 + min(failures + 1, self.steps[path].attempts))
        self.meaning.calls += ((name, number, seen_by(state)) for number in numbers)

    def finish(self, path: str) -> None:
        step, state = self.steps[path], self.state(path)
        node = step.node
        if clash := self.conflicts(path):
            self.failed[path] = clash
        elif node.inside is not None:
            inner = [output for name, output in self.outputs.items() if name.startswith(path.removesuffix("result"))]
            self.outputs[path] = {key: state[key] for key in set().union(*inner)}
        elif node.needs is not None and node.needs not in state:
            self.failed[path] = [("MissingKey", repr(path), repr(node.needs))]
        elif node.refuses or node.failures >= step.attempts:
            self.failed[path] = [(f"{path} fails",)]
        else:
            self.outputs[path] = {**node.output, f"{path} saw": seen_by(state)}
        if path in self.outputs:
            edges = {name: other.sources[path] for name, other in self.steps.items() if path in other.sources}
            taken = {name for name, edge in edges.items() if edge is None or _taken(edge, self.outputs[path])}
            self.taken[path] = set() if node.stop else taken

    def setters(self, path: str) -> dict[str, list[str]]:
        """By key: who set what a step sees, of steps one after the other the last, in topological order."""
        ran = [name for name in self.steps if name in self.before[path] and name in self.outputs]
        found: dict[str, list[str]] = {}
        for name in ran:
            for key in self.outputs[name]:
                found[key] = [*(other for other in found.get(key, ()) if other not in self.before[name]), name]
        return found

    def conflicts(self, path: str) -> list[tuple[str, ...]]:
        found = []
        for key, (first, *others) in self.setters(path).items():
            for other in others:
                if self.outputs[other][key] != self.outputs[first][key] and not self.is_reduced(key, (first, *others)):
                    found.append(("MergeConflict", repr(first), repr(other), repr(key)))
        return found

    def state(self, path: str) -> dict[str, Any]:
        state = dict(self.inputs)
        for key, names in self.setters(path).items():
            values = [self.outputs[name][key] for name in names]
            state[key] = reduce(digits, values) if len(names) > 1 and self.is_reduced(key, names) else values[0]
        return state

    def is_reduced(self, key: str, names: Sequence[str]) -> bool:
        """Whether the flow in which these steps are side by side has a reducer for the key."""
        flows = {name.rpartition(".")[0] for name in names}
        return key in self.reduced[flows.pop() if len(flows) == 1 else ""]

    def end(self) -> None:
        done = self.meaning
        ends = [path for path in self.steps if not any(path in step.sources for step in self.steps.values())]
        after = {path: {**self.state(path), **output} for path, output in self.outputs.items()}
        if not self.failed and not self.stopped and len(ends) == 1 and ends[0] not in self.outputs:
            if clash := self.conflicts(ends[0]):  # skipped: the flow's data is what came before it
                self.failed[ends[0]] = clash
            after[ends[0]] = self.state(ends[0])
        done.steps = {path: "completed" if path in self.outputs else "skipped" for path in self.taken}
        done.steps |= dict.fromkeys(self.failed, "failed")
        if self.failed:
            done.status, done.errors = "failed", self.failed[min(self.failed, key=list(self.steps).index)]
            self.undo(after)
        elif self.stopped:
            done.status, done.data = str(self.steps[self.stopped[0]].node.stop), after[self.stopped[0]]
        elif len(ends) == 1:
            done.data = after[ends[0]]
        else:
            done.data = {path.removesuffix(".result"): after[path] for path in ends if path in after}

    def undo(self, after: Mapping[str, Mapping[str, Any]]) -> None:
        for path in reversed(self.steps):
            failures = self.steps[path].node.undo
            if path in self.outputs and failures is not None:
                self.call(f"{path}.undo", path, after[path], failures)
                self.meaning.undone[path] = failures < self.steps[path].attempts
