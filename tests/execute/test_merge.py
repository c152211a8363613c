from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow import Graph, InvalidInput
from beluga_airflow.errors import InvalidOutput, MergeConflict
from beluga_airflow.execute.merge import merged


def graph_of(*edges: str, nodes: str = "abcd", **options: Any) -> Graph:
    graph = Graph("g", **options)
    for name in nodes:
        graph.add_node(name, lambda data: None)
    for edge in edges:
        graph.add_edge(edge[0], edge[1])
    return graph


def merge(graph: Graph, step: str, outputs: dict[str, dict[str, Any]], inputs: dict[str, Any] | None = None) -> Any:
    return merged(graph, graph.check().places[step], inputs or {}, outputs)


DIAMOND = ("ab", "ac", "bd", "cd")


def test_later_steps_replace_what_earlier_ones_set() -> None:
    graph = graph_of("ab", "bc", "cd")
    outputs = {"a": {"x": "a", "y": "a"}, "b": {"x": "b"}, "c": {"z": "c"}}

    assert merge(graph, "d", outputs, {"x": 0, "w": 0}) == {"x": "b", "y": "a", "z": "c", "w": 0}
    assert merge(graph, "b", {"a": outputs["a"]}, {"x": 0, "w": 0}) == {"x": "a", "y": "a", "w": 0}
    assert merge(graph, "a", {}, {"x": 0}) == {"x": 0}


def test_steps_beside_each_other_may_set_different_keys_or_equal_values() -> None:
    graph = graph_of(*DIAMOND)

    state = merge(graph, "d", {"b": {"b": 1, "same": [1]}, "c": {"c": 2, "same": [1]}})

    assert state == {"b": 1, "c": 2, "same": [1]}


def test_a_conflict_names_both_steps_the_key_and_the_way_out() -> None:
    graph = graph_of(*DIAMOND)

    with pytest.raises(MergeConflict) as conflict:
        merge(graph, "d", {"a": {"k": 0}, "b": {"k": 1}, "c": {"k": 2}})

    assert str(conflict.value) == (
        "steps 'b' and 'c' of flow 'g' run side by side and set 'k' to different values; "
        "let one of them set another key, or give the flow reducers={'k': ...}"
    )
    assert isinstance(conflict.value, InvalidInput), "no other attempt can help"


def test_what_a_branch_left_as_it_was_does_not_conflict() -> None:
    graph = graph_of(*DIAMOND)

    assert merge(graph, "d", {"a": {"k": 0}, "b": {"k": 1}, "c": {}}) == {"k": 1}


def test_a_step_behind_the_branches_settles_their_conflict_for_what_follows() -> None:
    graph = graph_of("ab", "ac", "bd", "cd", "de", nodes="abcde", reducers={"k": max})

    assert merge(graph, "e", {"b": {"k": 1}, "c": {"k": 2}, "d": {"k": 0}}) == {"k": 0}


def test_skipped_steps_are_passed_over() -> None:
    assert merge(graph_of(*DIAMOND), "d", {"a": {"k": 0}, "c": {"k": 2}}) == {"k": 2}


def test_a_reducer_takes_values_in_topological_order() -> None:
    # defined in another order than they stand
    graph = graph_of("zx", "zb", "zy", "xe", "be", "ye", nodes="ezybx", reducers={"k": lambda one, two: one + two})

    assert merge(graph, "e", {"x": {"k": ["x"]}, "b": {"k": ["b"]}, "y": {"k": ["y"]}}) == {"k": ["y", "b", "x"]}


def test_a_reducer_gets_copies() -> None:
    def grow(one: list[int], two: list[int]) -> list[int]:
        one.extend(two)
        return one

    graph = graph_of(*DIAMOND, reducers={"k": grow})
    outputs = {"b": {"k": [1]}, "c": {"k": [2]}}

    assert merge(graph, "d", outputs) == merge(graph, "d", outputs) == {"k": [1, 2]}
    assert outputs == {"b": {"k": [1]}, "c": {"k": [2]}}


def test_what_a_reducer_returns_must_be_json() -> None:
    graph = graph_of(*DIAMOND, reducers={"k": lambda one, two: {one, two}})

    with pytest.raises(InvalidOutput, match="what the reducer of 'k' returned is a set"):
        merge(graph, "d", {"b": {"k": 1}, "c": {"k": 2}})


def test_the_state_is_a_deep_copy() -> None:
    graph = graph_of("ab", nodes="ab")
    inputs: dict[str, Any] = {"list": [{"x": 1}]}
    outputs: dict[str, dict[str, Any]] = {"a": {"made": {"y": [2]}}}

    state = merge(graph, "b", outputs, inputs)
    state["list"][0]["x"] = 9
    state["made"]["y"].append(9)

    assert inputs == {"list": [{"x": 1}]}
    assert outputs == {"a": {"made": {"y": [2]}}}


@st.composite
def runs(draw: st.DrawFn) -> tuple[Graph, dict[str, dict[str, int]]]:
    size = draw(st.integers(2, 7))
    names = [str(number) for number in range(size)]
    graph = Graph("g", reducers={"sum": lambda one, two: one + two})
    for name in names:
        graph.add_node(name, lambda data: None)
    for i in range(size):
        for j in range(i + 1, size):
            if draw(st.booleans()):
                graph.add_edge(names[i], names[j])
    output = st.dictionaries(st.sampled_from(["sum", "k", "l"]), st.integers(0, 2), max_size=3)
    outputs = {name: draw(output) for name in names if draw(st.integers(0, 4))}
    return graph, outputs


@given(runs(), st.data())
def test_merging_agrees_with_a_naive_reference(
    run: tuple[Graph, dict[str, dict[str, int]]], data: st.DataObject
) -> None:
    graph, outputs = run
    shape = graph.check()
    step = data.draw(st.sampled_from(list(shape.order)))
    seen = [*shape.ancestors[step], step]
    expected: dict[str, int] = {}
    conflict = False
    for key in ("sum", "k", "l"):
        setters = [name for name in seen if key in outputs.get(name, {})]
        # the last words: of those that no other setter comes after
        last = [name for name in setters if not any(name in shape.ancestors[other] for other in setters)]
        values = [outputs[name][key] for name in last]
        if values:
            expected[key] = sum(values) if key == "sum" else values[0]
            conflict = conflict or (key != "sum" and len(set(values)) > 1)
    # whoever finished first
    shuffled = dict(data.draw(st.permutations(list(outputs.items()))))

    if conflict:
        with pytest.raises(MergeConflict):
            merge(graph, step, shuffled)
    else:
        assert merge(graph, step, shuffled) == expected
