"""Flows for the tests of the Temporal side: importable, as a worker needs them.

Steps report to `seen`, by the token in the flow's input, what a result cannot tell.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter, defaultdict
from decimal import Decimal
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from beluga_airflow import Chain, Decision, Graph, InvalidInput, Retry, StepContext, Stop

QUICK = Retry(maximum_attempts=3, initial_interval=0.01, maximum_interval=0.01)
ONCE = Retry(maximum_attempts=1)

seen: defaultdict[str, list[Any]] = defaultdict(list)
gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
"""Steps that wait do so until the test opens the gate of their token."""
running: Counter[str] = Counter()


class Order(BaseModel):
    token: str
    order_id: str
    amount: Decimal = Decimal(10)


def mark(name: str) -> Any:
    """A step that reports its name and returns it under a key of its own."""

    def step(data: dict[str, Any]) -> dict[str, Any]:
        seen[data["token"]].append(name)
        return {name: True}

    return step


async def never(data: dict[str, Any]) -> None:
    """A step that ends only by being cancelled."""
    seen[data["token"]].append("began")
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        seen[data["token"]].append("cancelled")
        raise


async def wait_at_gate(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
    seen[data["token"]].append(context.step)
    await gates[data["token"]].wait()
    return {"waited": True}


def price(order: Order) -> dict[str, Any]:
    return {"total": order.amount * 3, "order_id": order.order_id.upper()}


def identify(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
    return {"key": context.idempotency_key, "attempt": context.attempt, "generation": context.generation}


def fail(data: dict[str, Any]) -> None:
    seen[data["token"]].append("failed")
    raise RuntimeError("the printer is on fire")


def refuse(data: dict[str, Any]) -> None:
    seen[data["token"]].append("refused")
    raise InvalidInput(f"no order has the id {data.get('order_id', '')}")


def succeed_at_last(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
    seen[data["token"]].append(context.attempt)
    if context.attempt < 3:
        raise ConnectionError(f"attempt {context.attempt} lost its connection")
    return {"attempts": context.attempt}


async def gather_at_gate(data: dict[str, Any], context: StepContext) -> None:
    """A step that reports how many of its kind run at once, and waits until it may end."""
    running[data["token"]] += 1
    seen[data["token"]].append(running[data["token"]])
    await gates[data["token"]].wait()
    running[data["token"]] -= 1


def fan(name: str, **options: Any) -> Graph:
    graph = Graph(name, **options).add_node("first", lambda data: None)
    for number in range(6):
        graph.add_node(f"wide-{number}", gather_at_gate).add_edge("first", f"wide-{number}")
    return graph


chain = Chain("chain").add_step("price", price).add_step("identify", identify).add_step("end", mark("end"))

branches = (
    Graph("branches")
    .add_node("start", mark("start"))
    .add_node("left", mark("left"))
    .add_node("right", mark("right"))
    .add_node("end", lambda data: {"both": data["left"] and data["right"]})
    .add_edge("start", "left")
    .add_edge("start", "right")
    .add_edge("left", "end")
    .add_edge("right", "end")
)

when = (
    Graph("when")
    .add_node("look", lambda data: {"size": data["size"], "color": "red"})
    .add_node("large", mark("large"))
    .add_node("red", mark("red"))
    .add_node("blue", mark("blue"))
    .add_edge("look", "large", when=lambda output: output["size"] > 10)
    .add_edge("look", "red", when={"color": "red"})
    .add_edge("look", "blue", when={"color": "blue"})
)

join_any = (
    Graph("join-any")
    .add_node("by_card", lambda data: {"paid": data["card"]})
    .add_node("by_cash", lambda data: {"paid": True})
    .add_node("receipt", mark("receipt"), join="any")
    .add_node("both", mark("both"))
    .add_node("end", mark("end"), join="any")
    .add_edge("by_card", "receipt", when={"paid": True})
    .add_edge("by_cash", "receipt")
    .add_edge("by_card", "both", when={"paid": True})
    .add_edge("by_cash", "both")
    .add_edge("receipt", "end")
    .add_edge("both", "end")
)
join_any.reducers["paid"] = lambda one, other: one or other

stop = (
    Graph("stop")
    .add_node("check", lambda data: Stop("out_of_stock", {"product": "p-1"}))
    .add_node("beside", mark("beside"))
    .add_node("pay", mark("pay"))
    .add_edge("check", "pay")
)

failure = (
    Graph("failure", retry=ONCE)
    .add_node("bad", fail)
    .add_node("beside", mark("beside"))
    .add_node("after_bad", mark("after_bad"))
    .add_edge("bad", "after_bad")
)


def ending(name: str, first: Any) -> Graph:
    """A graph whose first step ends it while another waits at the gate."""
    return (
        Graph(name, retry=ONCE)
        .add_node("first", first)
        .add_node("beside", wait_at_gate)
        .add_node("after_first", mark("after_first"))
        .add_node("after_beside", mark("after_beside"))
        .add_edge("first", "after_first")
        .add_edge("beside", "after_beside")
    )


stops_early = ending("stops-early", lambda data: Stop("out_of_stock"))
fails_early = ending("fails-early", fail)

two_failures = Graph("two-failures", retry=ONCE).add_node("second", refuse).add_node("first", fail)

retried = Chain("retried", retry=QUICK).add_step("try", succeed_at_last).add_step("end", mark("end"))
used_up = Chain("used-up", retry=QUICK).add_step("try", fail)
refused = Chain("refused", retry=QUICK).add_step("check", refuse).add_step("end", mark("end"))
listed = Chain("listed", retry=Retry(maximum_attempts=3, non_retryable=(RuntimeError,))).add_step("try", fail)
# the first wait is longer than the longest: Temporal would refuse such a policy
short_waits = Chain("short-waits").add_step(
    "try", succeed_at_last, retry=Retry(maximum_attempts=3, initial_interval=9, maximum_interval=0.01)
)
at_once = Chain("at-once").add_step(
    "try", succeed_at_last, retry=Retry(maximum_attempts=3, initial_interval=0, maximum_interval=0)
)
patient = Chain(
    "patient", timeout=1e14, retry=Retry(maximum_attempts=sys.maxsize, initial_interval=0.01, maximum_interval=1e14)
).add_step("try", succeed_at_last, timeout=1e14)
waits_to_retry = Chain("waits-to-retry", timeout=0.5, retry=Retry(initial_interval=30, maximum_interval=30)).add_step(
    "try", fail
)

step_timeout = Chain("step-timeout", retry=ONCE).add_step("slow", never, timeout=0.2)
flow_timeout = Graph("flow-timeout", timeout=0.5).add_node("slow", never).add_node("slower", never)

finishes = (
    Graph("finishes")
    .add_node("start", mark("start"))
    .add_node("ship", lambda data: {"parcel": 1})
    .add_node("bill", lambda data: {"invoice": 2})
    .add_node("gift", mark("gift"))
    .add_edge("start", "ship")
    .add_edge("start", "bill")
    .add_edge("start", "gift", when={"gift": True})
)

skipped_end = (
    Graph("skipped-end", reducers={"n": lambda one, other: one + other})
    .add_node("one", lambda data: {"n": 1, "credit_ok": False})
    .add_node("other", lambda data: {"n": 2})
    .add_node("end", mark("end"))
    .add_edge("one", "end", when={"credit_ok": True})
    .add_edge("other", "end")
)

skipped_conflict = (
    Graph("skipped-conflict")
    .add_node("one", lambda data: {"n": 1})
    .add_node("other", lambda data: {"n": 2})
    .add_node("end", mark("end"))
    .add_edge("one", "end", when={"n": 7})
    .add_edge("other", "end")
)

capped = fan("capped", max_workers=2)
serial = fan("serial", parallel=False)
wide = fan("wide")
in_turn = Graph("in-turn", parallel=False)
for name in ("c", "a", "b"):
    in_turn.add_node(name, mark(name))

decision = Chain("decision").add_step(
    "decide",
    Decision(
        "How should this order be handled?",
        choices=["expedite", "standard"],
        reads=("order_id",),
        output_key="handling",
        fallback="standard",
    ),
)
by_rule = Chain("by-rule").add_step(
    "decide",
    Decision("Is it small?", output_type=bool, reads=("size",), rules=[(lambda data: data["size"] < 50, True)]),
)

reducers = (
    Graph("reducers", reducers={"tags": lambda earlier, later: [*earlier, *later]})
    .add_node("one", lambda data: {"tags": ["a"], "same": 1})
    .add_node("other", lambda data: {"tags": ["b"], "same": 1})
    .add_node("end", lambda data: {"count": len(data["tags"])})
    .add_edge("one", "end")
    .add_edge("other", "end")
)
conflict = (
    Graph("conflict", retry=QUICK)
    .add_node("one", lambda data: {"key": 1})
    .add_node("other", lambda data: {"key": 2})
    .add_node("end", mark("end"))
    .add_edge("one", "end")
    .add_edge("other", "end")
)
bad_reducer = Graph("bad-reducer", reducers={"key": lambda one, other: 1 / 0}, retry=ONCE)
for name in ("one", "other"):
    bad_reducer.add_node(name, lambda data, name=name: {"key": name})
bad_reducer.add_node("end", mark("end")).add_edge("one", "end").add_edge("other", "end")

missing = Chain("missing", retry=QUICK).add_step("read", lambda data: {"x": data["nowhere"]})
not_json = Chain("not-json", retry=QUICK).add_step("give", lambda data: {"when": object()})
exits = Chain("exits", retry=QUICK).add_step("leave", lambda data: sys.exit(3))
order_of_keys = (
    Chain("order-of-keys")
    .add_step("give", lambda data: {"stations": {"zoo": 1, "apple": 2, "museum": 3}})
    .add_step("read", lambda data: {"route": [*data["stations"]], "given": [*data["trip"]]})
)

held = Chain("held").add_step("wait", wait_at_gate).add_step("end", mark("end"))
stuck = Chain("stuck", retry=ONCE).add_step("slow", never)
changed = (
    Chain("changed").add_step("new_first", mark("new_first")).add_step("one", mark("one")).add_step("two", mark("two"))
)


def large(key: str, size: int) -> Any:
    def step(data: dict[str, Any]) -> dict[str, Any]:
        seen[data["token"]].append("large")
        return {key: "a" * size}

    return step


large_result = Chain("large-result", retry=QUICK).add_step("one", large("x", 2_500_000)).add_step("end", mark("end"))
large_sum = Chain("large-sum", retry=QUICK)
large_end = Graph("large-end", retry=QUICK)
for name in ("a", "b", "c"):
    large_sum.add_step(name, large(name, 800_000))
    large_end.add_node(name, large(name, 800_000))
large_sum.add_step("end", mark("end"))
branches_at_once = Graph("branches-at-once")
for name in ("a", "b", "c"):
    branches_at_once.add_node(name, mark(name))


def judge_size(data: dict[str, Any]) -> dict[str, Any] | Stop:
    """Every kind of end: above 100 a failure, above 50 a stop, of a text an input that the step refuses."""
    seen[data["token"]].append(data["size"])
    if not isinstance(data["size"], int):
        raise InvalidInput(f"size is a {type(data['size']).__name__}")
    if data["size"] > 100:
        raise RuntimeError("too large for the parcel")
    return Stop("large") if data["size"] > 50 else {"size_ok": True}


by_size = Chain("by-size", retry=ONCE).add_step("judge", judge_size)


async def wait_or_tell(data: dict[str, Any]) -> None:
    """A step at the gate that also tells when it is cancelled."""
    seen[data["token"]].append("wait")
    try:
        await gates[data["token"]].wait()
    except asyncio.CancelledError:
        seen[data["token"]].append("cancelled")
        raise


gathers = Chain("gathers").add_step("gather", gather_at_gate)
two_steps = Chain("two-steps").add_step("first", mark("first")).add_step("wait", wait_or_tell)


def handling(name: str, **options: Any) -> Chain:
    question = Decision(
        "How should this order be handled?",
        choices=["expedite", "standard"],
        reads=("order_id",),
        output_key="handling",
        **options,
    )
    return Chain(name, retry=Retry(maximum_attempts=2, initial_interval=0.01)).add_step("decide", question)


without_fallback = handling("without-fallback")
falls_back = handling("falls-back", fallback="standard")


def write_down(data: dict[str, Any], context: StepContext) -> None:
    """A step that tells other processes that it runs."""
    with Path(data["log"]).open("a") as file:
        file.write(f"{context.step} {context.idempotency_key} {os.getpid()}\n")


def wait_for_file(data: dict[str, Any], context: StepContext) -> None:
    """A step at a gate that other processes can open."""
    write_down(data, context)
    while not Path(data["gate"]).exists():
        time.sleep(0.02)


gated = Chain("gated").add_step("wait", wait_for_file, retry=Retry(maximum_attempts=1)).add_step("end", write_down)


def pass_gates(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
    """A step, or what undoes one: tells other processes when it begins and what it has done, and waits at its gates."""
    for place in ("begins", "did"):
        with Path(data["log"]).open("a") as file:
            file.write(f"{place} {context.step} {context.idempotency_key} {os.getpid()}\n")
        gate = data.get("gates", {}).get(f"{place} {context.step}")
        while gate and not Path(gate).exists():
            time.sleep(0.02)
    if context.attempt <= data.get("fails", {}).get(context.step, 0):
        raise ConnectionError("the bank is closed")
    if context.step in data.get("refuses", ()):
        raise InvalidInput(f"{context.step} cannot be")
    return {context.step: context.idempotency_key}


paid = (
    Chain("paid", retry=QUICK)
    .add_step("reserve", pass_gates, compensate=pass_gates)
    .add_step("pay", pass_gates, compensate=pass_gates)
    .add_step("fulfil", pass_gates)
)


def paid_first(name: str, **options: Any) -> Chain:
    return (
        Chain(name, retry=QUICK, **options)
        .add_step("pay", pass_gates, compensate=pass_gates)
        .add_step("fulfil", pass_gates)
    )


untimed = paid_first("untimed")
timed = paid_first("timed", timeout=1.0)
timed_inside = Chain("timed-inside").add_step("order", paid_first("order", timeout=1.0))
