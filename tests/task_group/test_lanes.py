"""Edges that keep a group within its cap."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow import Graph
from beluga_airflow.config import Settings
from beluga_airflow.graph import Shape
from beluga_airflow.task_group.lanes import ordering_edges


def step(data: dict[str, Any]) -> None:
    return None


def shape_of(names: str, edges: str = "", **options: Any) -> Shape:
    made = Graph("g", **options)
    for name in names:
        made.add_node(name, step)
    for edge in edges.split():
        made.add_edge(edge[0], edge[1])
    return Settings().settle(made.check())


def before(shape: Shape, added: list[tuple[str, str]]) -> dict[str, set[str]]:
    """All steps before each, by the flow's edges and the added ones."""
    edges = [(edge.source, edge.target) for edge in shape.edges] + added
    found: dict[str, set[str]] = {}
    for name in shape.order:
        sources = [source for source, target in edges if target == name]
        assert all(source in found for source in sources), "against the topological order"
        found[name] = set(sources).union(*(found[source] for source in sources))
    return found


def widest(steps: list[str], before: dict[str, set[str]]) -> int:
    """How many can run at once, found by trying all."""
    return max(
        size
        for size in range(1, len(steps) + 1)
        for some in combinations(steps, size)
        if not any(one in before[other] or other in before[one] for one, other in combinations(some, 2))
    )


@st.composite
def graphs(draw: st.DrawFn) -> tuple[str, str]:
    names = "abcdefgh"[: draw(st.integers(1, 8))]
    pairs = [one + other for one, other in combinations(names, 2)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=12)) if pairs else []
    return names, " ".join(edges)


@given(graphs(), st.integers(1, 5))
def test_no_more_can_run_at_once_than_may(graph: tuple[str, str], cap: int) -> None:
    shape = shape_of(*graph, max_workers=cap)
    edges = ordering_edges(shape, pooled=False)
    was, now = widest([*shape.order], before(shape, [])), widest([*shape.order], before(shape, edges))
    assert now <= cap
    # none where they are not needed, and none that is there already
    assert edges == [] if was <= cap else edges != []
    assert all(source not in shape.ancestors[target] for source, target in edges)


@given(graphs())
def test_one_at_a_time_is_the_topological_order(graph: tuple[str, str]) -> None:
    shape = shape_of(*graph, parallel=False)
    for pooled in (True, False):
        found = before(shape, ordering_edges(shape, pooled=pooled))
        assert [len(found[name]) for name in shape.order] == [*range(len(shape.order))]


def test_a_pool_is_a_cap_of_its_own() -> None:
    assert ordering_edges(shape_of("abcdef", max_workers=2), pooled=True) == []


def test_the_default_cap_holds_too() -> None:
    names = "".join(map(chr, range(ord("a"), ord("a") + 15)))
    shape = shape_of(names)
    assert widest([*shape.order], before(shape, ordering_edges(shape, pooled=False))) == 10


def test_lanes_that_are_long_are_avoided() -> None:
    # e waits for d, which is free at once, not for c
    assert ordering_edges(shape_of("abcde", "ab bc", max_workers=2), pooled=False) == [("d", "e")]


@pytest.mark.parametrize("options", [{"max_workers": 2}, {"parallel": False}])
def test_a_nested_flow_has_its_own_cap(options: dict[str, Any]) -> None:
    inner = Graph("inner", **options)
    for name in "abcd":
        inner.add_node(name, step)
    outer = Graph("outer").add_node("in", inner).add_node("x", step).add_node("y", step)
    shape = Settings().settle(outer.check())
    found = before(shape, ordering_edges(shape, pooled=False))
    inside = [name for name in shape.order if name.startswith("in.")]
    assert widest(inside, found) == options.get("max_workers", 1)
    assert widest([*shape.order], found) == options.get("max_workers", 1) + 2


def test_a_pool_leaves_a_nested_flow_one_at_a_time() -> None:
    inner = Graph("inner", parallel=False).add_node("a", step).add_node("b", step)
    shape = Settings().settle(Graph("outer", max_workers=1).add_node("in", inner).add_node("x", step).check())
    assert ordering_edges(shape, pooled=True) == [("in.a", "in.b")]


def test_a_wide_flow_has_no_more_ends_than_may_run() -> None:
    wide = Graph("wide", max_workers=7)
    for number in range(300):
        wide.add_node(f"s{number}", step)
        if number >= 100:
            wide.add_edge(f"s{number - 100}", f"s{number}")
    shape = Settings().settle(wide.check())
    found = before(shape, ordering_edges(shape, pooled=False))
    ends = [name for name in shape.order if not any(name in names for names in found.values())]
    assert len(ends) <= 7
