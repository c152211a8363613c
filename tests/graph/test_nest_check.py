"""What is refused of flows inside of flows."""

from __future__ import annotations

import pytest

from beluga_airflow import Chain, Graph, InvalidFlow
from beluga_airflow.graph import Flow
from tests.graph.random_flows import asked, nothing
from tests.graph.test_nest import around, graph_of


def refusal(flow: Flow) -> str:
    with pytest.raises(InvalidFlow) as refused:
        flow.check()
    return str(refused.value)


def test_faults_of_a_nested_flow_are_told_with_the_nodes_name() -> None:
    inner = Graph("inner", max_workers=0).add_node("a", 7)
    outer = Graph("outer", timeout=-1).add_node("ship", inner).add_node("ok", Chain("good").add_step("a", nothing))

    assert refusal(outer) == (
        "flow 'outer' cannot run: 2 faults: its timeout is -1 s, it must be above 0 and finite; "
        "step 'ship': flow 'inner' cannot run: 2 faults: max_workers is 0, it must be a whole number, 1 or more; "
        "step 'a': 7 is neither a function, nor an object with execute(inputs), nor a Decision, nor a flow"
    )


@pytest.mark.parametrize("name", ["result", "undo"])
def test_the_names_of_our_own_steps_are_reserved_at_every_depth(name: str) -> None:
    assert f"the step name {name!r} is reserved" in refusal(around(Chain("inner").add_step(name, nothing)))


def test_no_step_can_have_the_path_of_another() -> None:
    inner = Chain("inner").add_step("pack", nothing)

    assert "the step name 'ship.pack' must be" in refusal(around(inner).add_node("ship.pack", nothing))


def test_a_flow_inside_of_itself_is_refused() -> None:
    flow = Chain("loop").add_step("a", nothing)
    flow.add_step("again", flow)

    assert refusal(flow) == "flow 'loop' cannot run: step 'again' is flow 'loop', which this flow is inside of already"


def test_a_flow_inside_of_itself_through_another_is_refused_from_both_sides() -> None:
    one, two = Chain("one").add_step("a", nothing), Graph("two").add_node("b", nothing)
    one.add_step("two", two)
    two.add_node("one", one)

    assert refusal(one) == (
        "flow 'one' cannot run: step 'two': flow 'two' cannot run: "
        "step 'one' is flow 'one', which this flow is inside of already"
    )
    assert "step 'two' is flow 'two', which this flow is inside of already" in refusal(two)


def test_after_a_refusal_other_flows_are_checked_as_ever() -> None:
    flow = Chain("loop")
    flow.add_step("again", flow)
    refusal(flow)

    assert len(around(graph_of("ab")).check().steps) == 5


def test_a_refused_nested_flow_can_be_mended() -> None:
    inner = Graph("inner")
    outer = around(inner)
    assert "step 'ship': flow 'inner' cannot run: it has no steps" in refusal(outer)

    inner.add_node("a", nothing)

    assert list(outer.check().order) == ["start", "ship.a", "ship.result", "end"]


# keys that decisions read


def reads(inner: Flow, **options: tuple[str, ...]) -> Chain:
    """A flow with the input ``x`` that ends by reading ``y``."""
    outer = Chain("outer", inputs=["x"]).add_step("start", nothing, provides=[])
    return outer.add_step("ship", inner, **options).add_step("ask", asked("y"))


def test_a_key_that_a_nested_flow_provides_can_be_read_after_it() -> None:
    inner = Chain("inner").add_step("a", nothing, provides=["y"]).add_step("b", nothing, provides=["z"])

    assert len(reads(inner).check().steps) == 5


def test_a_key_that_nothing_in_a_nested_flow_provides_cannot_be_read_after_it() -> None:
    inner = Chain("inner").add_step("a", nothing, provides=["z"])

    assert "step 'ask' reads 'y', which neither the input nor an earlier step provides" in refusal(reads(inner))


def test_where_a_nested_flow_does_not_say_what_it_provides_it_may_be_anything() -> None:
    assert len(reads(Chain("inner").add_step("a", nothing)).check().steps) == 4


def test_what_the_node_says_holds_where_its_steps_do_not_say() -> None:
    inner = Chain("inner").add_step("a", nothing).add_step("b", nothing, provides=["w"])

    assert len(reads(inner, provides=("y",)).check().steps) == 5
    refused = "step 'ask' reads 'y', which neither the input nor an earlier step provides"
    assert refused in refusal(reads(inner, provides=("z",)))
    assert refused in refusal(reads(inner, provides=()))


def test_what_was_there_before_the_node_is_there_after_it() -> None:
    inner = Chain("inner").add_step("a", nothing)
    outer = Chain("outer", inputs=["x"]).add_step("start", nothing, provides=["w"])

    outer.add_step("ship", inner, provides=["y"]).add_step("ask", asked("x")).add_step("again", asked("w"))

    assert outer.check().order["again"] == 4


def test_what_nobody_said_before_the_node_is_not_made_known_by_it() -> None:
    outer = Chain("outer", inputs=["x"]).add_step("start", nothing)

    assert outer.add_step("ship", Chain("i").add_step("a", nothing), provides=["z"]).add_step("ask", asked("y")).check()


def test_a_node_cannot_provide_what_none_of_its_steps_does() -> None:
    inner = Chain("inner").add_step("a", nothing, provides=["z"])

    assert refusal(Chain("outer").add_step("ship", inner, provides=["z", "y"])) == (
        "flow 'outer' cannot run: step 'ship': it provides 'y', which no step of flow 'inner' does; they provide z"
    )
    inner = Chain("inner").add_step("deep", Graph("deep").add_node("a", nothing), provides=["z"])
    assert "step 'ship': it provides 'y', which no step of flow 'inner' does" in refusal(reads(inner, provides=("y",)))
    assert Chain("outer").add_step("ship", inner, provides="z").check()


def test_a_decision_inside_reads_what_its_neighbours_may_return_whatever_the_node_says() -> None:
    inner = Chain("inner").add_step("a", nothing).add_step("ask", asked("x"))

    assert Chain("outer", inputs=[]).add_step("ship", inner, provides=["ask"]).check()


def test_flows_are_not_nested_without_end() -> None:
    flow = Chain("f").add_step("a", nothing)
    for _ in range(2_000):
        flow = Chain("f").add_step("a", flow)

    assert refusal(flow).endswith("step 'a' is a flow inside of 50 others, which is as deep as it goes")


def test_a_decision_in_a_nested_flow_reads_what_comes_before_the_node() -> None:
    inner = Chain("inner").add_step("ask", asked("x"))

    assert len(Chain("outer", inputs=["x"]).add_step("ship", inner).check().steps) == 2
    assert (
        len(Chain("outer", inputs=[]).add_step("a", nothing, provides="x").add_step("ship", inner).check().steps) == 3
    )
    assert "step 'ship.ask' reads 'x', which" in refusal(Chain("outer", inputs=["y"]).add_step("ship", inner))


def test_what_a_nested_flow_takes_is_checked_on_its_own() -> None:
    inner = Chain("inner", inputs=["y"]).add_step("ask", asked("x"))

    assert "step 'ship': flow 'inner' cannot run: step 'ask' reads 'x'" in refusal(Chain("o").add_step("ship", inner))
