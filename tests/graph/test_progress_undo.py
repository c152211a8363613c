"""What is undone after a flow has failed, and what the result says of it."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow import Chain, FlowResult, Graph
from beluga_airflow.config import Settings
from beluga_airflow.graph import Outcome, Shape
from beluga_airflow.graph.progress import Progress
from tests.graph.test_progress import flows, outcome, played, shape_of


def undoable(*edges: str, nodes: str, undo: str) -> Shape:
    shape = shape_of(*edges, nodes=nodes)
    return replace(shape, steps=tuple(replace(step, undo=step.name in undo) for step in shape.steps))


@given(flows(), st.data())
def test_finished_steps_are_undone_in_reverse_topological_order(
    flow: tuple[Shape, dict[str, Outcome]], data: st.DataObject
) -> None:
    shape, outcomes = flow
    can = data.draw(st.sets(st.sampled_from(list(outcomes))))
    shape = replace(shape, steps=tuple(replace(step, undo=step.name in can) for step in shape.steps))
    failing = data.draw(st.sampled_from(list(outcomes)))
    ends: dict[str, Outcome | str] = {**outcomes, failing: "Broken: it broke"}

    progress, started = played(shape, ends, data)

    finished = [name for name in shape.order if name in started and name != failing]
    expected = [name for name in reversed(finished) if name in can]
    assert progress.to_undo == expected
    for step in expected:
        assert progress.to_undo[0] == step
        progress.undone[step] = None
    assert progress.to_undo == []


def test_what_could_not_be_undone_is_not_undone_again() -> None:
    progress = Progress(undoable("ab", "bc", nodes="abc", undo="ab"), {"a": outcome("b"), "b": outcome("c")})

    assert progress.to_undo == ["b", "a"]
    progress.undone["b"] = "ValueError: gone"

    assert progress.to_undo == ["a"]


def test_the_result_says_what_was_undone_and_what_could_not_be() -> None:
    progress = Progress(undoable("ab", "bc", "cd", nodes="abcd", undo="abc"))
    for step in "abc":
        assert progress.start() == [step]
        progress.finish({step: outcome("bcd")})
    progress.start()
    progress.finish({"d": "ValueError: no courier"})
    result = progress.result()
    progress.undone |= {"c": "KeyError: 'parcel'", "b": None, "a": "StepTimeout: too slow"}

    after = progress.after_undoing(result)

    assert after == replace(
        result,
        undone={"c": "KeyError: 'parcel'", "b": "undone", "a": "StepTimeout: too slow"},
        error=(
            "step 'd' failed: ValueError: no courier; step 'c' could not be undone: KeyError: 'parcel'; "
            "step 'a' could not be undone: StepTimeout: too slow"
        ),
    )
    assert (result.error, result.undone) == ("step 'd' failed: ValueError: no courier", {}), "it is another result"


def test_where_all_was_undone_the_error_stays_as_it_was() -> None:
    progress = Progress(undoable("ab", nodes="ab", undo="a"), {"a": outcome("b")})
    progress.undone["a"] = None

    after = progress.after_undoing(FlowResult(status="failed", error="step 'b' failed: ValueError"))

    assert after == FlowResult(status="failed", error="step 'b' failed: ValueError", undone={"a": "undone"})


def test_a_cancelled_flow_has_no_error_but_that_of_undoing() -> None:
    progress = Progress(undoable("ab", nodes="ab", undo="a"), {"a": outcome("b")})
    progress.undone["a"] = "KeyError: 'x'"

    after = progress.after_undoing(FlowResult(status="cancelled"))

    assert after.error == "step 'a' could not be undone: KeyError: 'x'"


def test_a_nested_flow_is_undone_before_its_steps() -> None:
    ship = Graph("shipping").add_node("pack", len, compensate=len).add_node("label", len)
    outer = Chain("outer").add_step("pay", len, compensate=len).add_step("ship", ship, compensate=len)
    kept = {step: outcome() for step in ("pay", "ship.pack", "ship.label", "ship.result")}
    progress = Progress(Settings().settle(outer.add_step("end", len).check()), kept)

    assert progress.to_undo == ["ship.result", "ship.pack", "pay"]


def test_a_nested_flow_whose_steps_are_done_has_finished_whatever_failed_beside_it() -> None:
    inner = Chain("inner").add_step("a", lambda data: None)
    graph = Graph("g").add_node("pay", inner, compensate=lambda data: None)
    graph.add_node("z", lambda data: None).add_node("after", lambda data: None)
    progress = Progress(Settings().settle(graph.add_edge("pay", "after").check()))
    assert progress.start() == ["pay.a", "z"]

    progress.finish({"z": "ValueError: no"})
    progress.finish({"pay.a": Outcome(output={}, taken=("pay.result",))})

    assert progress.start() == ["pay.result"]
    progress.finish({"pay.result": Outcome(output={}, taken=("after",))})
    assert (progress.start(), progress.to_undo) == ([], ["pay.result"])
