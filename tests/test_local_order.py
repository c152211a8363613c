from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beluga_airflow import Graph, InvalidInput, Stop
from beluga_airflow.config import GraphSettings, Settings
from tests.running import DEADLINE, ONCE, ended, graph_of, nothing


async def test_sync_steps_run_side_by_side() -> None:
    barrier = threading.Barrier(3)

    def meets(data: dict[str, Any]) -> None:
        barrier.wait(DEADLINE)

    result = await ended(graph_of(nodes=dict.fromkeys("abc", meets)))

    assert result.status == "completed"


async def test_many_sync_steps_run_side_by_side_when_they_may() -> None:
    barrier = threading.Barrier(60)

    def meets(data: dict[str, Any]) -> None:
        barrier.wait(DEADLINE)

    flow = graph_of(nodes={f"s{number}": meets for number in range(60)}, max_workers=60)

    assert (await ended(flow)).status == "completed"


@pytest.mark.parametrize("max_workers", [1, 3, None])
async def test_no_more_steps_than_workers_run_at_once_and_no_fewer(max_workers: int | None) -> None:
    cap = max_workers or 10
    barrier = asyncio.Barrier(cap)
    in_flight, peak = 0, 0

    async def meets(data: dict[str, Any]) -> None:
        nonlocal in_flight, peak
        in_flight += 1
        peak = max(peak, in_flight)
        await barrier.wait()
        in_flight -= 1

    flow = graph_of(nodes={f"s{number}": meets for number in range(cap * 3)}, max_workers=max_workers)

    assert (await ended(flow)).status == "completed"
    assert peak == cap


@pytest.mark.parametrize(
    ("options", "settings"),
    [({"parallel": False}, None), ({}, Settings(graph=GraphSettings(parallel_execution=False)))],
)
async def test_without_parallelism_steps_run_one_by_one_in_topological_order(
    options: dict[str, Any], settings: Settings | None
) -> None:
    trace: list[str] = []

    def traced(name: str) -> Callable[..., Any]:
        async def step(data: dict[str, Any]) -> None:
            trace.append(f"<{name}")
            await asyncio.sleep(0)
            trace.append(f"{name}>")

        return step

    # defined in another order than they stand
    flow = graph_of("zc", "za", "ab", nodes={name: traced(name) for name in "bczax"}, max_workers=4, **options)

    await ended(flow, settings=settings)

    assert list(flow.check().order) == ["z", "c", "a", "b", "x"]
    assert trace == [mark for name in "zcabx" for mark in (f"<{name}", f"{name}>")]


async def test_a_sync_step_never_blocks_the_loop() -> None:
    seen = threading.Event()

    def waits_for_the_loop(data: dict[str, Any]) -> dict[str, Any]:
        return {"the_loop_ran": seen.wait(DEADLINE)}

    async def in_the_loop(data: dict[str, Any]) -> None:
        seen.set()

    result = await ended(graph_of("ac", "bc", nodes={"a": waits_for_the_loop, "b": in_the_loop, "c": nothing}))

    assert result.data == {"the_loop_ran": True}


async def test_a_stop_lets_running_steps_end_and_starts_nothing_new() -> None:
    stopped = asyncio.Event()

    async def stops(data: dict[str, Any]) -> Stop:
        stopped.set()
        return Stop("out_of_stock", {"product": 7})

    async def runs_on(data: dict[str, Any]) -> dict[str, Any]:
        await stopped.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        return {"ran": True}

    flow = graph_of("ac", "bd", nodes={"a": stops, "b": runs_on, "c": nothing, "d": nothing})

    result = await ended(flow, {"order": 1})

    assert (result.status, result.ok, result.error) == ("out_of_stock", True, None)
    assert result.data == {"order": 1, "product": 7}
    assert result.steps == {"a": "completed", "b": "completed", "c": "skipped"}


async def test_after_a_failure_running_steps_end_and_nothing_new_starts() -> None:
    failing = asyncio.Event()
    ran: list[str] = []

    async def fails(data: dict[str, Any]) -> None:
        failing.set()
        raise InvalidInput("order_id is empty")

    async def runs_on(data: dict[str, Any]) -> None:
        await failing.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        ran.append("b")

    flow = graph_of("ac", "bd", nodes={"a": fails, "b": runs_on, "c": nothing, "d": lambda data: ran.append("d")})

    result = await ended(flow)

    assert (result.status, result.data) == ("failed", {})
    assert result.error == "step 'a' failed: InvalidInput: order_id is empty"
    assert result.steps == {"a": "failed", "b": "completed"}
    assert ran == ["b"]


async def test_an_edge_that_is_not_taken_skips_what_follows_until_something_joins_any() -> None:
    flow = graph_of(
        "ab", nodes={"a": lambda data: {"ok": False}, "b": lambda data: {"b": 1}, "c": nothing, "d": nothing}
    )
    flow.add_node("e", lambda data: {"e": sorted(data)}, join="any")
    flow.add_edge("a", "c", when={"ok": True}).add_edge("c", "d").add_edge("d", "e").add_edge("b", "e")

    result = await ended(flow)

    assert result.steps == {"a": "completed", "b": "completed", "c": "skipped", "d": "skipped", "e": "completed"}
    assert result.data == {"ok": False, "b": 1, "e": ["b", "ok"]}


@given(st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_any_graph_gives_the_same_result_side_by_side_and_one_by_one(chance: random.Random) -> None:
    names = [f"s{number}" for number in range(chance.randint(1, 7))]
    pairs = [(names[i], names[j]) for i in range(len(names)) for j in range(i + 1, len(names)) if chance.random() < 0.4]
    joins: list[Any] = [chance.choice(["all", "any"]) for _ in names]
    conditions = {pair: chance.choice([None, {"flag": True}]) for pair in pairs}
    flags = {name: chance.random() < 0.7 for name in names}
    stops = {name for name in names if chance.random() < 0.05} if chance.random() < 0.3 else set()

    def flow(parallel: bool) -> Graph:
        def make(name: str) -> Callable[..., Any]:
            async def step(data: dict[str, Any]) -> dict[str, Any] | Stop:
                for _ in range(chance.randint(0, 5) if parallel else 0):
                    await asyncio.sleep(0)
                output = {name: sorted(data), "flag": flags[name], "all": [name]}
                return Stop(f"stopped_by_{name}", output) if name in stops else output

            return step

        graph = Graph(
            "g", parallel=parallel, max_workers=3, retry=ONCE, reducers={"all": lambda a, b: a + b, "flag": min}
        )
        for name, join in zip(names, joins, strict=True):
            graph.add_node(name, make(name), join=join)
        for (source, target), when in conditions.items():
            graph.add_edge(source, target, when=when)
        return graph

    one, other = (asyncio.run(ended(flow(parallel))) for parallel in (True, False))

    if one.status == other.status == "completed":
        assert one == other
    else:
        # who stops first may differ, that it stops does not
        assert one.status.startswith("stopped_by_")
        assert other.status.startswith("stopped_by_")
