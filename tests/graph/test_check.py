from __future__ import annotations

import math
from collections.abc import Callable
from datetime import date, timedelta
from decimal import Decimal
from enum import Enum
from graphlib import CycleError, TopologicalSorter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow import Chain, Decision, Graph, InvalidFlow, Retry, StepContext
from beluga_airflow.graph.check import function_of, wants_context
from beluga_airflow.graph.flow import Flow


def nothing(data: dict[str, Any]) -> None:
    return None


def graph_of(*edges: str, nodes: str = "abc", **options: Any) -> Graph:
    graph = Graph("g", **options)
    for name in nodes:
        graph.add_node(name, nothing)
    for edge in edges:
        graph.add_edge(edge[0], edge[1])
    return graph


def chain_of(node: Any, name: Any = "a", **options: Any) -> Chain:
    return Chain("f").add_step(name, node, **options)


def with_condition(when: Any) -> Graph:
    return graph_of("ab", nodes="abc").add_edge("b", "c", when=when)


class Tier(Enum):
    GOLD = "gold"


class Callless:
    execute = "not a function"


class Step:
    def execute(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs


def faults_of(flow: Flow) -> str:
    with pytest.raises(InvalidFlow) as refused:
        flow.check()
    message = str(refused.value)
    assert message.startswith(f"flow {flow.name!r} cannot run: ")
    return message


NAME_RULE = "must be 1 to 100 letters, digits, '-' or '_'"

REFUSED: dict[str, tuple[Callable[[], Flow], str]] = {
    # names
    "empty name": (lambda: chain_of(nothing, ""), f"the step name '' {NAME_RULE}"),
    "name of blanks": (lambda: chain_of(nothing, " "), f"the step name ' ' {NAME_RULE}"),
    "name with a slash": (lambda: chain_of(nothing, "a/b"), f"the step name 'a/b' {NAME_RULE}"),
    "name with a dot": (lambda: chain_of(nothing, "a.b"), f"the step name 'a.b' {NAME_RULE}"),
    "name with a line break": (lambda: chain_of(nothing, "a\n"), rf"the step name 'a\n' {NAME_RULE}"),
    "name that is too long": (lambda: chain_of(nothing, "a" * 101), NAME_RULE),
    "name that is no text": (lambda: chain_of(nothing, None), f"the step name None {NAME_RULE}"),
    "reserved name": (lambda: chain_of(nothing, "result"), "the step name 'result' is reserved, choose another"),
    "other reserved name": (lambda: chain_of(nothing, "undo"), "the step name 'undo' is reserved, choose another"),
    "duplicate name": (lambda: graph_of(nodes="aba"), "step 'a' is defined 2 times"),
    "duplicate in a chain": (lambda: chain_of(nothing).add_step("a", nothing), "step 'a' is defined 2 times"),
    "empty name of the flow": (lambda: Chain("").add_step("a", nothing), f"its name '' {NAME_RULE}"),
    "no steps": (lambda: Graph("g"), "it has no steps"),
    # edges
    "edge from nowhere": (
        lambda: graph_of("ab", "xc"),
        "the edge 'x' -> 'c' names the step 'x', which does not exist",
    ),
    "edge to nowhere": (lambda: graph_of("ax"), "the edge 'a' -> 'x' names the step 'x', which does not exist"),
    "self edge": (lambda: graph_of("ab", "bb"), "the edge 'b' -> 'b' leads back to its own step"),
    "duplicate edge": (lambda: graph_of("ab", "bc", "ab"), "the edge 'a' -> 'b' is defined 2 times"),
    "cycle": (
        lambda: graph_of("ab", "bc", "cd", "db", nodes="abcd"),
        "its edges go round in a circle, so that these steps can never start: b, c, d",
    ),
    "condition that is neither": (
        lambda: with_condition("ok"),
        "the edge 'b' -> 'c': when='ok' is neither a mapping nor a predicate",
    ),
    "condition on an enum": (lambda: with_condition({"tier": Tier.GOLD}), "GOLD: 'gold'>} can never hold"),
    "condition on a decimal": (
        lambda: with_condition({"sum": Decimal(1)}),
        "when={'sum': Decimal('1')} can never hold",
    ),
    "condition on a date": (lambda: with_condition({"day": date(2025, 1, 2)}), "can never hold"),
    "condition on a tuple": (lambda: with_condition({"ids": (1, 2)}), "when={'ids': (1, 2)} can never hold"),
    "condition on NaN": (lambda: with_condition({"sum": math.nan}), "can never hold"),
    # points
    "unreachable step": (
        lambda: graph_of("ab").set_entry_point("a"),
        "step 'c' is unreachable: no edge leads into it and it is not named as entry point",
    ),
    "entry that is none": (
        lambda: graph_of("ab", "bc").set_entry_point(["a", "b"]),
        "'b' is named as entry point, but an edge leads into it",
    ),
    "entry that is not there": (
        lambda: graph_of("ab", "bc").set_entry_point(["a", "x"]),
        "the entry point 'x' does not exist",
    ),
    "finish that is none": (
        lambda: graph_of("ab", "bc").set_finish_point(["b", "c"]),
        "'b' is named as finish point, but an edge leads out of it",
    ),
    "finish that is not there": (
        lambda: graph_of("ab", "bc").set_finish_point(["c", "x"]),
        "the finish point 'x' does not exist",
    ),
    "end that is not named": (
        lambda: graph_of("ab", "ac").set_finish_point("b"),
        "no edge leads out of step 'c' and it is not named as finish point",
    ),
    # bounds
    "no workers": (lambda: graph_of(max_workers=0), "max_workers is 0, it must be a whole number, 1 or more"),
    "negative workers": (lambda: graph_of(max_workers=-1), "max_workers is -1, it must be a whole number, 1 or more"),
    "half a worker": (lambda: graph_of(max_workers=2.5), "max_workers is 2.5, it must be a whole number, 1 or more"),
    "no time for the flow": (lambda: graph_of(timeout=0), "its timeout is 0 s, it must be above 0 and finite"),
    "negative time for the flow": (
        lambda: graph_of(timeout=timedelta(seconds=-1)),
        "its timeout is -1 s, it must be above 0 and finite",
    ),
    "endless time for the flow": (lambda: graph_of(timeout=math.inf), "its timeout is inf s"),
    "no time for a step": (
        lambda: chain_of(nothing, timeout=0.0),
        "the timeout of step 'a' is 0 s, it must be above 0 and finite",
    ),
    "no number for a step": (lambda: chain_of(nothing, timeout=math.nan), "the timeout of step 'a' is nan s"),
    "unknown join": (
        lambda: Graph("g").add_node("a", nothing, join="some"),  # type: ignore[arg-type]
        "the join of step 'a' is 'some', it must be 'all' or 'any'",
    ),
    "no attempts": (
        lambda: chain_of(nothing, retry=Retry(maximum_attempts=0)),
        "step 'a': retry: maximum_attempts is 0, it must be a whole number, 1 or more",
    ),
    "no attempts for the flow": (
        lambda: Chain("f", retry=Retry(maximum_attempts=0)).add_step("a", nothing),
        "the retry of the flow: maximum_attempts is 0, it must be a whole number, 1 or more",
    ),
    "reducer that is none": (
        lambda: graph_of(reducers={"total": "sum"}),
        "the reducer of 'total' is 'sum', it must be a function of two values",
    ),
    # what runs
    "a class": (lambda: chain_of(Step), "step 'a': Step is a class, give an instance of it"),
    "a number": (lambda: chain_of(7), "step 'a': 7 is neither a function, nor an object with execute(inputs)"),
    "an object that cannot execute": (lambda: chain_of(Callless()), "is neither a function, nor an object"),
    "a flow": (lambda: chain_of(Chain("inner")), "is neither a function, nor an object"),
    "takes nothing": (lambda: chain_of(lambda: None), "must take the data, and at most a context beside it"),
    "takes too much": (lambda: chain_of(lambda data, more: None), "must take the data, and at most a context"),
    "takes it by keyword": (lambda: chain_of(lambda *, data: None), "must take the data, and at most a context"),
    "a faulty decision": (
        lambda: chain_of(Decision("", choices=["yes", "no"], reads=["x"])),
        "step 'a': its question is empty",
    ),
    # keys that nobody provides
    "read of a key that is nowhere": (
        lambda: Chain("f", inputs=["x"]).add_step("a", Decision("?", output_type=bool, reads=["x", "y"])),
        "step 'a' reads 'y', which neither the input nor an earlier step provides",
    ),
    "read of a key that comes later": (
        lambda: (
            Chain("f", inputs=["x"])
            .add_step("a", Decision("?", output_type=bool, reads=["y"]))
            .add_step("b", nothing, provides=["y"])
        ),
        "step 'a' reads 'y'",
    ),
    "read of a key of a step beside it": (
        lambda: (
            Graph("f", inputs=["x"])
            .add_node("a", nothing, provides=["y"])
            .add_node("b", Decision("?", output_type=bool, reads=["y"]))
        ),
        "step 'b' reads 'y'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_when_checked(case: str) -> None:
    build, message = REFUSED[case]

    assert message in faults_of(build())


def test_all_faults_are_told_at_once() -> None:
    graph = Graph("g", max_workers=0, timeout=-1).add_node("", nothing).add_node("b", 7).add_edge("b", "x")

    message = faults_of(graph)

    assert "cannot run: 5 faults: " in message
    assert len(message.split("; ")) == 5


@pytest.mark.parametrize("name", ["a", "A-1_b", "a" * 100, "1", "_"])
def test_good_names_are_taken(name: str) -> None:
    assert [step.name for step in chain_of(nothing, name).check().steps] == [name]


class WithContext:
    def execute(self, inputs: dict[str, Any], context: StepContext) -> dict[str, Any]:
        return {**inputs, "key": context.idempotency_key}


class Called:
    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return data


@pytest.mark.parametrize(
    "node",
    [
        nothing,
        Step(),
        WithContext(),
        Called(),
        lambda data, context: None,
        lambda data, *, context: None,
        lambda data, context=None, more=1: None,
        lambda context: None,
        lambda *args: None,
        len,
    ],
    ids=str,
)
def test_whatever_takes_the_data_is_a_step(node: Any) -> None:
    assert chain_of(node).check().by_name["a"].kind == "function"


@pytest.mark.parametrize(
    ("function", "wants"),
    [
        (lambda data: None, False),
        (lambda data, context: None, True),
        (lambda data, *, context=None: None, True),
        (lambda context: None, False),
        (lambda **context: None, False),
        (WithContext().execute, True),
        (function_of(WithContext()), True),
        (function_of(Step()), False),
    ],
)
def test_the_context_is_asked_for_by_name(function: Callable[..., Any], wants: bool) -> None:
    assert wants_context(function) is wants


def reading(key: str) -> Decision:
    return Decision("?", output_type=bool, reads=[key])


@pytest.mark.parametrize(
    "flow",
    [
        Chain("f", inputs=["x"]).add_step("a", reading("x")),
        Chain("f").add_step("a", reading("y")),
        Chain("f", inputs=[]).add_step("a", nothing, provides=["y"]).add_step("b", reading("y")),
        Chain("f", inputs=["x"]).add_step("first", reading("x")).add_step("second", reading("first")),
        Chain("f", inputs=["x"])
        .add_step("a", nothing, provides=["y"])
        .add_step("b", nothing, provides=[])
        .add_step("c", reading("y")),
        # nobody said what the step before returns, so it may be this
        Chain("f", inputs=["x"]).add_step("a", nothing).add_step("b", reading("y")),
        graph_of("ac", inputs=["x"]).add_node("d", reading("y")).add_edge("c", "d"),
    ],
)
def test_keys_that_may_be_there_can_be_read(flow: Flow) -> None:
    assert len(flow.check().steps) == flow.step_count


@st.composite
def any_edges(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    size = draw(st.integers(1, 7))
    pairs = [(source, target) for source in range(size) for target in range(size) if source != target]
    return size, draw(st.lists(st.sampled_from(pairs), unique=True, max_size=12)) if pairs else []


@given(any_edges())
def test_a_graph_is_refused_exactly_when_it_goes_round_and_ordered_by_definition_otherwise(
    drawn: tuple[int, list[tuple[int, int]]],
) -> None:
    size, edges = drawn
    graph = Graph("g")
    for step in range(size):
        graph.add_node(str(step), nothing)
    for source, target in edges:
        graph.add_edge(str(source), str(target))
    before: dict[int, set[int]] = {step: {source for source, target in edges if target == step} for step in range(size)}
    try:
        list(TopologicalSorter(before).static_order())
    except CycleError:
        assert "go round in a circle" in faults_of(graph)
        return

    order = [int(step.name) for step in graph.check().steps]

    expected: list[int] = []
    while len(expected) < size:
        expected.append(min(step for step in before if step not in expected and before[step] <= set(expected)))
    assert order == expected
