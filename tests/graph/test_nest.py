"""A flow as a node of a flow."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow import Chain, Graph, InvalidFlow, Retry
from beluga_airflow.config import Settings
from beluga_airflow.graph import Flow, Shape
from beluga_airflow.graph.shape import GroupShape
from tests.graph.random_flows import flows, nothing, outcomes


def other(data: dict[str, Any]) -> None:
    return None


def graph_of(*edges: str, nodes: str = "ab", name: str = "inner", **options: Any) -> Graph:
    graph = Graph(name, **options)
    for node in nodes:
        graph.add_node(node, nothing)
    for edge in edges:
        graph.add_edge(edge[0], edge[1])
    return graph


def around(inner: Flow, **options: Any) -> Graph:
    """``start`` -> the flow as ``ship`` -> ``end``."""
    outer = Graph("outer").add_node("start", nothing).add_node("ship", inner, **options).add_node("end", nothing)
    return outer.add_edge("start", "ship").add_edge("ship", "end")


def arrows(shape: Shape) -> set[str]:
    return {f"{edge.source} -> {edge.target}" for edge in shape.edges}


# paths and edges


def test_the_steps_of_a_nested_flow_have_paths_and_an_end() -> None:
    shape = around(graph_of("ab")).check()

    assert list(shape.order) == ["start", "ship.a", "ship.b", "ship.result", "end"]
    assert [step.kind for step in shape.steps] == ["function", "function", "function", "flow", "function"]
    assert arrows(shape) == {
        "start -> ship.a",
        "ship.a -> ship.b",
        "ship.a -> ship.result",
        "ship.b -> ship.result",
        "ship.result -> end",
    }


def test_edges_lead_to_every_entry_point_and_come_from_the_end() -> None:
    outer = Graph("outer").add_node("start", nothing).add_node("ship", graph_of("ac", nodes="abc"))
    outer.add_node("end", nothing).add_edge("start", "ship", when={"ok": 1}).add_edge("ship", "end", when={"sent": 2})

    assert {(edge.source, edge.target, edge.when) for edge in outer.check().edges} == {
        ("start", "ship.a", "ok=1"),
        ("start", "ship.b", "ok=1"),
        ("ship.a", "ship.c", None),
        ("ship.a", "ship.result", None),
        ("ship.b", "ship.result", None),
        ("ship.c", "ship.result", None),
        ("ship.result", "end", "sent=2"),
    }


def test_a_flow_of_one_nested_flow_is_that_flow() -> None:
    shape = Chain("outer").add_step("ship", Chain("inner").add_step("a", nothing)).check()

    assert list(shape.order) == ["ship.a", "ship.result"]
    assert shape.finish == ("ship.result",)


def test_nested_flows_may_stand_in_a_row() -> None:
    shape = Chain("outer").add_step("one", graph_of()).add_step("two", graph_of()).check()

    assert {"one.result -> two.a", "one.result -> two.b"} <= arrows(shape)
    assert "one.a -> two.a" not in arrows(shape)


def test_flows_are_nested_to_any_depth() -> None:
    flow: Flow = Chain("bottom").add_step("a", nothing)
    for level in range(5):
        flow = Chain(f"level{level}").add_step("in", flow).add_step("b", nothing)

    shape = flow.check()

    assert shape.steps[0].name == "in.in.in.in.in.a"
    assert [group.path for group in shape.groups] == [".".join(["in"] * depth) for depth in range(1, 6)]
    assert [group.path for group in shape.around["in.in.b"]] == ["in", "in.in"]


def test_the_entry_points_of_a_flow_that_begins_with_a_flow_are_those_of_that_one() -> None:
    middle = Graph("middle").add_node("deep", graph_of()).add_node("after", nothing).add_edge("deep", "after")

    shape = around(middle, join="any").check()

    assert {"start -> ship.deep.a", "start -> ship.deep.b", "ship.deep.result -> ship.after"} <= arrows(shape)
    assert {name for name, step in shape.by_name.items() if step.join == "any"} == {
        *("ship.deep.a", "ship.deep.b", "ship.deep.result", "ship.result"),
    }


def test_one_flow_may_be_two_nodes() -> None:
    inner = graph_of("ab")
    shape = Graph("outer").add_node("x", inner).add_node("y", inner).add_edge("x", "y").check()

    assert list(shape.order) == ["x.a", "x.b", "x.result", "y.a", "y.b", "y.result"]


def test_a_flow_is_the_same_alone_after_it_was_nested() -> None:
    inner = graph_of("ab", retry=Retry(maximum_attempts=7))
    alone = graph_of("ab", retry=Retry(maximum_attempts=7)).check()

    around(inner, join="any", retry=Retry(maximum_attempts=2)).check()

    assert inner.check() == alone
    assert list(inner.steps) == ["a", "b"]


def test_the_functions_are_found_by_path() -> None:
    inner = Chain("inner").add_step("a", other)

    outer = around(inner)

    assert {path: step.node for path, step in outer.steps.items()} == {
        "start": nothing,
        "ship.a": other,
        "ship.result": None,
        "end": nothing,
    }


def test_a_nested_flow_is_frozen_with_the_outer_one() -> None:
    inner = graph_of("ab")
    around(inner).check()

    with pytest.raises(InvalidFlow, match="flow 'inner' is in use and cannot be changed any more"):
        inner.add_node("c", nothing)


def test_points_are_named_by_the_node() -> None:
    outer = Graph("outer").add_node("one", graph_of()).add_node("two", graph_of("ab")).add_edge("one", "two")

    outer.set_entry_point("one").set_finish_point("two")

    assert outer.check().finish == ("two.result",)


def test_several_finish_points_of_the_outer_flow_may_be_nested_flows() -> None:
    outer = Graph("outer").add_node("a", nothing).add_node("one", graph_of()).add_node("two", graph_of())
    outer.add_edge("a", "one").add_edge("a", "two").set_finish_point(["one", "two"])

    assert outer.check().finish == ("one.result", "two.result")


# what the steps take from where they are


def test_the_join_of_the_node_is_that_of_its_entry_points() -> None:
    inner = Graph("inner").add_node("a", nothing).add_node("b", nothing).add_node("c", nothing, join="any")
    inner.add_edge("a", "c").add_edge("b", "c")

    joins = [{step.name: step.join for step in around(inner, join=join).check().steps} for join in ("all", "any")]

    inside = {"ship.a": "all", "ship.b": "all", "ship.c": "any", "ship.result": "any"}
    assert joins[0] == {"start": "all", **inside, "end": "all"}
    assert joins[1] == joins[0] | {"ship.a": "any", "ship.b": "any"}


def retries(flow: Flow) -> dict[str, int | None]:
    return {step.name: step.retry and step.retry.maximum_attempts for step in flow.check().steps}


def test_the_nearest_retry_counts() -> None:
    def flow(*attempts: int | None) -> Flow:
        own, node, inner, outer = [None if n is None else Retry(maximum_attempts=n) for n in attempts]
        nested = Chain("inner", retry=inner).add_step("a", nothing, retry=own)
        return Chain("outer", retry=outer).add_step("ship", nested, retry=node)

    assert retries(flow(1, 2, 3, 4)) == {"ship.a": 1, "ship.result": 2}
    assert retries(flow(None, 2, 3, 4)) == {"ship.a": 2, "ship.result": 2}
    assert retries(flow(None, None, 3, 4)) == {"ship.a": 3, "ship.result": 4}
    assert retries(flow(None, None, None, 4)) == {"ship.a": 4, "ship.result": 4}
    assert retries(flow(None, None, None, None)) == {"ship.a": None, "ship.result": None}


def test_where_no_retry_is_given_the_default_of_a_steps_own_flow_holds() -> None:
    settled = Settings().settle(around(Chain("inner").add_step("a", nothing)).check())

    attempts = {step.name: step.retry.maximum_attempts for step in settled.steps if step.retry}
    assert attempts == {"start": 3, "ship.a": 4, "ship.result": 3, "end": 3}


def test_timeouts_of_steps_stay_theirs_and_that_of_the_node_is_the_groups() -> None:
    inner = Chain("inner", timeout=50).add_step("a", nothing, timeout=5)

    shape = around(inner, timeout=20).check()

    assert [step.timeout for step in shape.steps] == [None, 5.0, None, None]
    assert [group.timeout for group in shape.groups] == [20.0]
    assert [group.timeout for group in around(Chain("i", timeout=50).add_step("a", nothing)).check().groups] == [50.0]
    assert [group.timeout for group in around(Chain("i").add_step("a", nothing)).check().groups] == [None]


def test_groups_say_what_holds_in_them() -> None:
    deep = Chain("deep").add_step("a", nothing)
    middle = Graph("middle", max_workers=2, timeout=9).add_node("deep", deep).add_node("b", nothing)
    outer = Graph("outer", max_workers=7).add_node("one", middle).add_node("two", graph_of(parallel=False))

    assert outer.check().groups == (
        GroupShape(path="one", flow="middle", kind="graph", max_workers=2, timeout=9.0),
        GroupShape(path="one.deep", flow="deep", kind="chain"),
        GroupShape(path="two", flow="inner", kind="graph", parallel=False),
    )


def test_a_nested_flow_that_is_not_parallel_has_one_worker() -> None:
    shape = Graph("outer", max_workers=7).add_node("two", graph_of(parallel=False, max_workers=5)).check()

    assert [group.max_workers for group in Settings().settle(shape).groups] == [1]
    assert Settings().settle(shape).max_workers == 7


def test_what_undoes_steps_and_the_nested_flow_stays_theirs() -> None:
    inner = Chain("inner").add_step("a", nothing, compensate=other).add_step("b", nothing)

    shape = around(inner, compensate=other).check()

    assert [step.name for step in shape.steps if step.undo] == ["ship.a", "ship.result"]


def test_each_flow_has_its_own_reducers() -> None:
    deep = Graph("middle", reducers={"k": min}).add_node("deep", graph_of(reducers={"k": max}))
    outer = Graph("outer", reducers={"own": max}).add_node("one", deep).add_node("two", graph_of())

    assert outer.flat.reducers == {"": {"own": max}, "one": {"k": min}, "one.deep": {"k": max}, "two": {}}


def test_what_a_nested_flow_consists_of_counts_in_the_fingerprint_and_its_bounds_do_not() -> None:
    def fingerprint(inner: Flow, **options: Any) -> str:
        return around(inner, **options).check().fingerprint

    one = fingerprint(graph_of("ab"))
    others = [fingerprint(graph_of()), fingerprint(graph_of("ab"), join="any")]
    others += [fingerprint(graph_of("ab"), compensate=other), fingerprint(graph_of("ab", nodes="abc"))]
    assert len({one, *others}) == len(others) + 1
    assert one == fingerprint(graph_of("ab", timeout=2, max_workers=2)) == fingerprint(graph_of("ab"), timeout=3)


# the rule of what runs next, inside of a nested flow


def runs(shape: Shape, taken: dict[str, tuple[str, ...]]) -> set[str]:
    """The steps that run, where each takes these edges."""
    done: dict[str, tuple[str, ...]] = {}
    ran: set[str] = set()
    while True:
        run, skipped = shape.ready(done)
        if not run:
            return ran
        ran |= {*run}
        done |= dict.fromkeys(skipped, ()) | {step: taken[step] for step in run}


@given(flows(depth=1), st.data())
def test_a_nested_flow_runs_as_it_runs_alone(inner: Flow, data: st.DataObject) -> None:
    shape = around(inner, join=data.draw(st.sampled_from(["all", "any"]))).check()
    taken = {step: outcome.taken for step, outcome in data.draw(outcomes(shape)).items()}
    alone = {step: tuple(t.removeprefix("ship.") for t in taken[f"ship.{step}"]) for step in inner.check().order}

    ran = runs(shape, taken)

    assert {step.removeprefix("ship.") for step in ran} - {"start", "end", "result"} == runs(inner.check(), alone)
    assert "ship.result" in ran, "whichever of its finish points were skipped"


@given(flows(), st.data())
def test_a_nested_flow_ends_exactly_when_it_began(flow: Flow, data: st.DataObject) -> None:
    shape = flow.check()
    ran = runs(shape, {step: outcome.taken for step, outcome in data.draw(outcomes(shape)).items()})

    for group in shape.groups:
        inside = {step for step in ran if step.startswith(f"{group.path}.")}
        assert bool(inside) is (f"{group.path}.result" in ran)


@given(flows())
def test_a_shape_with_nested_flows_survives_json(flow: Flow) -> None:
    assert Shape.from_json(flow.check().to_json()) == flow.check()


@given(flows())
def test_steps_stand_after_what_they_wait_for(flow: Flow) -> None:
    shape = flow.check()

    assert all(shape.order[edge.source] < shape.order[edge.target] for edge in shape.edges)
    assert len({(edge.source, edge.target) for edge in shape.edges}) == len(shape.edges)
    assert len(shape.order) == len(shape.steps)
    assert set(flow.steps) == set(shape.order)
