"""What the tests of the in-process runtime share."""

from __future__ import annotations

import asyncio
from typing import Any

from beluga_airflow import FlowResult, Graph, Retry, run
from beluga_airflow.graph import Flow

DEADLINE = 20
ONCE = Retry(maximum_attempts=1)
FAST = Retry(maximum_attempts=3, initial_interval=0)


def nothing(data: dict[str, Any]) -> None:
    return None


def graph_of(*edges: str, nodes: dict[str, Any], **options: Any) -> Graph:
    """A graph whose steps are tried once; an edge is two letters."""
    graph = Graph("g", **{"retry": ONCE, **options})
    for name, node in nodes.items():
        graph.add_node(name, node)
    for edge in edges:
        graph.add_edge(edge[0], edge[1])
    return graph


async def ended(flow: Flow, inputs: Any = None, **options: Any) -> FlowResult:
    """The result of a run, which must come in time."""
    async with asyncio.timeout(DEADLINE):
        return await run(flow, inputs or {}, **options)
