"""What a failed, late or cancelled flow undoes, in one process."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import anyio
import pytest

from beluga_airflow import Chain, Decision, FlowResult, Graph, InvalidInput, Retry, StepContext, Stop, run
from beluga_airflow.testing.scripted_model import ScriptedModel
from tests.running import DEADLINE, ONCE, ended, nothing
from tests.undoing import IN_FLIGHT, NO_COURIER, Shop, Step, hangs, waits_for_ever


@pytest.fixture
def shop() -> Shop:
    return Shop()


# in which order, with what


async def test_finished_steps_are_undone_last_first_and_one_at_a_time(shop: Shop) -> None:
    busy: list[str] = []

    def alone(name: str) -> Step:
        async def undo(data: dict[str, Any]) -> None:
            busy.append(name)
            shop.calls.append(f"undo {' and '.join(busy)}")
            await asyncio.sleep(0.01)  # room for another one, were there one
            busy.remove(name)

        return undo

    flow = Graph("g", retry=ONCE)
    for name in ("d", "c", "b", "a"):
        flow.add_node(name, shop.does(name), compensate=alone(name))
    flow.add_node("end", shop.fails("end"), compensate=alone("end"))
    for edge in ("ab", "ac", "cd", "bd"):
        flow.add_edge(*edge)
    flow.add_edge("d", "end")

    result = await ended(flow)

    assert [call for call in shop.calls if call.startswith("undo")] == ["undo d", "undo b", "undo c", "undo a"]
    assert result.undone == dict.fromkeys("dbca", "undone")
    assert list(result.undone) == ["d", "b", "c", "a"]
    assert (result.status, result.error) == ("failed", "step 'end' failed: RuntimeError: no courier")
    assert result.steps == {**dict.fromkeys("cbad", "completed"), "end": "failed"}


async def test_what_undoes_a_step_has_a_key_of_its_own(shop: Shop) -> None:
    result = await ended(shop.order(shop.fails("ship")), key="order 7")

    assert shop.calls == ["reserve", "pay", "ship", "undo pay", "undo reserve"]
    assert shop.contexts == [
        StepContext(flow="shop", step=f"{step}.undo", idempotency_key=key, attempt=1, generation=0)
        for step, key in (("pay", "shop/order 7/pay.undo"), ("reserve", "shop/order 7/reserve.undo"))
    ]
    assert result.undone == {"pay": "undone", "reserve": "undone"}


@dataclass
class Payment:
    order_id: str
    amount: Decimal


async def test_what_undoes_a_step_gets_the_data_as_it_was_after_it() -> None:
    seen: list[Any] = []

    def undo_first(data: dict[str, Any]) -> None:
        seen.append(dict(data))

    def undo_pay(payment: Payment) -> None:
        seen.append(payment)

    def undo_left(data: dict[str, Any]) -> None:
        seen.append(deepcopy(data))
        data["lines"].append("spoilt")

    flow = (
        Graph("g", retry=ONCE)
        .add_node("first", lambda data: {"state": "new", "amount": "0"}, compensate=undo_first)
        .add_node("pay", lambda data: {"state": "paid", "amount": Decimal("9.50")}, compensate=undo_pay)
        .add_node("left", lambda data: {"side": "left"}, compensate=undo_left)
        .add_node("end", lambda data: 1 / 0)
    )
    for edge in (("first", "pay"), ("first", "left"), ("pay", "end"), ("left", "end")):
        flow.add_edge(*edge)

    result = await ended(flow, {"order_id": "o-1", "lines": ["mug"]})

    assert result.undone == {"left": "undone", "pay": "undone", "first": "undone"}
    given = {"order_id": "o-1", "lines": ["mug"], "state": "new", "amount": "0"}
    # not what steps beside it or after it returned, and a copy
    assert seen == [{**given, "side": "left"}, Payment("o-1", Decimal("9.50")), given]


async def test_a_decision_can_be_undone() -> None:
    seen: list[Any] = []
    flow = Chain("f", retry=ONCE).add_step(
        "how",
        Decision("How?", choices=["fast", "slow"], reads=["tier"]),
        compensate=lambda data: seen.append(dict(data)),
    )
    result = await ended(flow.add_step("end", lambda data: 1 / 0), {"tier": 1}, model=ScriptedModel(["fast"]))
    assert (result.undone, seen) == ({"how": "undone"}, [{"tier": 1, "how": "fast"}])
    assert result.decisions["how"]["answer"] == "fast"


# trouble while undoing


async def test_undoing_is_retried_as_its_step_is(shop: Shop) -> None:
    refund = shop.undoes("pay", ConnectionError("closed"), ConnectionError("closed"))

    result = await ended(shop.order(shop.fails("ship"), pay=refund), key=7)

    assert [(each.attempt, each.idempotency_key) for each in shop.contexts[:3]] == [
        (number, "shop/7/pay.undo") for number in (1, 2, 3)
    ]
    assert result.undone == {"pay": "undone", "reserve": "undone"}
    assert result.error == NO_COURIER


def exits(data: dict[str, Any]) -> None:
    sys.exit(3)


class HaltError(BaseException):
    """Nothing that is caught by the way."""


def halts(data: dict[str, Any]) -> None:
    raise HaltError("all of it")


async def awaits_what_was_cancelled(data: dict[str, Any]) -> None:
    task = asyncio.ensure_future(asyncio.Event().wait())
    task.cancel()
    await task


async def test_a_step_that_is_done_is_undone_where_its_condition_fails(shop: Shop) -> None:
    graph = Graph("shop").add_node("pay", shop.does("pay"), compensate=shop.undoes("pay"))
    graph.add_node("ship", shop.does("ship")).add_edge("pay", "ship", when=lambda output: output["no such key"])

    result = await ended(graph)

    assert shop.calls == ["pay", "undo pay"]
    assert (result.status, result.steps, result.undone) == ("failed", {"pay": "failed"}, {"pay": "undone"})
    assert str(result.error).startswith(
        "step 'pay' failed: the step is done, but its condition on 'pay' -> 'ship' raised MissingKey: "
    )


FAILING = {
    "used up": (3, [ConnectionError("closed")] * 3, "ConnectionError: closed"),
    "refused": (1, [InvalidInput("no such payment")], "InvalidInput: no such payment"),
}


@pytest.mark.parametrize(("times", "errors", "why"), FAILING.values(), ids=FAILING)
async def test_what_could_not_be_undone_is_loud_and_listed_and_keeps_nobody_else_from_it(
    shop: Shop, caplog: pytest.LogCaptureFixture, times: int, errors: list[Exception], why: str
) -> None:
    result = await ended(shop.order(shop.fails("ship"), pay=shop.undoes("pay", *errors)))

    assert shop.calls == ["reserve", "pay", "ship", *["undo pay"] * times, "undo reserve"]
    assert result.undone == {"pay": why, "reserve": "undone"}
    assert result.error == f"{NO_COURIER}; step 'pay' could not be undone: {why}"
    records = [record for record in caplog.records if record.name == "beluga_airflow.execute.undoing"]
    told = [(record.levelno, record.getMessage()) for record in records]
    assert told == [
        (logging.ERROR, f"step 'pay' of flow 'shop' could not be undone: {why}"),
        (logging.WARNING, "step 'reserve' of flow 'shop' was undone"),
    ]


@pytest.mark.parametrize(
    ("undo", "why"),
    [
        (hangs, "StepTimeout: step 'pay.undo' took longer than its timeout of 0.05 s"),
        (exits, "StepExited: step 'pay.undo' called sys.exit(3); raise an error instead"),
        (halts, "StepExited: step 'pay.undo' raised HaltError: all of it; raise an Exception instead"),
        (
            awaits_what_was_cancelled,
            "RuntimeError: step 'pay.undo' awaited something that was cancelled; catch that in the step",
        ),
    ],
)
async def test_what_undoes_a_step_is_held_to_what_steps_are(shop: Shop, undo: Step, why: str) -> None:
    flow = (
        Chain("f", retry=Retry(maximum_attempts=2, initial_interval=0))
        .add_step("reserve", shop.does("reserve"), compensate=shop.undoes("reserve"))
        .add_step("pay", shop.does("pay"), compensate=undo, timeout=0.05)
        .add_step("end", shop.fails("end", InvalidInput("no street")))
    )
    result = await ended(flow)
    assert result.undone == {"pay": why, "reserve": "undone"}


# what is undone, and what is not


async def test_what_ran_beside_a_failure_ends_and_is_undone_too(shop: Shop) -> None:
    async def beside(data: dict[str, Any]) -> dict[str, Any]:
        # until the other one has failed: its task has ended then
        while len(asyncio.all_tasks()) > alone + 1:  # noqa: ASYNC110  # the runtime has no event for it
            await asyncio.sleep(0)
        return {"packed": True}

    alone = len(asyncio.all_tasks())
    flow = (
        Graph("g", retry=ONCE)
        .add_node("pack", beside, compensate=shop.undoes("pack"))
        .add_node("pay", shop.fails("pay"), compensate=shop.undoes("pay"))
        .add_node("after", shop.does("after"), compensate=shop.undoes("after"))
        .add_edge("pack", "after")
    )
    result = await ended(flow)

    assert shop.calls == ["pay", "undo pack"], "neither what failed nor what never started is undone"
    assert result.undone == {"pack": "undone"}
    assert result.steps == {"pack": "completed", "pay": "failed"}


async def test_a_skipped_step_is_not_undone(shop: Shop) -> None:
    flow = (
        Graph("g", retry=ONCE)
        .add_node("look", lambda data: {"gift": False}, compensate=shop.undoes("look"))
        .add_node("gift", shop.does("gift"), compensate=shop.undoes("gift"))
        .add_node("end", shop.fails("end"), join="any")
        .add_edge("look", "gift", when={"gift": True})
        .add_edge("look", "end")
        .add_edge("gift", "end")
    )
    assert (await ended(flow)).undone == {"look": "undone"}
    assert shop.calls == ["end", "undo look"]


async def test_a_flow_out_of_time_is_undone_and_its_time_does_not_bound_that(shop: Shop) -> None:
    async def slow(data: dict[str, Any]) -> None:
        await asyncio.sleep(0.3)
        shop.calls.append("undo pay")

    flow = shop.order(hangs, pay=slow)
    flow.timeout = 0.1

    result = await ended(flow)

    assert shop.calls == ["reserve", "pay", "undo pay", "undo reserve"]
    assert (result.status, result.undone) == ("timed_out", {"ship": IN_FLIGHT, "pay": "undone", "reserve": "undone"})
    assert result.error == (
        f"flow 'shop' used up its timeout of 0.1 s in step 'ship'; step 'ship' could not be undone: {IN_FLIGHT}"
    )


@pytest.mark.parametrize("end", [nothing, lambda data: Stop("no_courier")])
async def test_a_flow_that_ends_as_it_was_meant_to_undoes_nothing(shop: Shop, end: Step) -> None:
    result = await ended(shop.order(end))
    assert result.ok
    assert (shop.calls, result.undone) == (["reserve", "pay"], {})


async def test_a_stop_beside_a_failure_is_undone(shop: Shop) -> None:
    flow = Graph("g", retry=ONCE).add_node("stop", lambda data: Stop("halt"), compensate=shop.undoes("stop"))
    result = await ended(flow.add_node("bad", shop.fails("bad")))
    assert (result.status, result.undone, shop.calls) == ("failed", {"stop": "undone"}, ["bad", "undo stop"])


# flows inside flows


def nested(shop: Shop, last: Step, **options: Any) -> Chain:
    """Two steps inside another flow, which can be undone each and as a whole."""
    inner = (
        Chain("packing", retry=ONCE, **options)
        .add_step("box", shop.does("box"), compensate=shop.undoes("box"))
        .add_step("label", last, compensate=shop.undoes("label"))
    )
    return (
        Chain("f", retry=ONCE)
        .add_step("pay", shop.does("pay"), compensate=shop.undoes("pay"))
        .add_step("pack", inner, compensate=shop.undoes("pack"))
        .add_step("ship", shop.fails("ship"))
    )


async def test_a_finished_flow_inside_is_undone_as_a_whole_and_then_its_steps(shop: Shop) -> None:
    result = await ended(nested(shop, shop.does("label")), key=7)

    undos = ["pack.result", "pack.label", "pack.box", "pay"]
    assert result.undone == dict.fromkeys(undos, "undone")
    assert [context.idempotency_key for context in shop.contexts] == [f"f/7/{step}.undo" for step in undos]
    assert shop.calls[4:] == ["undo pack", "undo label", "undo box", "undo pay"]


async def test_of_a_flow_inside_that_failed_only_the_finished_steps_are_undone(shop: Shop) -> None:
    result = await ended(nested(shop, shop.fails("label")))
    assert result.undone == {"pack.box": "undone", "pay": "undone"}
    assert result.error == "step 'pack.label' failed: RuntimeError: no courier"


async def test_of_a_flow_inside_that_was_late_the_finished_steps_are_undone(shop: Shop) -> None:
    result = await ended(nested(shop, hangs, timeout=0.1))
    assert (result.status, result.undone) == (
        "timed_out",
        {"pack.label": IN_FLIGHT, "pack.box": "undone", "pay": "undone"},
    )


# cancelling


async def cancelled_in(flow: Chain, reached: asyncio.Event) -> asyncio.Task[FlowResult]:
    """A run that was cancelled when a step had reached its place, and has ended."""
    task = asyncio.create_task(ended(flow))
    async with asyncio.timeout(DEADLINE):
        await reached.wait()
        task.cancel()
        await asyncio.wait([task])
    return task


async def test_a_cancelled_run_undoes_its_finished_steps_and_is_cancelled(shop: Shop) -> None:
    reached = asyncio.Event()

    task = await cancelled_in(shop.order(waits_for_ever(reached)), reached)

    assert task.cancelled()
    assert shop.calls == ["reserve", "pay", "undo pay", "undo reserve"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_run_that_somebody_bounds_is_undone_before_it_ends(shop: Shop) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await ended(shop.order(hangs))
    assert shop.calls == ["reserve", "pay", "undo pay", "undo reserve"]


@pytest.mark.parametrize("undo", [exits, halts, awaits_what_was_cancelled, hangs])
async def test_what_cannot_be_undone_of_a_cancelled_run_keeps_nobody_else_from_it(
    shop: Shop, undo: Step, caplog: pytest.LogCaptureFixture
) -> None:
    reached = asyncio.Event()

    flow = (
        Chain("shop", retry=ONCE)
        .add_step("reserve", shop.does("reserve"), compensate=shop.undoes("reserve"))
        .add_step("pay", shop.does("pay"), compensate=undo, timeout=0.05)
        .add_step("ship", waits_for_ever(reached))
    )
    task = await cancelled_in(flow, reached)

    assert task.cancelled()
    assert shop.calls == ["reserve", "pay", "undo reserve"]
    assert "step 'pay' of flow 'shop' could not be undone: " in caplog.text


async def test_cancelling_a_run_that_is_being_undone_does_not_stop_that(shop: Shop) -> None:
    reached = asyncio.Event()

    async def slow(data: dict[str, Any], context: StepContext) -> None:
        shop.calls.append("undo pay")
        reached.set()
        await asyncio.sleep(0.05)
        shop.calls.append("paid back")

    task = await cancelled_in(shop.order(shop.fails("ship"), pay=slow), reached)

    assert task.cancelled()
    assert shop.calls == ["reserve", "pay", "ship", "undo pay", "paid back", "undo reserve"]


async def test_a_step_that_ends_as_the_run_is_cancelled_is_undone(shop: Shop) -> None:
    begun, gate = asyncio.Event(), asyncio.Event()

    async def pay(data: dict[str, Any]) -> None:
        begun.set()
        await gate.wait()

    flow = Chain("f").add_step("pay", pay, compensate=shop.undoes("pay")).add_step("ship", shop.does("ship"))
    task = asyncio.create_task(ended(flow))
    async with asyncio.timeout(DEADLINE):
        await begun.wait()
        gate.set()
        task.cancel()
        await asyncio.wait([task])

    assert task.cancelled()
    assert shop.calls == ["undo pay"]


async def test_whoever_cancels_again_and_again_leaves_no_undoing_half_done() -> None:
    undone: list[str] = []

    async def refund(data: dict[str, Any]) -> None:
        await asyncio.sleep(0.05)
        undone.append("refund")

    async def hangs(data: dict[str, Any]) -> None:
        await asyncio.Event().wait()

    flow = Chain("shop", retry=Retry(maximum_attempts=1))
    flow.add_step("reserve", lambda data: None, compensate=lambda data: undone.append("unreserve"))
    flow.add_step("pay", lambda data: None, compensate=refund).add_step("ship", hangs)

    with anyio.move_on_after(0.1):  # which cancels at every turn of the loop
        await run(flow, {})

    assert undone == ["refund", "unreserve"]


async def pays_in_spite_of_all(data: dict[str, Any]) -> dict[str, Any]:
    """Finishes its payment although it is cancelled."""
    payment = asyncio.ensure_future(asyncio.sleep(0.4))
    while not payment.done():
        with suppress(asyncio.CancelledError):
            await asyncio.shield(payment)
    return {"paid": True}


async def test_what_is_done_in_spite_of_several_cancellations_is_undone() -> None:
    undone: list[str] = []
    flow = Chain("shop").add_step("pay", pays_in_spite_of_all, compensate=lambda data: undone.append("pay"))

    task = asyncio.create_task(run(flow, {}))
    for _ in range(3):
        await asyncio.sleep(0.05)
        task.cancel()
    await asyncio.wait([task], timeout=DEADLINE)

    assert (task.cancelled(), undone) == (True, ["pay"])


async def test_what_is_done_in_spite_of_two_timeouts_is_undone() -> None:
    undone: list[str] = []
    inner = Chain("inner", timeout=0.1)
    inner.add_step("pay", pays_in_spite_of_all, compensate=lambda data: undone.append("pay"))

    result = await ended(Graph("outer", timeout=0.2).add_node("in", inner))

    assert (result.status, result.undone, undone) == ("timed_out", {"in.pay": "undone"}, ["pay"])


async def test_a_step_between_two_attempts_is_not_in_flight() -> None:
    async def fails(data: dict[str, Any]) -> None:
        raise ConnectionError("closed")

    flow = Chain("shop", timeout=0.1)
    flow.add_step("pay", fails, compensate=lambda data: None, retry=Retry(initial_interval=60, maximum_interval=60))

    result = await ended(flow)

    assert (result.error, result.undone) == ("flow 'shop' used up its timeout of 0.1 s in step 'pay'", {})


async def test_what_undoes_a_step_and_cancels_its_own_task_keeps_nobody_else_from_it(shop: Shop) -> None:
    async def cancels_itself(data: dict[str, Any]) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.Event().wait()

    result = await ended(shop.order(shop.fails("ship"), pay=cancels_itself))

    why = "StepExited: step 'pay.undo' cancelled its own task; raise an error instead"
    assert result.undone == {"pay": why, "reserve": "undone"}


async def test_a_step_whose_attempt_was_cut_off_is_in_doubt_until_the_next_one() -> None:
    async def hangs_on(data: dict[str, Any]) -> None:
        await asyncio.Event().wait()

    flow = Chain("shop", timeout=0.2)
    slow = Retry(initial_interval=60, maximum_interval=60)
    flow.add_step("pay", hangs_on, compensate=lambda data: None, retry=slow, timeout=0.05)

    result = await ended(flow)

    assert (result.status, result.undone) == ("timed_out", {"pay": IN_FLIGHT})
