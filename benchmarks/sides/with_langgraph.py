"""The work as LangGraph does it: a ``StateGraph``, compiled once, then ``ainvoke``."""

from __future__ import annotations

from typing import Any, TypedDict

from langgraph.graph import END, START, StateGraph
from work import INPUTS, Program, Step, serve

__all__ = ["program_of"]


def program_of(steps: list[Step]) -> Program:
    """The steps as a compiled graph whose state has a key for each of the input and for each that a step returns."""
    keys = INPUTS | {key: value for step in steps for key, value in step.returns.items()}
    graph = StateGraph(TypedDict("State", {key: type(value) for key, value in keys.items()}))
    ends = {step.name for step in steps}.difference(*(step.before for step in steps))
    for step in steps:
        graph.add_node(step.name, step.function)
        # a list is a join: the step waits for all of them
        before = list(step.before) if len(step.before) > 1 else next(iter(step.before), START)
        graph.add_edge(before, step.name)
    for end in ends:
        graph.add_edge(end, END)
    compiled = graph.compile()
    config: Any = {"recursion_limit": len(steps) + 1}  # its default is too small for a long chain

    async def program(inputs: dict[str, Any]) -> dict[str, Any]:
        return await compiled.ainvoke(inputs, config)

    return program


if __name__ == "__main__":
    serve(program_of, "langgraph")
