from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel, RootModel

from beluga_airflow import Chain, Decision, Graph, InvalidFlow, InvalidInput, StepContext, Stop
from beluga_airflow.errors import InvalidOutput, MissingKey, StepExited, StepTimeout
from beluga_airflow.graph import Flow, Outcome
from tests.execute.attempts import DEADLINE, once, output_of


class Plain:
    def execute(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"by": "plain", "x": inputs["x"]}


class Awaiting:
    async def execute(self, inputs: dict[str, Any], context: StepContext) -> dict[str, Any]:
        return {"by": context.step, "x": inputs["x"]}


class Called:
    async def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return {"by": "called", "x": data["x"]}


async def awaited(data: dict[str, Any]) -> dict[str, Any]:
    return {"by": "awaited", "x": data["x"]}


@pytest.mark.parametrize(
    ("node", "by"),
    [
        (lambda data: {"by": "lambda", "x": data["x"]}, "lambda"),
        (lambda data, *, context: {"by": context.flow, "x": data["x"]}, "f"),
        (lambda data: awaited(data), "awaited"),
        (awaited, "awaited"),
        (Plain(), "plain"),
        (Awaiting(), "a"),
        (Called(), "called"),
    ],
)
async def test_every_form_of_a_step_is_called(node: Any, by: str) -> None:
    assert await output_of(node, {"x": 1}) == {"by": by, "x": 1}


async def test_the_context_says_which_attempt_of_what_this_is() -> None:
    seen: list[StepContext] = []

    def step(data: dict[str, Any], context: StepContext) -> None:
        seen.append(context)

    flow = Chain("f").add_step("a", step)
    await once(flow, number=1, generation=0)
    await once(flow, number=3, generation=2)

    assert seen[0] == StepContext(flow="f", step="a", idempotency_key="shop/order 7/a", attempt=1, generation=0)
    assert seen[1] == StepContext(flow="f", step="a", idempotency_key="shop/order 7/a", attempt=3, generation=2)


async def test_a_step_can_change_neither_the_input_nor_what_others_returned() -> None:
    kept: list[Any] = []

    def spoil(data: dict[str, Any]) -> Any:
        data["items"].append("spoilt")
        data["made"]["by"] = "spoilt"
        data.clear()
        kept.append({"mine": [1]})
        return kept[0]

    inputs: dict[str, Any] = {"items": ["mug"]}
    outputs: dict[str, dict[str, Any]] = {"a": {"made": {"by": "a"}}}
    flow = Chain("f").add_step("a", lambda data: None).add_step("b", spoil)

    outcome = await once(flow, "b", inputs, outputs=outputs)
    kept[0]["mine"].append("later")

    assert (inputs, outputs) == ({"items": ["mug"]}, {"a": {"made": {"by": "a"}}})
    assert outcome.output == {"mine": [1]}
    assert outcome.state == {"items": ["mug"], "made": {"by": "a"}, "mine": [1]}


class Total(BaseModel):
    total: Decimal


@dataclass
class Priced:
    total: Decimal


class Amounts(RootModel[dict[str, Decimal]]):
    pass


@pytest.mark.parametrize(
    "returned",
    [
        {"total": Decimal("1.50")},
        Total(total=Decimal("1.50")),
        Priced(Decimal("1.50")),
        Amounts({"total": Decimal("1.50")}),
    ],
)
async def test_a_step_returns_anything_that_becomes_a_json_object(returned: Any) -> None:
    assert await output_of(lambda data: returned) == {"total": "1.50"}


async def test_a_step_that_returns_none_adds_nothing() -> None:
    assert await output_of(lambda data: None) == {}


class Listed(RootModel[list[int]]):
    pass


@pytest.mark.parametrize(
    ("returned", "kind"),
    [
        ("text", "str"),
        ([1], "list"),
        (True, "bool"),
        (0, "int"),
        (Stop, "type"),
        (Priced, "type"),
        (Listed([1]), "Listed"),
    ],
)
async def test_anything_else_is_refused_by_name(returned: Any, kind: str) -> None:
    with pytest.raises(InvalidOutput, match=f"step 'a' returned a {kind}; return a mapping of what the step adds"):
        await output_of(lambda data: returned)


async def test_a_value_that_is_not_json_is_refused_by_its_place() -> None:
    with pytest.raises(InvalidOutput, match=r"what step 'a' returned\['lines'\]\[1\] is a set, which is not JSON"):
        await output_of(lambda data: {"lines": [1, {2}]})


async def test_a_missing_key_names_step_and_key() -> None:
    with pytest.raises(MissingKey, match="step 'a' reads 'order_id', which neither the input nor an earlier step"):
        await output_of(lambda data: {"id": data["order_id"]}, {"order": 1})


async def test_a_missing_key_in_a_condition_names_step_and_key() -> None:
    graph = Graph("g").add_node("a", lambda data: {"x": 1}).add_node("b", lambda data: None)
    graph.add_edge("a", "b", when=lambda output: output["credit_ok"])

    outcome = await once(graph)

    assert outcome.fault is not None
    assert outcome.fault.startswith(
        "the step is done, but its condition on 'a' -> 'b' raised MissingKey: step 'a' reads 'credit_ok'"
    )
    assert (outcome.output, outcome.taken) == ({"x": 1}, ())


async def test_a_condition_that_fails_is_no_failure_of_its_step() -> None:
    graph = Graph("g").add_node("a", lambda data: {"x": 1}).add_node("b", lambda data: None)
    outcome = await once(graph.add_edge("a", "b", when=exits))
    assert outcome == Outcome(
        output={"x": 1}, fault="the step is done, but its condition on 'a' -> 'b' raised SystemExit: 3"
    )
    assert Outcome.from_json(outcome.to_json()) == outcome


async def test_a_condition_that_the_code_has_lost_shows_before_the_step_runs() -> None:
    ran: list[str] = []
    graph = Graph("g").add_node("a", lambda data: ran.append("a")).add_node("b", lambda data: None)
    graph.add_edge("a", "b", when={"x": 1})
    place = replace(graph.check().place("a"), targets={"gone": "x=1"})
    with pytest.raises(InvalidFlow, match=r"began with a condition \(x=1\) on 'a' -> 'gone' that its code does not"):
        await once(graph, place=place)
    assert not ran


class TaskEnds(BaseException):
    """What a host raises to end a task."""


async def test_what_the_host_raises_is_no_failure_of_a_step() -> None:
    async def is_ended(data: dict[str, Any]) -> None:
        raise TaskEnds

    flow = Chain("f").add_step("a", is_ended)
    with pytest.raises(TaskEnds):
        await once(flow, interrupts=(TaskEnds,))
    with pytest.raises(StepExited, match="step 'a' raised TaskEnds; raise an Exception instead"):
        await once(flow)


@pytest.mark.parametrize("status", ["completed", "failed", "timed_out", "cancelled", "", None, 7])
async def test_a_stop_has_a_status_of_its_own(status: Any) -> None:
    with pytest.raises(
        InvalidOutput, match=r"step 'a' returned Stop\(.*must be a word that is none of cancelled, comp"
    ):
        await output_of(lambda data: Stop(status))


async def test_a_stop_ends_the_flow_with_the_data_so_far() -> None:
    flow = Chain("f").add_step("a", lambda data: Stop("out_of_stock", {"product": 7})).add_step("b", lambda data: None)

    outcome = await once(flow, inputs={"order": 1})

    assert (outcome.stop, outcome.taken) == ("out_of_stock", ())
    assert (outcome.output, outcome.state) == ({"product": 7}, {"order": 1, "product": 7})


async def test_a_step_in_the_middle_leaves_its_output_and_no_state() -> None:
    flow = Chain("f").add_step("a", lambda data: {"x": 1}).add_step("b", lambda data: {"y": 2})

    first, last = await once(flow, inputs={"big": 0}), await once(flow, "b", {"big": 0}, outputs={"a": {"x": 1}})

    assert (first.taken, first.output, first.state) == (("b",), {"x": 1}, None)
    assert (last.taken, last.output, last.state) == ((), {"y": 2}, {"big": 0, "x": 1, "y": 2})


async def test_conditions_look_at_the_steps_own_output_as_json() -> None:
    graph = Graph("g")
    for name in "abcde":
        graph.add_node(name, lambda data: {"sum": Decimal("5.0"), "ok": True, "none": None})
    graph.add_edge("a", "b", when={"ok": True}).add_edge("a", "c", when={"of_input": 1})
    graph.add_edge("a", "d", when=lambda output: output["sum"] == "5.0").add_edge("a", "e")

    assert (await once(graph, inputs={"of_input": 1})).taken == ("b", "d", "e")


async def test_a_condition_cannot_change_what_the_step_returned() -> None:
    graph = Graph("g").add_node("a", lambda data: {"list": [1]}).add_node("b", lambda data: None)
    graph.add_edge("a", "b", when=lambda output: output["list"].append(2) is None)

    outcome = await once(graph)

    assert (outcome.output, outcome.taken) == ({"list": [1]}, ("b",))


async def test_a_condition_that_the_code_has_no_more_is_told() -> None:
    def graph(*targets: str) -> Graph:
        made = Graph("g").add_node("a", lambda data: {"ok": 1}).add_node("b", lambda data: None)
        for target in targets:
            made.add_edge("a", target, when={"ok": 1})
        return made

    place = graph("b").check().place("a")

    with pytest.raises(InvalidFlow, match=r"flow 'g' began with a condition \(ok=1\) on 'a' -> 'b' that its code"):
        await once(graph(), place=place)


async def test_an_attempt_keeps_to_its_timeout() -> None:
    async def forever(data: dict[str, Any]) -> None:
        await asyncio.Event().wait()

    with pytest.raises(StepTimeout, match=r"step 'a' took longer than its timeout of 0.05 s"):
        await once(Chain("f").add_step("a", forever), timeout=0.05)


async def test_a_sync_step_is_left_behind_when_its_time_is_up() -> None:
    release = threading.Event()

    try:
        with pytest.raises(StepTimeout):
            await once(Chain("f").add_step("a", lambda data: release.wait(DEADLINE)), timeout=0.05)
    finally:
        release.set()


async def test_a_timeout_of_the_steps_own_is_its_own() -> None:
    def gives_up(data: dict[str, Any]) -> None:
        raise TimeoutError("the shop did not answer")

    with pytest.raises(TimeoutError, match="the shop did not answer") as own:
        await output_of(gives_up)

    assert type(own.value) is TimeoutError


def exits(data: Any, *more: Any) -> Any:
    sys.exit(3)


def is_interrupted(data: Any) -> Any:
    raise KeyboardInterrupt


async def exits_later(data: Any) -> Any:
    sys.exit(3)


def exits_in_a_reducer() -> Flow:
    graph = Graph("f", reducers={"k": exits})
    for name in "xya":
        graph.add_node(name, lambda data: None)
    return graph.add_edge("x", "a").add_edge("y", "a")


@pytest.mark.parametrize(
    "build",
    [
        lambda: Chain("f").add_step("a", exits),
        lambda: Chain("f").add_step("a", exits_later),
        lambda: Chain("f").add_step("a", Decision("?", output_type=bool, reads=["x"], rules=[(exits, True)])),
        exits_in_a_reducer,
    ],
)
async def test_no_code_of_a_flow_ends_the_process(build: Callable[[], Flow]) -> None:
    with pytest.raises(StepExited, match=r"step 'a' called sys.exit\(3\); raise an error instead"):
        await once(build(), inputs={"x": 1}, outputs={"x": {"k": 1}, "y": {"k": 2}})


async def test_an_interrupt_that_a_step_makes_itself_ends_no_process() -> None:
    with pytest.raises(StepExited, match="KeyboardInterrupt"):
        await once(Chain("f").add_step("a", is_interrupted))


async def awaits_what_is_cancelled(data: dict[str, Any]) -> None:
    task = asyncio.create_task(asyncio.Event().wait())
    task.cancel()
    await task


def raises_cancelled(data: dict[str, Any]) -> None:
    raise asyncio.CancelledError


async def nothing_left(data: dict[str, Any]) -> None:
    async def none() -> AsyncIterator[int]:
        for number in list[int]():
            yield number

    await anext(none())


@pytest.mark.parametrize("node", [awaits_what_is_cancelled, raises_cancelled])
async def test_a_cancellation_inside_a_step_is_an_error_of_the_step(node: Any) -> None:
    with pytest.raises(RuntimeError, match="step 'a' awaited something that was cancelled"):
        await output_of(node)


async def test_a_cancellation_from_outside_is_one() -> None:
    started = asyncio.Event()

    async def waits(data: dict[str, Any]) -> None:
        started.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(output_of(waits))
    await started.wait()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_sync_step_sees_the_context_variables_of_the_run() -> None:
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("of the run")

    output = await output_of(lambda data: {"seen": variable.get(), "thread": threading.get_ident()})

    assert output["seen"] == "of the run"
    assert output["thread"] != threading.get_ident()


async def test_the_error_of_a_step_is_left_as_it_is() -> None:
    error = InvalidInput("order_id is empty")

    def refuses(data: dict[str, Any]) -> None:
        raise error

    with pytest.raises(InvalidInput) as raised:
        await output_of(refuses)

    assert raised.value is error


async def test_an_error_that_would_end_a_loop_or_a_generator_is_an_error() -> None:
    with pytest.raises(StopAsyncIteration):
        await output_of(nothing_left)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await output_of(lambda data: next(iter(())))


async def test_the_predicate_of_an_edge_into_a_nested_flow_is_asked_once() -> None:
    asked: list[dict[str, Any]] = []

    def first_time_only(output: dict[str, Any]) -> bool:
        asked.append(output)
        return len(asked) == 1

    inner = Graph("inner").add_node("x", lambda data: None).add_node("y", lambda data: None)
    outer = Graph("outer").add_node("a", lambda data: {"n": 1}).add_node("ship", inner)
    outer.add_edge("a", "ship", when=first_time_only)

    assert (await once(outer)).taken == ("ship.x", "ship.y")
    assert asked == [{"n": 1}]
