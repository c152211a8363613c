"""The work as a flow of this package, in this process: ``await run(flow, inputs)``."""

from __future__ import annotations

from typing import Any

from work import Program, Step, serve

from beluga_airflow import Graph, run

__all__ = ["program_of"]


def program_of(steps: list[Step]) -> Program:
    """The steps as a ``Graph``, checked before it runs."""
    graph = Graph("work")
    for step in steps:
        graph.add_node(step.name, step.function)
        for before in step.before:
            graph.add_edge(before, step.name)
    graph.check()

    async def program(inputs: dict[str, Any]) -> dict[str, Any]:
        result = await run(graph, inputs)
        if result.status != "completed":
            raise RuntimeError(f"the flow ended as {result.status}: {result.error}")
        return result.data

    return program


if __name__ == "__main__":
    serve(program_of, "beluga-airflow")
