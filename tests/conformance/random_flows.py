"""Random flows: drawing plans, and building the flows that they describe.

A flow of a plan is found by its import path (`path_of`), in any process: the name is the plan itself.
"""

from __future__ import annotations

import time
import zlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from hypothesis import strategies as st
from pydantic import TypeAdapter

from beluga_airflow import Graph, InvalidInput, Retry, StepContext, Stop

__all__ = ["Edge", "Node", "Plan", "Report", "built", "digits", "path_of", "plans", "reports", "seen_by"]


class _Plain:
    def __repr__(self) -> str:
        """What is not as usual, in a form that can be pasted."""
        values = [(each.name, getattr(self, each.name), each.default) for each in fields(self)]
        given = [f"{name}={value!r}" for name, value, usual in values if value not in (usual, {})]
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass(frozen=True, kw_only=True, repr=False)
class Node(_Plain):
    """One node.

    Args:
        output: what it returns, beside what it saw.
        ticks: how long it takes; another power of two for each node of a plan, so that no two ever end together.
        needs: the key that it reads then, if any.
        refuses: it then fails in a way that no other attempt mends.
        failures: how many attempts fail in another way.
        stop: it returns a stop of this status.
        undo: how many attempts of its compensation fail; None: it has none.
        inside: it is this flow; of the rest only name, join and undo count.
    """

    name: str
    output: Mapping[str, int] = field(default_factory=dict)
    ticks: int = 1
    needs: str | None = None
    refuses: bool = False
    failures: int = 0
    stop: str | None = None
    join: Literal["all", "any"] = "all"
    undo: int | None = None
    inside: Plan | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Edge(_Plain):
    """One edge; ``when``: the key of the output is this value (a mapping) or above it (a predicate)."""

    source: str
    target: str
    when: tuple[Literal["is", "above"], str, int] | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan(_Plain):
    """A flow; ``reduced``: the keys that have the reducer `digits`; ``attempts``: of each step in all."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...] = ()
    reduced: tuple[str, ...] = ()
    attempts: int = 1
    parallel: bool = True
    max_workers: int | None = None


def digits(earlier: int, later: int) -> int:
    """A reducer that shows the order of its arguments."""
    return earlier * 10 + later


def seen_by(data: Mapping[str, Any]) -> dict[str, Any]:
    """What of its data a step tells: all but where to tell it, and what other steps saw."""
    return {key: value for key, value in data.items() if key != "token" and not key.endswith(" saw")}


async def at_once(path: str, ticks: int) -> None:
    """The pace of steps that take no time."""


@dataclass
class Report:
    """What the functions of one run tell.

    Args:
        pace: awaited by every step, with its path and its ticks.
        calls: each call: the idempotency key, the number of the attempt, what it saw.
        events: when a step ``began`` its first attempt and ``ended`` its last.
    """

    pace: Callable[[str, int], Awaitable[Any]] = at_once
    calls: list[tuple[str, int, dict[str, Any]]] = field(default_factory=list)
    events: list[tuple[float, str, str]] = field(default_factory=list)

    def call(self, data: dict[str, Any], context: StepContext) -> None:
        """Note a call, and try to change what others see."""
        self.calls.append((context.idempotency_key, context.attempt, deepcopy(seen_by(data))))
        data["bag"].append(context.step)
        data["x"] = -1

    def note(self, what: str, path: str) -> None:
        """Note that a step ``began`` or ``ended``."""
        self.events.append((time.time(), what, path))

    @property
    def in_flight(self) -> set[str]:
        """The steps that began and have not ended."""
        began, ended = ({path for _, what, path in self.events if what == which} for which in ("began", "ended"))
        return began - ended

    @property
    def trace(self) -> list[tuple[str, frozenset[str]]]:
        """Each step that ended, with all that were in flight then."""
        places = [place for place, (_, what, _) in enumerate(self.events) if what == "ended"]
        return [(self.events[place][2], frozenset(Report(events=self.events[:place]).in_flight)) for place in places]


reports: defaultdict[str, Report] = defaultdict(Report)
"""By the token in a flow's input."""


@dataclass(frozen=True)
class Told:
    """A step that does what its plan says; ``attempts``: how many it has."""

    node: Node
    attempts: int

    async def execute(self, inputs: dict[str, Any], context: StepContext) -> dict[str, Any] | Stop:
        """One attempt; the first one takes all the time."""
        report, saw = reports[inputs["token"]], deepcopy(seen_by(inputs))
        report.call(inputs, context)
        if context.attempt == 1:
            report.note("began", context.step)
            await report.pace(context.step, self.node.ticks)
        hopeless = self.node.refuses or not (self.node.needs is None or self.node.needs in inputs)
        if hopeless or context.attempt > self.node.failures or context.attempt == self.attempts:
            report.note("ended", context.step)
        if self.node.needs is not None:
            inputs[self.node.needs]
        if self.node.refuses:
            raise InvalidInput(f"{context.step} fails for good")
        if context.attempt <= self.node.failures:
            raise RuntimeError(f"{context.step} fails in attempt {context.attempt}")
        output = {**self.node.output, f"{context.step} saw": saw}
        return Stop(self.node.stop, output) if self.node.stop else output


@dataclass(frozen=True)
class Undo:
    """A compensation of which so many attempts fail."""

    failures: int

    async def execute(self, inputs: dict[str, Any], context: StepContext) -> None:
        """One attempt."""
        reports[inputs["token"]].call(inputs, context)
        if context.attempt <= self.failures:
            raise RuntimeError(f"{context.step} fails in attempt {context.attempt}")


def built(plan: Plan, name: str = "random") -> Graph:
    """The flow that a plan describes."""
    graph = Graph(
        name,
        parallel=plan.parallel,
        max_workers=plan.max_workers,
        retry=Retry(maximum_attempts=plan.attempts, initial_interval=0),
        reducers=dict.fromkeys(plan.reduced, digits),
    )
    for node in plan.nodes:
        step = Told(node, plan.attempts) if node.inside is None else built(node.inside, f"{name}-{node.name}")
        graph.add_node(node.name, step, join=node.join, compensate=None if node.undo is None else Undo(node.undo))
    for edge in plan.edges:
        graph.add_edge(edge.source, edge.target, when=_when(edge))
    return graph


def _when(edge: Edge) -> Any:
    if edge.when is None:
        return None
    how, key, value = edge.when
    return {key: value} if how == "is" else lambda output: output.get(key, value) > value


PREFIX = "flow_"
PLAN = TypeAdapter(Plan)


def path_of(plan: Plan) -> str:
    """Where a worker finds the flow of a plan."""
    return f"{__name__}:{PREFIX}{zlib.compress(PLAN.dump_json(plan, exclude_defaults=True), 9).hex()}"


def __getattr__(name: str) -> Graph:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    plan = PLAN.validate_json(zlib.decompress(bytes.fromhex(name.removeprefix(PREFIX))))
    # kept: a flow is looked for as often as it has steps
    return globals().setdefault(name, built(plan))


KEYS = ("x", "y")
VALUES = st.sampled_from(range(3))


def seldom(usual: Any, *others: Any, once_in: int) -> st.SearchStrategy[Any]:
    """``usual``, but once in so many times one of the others."""
    return st.sampled_from([usual] * (once_in - 1) * len(others) + [*others])


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans of one to eight nodes, of which one may be a flow of up to three."""
    ticks = iter(draw(st.permutations([2**power for power in range(11)])))
    inside = draw(graphs(ticks, most=3)) if draw(st.booleans()) else None
    return draw(graphs(ticks, most=8, inside=inside))


@st.composite
def graphs(draw: st.DrawFn, ticks: Iterator[int], *, most: int, inside: Plan | None = None) -> Plan:
    """Graphs without flows in them but this one."""
    sizes = [*range(1, most + 1), *range(most // 2 + 1, most + 1), *range(most // 2 + 1, most + 1)]
    names = "abcdefgh"[: draw(st.sampled_from(sizes))]
    nodes = [draw(steps(name, next(ticks))) for name in names]
    if inside is not None:
        place = draw(st.integers(0, len(nodes) - 1))
        like = nodes[place]
        nodes[place] = Node(name=like.name, join=like.join, undo=like.undo, inside=inside)
    conditions = seldom(None, *(("is", key, 1) for key in KEYS), *(("above", key, 0) for key in KEYS), once_in=4)
    linked = seldom(False, True, once_in=draw(st.integers(2, 4)))
    pairs = [(source, target) for target in names for source in names if source < target and draw(linked)]
    return Plan(
        # the order of definition is another than that of the edges
        nodes=tuple(draw(st.permutations(nodes))),
        edges=tuple(Edge(source=source, target=target, when=draw(conditions)) for source, target in pairs),
        reduced=tuple(key for key in KEYS if draw(st.booleans())),
        attempts=draw(st.integers(1, 3)),
        parallel=draw(seldom(True, False, once_in=6)),
        max_workers=draw(seldom(None, 1, 2, 3, once_in=3)),
    )


@st.composite
def steps(draw: st.DrawFn, name: str, ticks: int) -> Node:
    """Nodes that are functions."""
    return Node(
        name=name,
        ticks=ticks,
        output={key: draw(VALUES) for key in KEYS if draw(st.booleans())},
        needs=draw(seldom(None, *KEYS, once_in=15)),
        refuses=draw(seldom(False, True, once_in=20)),
        failures=draw(seldom(0, 1, 2, once_in=10)),
        stop=draw(seldom(None, f"stopped_by_{name}", once_in=20)),
        join=draw(seldom("all", "any", once_in=3)),
        undo=draw(st.sampled_from([None, 0, 1])),
    )
