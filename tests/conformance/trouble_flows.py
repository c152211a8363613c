"""The example flows of time, trouble, decisions and undoing; see flows.py."""

from __future__ import annotations

import asyncio
import sys
import time
from decimal import Decimal
from typing import Any

from pydantic import BaseModel

from beluga_airflow import Chain, Decision, Graph, InvalidInput, Retry, StepContext, Stop
from tests.conformance.flows import ONCE, QUICK, TWICE, beside
from tests.conformance.trace import Trace, fails, gives, never, nothing, step, traced


class Busy(Exception):
    """What a service raises that asks to be left alone for a while."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"busy for {seconds:g} s")
        self.retry_after = seconds


class OutOfPaper(OSError):
    """A kind of OSError."""


# time

slow = Chain("slow", retry=TWICE).add_step("slow", never, timeout=0.1).add_step("end", nothing)
slow_in_thread = Chain("slow-in-thread", retry=ONCE).add_step("slow", step(lambda data: time.sleep(1)), timeout=0.1)
out_of_time = Graph("out-of-time", timeout=0.5).add_node("slow", never).add_node("slower", never)
out_of_time_in_thread = Chain("out-of-time-in-thread", timeout=0.5).add_step("slow", step(lambda data: time.sleep(4)))
waits_too_long = Chain("waits-too-long", timeout=0.5, retry=Retry(initial_interval=2)).add_step(
    "charge", fails(ConnectionError, "the bank is closed")
)

# retries


@step
def at_last(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
    if context.attempt < 3:
        raise ConnectionError(f"attempt {context.attempt} lost its connection")
    return {"attempts": context.attempt, "key": context.idempotency_key}


@step
def busy_once(data: dict[str, Any], context: StepContext) -> None:
    if context.attempt == 1:
        raise Busy(0.6)


retried = Chain("retried", retry=QUICK).add_step("charge", at_last).add_step("end", nothing)
used_up = Chain("used-up", retry=QUICK).add_step("charge", fails(ConnectionError, "the bank is closed"))
own_retry = Chain("own-retry", retry=QUICK).add_step("charge", fails(ConnectionError, "closed"), retry=TWICE)
listed_class = Chain("listed-class", retry=Retry(initial_interval=0.01, non_retryable=(OSError,))).add_step(
    "print", fails(OutOfPaper, "no paper")
)
listed_name = Chain("listed-name", retry=Retry(initial_interval=0.01, non_retryable=("OutOfPaper",))).add_step(
    "print", fails(OutOfPaper, "no paper")
)
refused = (
    Chain("refused", retry=QUICK).add_step("check", fails(InvalidInput, "order_id is empty")).add_step("end", nothing)
)
retry_after = Chain("retry-after", retry=QUICK).add_step("ask", busy_once)
silent = Chain("silent", retry=ONCE).add_step("fail", fails(RuntimeError))
long_error = Chain("long-error", retry=ONCE).add_step("fail", fails(RuntimeError, "x" * 5_000))

# what steps may be and do


class Charge:
    """A step that is an object."""

    def execute(self, inputs: dict[str, Any], context: StepContext) -> dict[str, Any]:
        with traced(inputs, context):
            return {"charged": context.step, "flow": context.flow, "generation": context.generation}


class Notify:
    """A step that is an object, async, and asks for the data alone."""

    async def execute(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"notified": inputs["charged"]}


objects = Chain("objects").add_step("charge", Charge()).add_step("notify", Notify())
exits = Chain("exits", retry=QUICK).add_step("leave", step(lambda data: sys.exit(3))).add_step("end", nothing)


@step
async def await_cancelled(data: dict[str, Any]) -> None:
    raise asyncio.CancelledError


cancelled_inside = Chain("cancelled-inside", retry=ONCE).add_step("wait", await_cancelled)


class Halt(BaseException):
    """What is no mere error."""


halts = Chain("halts", retry=TWICE).add_step("halt", fails(Halt, "out of order")).add_step("end", nothing)


@step
async def exit_async(data: dict[str, Any]) -> None:
    sys.exit()


exits_async = Chain("exits-async", retry=QUICK).add_step("leave", exit_async)
interrupted = Chain("interrupted", retry=QUICK).add_step("leave", fails(KeyboardInterrupt))


class Wordless(Exception):
    """An error that cannot be told."""

    def __str__(self) -> str:
        raise ValueError("no words")


wordless = Chain("wordless", retry=TWICE).add_step("fail", fails(Wordless))
odd_words = Chain("odd-words", retry=ONCE).add_step("fail", fails(RuntimeError, "zero \x00, naïve 🦦"))
half_words = Chain("half-words", retry=ONCE).add_step("fail", fails(RuntimeError, "half \ud800"))

# decisions; the model answers what `says` says


def handling(**options: Any) -> Decision:
    return Decision(
        "How should this order be handled?",
        choices={"expedite": "ship today", "standard": "the normal queue"},
        **{"reads": ("says",), "output_key": "handling", **options},
    )


decided = Chain("decided", retry=TWICE).add_step("decide", handling()).add_step("end", nothing)
falls_back = Chain("falls-back", retry=TWICE).add_step("decide", handling(fallback="standard"))
by_rule = Chain("by-rule").add_step(
    "decide",
    handling(output_key=None, rules=[(lambda data: data["says"] == "", "expedite"), (lambda data: True, "standard")]),
)
bad_rule = Chain("bad-rule", retry=QUICK).add_step("decide", handling(rules=[(lambda data: True, lambda data: "fly")]))
number = Chain("number", retry=TWICE).add_step(
    "decide", Decision("How many parcels?", output_type=int, reads=("says",))
)
decided_then_failed = (
    Chain("decided-then-failed", retry=ONCE)
    .add_step("decide", handling())
    .add_step("ship", fails(RuntimeError, "no courier"))
)
no_question = Chain("no-question", retry=QUICK).add_step("drop", nothing).add_step("decide", handling(reads=("gone",)))

# undoing


@step
def refund(data: dict[str, Any]) -> None:
    """Gives back what was paid; the data must be that after the payment."""
    if data["payment"] != "p-1" or data["reserved"] is not True or "parcel" in data:
        raise InvalidInput(f"no payment to give back in {sorted(data)}")


@step
def refund_at_last(data: dict[str, Any], context: StepContext) -> None:
    if context.attempt == 1:
        raise ConnectionError("the bank is closed")


def order(name: str, end: Any, back: Any = refund, pay_timeout: float | None = None, **options: Any) -> Chain:
    """Goods are reserved and paid for, and then shipping ends as it is given."""
    return (
        Chain(name, **{"retry": TWICE, **options})
        .add_step("reserve", gives(reserved=True), compensate=nothing)
        .add_step("look", nothing)
        .add_step("pay", gives(payment="p-1"), compensate=back, timeout=pay_timeout)
        .add_step("ship", end, compensate=nothing)
        .add_step("notify", nothing, compensate=nothing)
    )


no_courier = fails(RuntimeError, "no courier")
undone = order("undone", no_courier)
undone_in_time = order("undone-in-time", never, timeout=5)
undone_refused = order("undone-refused", fails(InvalidInput, "no such street"))
undo_fails = order("undo-fails", no_courier, fails(ConnectionError, "the bank is closed"))
undo_refused = order("undo-refused", no_courier, fails(InvalidInput, "no such payment"))
undo_late = order("undo-late", no_courier, never, pay_timeout=0.5)
undo_retried = order("undo-retried", no_courier, refund_at_last)
undo_exits = order("undo-exits", no_courier, step(lambda data: sys.exit(1)))
not_undone_after_stop = order("not-undone-after-stop", step(lambda data: Stop("no_courier")))
not_undone_after_end = order("not-undone-after-end", gives(parcel=1))


condition_fails = (
    Graph("condition-fails", retry=TWICE)
    .add_node("pay", gives(payment="p-1"), compensate=nothing)
    .add_node("ship", nothing)
    .add_edge("pay", "ship", when=lambda output: output["parcel"] > 0)
)


class Invoice(BaseModel):
    trace: str
    total: Decimal


class GiveBack:
    """What undoes may be an object too, async, with types and a context."""

    async def execute(self, invoice: Invoice, context: StepContext) -> None:
        with traced(invoice, context):
            if invoice.total != Decimal("2.50"):
                raise InvalidInput(f"the total is {invoice.total!r}")


undone_by_object = (
    Chain("undone-by-object", retry=ONCE)
    .add_step("pay", gives(total=Decimal("2.50")), compensate=GiveBack())
    .add_step("ship", no_courier)
)


@step
async def ship_beside(data: dict[str, Any], trace: Trace) -> None:
    await trace.wait_for("began", "beside")
    raise RuntimeError("no courier")


undone_beside = (
    Graph("undone-beside", retry=ONCE)
    .add_node("first", ship_beside, compensate=nothing)
    .add_node("beside", beside, compensate=nothing)
    .add_node("skipped", nothing, compensate=nothing)
    .add_node("look", gives(ok=False), compensate=nothing)
    .add_edge("look", "skipped", when={"ok": True})
)
