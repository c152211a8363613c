"""Random flows, with flows inside of them, and what their steps leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from beluga_airflow import Chain, Decision, Graph, Retry
from beluga_airflow.graph import Flow, Outcome, Shape

__all__ = ["asked", "flows", "nothing", "outcomes"]


def nothing(data: dict[str, Any]) -> None:
    return None


def asked(*reads: str) -> Decision:
    return Decision("?", output_type=bool, reads=reads or ("x",))


@st.composite
def flows(draw: st.DrawFn, depth: int = 2) -> Flow:
    """Up to four nodes a flow, named in another order than they stand; flows ``depth`` times inside of each other."""
    size = draw(st.integers(1, 4))
    names = draw(st.permutations([f"n{number}" for number in range(size)]))
    kinds = st.sampled_from(["function", "decision", *["flow"] * bool(depth)])

    def options(kind: str) -> dict[str, Any]:
        timeout = draw(st.sampled_from([None, 1.0, 2.0])) if kind == "flow" else None
        return {"timeout": timeout, "compensate": draw(st.sampled_from([None, nothing]))}

    def node(kind: str) -> Any:
        return draw(flows(depth - 1)) if kind == "flow" else asked() if kind == "decision" else nothing

    if draw(st.booleans()):
        chain = Chain("chain", retry=draw(st.none() | st.builds(Retry, maximum_attempts=st.integers(1, 3))))
        for name in names:
            kind = draw(kinds)
            chain.add_step(name, node(kind), **options(kind))
        return chain
    graph = Graph("graph", max_workers=draw(st.none() | st.integers(1, 3)), parallel=draw(st.none() | st.booleans()))
    for name in names:
        kind = draw(kinds)
        graph.add_node(name, node(kind), join=draw(st.sampled_from(["all", "any"])), **options(kind))
    for place, source in enumerate(names):
        for target in names[place + 1 :]:
            if draw(st.booleans()):
                graph.add_edge(source, target, when=draw(st.sampled_from([None, {"ok": True}])))
    return graph


@st.composite
def outcomes(draw: st.DrawFn, shape: Shape) -> dict[str, Outcome]:
    """What each step leaves behind; of the edges out of it, those with a condition may not be taken."""

    def taken(step: str) -> Iterator[str]:
        for target, when in shape.conditions[step].items():
            if when is None or draw(st.booleans()):
                yield target

    return {step: Outcome(output={step: 1}, taken=tuple(taken(step)), state={"at": step}) for step in shape.order}
