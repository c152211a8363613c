from __future__ import annotations

import math
import operator
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import date, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache, partial
from graphlib import CycleError, TopologicalSorter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow import Chain, Decision, Graph, InvalidFlow, Retry, StepContext
from beluga_airflow.graph.callee import function_of, wants_context
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


class Awaited:
    async def __call__(self, *values: Any) -> Any:
        return values


class Yielding:
    def execute(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield inputs


def pages(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield data


async def later_pages(data: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield data


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text for it")


class Unsigned:
    __signature__ = "none"

    def __call__(self, *values: Any) -> Any:
        return values


class Equal:
    """Equal to everything, and cannot be hashed."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]  # that is how Python says so


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
    "name with half a character": (lambda: chain_of(nothing, "a\udcff"), rf"the step name 'a\udcff' {NAME_RULE}"),
    "name that is a list": (
        lambda: chain_of(nothing, ["a"]).add_step("b", nothing),
        f"the step name ['a'] {NAME_RULE}",
    ),
    "name that has no text": (lambda: chain_of(nothing, Unprintable()), "the step name <Unprintable instance at 0x"),
    "name of the flow that is a list": (lambda: Chain(["f"]).add_step("a", nothing), f"its name ['f'] {NAME_RULE}"),  # type: ignore[arg-type]
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
    "edge from a list": (
        lambda: graph_of().add_edge(["a"], "b"),  # type: ignore[arg-type]
        "the edge ['a'] -> 'b' names the step ['a'], which does not exist",
    ),
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
    "condition on infinity": (lambda: with_condition({"sum": math.inf}), "when={'sum': inf} can never hold"),
    "condition on a set": (lambda: with_condition({"ids": {1}}), "when={'ids': {1}} can never hold"),
    "condition on half a character": (lambda: with_condition({"a": "\ud800"}), r"when={'a': '\ud800'} can never hold"),
    "condition on what has no text": (
        lambda: with_condition({"a": Unprintable()}),
        "when={'a': <Unprintable instance at 0x",
    ),
    "condition on a key that is no text": (
        lambda: with_condition({1: 2}),
        "the edge 'b' -> 'c': when={1: 2} can never hold, since a step's output is JSON and this is not",
    ),
    "condition on keys inside that are no texts": (lambda: with_condition({"a": {1: 2}}), "can never hold"),
    "condition on a key of half a character": (lambda: with_condition({"\ud800": 1}), "can never hold"),
    "predicate of nothing": (
        lambda: with_condition(lambda: True),
        "<lambda>() must take one value, the source step's output",
    ),
    "predicate of two values": (
        lambda: with_condition(lambda output, more: True),
        "<lambda>(output, more) must take one value, the source step's output",
    ),
    "predicate by keyword": (lambda: with_condition(lambda *, output: True), "must take one value"),
    "predicate that is a class": (lambda: with_condition(Step), "when=Step() must take one value"),
    "predicate that is an unbound method": (lambda: with_condition(Step.execute), "must take one value"),
    "predicate with an async call": (
        lambda: with_condition(Awaited()),
        "when=Awaited is async, and what it returns would always hold: give a plain function",
    ),
    "predicate that yields": (
        lambda: with_condition(pages),
        "when=pages is a generator, and what it returns would always hold: give a plain function",
    ),
    # points
    "entry that is a number": (
        lambda: graph_of("ab").set_entry_point(7),  # type: ignore[arg-type]
        "the entry point 7 does not exist",
    ),
    "entry in a list of lists": (
        lambda: graph_of("ab").set_entry_point([["a"]]),  # type: ignore[list-item]
        "the entry point ['a'] does not exist",
    ),
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
    "a truth of workers": (
        lambda: graph_of(max_workers=True),
        "max_workers is True, it must be a whole number, 1 or more",
    ),
    "no number of workers": (lambda: graph_of(max_workers=math.nan), "max_workers is nan, it must be a whole number"),
    "a word for parallel": (
        lambda: graph_of(parallel="no"),
        "parallel is 'no', it must be True or False",
    ),
    "no time for the flow": (lambda: graph_of(timeout=0), "its timeout is 0 s, it must be above 0 and finite"),
    "negative time for the flow": (
        lambda: graph_of(timeout=timedelta(seconds=-1)),
        "its timeout is -1 s, it must be above 0 and finite",
    ),
    "endless time for the flow": (lambda: graph_of(timeout=math.inf), "its timeout is inf s"),
    "no number for the flow": (lambda: graph_of(timeout=math.nan), "its timeout is nan s"),
    "a word for the flow's time": (
        lambda: graph_of(timeout="soon"),
        "its timeout is 'soon', it must be seconds or a timedelta, above 0 and finite",
    ),
    "a truth for the flow's time": (lambda: graph_of(timeout=True), "its timeout is True, it must be seconds"),
    "a list for a step's time": (
        lambda: chain_of(nothing, timeout=[1]),
        "the timeout of step 'a' is [1], it must be seconds or a timedelta, above 0 and finite",
    ),
    "endless time for a step": (lambda: chain_of(nothing, timeout=math.inf), "the timeout of step 'a' is inf s"),
    "more time than any number": (lambda: chain_of(nothing, timeout=10**400), "the timeout of step 'a' is inf s"),
    "no time for a step": (
        lambda: chain_of(nothing, timeout=0.0),
        "the timeout of step 'a' is 0 s, it must be above 0 and finite",
    ),
    "no number for a step": (lambda: chain_of(nothing, timeout=math.nan), "the timeout of step 'a' is nan s"),
    "unknown join": (
        lambda: Graph("g").add_node("a", nothing, join="some"),  # type: ignore[arg-type]
        "the join of step 'a' is 'some', it must be 'all' or 'any'",
    ),
    "join by a list": (
        lambda: Graph("g").add_node("a", nothing, join=["all"]),  # type: ignore[arg-type]
        "the join of step 'a' is ['all'], it must be 'all' or 'any'",
    ),
    "join that equals all": (
        lambda: Graph("g").add_node("a", nothing, join=Equal()),  # type: ignore[arg-type]
        "the join of step 'a' is <",
    ),
    "retry that is a number": (lambda: chain_of(nothing, retry=3), "step 'a': retry: it is 3, it must be a Retry"),
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
    "reducer of one value": (
        lambda: graph_of(reducers={"total": lambda one: one}),
        "<lambda>(one), it must be a function of two values",
    ),
    "reducer of three values": (
        lambda: graph_of(reducers={"total": lambda one, two, three: one}),
        "<lambda>(one, two, three), it must be a function of two values",
    ),
    "reducer of one value that is built in": (
        lambda: graph_of(reducers={"total": len}),
        "the reducer of 'total' is len(obj, /), it must be a function of two values",
    ),
    "reducer with an async call": (
        lambda: graph_of(reducers={"total": Awaited()}),
        "the reducer of 'total' is async: give a plain function",
    ),
    "reducer that yields": (
        lambda: graph_of(reducers={"total": lambda one, two: (yield)}),
        "the reducer of 'total' is a generator: give a plain function",
    ),
    "reducer of a key that is no text": (
        lambda: graph_of(reducers={1: max}),
        "the reducer of 1 can never be asked, since keys are texts",
    ),
    "reducers without keys": (
        lambda: graph_of(reducers=[max]),
        "reducers is [<built-in function max>], it must be a mapping of keys to functions of two values",
    ),
    # what runs
    "a class": (lambda: chain_of(Step), "step 'a': Step is a class, give an instance of it"),
    "a number": (
        lambda: chain_of(7),
        "step 'a': 7 is neither a function, nor an object with execute(inputs), nor a Decision, nor a flow",
    ),
    "an object that cannot execute": (lambda: chain_of(Callless()), "is neither a function, nor an object"),
    "a faulty flow": (lambda: chain_of(Chain("inner")), "step 'a': flow 'inner' cannot run: it has no steps"),
    "a flow's class": (lambda: chain_of(Graph), "step 'a': Graph is a class, give an instance of it"),
    "what has no text": (lambda: chain_of(Unprintable()), "step 'a': <Unprintable instance at 0x"),
    "a generator": (
        lambda: chain_of(pages),
        "step 'a': pages is a generator: return a mapping instead of yielding",
    ),
    "an async generator": (lambda: chain_of(later_pages), "step 'a': later_pages is a generator: return a mapping"),
    "a part of a generator": (lambda: chain_of(partial(pages)), "is a generator: return a mapping"),
    "an object that yields": (lambda: chain_of(Yielding()), "Yielding.execute is a generator: return a mapping"),
    "a method without its object": (
        lambda: chain_of(Step.execute),
        "must take the data, and at most a context beside it",
    ),
    "takes nothing": (lambda: chain_of(lambda: None), "must take the data, and at most a context beside it"),
    "takes too much": (lambda: chain_of(lambda data, more: None), "must take the data, and at most a context"),
    "takes it by keyword": (lambda: chain_of(lambda *, data: None), "must take the data, and at most a context"),
    "a faulty decision": (
        lambda: chain_of(Decision("", choices=["yes", "no"], reads=["x"])),
        "step 'a': its question is empty",
    ),
    # what undoes
    "undoing by a class": (
        lambda: chain_of(nothing, compensate=Step),
        "step 'a': compensate: Step is a class, give an instance of it",
    ),
    "undoing by a number": (
        lambda: chain_of(nothing, compensate=0),
        "step 'a': compensate: 0 is neither a function, nor an object with execute(inputs)",
    ),
    "undoing by a decision": (
        lambda: chain_of(nothing, compensate=Decision("?", output_type=bool, reads=["x"])),
        "step 'a': compensate: Decision('?', output_type=<class 'bool'>, reads=['x']) is neither a function, nor an",
    ),
    "undoing by a flow": (
        lambda: chain_of(nothing, compensate=chain_of(nothing)),
        "step 'a': compensate: Chain('f': a) is neither a function, nor an object with execute(inputs)",
    ),
    "undoing that takes nothing": (
        lambda: chain_of(nothing, compensate=lambda: None),
        "<lambda>() must take the data, and at most a context beside it",
    ),
    "undoing that takes too much": (
        lambda: chain_of(nothing, compensate=lambda data, more: None),
        "must take the data, and at most a context beside it",
    ),
    "undoing of a graph's node": (
        lambda: Graph("g").add_node("a", nothing, compensate="refund"),
        "step 'a': compensate: 'refund' is neither a function, nor an object with execute(inputs)",
    ),
    "undoing that yields, so that it would undo nothing": (
        lambda: chain_of(nothing, compensate=pages),
        "step 'a': compensate: pages is a generator: return a mapping instead of yielding",
    ),
    "undoing of a decision": (
        lambda: chain_of(Decision("?", output_type=bool, reads=["x"]), compensate=7),
        "step 'a': compensate: 7 is neither",
    ),
    "undoing of a flow": (lambda: chain_of(chain_of(nothing), compensate=7), "step 'a': compensate: 7 is neither"),
    # keys
    "input that is a number": (
        lambda: Chain("f", inputs=3).add_step("a", nothing),  # type: ignore[arg-type]
        "inputs names 3, it must name keys, which are texts",
    ),
    "input in a list of lists": (
        lambda: Chain("f", inputs=[["x"]]).add_step("a", nothing),  # type: ignore[list-item]
        "inputs names ['x'], it must name keys, which are texts",
    ),
    "provides a number": (
        lambda: chain_of(nothing, provides=3),
        "step 'a': provides names 3, it must name keys, which are texts",
    ),
    "provides a list of lists": (
        lambda: Chain("f", inputs=["x"]).add_step("a", nothing, provides=[["y"]]),  # type: ignore[list-item]
        "step 'a': provides names ['y'], it must name keys, which are texts",
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
        print,
        {}.get,
        Step().execute,
        partial(lambda number, data: None, 1),
        operator.itemgetter("x"),
        lru_cache(nothing),
        Awaited(),
        Unsigned(),
    ],
)
def test_whatever_takes_the_data_is_a_step(node: Any) -> None:
    assert chain_of(node).check().by_name["a"].kind == "function"


@pytest.mark.parametrize(
    "compensate", [nothing, Step(), WithContext(), Called(), lambda data, context: None, lambda data, *, context: None]
)
def test_whatever_takes_the_data_can_undo_a_step(compensate: Any) -> None:
    shape = chain_of(nothing, compensate=compensate).add_step("b", nothing).check()

    assert [step.undo for step in shape.steps] == [True, False]


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


@pytest.mark.parametrize(
    "when",
    [
        bool,
        operator.itemgetter("ok"),
        partial(operator.contains, {"ok": True}),
        Called(),
        Unsigned(),
        {}.__contains__,
        lambda output, more=1: True,
        lambda *outputs: True,
        {"ok": True, "sum": 1.5, "ids": [1, {"deep": None}], "naïve": "ü"},
        {},
    ],
)
def test_whatever_takes_one_value_is_a_predicate(when: Any) -> None:
    assert len(with_condition(when).check().edges) == 2


@pytest.mark.parametrize(
    "reducer",
    [max, operator.add, operator.or_, divmod, lambda *values: values, lambda one, two, *, more=1: one, Unsigned()],
)
def test_whatever_takes_two_values_is_a_reducer(reducer: Any) -> None:
    assert graph_of(reducers={"k": reducer}).check().flow == "g"


class Word(str, Enum):  # noqa: UP042  # a StrEnum prints as its text
    """Whose texts are printed by the names of its members."""

    INNER = "inner"
    NEXT = "next"


def test_a_name_of_an_enum_is_its_text() -> None:
    inner = Graph(Word.INNER).add_node(Word.NEXT, nothing)
    outer = Graph("f", inputs=[Word.INNER]).add_node(Word.INNER, inner).add_node(Word.NEXT, nothing)
    shape = outer.add_edge(Word.INNER, Word.NEXT).set_entry_point(Word.INNER).set_finish_point([Word.NEXT]).check()

    assert list(shape.order) == ["inner.next", "inner.result", "next"]
    assert [group.flow for group in shape.groups] == ["inner"]
    assert {type(name) for name in (*shape.order, *shape.targets["inner.result"], shape.groups[0].flow)} == {str}


@pytest.mark.parametrize(
    "flow",
    [
        Chain("f" * 10**6).add_step("a", nothing),
        chain_of(nothing, "a" * 10**6),
        chain_of("a" * 10**6),
        chain_of(nothing, compensate=["a"] * 10**6),
        graph_of("ab").add_edge("a" * 10**6, "b" * 10**6),
        graph_of("ab").add_edge("b", "c", when={"a": {1: "a" * 10**6}}),
        graph_of("ab").set_entry_point("a" * 10**6),
        graph_of(max_workers="1" * 10**6, parallel="0" * 10**6, timeout="2" * 10**6, reducers={"a" * 10**6: 3}),
        Chain("f", inputs=[]).add_step("a", Decision("?", output_type=bool, reads=["a" * 10**6])),
    ],
    ids=range(9),
)
def test_a_refusal_is_no_longer_than_a_reader_can_bear(flow: Flow) -> None:
    with pytest.raises(InvalidFlow) as refused:
        flow.check()

    assert len(str(refused.value)) < 2_000


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


def test_many_faults_of_one_step_are_no_trouble_to_each_other() -> None:
    message = faults_of(chain_of(Chain("inner").add_step("a", nothing, provides=[]), ["a"], provides=[["y"]]))

    assert "cannot run: 2 faults: the step name ['a'] must be" in message
    assert "step ['a']: provides names ['y'], it must name keys, which are texts" in message


def test_predicates_and_reducers_are_plain_functions() -> None:
    async def later(*values: Any) -> Any:
        return values

    flow = graph_of("ab", reducers={"k": later})
    flow.add_node("c", lambda data: None).add_edge("b", "c", when=later)

    with pytest.raises(InvalidFlow) as refused:
        flow.check()
    assert "the reducer of 'k' is async: give a plain function" in str(refused.value)
    assert "the edge 'b' -> 'c': when=test_predicates" in str(refused.value)
    assert "is async, and what it returns would always hold: give a plain function" in str(refused.value)
