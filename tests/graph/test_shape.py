from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow import Graph, Retry
from beluga_airflow.graph import Flow, Shape
from beluga_airflow.graph.retry import RETRY_AFTER_BOUND
from beluga_airflow.graph.shape import Edge, GroupShape, Place, StepShape
from tests.graph.random_flows import flows, outcomes


def shape_of(*edges: str, nodes: str = "abcd", any_of: str = "") -> Shape:
    steps = tuple(StepShape(name=name, join="any" if name in any_of else "all") for name in nodes)
    return Shape(
        flow="g", kind="graph", steps=steps, edges=tuple(Edge(source=edge[0], target=edge[1]) for edge in edges)
    )


@dataclass(frozen=True)
class Case:
    """A random flow in topological order, which of its edges are taken, and how far it has come."""

    shape: Shape
    taken: Mapping[str, tuple[str, ...]]
    done: dict[str, tuple[str, ...]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size = draw(st.integers(1, 8))
    names = [f"s{size - number}" for number in range(size)]  # whose alphabetical order is another one
    pairs = [(names[i], names[j]) for i in range(size) for j in range(i + 1, size)]
    edges = [pair for pair in pairs if draw(st.booleans())]
    joins: list[Any] = draw(st.lists(st.sampled_from(["all", "any"]), min_size=size, max_size=size))
    shape = Shape(
        flow="g",
        kind="graph",
        steps=tuple(StepShape(name=name, join=join) for name, join in zip(names, joins, strict=True)),
        edges=tuple(Edge(source=source, target=target) for source, target in edges),
    )
    taken = {name: tuple(t for s, t in edges if s == name and draw(st.integers(0, 3)) > 0) for name in names}
    # any state that a run can be in: steps end one by one, in any order
    done: dict[str, tuple[str, ...]] = {}
    for _ in range(draw(st.integers(0, size))):
        run, skipped = naive(shape, done)
        done.update(dict.fromkeys(skipped, ()))
        if run:
            name = draw(st.sampled_from(run))
            done[name] = taken[name]
    return Case(shape, taken, done)


def naive(shape: Shape, done: Mapping[str, tuple[str, ...]]) -> tuple[list[str], list[str]]:
    """What ``ready`` promises, as slowly and plainly as can be: look at every step until nothing changes."""
    ended = dict(done)
    run: set[str] = set()
    skipped: set[str] = set()
    changed = True
    while changed:
        changed = False
        for step in shape.steps:
            if step.name in ended or step.name in run:
                continue
            incoming = [edge.source for edge in shape.edges if edge.target == step.name]
            if not all(source in ended for source in incoming):
                continue
            taken = [step.name in ended[source] for source in incoming]
            if not incoming or (any(taken) if step.join == "any" else all(taken)):
                run.add(step.name)
            else:
                skipped.add(step.name)
                ended[step.name] = ()
            changed = True
    order = [step.name for step in shape.steps]
    return [name for name in order if name in run], [name for name in order if name in skipped]


@given(cases())
def test_ready_agrees_with_a_naive_reference(case: Case) -> None:
    assert case.shape.ready(case.done) == naive(case.shape, case.done)


@given(cases(), st.data())
def test_what_follows_from_one_step_is_what_was_not_known_before(case: Case, data: st.DataObject) -> None:
    run, skipped = case.shape.ready(case.done)
    done = {**case.done, **dict.fromkeys(skipped, ())}
    if not run:
        return
    step = data.draw(st.sampled_from(run))
    done[step] = case.taken[step]

    more, more_skipped = case.shape.ready(done, step)

    everything, skipped_now = naive(case.shape, done)
    assert more == [name for name in everything if name not in run]
    assert more_skipped == skipped_now


@given(flows(), st.data())
def test_step_by_step_or_from_the_beginning_the_same_is_ready(flow: Flow, data: st.DataObject) -> None:
    shape = flow.check()
    left = data.draw(outcomes(shape))
    ready, skipped = shape.ready({})
    waiting, done = [*ready], dict[str, tuple[str, ...]]()
    assert skipped == []
    while waiting:
        step = data.draw(st.sampled_from(waiting))
        waiting.remove(step)
        done[step] = left[step].taken

        more, skipped = shape.ready(done, step)
        waiting += more

        assert (sorted(waiting, key=shape.order.__getitem__), skipped) == shape.ready(done)
        assert (more, skipped) == tuple(sorted(names, key=shape.order.__getitem__) for names in (more, skipped))
        done |= dict.fromkeys(skipped, ())
    assert done.keys() == shape.order.keys(), "every step has run or is skipped"


@given(cases())
def test_ready_changes_nothing(case: Case) -> None:
    before = dict(case.done)

    assert case.shape.ready(case.done) == case.shape.ready(case.done)
    assert case.done == before


def test_a_step_waits_for_all_steps_before_it() -> None:
    shape = shape_of("ac", "bc", "cd")

    assert shape.ready({}) == (["a", "b"], [])
    assert shape.ready({"a": ("c",)}, "a") == ([], [])
    assert shape.ready({"a": ("c",), "b": ("c",)}, "b") == (["c"], [])


def test_a_step_is_skipped_when_one_edge_is_not_taken() -> None:
    shape = shape_of("ac", "bc", nodes="abc")

    assert shape.ready({"a": ("c",), "b": ()}, "b") == ([], ["c"])


def test_a_step_that_joins_any_waits_until_every_edge_is_decided() -> None:
    shape = shape_of("ac", "bc", nodes="abc", any_of="c")

    assert shape.ready({"a": ("c",)}, "a") == ([], [])
    assert shape.ready({"a": ("c",), "b": ()}, "b") == (["c"], [])
    assert shape.ready({"a": (), "b": ()}, "b") == ([], ["c"])


def test_skips_run_down_to_where_something_joins_any() -> None:
    shape = shape_of("ab", "bc", "cd", "ad", "de", nodes="abcde", any_of="d")

    assert shape.ready({"a": ("d",)}, "a") == (["d"], ["b", "c"])
    assert shape.ready({"a": ("b",)}, "a") == (["b"], [])
    assert shape.ready({"a": ()}, "a") == ([], ["b", "c", "d", "e"])


steps = st.builds(
    StepShape,
    name=st.text(min_size=1, max_size=5),
    kind=st.sampled_from(["function", "decision", "flow"]),
    join=st.sampled_from(["all", "any"]),
    timeout=st.none() | st.floats(0.1, 1e6),
    retry=st.none()
    | st.builds(Retry, maximum_attempts=st.integers(1, 9), non_retryable=st.just(("KeyError",)))
    | st.builds(Retry, initial_interval=st.floats(0, 9)),
    undo=st.booleans(),
)
groups = st.builds(
    GroupShape,
    path=st.text(max_size=3),
    flow=st.text(max_size=3),
    kind=st.sampled_from(["chain", "graph"]),
    parallel=st.none() | st.booleans(),
    max_workers=st.none() | st.integers(1, 20),
    timeout=st.none() | st.floats(0.1, 1e6),
)
shapes = st.builds(
    Shape,
    flow=st.text(max_size=5),
    kind=st.sampled_from(["chain", "graph"]),
    steps=st.lists(steps, max_size=3).map(tuple),
    edges=st.lists(
        st.builds(Edge, source=st.text(max_size=3), target=st.text(max_size=3), when=st.none() | st.text(max_size=5)),
        max_size=3,
    ).map(tuple),
    parallel=st.none() | st.booleans(),
    max_workers=st.none() | st.integers(1, 20),
    timeout=st.none() | st.floats(0.1, 1e6),
    groups=st.lists(groups, max_size=3).map(tuple),
)


def test_a_shape_that_was_written_before_there_were_groups_can_be_read() -> None:
    old = shape_of("ab").to_json()
    del old["groups"]
    old["steps"] = [{key: value for key, value in step.items() if key != "undo"} for step in old["steps"]]

    assert Shape.from_json(old) == shape_of("ab")


@given(shapes)
def test_a_shape_survives_json(shape: Shape) -> None:
    twin = Shape.from_json(json.loads(json.dumps(shape.to_json(), sort_keys=True)))

    assert twin == shape
    assert twin.fingerprint == shape.fingerprint


def what_runs(shape: Shape) -> Any:
    steps = [(step.name, step.kind, step.join, step.undo) for step in shape.steps]
    return shape.flow, steps, shape.edges


@given(shapes, shapes)
def test_the_fingerprint_tells_shapes_apart(one: Shape, other: Shape) -> None:
    assert (one.fingerprint == other.fingerprint) is (what_runs(one) == what_runs(other))


@pytest.mark.parametrize(
    "changed",
    [
        {"flow": "other"},
        {"steps": shape_of(any_of="d").steps},
        {"steps": shape_of(nodes="abc").steps},
        {"steps": shape_of(nodes="bacd").steps},
        {"steps": (StepShape(name="a", kind="decision"), *shape_of(nodes="bcd").steps)},
        {"steps": (StepShape(name="a", undo=True), *shape_of(nodes="bcd").steps)},
        {"edges": shape_of("ab").edges},
        {"edges": (Edge(source="a", target="b", when="ok=True"), *shape_of("bc").edges)},
    ],
    ids=str,
)
def test_every_part_of_a_shape_that_says_what_runs_counts_in_its_fingerprint(changed: dict[str, Any]) -> None:
    shape = shape_of("ab", "bc")

    assert replace(shape, **changed).fingerprint != shape.fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        {"timeout": 9.0},
        {"max_workers": 9},
        {"parallel": False},
        {"steps": tuple(replace(step, timeout=9.0, retry=Retry()) for step in shape_of().steps)},
        {"groups": (GroupShape(path="a", flow="inner", kind="chain", timeout=9.0, max_workers=9),)},
    ],
    ids=str,
)
def test_how_long_and_how_often_does_not_count_in_the_fingerprint(changed: dict[str, Any]) -> None:
    shape = shape_of("ab", "bc")

    assert replace(shape, **changed).fingerprint == shape.fingerprint


@given(cases())
def test_a_place_says_what_the_shape_says(case: Case) -> None:
    for name in case.shape.order:
        # whoever carries JSON may sort keys; the order of the steps must live through it
        place = Place.from_json(json.loads(json.dumps(case.shape.place(name).to_json(), sort_keys=True)))

        assert tuple(place.sources) == (*case.shape.ancestors[name], name)
        assert {step: tuple(before) for step, before in place.sources.items()} == {
            step: case.shape.sources[step] for step in place.sources
        }
        assert tuple(place.targets) == case.shape.targets[name]


@given(cases())
def test_ancestors_are_all_steps_from_which_a_way_leads(case: Case) -> None:
    def before(name: str) -> set[str]:
        direct = {edge.source for edge in case.shape.edges if edge.target == name}
        return direct.union(*map(before, direct))

    for name, ancestors in case.shape.ancestors.items():
        assert set(ancestors) == before(name)
        assert list(ancestors) == sorted(ancestors, key=case.shape.order.__getitem__)


def test_the_order_of_steps_is_not_the_order_of_definition() -> None:
    graph = Graph("g")
    for name in ("notify", "pay", "check", "validate"):
        graph.add_node(name, lambda data: None)
    graph.add_edge("validate", "check").add_edge("validate", "pay").add_edge("pay", "notify").add_edge(
        "check", "notify"
    )

    shape = graph.check()

    assert list(shape.order) == ["validate", "pay", "check", "notify"]
    assert shape.finish == ("notify",)
    assert shape.ready({"validate": ("pay", "check")}) == (["pay", "check"], [])


@given(cases())
def test_what_runs_again_is_the_step_and_all_it_comes_before(case: Case) -> None:
    for name in case.shape.order:
        after = {other for other, before in case.shape.ancestors.items() if name in before}

        assert case.shape.rerun_from(name) == {name} | after


def test_what_runs_again_goes_through_nested_flows() -> None:
    ship = Graph("ship").add_node("pack", len).add_node("label", len).add_node("send", len).add_edge("pack", "send")
    shop = Graph("shop").add_node("pay", len).add_node("ship", ship).add_node("bill", len).add_node("done", len)
    shape = shop.add_edge("pay", "ship").add_edge("pay", "bill").add_edge("ship", "done").check()

    assert shape.rerun_from("ship.pack") == {"ship.pack", "ship.send", "ship.result", "done"}
    assert shape.rerun_from("bill") == {"bill"}
    assert shape.rerun_from("pay") == set(shape.order)


@given(flows())
def test_a_step_is_in_the_nested_flows_that_its_path_names(flow: Flow) -> None:
    shape = flow.check()

    for name, around in shape.around.items():
        parts = name.split(".")
        assert [group.path for group in around] == [".".join(parts[:depth]) for depth in range(1, len(parts))]


def test_a_nested_flow_is_not_around_steps_with_a_longer_name() -> None:
    inner = Graph("inner").add_node("a", len)
    shape = Graph("g").add_node("ship", inner).add_node("ship2", inner).add_node("ship-it", len).check()

    assert {name: [group.path for group in around] for name, around in shape.around.items()} == {
        "ship.a": ["ship"],
        "ship.result": ["ship"],
        "ship2.a": ["ship2"],
        "ship2.result": ["ship2"],
        "ship-it": [],
    }


@given(cases())
def test_the_conditions_of_a_step_are_those_of_its_edges(case: Case) -> None:
    for name, targets in case.shape.conditions.items():
        assert tuple(targets) == case.shape.targets[name]
        assert targets == {edge.target: edge.when for edge in case.shape.edges if edge.source == name}


def undoing(*steps: StepShape) -> float:
    return Shape(flow="g", kind="graph", steps=steps, edges=()).longest_undoing


def test_undoing_takes_the_attempts_and_the_waits_between_them() -> None:
    retry = Retry(maximum_attempts=3, initial_interval=100, maximum_interval=100)

    assert undoing(StepShape(name="a", undo=True, timeout=10, retry=retry)) == 3 * 10 + 2 * 100
    assert undoing(StepShape(name="a", undo=True, timeout=10, retry=Retry(maximum_attempts=1))) == 10
    assert undoing(StepShape(name="a", timeout=10, retry=retry)) == 0
    assert undoing() == 0


asked = st.none() | st.floats(0, 500)


@given(st.lists(asked, max_size=9), st.floats(0, 500), st.floats(1, 3), st.floats(0, 500), st.floats(0.1, 99))
def test_undoing_takes_no_longer_whatever_servers_ask(
    waits: list[float | None], initial: float, backoff: float, longest: float, timeout: float
) -> None:
    retry = Retry(
        maximum_attempts=len(waits) + 1,
        initial_interval=initial,
        backoff_coefficient=backoff,
        maximum_interval=longest,
    )
    steps = [StepShape(name=name, undo=True, timeout=timeout, retry=retry) for name in "ab"]

    one = timeout
    for attempt, wait in enumerate(waits, 1):
        one += retry.delay(attempt, wait) + timeout
    assert undoing(*steps) >= 2 * one * 0.999_999


def test_undoing_may_wait_as_long_as_servers_ask() -> None:
    retry = Retry(maximum_attempts=3, initial_interval=1, maximum_interval=1)

    assert undoing(StepShape(name="a", undo=True, timeout=10, retry=retry)) == 3 * 10 + 2 * RETRY_AFTER_BOUND


def test_the_waits_of_very_many_attempts_are_all_counted() -> None:
    retry = Retry(maximum_attempts=10**12, initial_interval=100, maximum_interval=100)

    # and in no time
    assert undoing(StepShape(name="a", undo=True, timeout=1, retry=retry)) == pytest.approx(10**12 * 101, rel=1e-9)
