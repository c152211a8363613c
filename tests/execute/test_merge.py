from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from time import process_time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow import Graph, InvalidInput
from beluga_airflow.errors import InvalidOutput, MergeConflict
from beluga_airflow.execute import States


def graph_of(*edges: str, nodes: str = "abcd", **options: Any) -> Graph:
    graph = Graph("g", **options)
    for name in nodes:
        graph.add_node(name, lambda data: None)
    for edge in edges:
        graph.add_edge(edge[0], edge[1])
    return graph


def merge(graph: Graph, step: str, outputs: dict[str, dict[str, Any]], inputs: dict[str, Any] | None = None) -> Any:
    return States(graph, graph.check().sources, inputs or {}, outputs).before(step)


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


def naive(graph: Graph, seen: Iterable[str], outputs: Mapping[str, Mapping[str, int]]) -> dict[str, int] | None:
    """What is known once these steps have ended, as plainly as can be; None: two of them disagree."""
    before = graph.check().ancestors
    expected: dict[str, int] = {}
    for key in ("sum", "k", "l"):
        setters = [name for name in seen if key in outputs.get(name, {})]
        # the last words: of those that no other setter comes after
        last = [name for name in setters if not any(name in before[other] for other in setters)]
        values = [outputs[name][key] for name in last]
        if key != "sum" and len(set(values)) > 1:
            return None
        if values:
            expected[key] = sum(values) if key == "sum" else values[0]
    return expected


def told(ask: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What is answered; None: a conflict."""
    try:
        return ask()
    except MergeConflict:
        return None


@given(runs(), st.data())
def test_merging_agrees_with_a_naive_reference(
    run: tuple[Graph, dict[str, dict[str, int]]], data: st.DataObject
) -> None:
    graph, outputs = run
    shape = graph.check()
    # whoever finished first, and whichever step is asked about first
    shuffled = dict(data.draw(st.permutations(list(outputs.items()))))
    states = States(graph, shape.sources, {}, shuffled)

    for step in data.draw(st.permutations(list(shape.order))):
        assert told(lambda step=step: states.before(step)) == naive(graph, shape.ancestors[step], outputs)
        if step in outputs:
            assert told(lambda step=step: states.after(step)) == naive(graph, [*shape.ancestors[step], step], outputs)


@given(runs(), st.data())
def test_a_step_sees_the_same_while_the_run_goes_on(
    run: tuple[Graph, dict[str, dict[str, int]]], data: st.DataObject
) -> None:
    graph, outputs = run
    shape = graph.check()
    grown: dict[str, dict[str, int]] = {}
    growing = States(graph, shape.sources, {}, grown)
    # any order in which steps can end; one that is skipped leaves nothing
    waiting = list(shape.order)
    while waiting:
        step = data.draw(st.sampled_from([name for name in waiting if not {*shape.ancestors[name]} & {*waiting}]))
        waiting.remove(step)

        assert told(lambda step=step: growing.before(step)) == naive(graph, shape.ancestors[step], outputs)
        if step in outputs:
            after = naive(graph, [*shape.ancestors[step], step], outputs)
            assert told(lambda step=step: growing.after(step, outputs[step])) == after
            grown[step] = outputs[step]
            assert told(lambda step=step: growing.after(step)) == after


@given(runs())
def test_the_place_of_a_step_is_all_that_its_data_needs(run: tuple[Graph, dict[str, dict[str, int]]]) -> None:
    graph, outputs = run
    shape = graph.check()
    whole = States(graph, shape.sources, {}, outputs)

    for step in shape.order:
        own = {name: outputs[name] for name in shape.ancestors[step] if name in outputs}
        alone = States(graph, shape.place(step).sources, {}, own)

        assert told(lambda step=step, alone=alone: alone.before(step)) == told(lambda step=step: whole.before(step))


def test_an_attempt_does_not_change_what_the_next_one_sees() -> None:
    graph = graph_of("ab", nodes="ab")
    states = States(graph, graph.check().sources, {"x": 0}, {"a": {"x": 1}})

    assert states.after("b", {"x": 2}) == {"x": 2}
    assert states.before("b") == {"x": 1}
    assert states.after("b", {}) == {"x": 1}


def test_the_output_that_is_given_counts_and_not_the_one_that_was_kept() -> None:
    graph = graph_of("ab", nodes="ab")
    states = States(graph, graph.check().sources, {}, {"a": {"x": 1}, "b": {"x": 2}})

    assert states.after("b", {"x": 3}) == {"x": 3}
    assert states.after("b") == {"x": 2}


def test_a_step_settles_the_conflict_of_those_before_it_for_what_comes_after() -> None:
    graph = graph_of(*DIAMOND)
    states = States(graph, graph.check().sources, {}, {"b": {"k": 1}, "c": {"k": 2}})

    with pytest.raises(MergeConflict, match="steps 'b' and 'c'"):
        states.after("d", {"other": 3})
    assert states.after("d", {"k": 3}) == {"k": 3}


def test_thousands_of_skipped_steps_in_a_row_are_no_trouble() -> None:
    graph = Graph("g")
    names = [f"s{number}" for number in range(3_000)]
    for name in names:
        graph.add_node(name, lambda data: None)
    for source, target in pairwise(names):
        graph.add_edge(source, target)

    assert merge(graph, names[-1], {"s0": {"x": 1}}) == {"x": 1}


def nested(inner: Graph, **options: Any) -> Graph:
    """``start`` -> the flow as ``ship`` -> ``end``."""
    outer = Graph("outer", **options)
    outer.add_node("start", lambda data: None).add_node("ship", inner).add_node("end", lambda data: None)
    return outer.add_edge("start", "ship").add_edge("ship", "end")


def states_of(graph: Graph, outputs: dict[str, dict[str, Any]], inputs: dict[str, Any] | None = None) -> States:
    return States(graph, graph.check().sources, inputs or {}, outputs)


def test_a_nested_flow_adds_what_its_steps_returned_and_nothing_else() -> None:
    graph = nested(graph_of("ab", nodes="abc"))
    outputs = {"start": {"x": 0, "y": 0}, "ship.a": {"x": 1, "z": 1}, "ship.b": {"z": 2}, "ship.c": {"w": [3]}}
    states = states_of(graph, outputs, {"x": -1, "v": -1})

    assert states.added("ship.result") == {"x": 1, "z": 2, "w": [3]}
    assert states.before("ship.result") == {"x": 1, "y": 0, "z": 2, "w": [3], "v": -1}


def test_what_a_nested_flow_adds_is_a_copy() -> None:
    outputs: dict[str, dict[str, Any]] = {"ship.a": {"x": [1]}}
    states = states_of(nested(graph_of(nodes="a")), outputs)

    states.added("ship.result")["x"].append(2)

    assert outputs == {"ship.a": {"x": [1]}}


def test_a_nested_flow_whose_steps_returned_nothing_adds_nothing() -> None:
    assert states_of(nested(graph_of("ab", nodes="ab")), {"start": {"x": 1}, "ship.a": {}}).added("ship.result") == {}


def test_a_flow_inside_of_a_nested_flow_belongs_to_both() -> None:
    outer = nested(nested(graph_of(nodes="a")))
    outputs = {"ship.start": {"s": 1}, "ship.ship.a": {"a": 2}, "ship.ship.result": {"a": 2}, "ship.end": {"e": 3}}
    states = states_of(outer, {"start": {"o": 0}, **outputs})

    assert states.added("ship.ship.result") == {"a": 2}
    assert states.added("ship.result") == {"s": 1, "a": 2, "e": 3}


def test_a_name_that_begins_like_that_of_the_nested_flow_is_another() -> None:
    graph = Graph("g").add_node("ship", graph_of(nodes="a")).add_node("ship-b", lambda data: None)
    graph.add_node("ship2", graph_of(nodes="a")).add_edge("ship-b", "ship").add_edge("ship2", "ship")
    outputs = {"ship-b": {"b": 1}, "ship2.a": {"two": 1}, "ship2.result": {"two": 1}, "ship.a": {"a": 1}}

    assert states_of(graph, outputs).added("ship.result") == {"a": 1}


def test_finish_points_of_a_nested_flow_must_agree_or_have_a_reducer() -> None:
    outputs = {"ship.a": {"k": 1}, "ship.b": {"k": 2}}

    with pytest.raises(MergeConflict, match=r"'ship.a' and 'ship.b' of flow 'g' run side by side and set 'k'"):
        states_of(nested(graph_of(nodes="ab")), outputs).added("ship.result")
    reduced = states_of(nested(graph_of(nodes="ab", reducers={"k": lambda one, two: one + two})), outputs)
    assert reduced.added("ship.result") == {"k": 3}


@pytest.mark.parametrize(
    ("outputs", "flow"),
    [
        ({"deep.mid.one": {"k": 1}, "deep.mid.two": {"k": 2}}, "inner"),
        ({"deep.mid.one": {"k": 1}, "deep.mid.result": {"k": 1}, "deep.side": {"k": 2}}, "middle"),
        ({"deep.side": {"k": 1}, "deep.result": {"k": 1}, "beside": {"k": 2}}, "outer"),
    ],
)
def test_a_conflict_names_the_flow_whose_reducers_would_settle_it(
    outputs: dict[str, dict[str, Any]], flow: str
) -> None:
    def flows(**reducers: Any) -> Graph:
        inner = Graph("inner", **reducers.get("inner", {}))
        inner.add_node("one", lambda data: None).add_node("two", lambda data: None)
        middle = Graph("middle", **reducers.get("middle", {}))
        middle.add_node("mid", inner).add_node("side", lambda data: None)
        outer = Graph("outer", **reducers.get("outer", {})).add_node("deep", middle)
        outer.add_node("beside", lambda data: None).add_node("end", lambda data: None)
        return outer.add_edge("deep", "end").add_edge("beside", "end")

    with pytest.raises(MergeConflict) as conflict:
        states_of(flows(), outputs).before("end")

    first, *_, other = outputs if flow == "inner" else [*outputs][1:]
    assert str(conflict.value) == (
        f"steps {first!r} and {other!r} of flow {flow!r} run side by side and set 'k' to different values; "
        "let one of them set another key, or give the flow reducers={'k': ...}"
    )
    mended = flows(**{flow: {"reducers": {"k": lambda one, two: one + two}}})
    assert states_of(mended, outputs).before("end") == {"k": 3}


def test_where_the_code_has_no_such_nested_flow_any_more_its_conflict_names_the_outer_one() -> None:
    began = nested(graph_of(nodes="ab", reducers={"k": lambda one, two: one + two}))
    now = Graph("outer").add_node("start", lambda data: None)

    states = States(now, began.check().sources, {}, {"ship.a": {"k": 1}, "ship.b": {"k": 2}})

    with pytest.raises(MergeConflict, match=r"'ship.a' and 'ship.b' of flow 'outer' run side by side"):
        states.added("ship.result")


def test_what_a_nested_flow_has_reduced_is_reduced_no_second_time() -> None:
    graph = nested(graph_of(nodes="ab", reducers={"k": lambda one, two: one + two}))
    outputs = {"ship.a": {"k": 1}, "ship.b": {"k": 2}, "ship.result": {"k": 3}}

    assert states_of(graph, outputs).before("end") == {"k": 3}


def test_a_reducer_holds_for_what_is_side_by_side_in_its_own_flow() -> None:
    plus = {"k": lambda one, two: one + two}
    inside = {"ship.a": {"k": 1}, "ship.b": {"k": 2}}
    outer = Graph("outer", reducers=plus).add_node("ship", graph_of(nodes="ab")).add_node("end", lambda data: None)
    with pytest.raises(MergeConflict):
        states_of(outer.add_edge("ship", "end"), inside).added("ship.result")

    beside = nested(graph_of("ab", nodes="ab", reducers=plus)).add_node("other", lambda data: None)
    with pytest.raises(MergeConflict):
        states_of(beside.add_edge("other", "end"), {"other": {"k": 5}, "ship.result": {"k": 3}}).before("end")


def test_a_reducer_of_the_outer_flow_takes_what_the_nested_flow_comes_to() -> None:
    outer = Graph("outer", reducers={"k": lambda one, two: one * two}).add_node("beside", lambda data: None)
    outer.add_node("ship", graph_of("ab", nodes="ab")).add_node("end", lambda data: None)
    outer.add_edge("beside", "end").add_edge("ship", "end")
    outputs = {"beside": {"k": 5}, "ship.a": {"k": 2}, "ship.b": {"k": 3}, "ship.result": {"k": 3}}

    assert states_of(outer, outputs).before("end") == {"k": 15}


@given(runs(), st.data())
def test_the_end_of_a_nested_flow_changes_no_data(
    run: tuple[Graph, dict[str, dict[str, int]]], data: st.DataObject
) -> None:
    inner, outputs = run
    graph = nested(inner)
    start = data.draw(st.dictionaries(st.sampled_from(["sum", "k", "l", "m"]), st.integers(0, 2), max_size=3))
    states = states_of(graph, {"start": start, **{f"ship.{name}": output for name, output in outputs.items()}})
    expected = naive(inner, inner.check().order, outputs)

    added = told(lambda: states.added("ship.result"))

    assert added == expected
    if added is not None:
        assert states.after("ship.result", added) == states.before("ship.result") == start | added


def test_many_steps_side_by_side_are_merged_in_no_time() -> None:
    names = [f"s{number}" for number in range(600)]
    graph = Graph("wide", reducers={"sum": lambda one, two: one + two}).add_node("end", lambda data: None)
    for name in names:
        graph.add_node(name, lambda data: None).add_edge(name, "end")
    states = states_of(graph, {name: {"sum": 1, "same": True} for name in names})

    start = process_time()
    assert states.before("end") == {"sum": 600, "same": True}
    assert process_time() - start < 5, "it took a minute when every branch was looked at anew"
