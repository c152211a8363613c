"""Flows for the tests of the operators: importable, as a worker needs them.

Steps report to `seen`, by the token in the flow's input, what a result cannot tell.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from typing import Any

from beluga_airflow import Chain, Decision, Graph, InvalidInput, Retry, StepContext, Stop

QUICK = Retry(maximum_attempts=3, initial_interval=0.01, maximum_interval=0.01)
ONCE = Retry(maximum_attempts=1)
BIG = 100_000
TEXTS = ["\ud800 half", "\x00", "naïve — 名前", "a\nb\u2028c", "'\";--", "../../x", "🦦" * 100]

seen: defaultdict[str, list[Any]] = defaultdict(list)
gates: defaultdict[str, threading.Event] = defaultdict(threading.Event)
"""Steps that wait do so until the test opens the gate of their token."""
pairs: defaultdict[str, threading.Barrier] = defaultdict(lambda: threading.Barrier(2))
broken: set[str] = set()
"""Tokens for which `fragile` fails."""


def told(step: str, data: dict[str, Any]) -> None:
    seen[data.get("token", "")].append(step)


def validate(data: dict[str, Any]) -> dict[str, Any]:
    told("validate", data)
    if not data.get("order_id"):
        raise InvalidInput("order_id is empty")
    return {"valid": True}


def charge(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
    told("charge", data)
    return {
        "idempotency_key": context.idempotency_key,
        "attempt": context.attempt,
        "generation": context.generation,
    }


def fragile(data: dict[str, Any]) -> dict[str, Any]:
    told("fragile", data)
    if data.get("token") in broken:
        raise ConnectionError("the bank is closed")
    return {"paid": True}


def idle(data: dict[str, Any]) -> None:
    pass


def refund(data: dict[str, Any], context: StepContext) -> None:
    told(f"refund {data['idempotency_key']} by {context.idempotency_key}", data)
    if data.get("end") == "no refund":
        raise InvalidInput("the account is closed")


def flaky(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
    told("flaky", data)
    if context.attempt < 3:
        raise ConnectionError("not yet")
    return {"attempts": context.attempt}


def out_of_stock(data: dict[str, Any]) -> Stop:
    told("stock", data)
    return Stop("out_of_stock", {"product_id": "p-1"})


def big(data: dict[str, Any]) -> dict[str, Any]:
    told("big", data)
    return {"blob": "x" * BIG}


def sized(data: dict[str, Any]) -> dict[str, Any]:
    told("sized", data)
    return {"blob": "", "size": len(data["blob"])}


def meet(name: str) -> Any:
    def step(data: dict[str, Any]) -> dict[str, Any]:
        told(name, data)
        pairs[data["token"]].wait(timeout=20)  # broken unless the other one runs at the same time
        return {name: True}

    return step


async def at_gate(data: dict[str, Any]) -> dict[str, Any]:
    told("waiting", data)
    try:
        while not gates[data["token"]].is_set():  # noqa: ASYNC110  # the test opens it from another loop
            await asyncio.sleep(0.01)
    except asyncio.CancelledError:
        told("cancelled", data)
        raise
    return {"waited": True}


async def never(data: dict[str, Any]) -> None:
    await asyncio.Event().wait()


def treated(data: dict[str, Any]) -> dict[str, Any] | Stop:
    """The step of a batch: the item says how it is to end."""
    told(str(data.get("id")), data)
    match data.get("end"):
        case "stop":
            return Stop("out_of_stock")
        case "invalid":
            raise InvalidInput("the item is not good")
        case "error":
            raise ConnectionError("the bank is closed")
    return {"treated": True}


handling = Decision(
    "How should this order be handled?",
    choices=["expedite", "standard"],
    reads=("tier",),
    rules=[(lambda data: data["tier"] == "tiny", "standard")],
)
careful = Decision("Is it fraud?", output_type=bool, reads=("tier",), fallback=True)

paid_then_decided = Chain("paid-then-decided").add_step("charge", charge).add_step("handling", handling)
chain = Chain("order-chain").add_step("validate", validate).add_step("charge", charge)
graph = (
    Graph("order-graph")
    .add_node("validate", validate)
    .add_node("left", meet("left"))
    .add_node("right", meet("right"))
    .add_node("charge", charge)
    .add_edge("validate", "left")
    .add_edge("validate", "right")
    .add_edge("left", "charge")
    .add_edge("right", "charge")
)
decided = Chain("decided", retry=QUICK).add_step("handling", handling).add_step("charge", charge)
decided_then_broken = Chain("decided-then-broken", retry=ONCE).add_step("handling", handling).add_step("pay", fragile)
fallen_back = Chain("fallen-back", retry=ONCE).add_step("fraud", careful)
stopped = Chain("stopped").add_step("stock", out_of_stock).add_step("charge", charge)
retried = Chain("retried", retry=QUICK).add_step("flaky", flaky)
used_up = Chain("used-up", retry=QUICK).add_step("pay", fragile)
used_up_late = (
    Chain("used-up-late", retry=ONCE)
    .add_step("validate", validate)
    .add_step("charge", charge)
    .add_step("fulfil", fragile)
)
pair = (
    Graph("pair")
    .add_node("validate", validate)
    .add_node("charge", charge)
    .add_node("fulfil", fragile)
    .add_edge("validate", "charge")
    .add_edge("validate", "fulfil")
)
refunded = (
    Chain("refunded", retry=ONCE)
    .add_step("validate", validate)
    .add_step("charge", charge, compensate=refund)
    .add_step("fulfil", fragile)
)
late = Chain("late", timeout=0.2).add_step("never", never)
sizeable = Chain("sizeable", retry=ONCE).add_step("big", big).add_step("sized", sized).add_step("pay", fragile)
gated = Chain("gated").add_step("wait", at_gate).add_step("charge", charge)
item = Chain("item", retry=ONCE).add_step("treated", treated).add_step("charge", charge)
judged = Chain("judged", retry=ONCE).add_step("treated", treated).add_step("handling", handling)
doubly_judged = Chain("doubly-judged", retry=ONCE).add_step("handling", handling).add_step("fraud", careful)
patient = Chain("patient", retry=ONCE).add_step("treated", treated).add_step("wait", at_gate)

unfinished = Chain("unfinished")
not_a_flow = {"chain": chain}


def orders(count: int = 3, token: str = "") -> Iterator[dict[str, Any]]:
    told(f"orders({count})", {"token": token})
    for number in range(count):
        yield {"id": number, "order_id": f"o-{number}", "tier": "tiny", "token": token}


async def orders_by_and_by(token: str = "") -> AsyncIterator[dict[str, Any]]:
    for order in orders(2, token):
        await asyncio.sleep(0)
        yield order


def texts(token: str) -> Iterator[dict[str, Any]]:
    yield from ({"id": text, "order_id": text, "token": token} for text in TEXTS)


def a_number() -> int:
    return 7


def spoiled(token: str = "") -> Iterator[dict[str, Any]]:
    yield from orders(2, token)
    if token in broken:
        raise OSError("the file ends too early")
    yield from ({"id": number, "order_id": f"o-{number}", "token": token} for number in (2, 3))
