from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from enum import StrEnum
from typing import Any

import pytest

from beluga_airflow import Chain, Decision, Graph, InvalidFlow, Retry
from beluga_airflow.graph.flow import Flow, Link


def nothing(data: dict[str, Any]) -> None:
    return None


def diamond() -> Graph:
    graph = Graph("diamond")
    for name in "abcd":
        graph.add_node(name, nothing)
    return graph.add_edge("a", "b").add_edge("a", "c").add_edge("b", "d").add_edge("c", "d")


def test_a_chain_is_a_graph_of_one_line() -> None:
    chain = Chain("line").add_step("c", nothing).add_step("a", nothing).add_step("b", nothing)

    shape = chain.check()

    assert (shape.kind, chain.step_count) == ("chain", 3)
    assert [step.name for step in shape.steps] == ["c", "a", "b"]
    assert [(edge.source, edge.target) for edge in shape.edges] == [("c", "a"), ("a", "b")]
    assert not hasattr(chain, "add_edge")


def test_step_count_counts_before_and_after_the_check() -> None:
    graph = diamond()
    assert graph.step_count == 4

    graph.check()

    assert graph.step_count == 4


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda graph: graph.add_node("e", nothing), "adding step 'e'"),
        (lambda graph: graph.add_edge("b", "c"), "adding edge 'b' -> 'c'"),
        (lambda graph: graph.set_entry_point("a"), "setting entry points"),
        (lambda graph: graph.set_finish_point(["d"]), "setting finish points"),
    ],
)
def test_a_checked_flow_is_frozen(change: Callable[[Graph], Any], what: str) -> None:
    graph = diamond()
    shape = graph.check()

    with pytest.raises(InvalidFlow, match="flow 'diamond' is in use and cannot be changed any more") as refused:
        change(graph)

    assert what in str(refused.value)
    assert graph.check() is shape


def test_a_checked_chain_is_frozen() -> None:
    chain = Chain("line").add_step("a", nothing)
    chain.check()

    with pytest.raises(InvalidFlow, match="adding step 'b'"):
        chain.add_step("b", nothing)

    assert chain.definition[1] == ()


def test_looking_at_the_steps_checks_and_freezes() -> None:
    graph = diamond()

    assert list(graph.steps) == ["a", "b", "c", "d"]

    with pytest.raises(InvalidFlow, match="in use"):
        graph.add_node("e", nothing)


def test_a_refused_flow_can_be_mended() -> None:
    graph = diamond().add_edge("d", "a")
    with pytest.raises(InvalidFlow, match="circle"):
        graph.check()
    chain = Chain("line")
    with pytest.raises(InvalidFlow, match="no steps"):
        chain.check()

    chain.add_step("a", nothing)

    assert [step.name for step in chain.check().steps] == ["a"]


def test_what_the_author_leaves_open_stays_open() -> None:
    shape = diamond().check()

    assert (shape.parallel, shape.max_workers, shape.timeout) == (None, None, None)
    assert all((step.timeout, step.retry) == (None, None) for step in shape.steps)


def test_durations_become_seconds() -> None:
    graph = Graph("g", timeout=timedelta(minutes=2)).add_node("a", nothing, timeout=timedelta(milliseconds=1500))

    shape = graph.check()

    assert (shape.timeout, shape.by_name["a"].timeout) == (120.0, 1.5)


def test_the_retry_of_a_step_goes_before_that_of_its_flow() -> None:
    own, of_flow = Retry(maximum_attempts=9), Retry(maximum_attempts=2)
    chain = Chain("line", retry=of_flow).add_step("a", nothing, retry=own).add_step("b", nothing)

    shape = chain.check()

    assert (shape.by_name["a"].retry, shape.by_name["b"].retry) == (own, of_flow)


def test_one_name_may_be_given_as_a_text() -> None:
    graph = Graph("g", inputs="order_id").add_node("validate", nothing, provides="valid")
    graph.add_node("decide", Decision("ok?", output_type=bool, reads=["order_id", "valid"]))
    graph.add_edge("validate", "decide").set_entry_point("validate").set_finish_point("decide")

    graph.check()

    assert (graph.inputs, graph.steps["validate"].provides) == (("order_id",), ("valid",))
    assert (graph.entry, graph.finish) == (("validate",), ("decide",))


def test_a_decision_answers_under_the_name_of_its_step_unless_told_otherwise() -> None:
    one = Decision("ok?", output_type=bool, reads=["x"])
    chain = Chain("line").add_step("first", one).add_step("second", Decision("?", output_type=bool, reads=["x"]))
    chain.add_step("third", Decision("?", output_type=bool, reads=["x"], output_key="third_answer"))

    assert [step.node.output_key for step in chain.steps.values()] == ["first", "second", "third_answer"]
    assert [step.provides for step in chain.steps.values()] == [("first",), ("second",), ("third_answer",)]
    assert one.output_key is None, "the author's object may be used in another flow"
    assert {step.kind for step in chain.check().steps} == {"decision"}


class Tier(StrEnum):
    GOLD = "gold"


@pytest.mark.parametrize(
    ("when", "output", "taken"),
    [
        (None, {}, True),
        ({}, {}, True),
        ({"ok": True}, {"ok": True, "more": 1}, True),
        ({"ok": True}, {"ok": False}, False),
        ({"ok": None}, {}, False),
        ({"ok": None}, {"ok": None}, True),
        ({"a": 1, "b": [2, {"c": 3}]}, {"a": 1, "b": [2, {"c": 3}]}, True),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, False),
        ({"tier": Tier.GOLD}, {"tier": "gold"}, True),
        (lambda output: output["value"] > 10, {"value": 11}, True),
        (lambda output: output.get("value"), {"value": ""}, False),
    ],
)
def test_an_edge_is_taken_by_its_source_steps_output(when: Any, output: dict[str, Any], taken: bool) -> None:
    assert Link(source="a", target="b", when=when).taken(output) is taken


def test_the_text_of_a_condition_travels_in_the_shape() -> None:
    def is_large(output: dict[str, Any]) -> bool:
        return bool(output)

    class Larger:
        def __call__(self, output: dict[str, Any]) -> bool:
            return bool(output)

    graph = Graph("g")
    for name in "abcd":
        graph.add_node(name, nothing)
    graph.add_edge("a", "b", when={"ok": True, "tier": "gold"}).add_edge("b", "c", when=is_large)
    graph.add_edge("c", "d", when=Larger())

    assert [edge.when for edge in graph.check().edges] == ["ok=True, tier='gold'", "is_large", "predicate"]


class OwnGraph(Graph):
    def __init__(self) -> None:
        super().__init__("own")


def made_by_a_function() -> Flow:
    return Chain("made")


def test_a_flow_knows_the_module_it_was_made_in() -> None:
    assert {Chain("c").module, Graph("g").module, OwnGraph().module, made_by_a_function().module} == {__name__}


def test_airflow_copies_a_checked_flow_as_itself() -> None:
    graph = diamond()
    graph.check()

    assert copy.deepcopy({"flow": graph})["flow"] is graph


def test_a_copy_of_an_open_flow_is_another_flow() -> None:
    graph = diamond()

    twin = copy.deepcopy(graph)
    twin.add_node("e", nothing).add_edge("d", "e")

    assert (graph.step_count, twin.step_count) == (4, 5)
    assert len(graph.check().edges) == 4
    assert len(twin.check().edges) == 5
    assert twin.steps["a"].node is nothing


def undo(data: dict[str, Any]) -> None:
    return None


def test_what_undoes_a_step_is_kept_with_it() -> None:
    chain = Chain("line").add_step("a", nothing, compensate=undo).add_step("b", nothing)
    graph = Graph("g").add_node("a", nothing, compensate=undo).add_node("b", nothing)
    graph.add_node("c", Decision("?", output_type=bool, reads=["x"]), compensate=undo)

    assert [step.compensate for step in chain.steps.values()] == [undo, None]
    assert [step.compensate for step in graph.steps.values()] == [undo, None, undo]
    assert [step.undo for step in graph.check().steps] == [True, False, True]


def test_a_nested_flow_counts_as_one_step_of_its_author() -> None:
    outer = Chain("outer").add_step("in", diamond()).add_step("end", nothing)

    assert (outer.step_count, len(outer.steps), len(outer.check().steps)) == (2, 6, 6)
    assert [step.name for step in outer.definition[0]] == ["in", "end"]


def test_a_flow_is_laid_flat_once() -> None:
    outer = Chain("outer").add_step("in", diamond())

    assert outer.flat is outer.flat
    assert list(outer.flat.by_name) == ["in.a", "in.b", "in.c", "in.d", "in.result"]
    assert [link.target for link in outer.flat.links_from["in.a"]] == ["in.b", "in.c", "in.result"]


def test_the_definition_of_a_flow_with_nothing_in_it_is_its_own() -> None:
    graph = diamond()

    flat = graph.flat

    assert (flat.steps, flat.links) == graph.definition
    assert (flat.groups, flat.reducers) == ((), {"": {}})


def test_a_mermaid_chart_is_of_the_checked_flow() -> None:
    graph = diamond()

    assert graph.to_mermaid().startswith("flowchart TD\n")

    with pytest.raises(InvalidFlow, match="in use"):
        graph.add_node("e", nothing)
    with pytest.raises(InvalidFlow, match="it has no steps"):
        Graph("empty").to_mermaid()


def test_airflow_copies_a_flow_inside_of_a_checked_one_as_itself() -> None:
    inner = diamond()
    outer = Chain("outer").add_step("in", inner)
    outer.check()

    assert copy.deepcopy({"inner": inner})["inner"] is inner
    assert copy.deepcopy(outer).steps["in.a"].node is nothing


def test_a_copy_of_an_open_flow_can_be_checked_with_its_flows() -> None:
    outer = Chain("outer").add_step("in", diamond())

    twin = copy.deepcopy(outer).add_step("end", nothing)

    assert list(twin.steps) == ["in.a", "in.b", "in.c", "in.d", "in.result", "end"]
    assert list(outer.steps) == ["in.a", "in.b", "in.c", "in.d", "in.result"]
