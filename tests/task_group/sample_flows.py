"""Flows for the tests of the task group: the same objects are run by `run()` and as tasks.

Steps report to `seen`, by the case in the flow's input, what a result cannot tell.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import defaultdict
from typing import Any

from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from beluga_airflow import Chain, Decision, Graph, InvalidInput, Retry, StepContext, Stop

ONCE = Retry(maximum_attempts=1)
QUICK = Retry(maximum_attempts=3, initial_interval=0.01, maximum_interval=0.01)

seen: defaultdict[str, list[str]] = defaultdict(list)
times: defaultdict[str, list[float]] = defaultdict(list)


class Busy(Exception):
    """A server that says when to come back."""

    retry_after = 2.5


class Halt(BaseException):
    """What is no mere error."""


def told(step: str, data: dict[str, Any]) -> None:
    seen[data.get("case", "")].append(step)


def sets(name: str, **output: Any) -> Any:
    """A step that returns ``output``, with its own name as a key."""

    def step(data: dict[str, Any]) -> dict[str, Any]:
        told(name, data)
        return {name: True, **output}

    return step


def raises(name: str, error: BaseException) -> Any:
    def step(data: dict[str, Any]) -> None:
        told(name, data)
        raise error

    return step


def undoes(name: str) -> Any:
    def step(data: dict[str, Any], context: StepContext) -> None:
        told(f"undo {name} {data[name]} {context.idempotency_key.rpartition('/')[2]}", data)

    return step


def stops(data: dict[str, Any]) -> Stop:
    told("stops", data)
    return Stop("out_of_stock", {"product": "p-1"})


def third_time(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
    told("third_time", data)
    if context.attempt < 3:
        raise ConnectionError("not yet")
    return {"attempts": context.attempt}


def busy(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
    told("busy", data)
    times[data["case"]].append(time.monotonic())
    if context.attempt == 1:
        raise Busy("come back later")
    return {"served": True}


def exits(data: dict[str, Any]) -> None:
    sys.exit(3)


async def never(data: dict[str, Any]) -> None:
    told("never", data)
    await asyncio.Event().wait()


def hangs(data: dict[str, Any]) -> None:
    told("hangs", data)
    threading.Event().wait()


def keyed(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
    told("keyed", data)
    return {"key": context.idempotency_key, "attempt": context.attempt, "generation": context.generation}


def is_gold(output: dict[str, Any]) -> bool:
    return bool(output["tier"] == "gold")


def graph(name: str, edges: str, /, nodes: dict[str, Any], **options: Any) -> Graph:
    """A graph of steps named by words; edges as ``"a>b b>c"``."""
    made = Graph(name, **{"retry": ONCE, **options})
    for node, step in nodes.items():
        made.add_node(node, step)
    for edge in edges.split():
        source, _, target = edge.partition(">")
        made.add_edge(source, target)
    return made


def plain(*names: str, **special: Any) -> dict[str, Any]:
    return {name: sets(name) for name in names} | special


linear = Chain("linear").add_step("validate", sets("validate")).add_step("charge", sets("charge", paid=7))
diamond = graph("diamond", "a>b a>c b>d c>d", plain("a", "b", "c", "d"))

when_false = (
    graph("when-false", "", plain("credit", "pay", "notify"))
    .add_edge("credit", "pay", when={"credit": False})
    .add_edge("pay", "notify")
)
predicate = (
    graph("predicate", "", plain("gift", "bill", look=sets("look", tier="gold")))
    .add_edge("look", "gift", when=is_gold)
    .add_edge("look", "bill", when=lambda output: output["tier"] != "gold")
)
join_any = (
    Graph("join-any", retry=ONCE)
    .add_node("look", sets("look", big=True))
    .add_node("truck", sets("truck"))
    .add_node("bike", sets("bike"))
    .add_node("send", sets("send"), join="any")
    .add_edge("look", "truck", when={"big": True})
    .add_edge("look", "bike", when={"big": False})
    .add_edge("truck", "send")
    .add_edge("bike", "send")
)
stop_in_branch = graph("stop-in-branch", "a>stock a>b b>c stock>d c>d", plain("a", "b", "c", "d", stock=stops))
failure = graph("failure", "a>bad a>b b>c bad>d c>d", plain("a", "b", "c", "d", bad=raises("bad", ValueError("no"))))
used_up = Chain("used-up", retry=QUICK).add_step("pay", raises("pay", ConnectionError("the bank is closed")))
third = Chain("third", retry=QUICK).add_step("try", third_time).add_step("after", sets("after"))
invalid = Chain("invalid", retry=QUICK).add_step("check", raises("check", InvalidInput("order_id is empty")))
listed = Chain("listed", retry=Retry(maximum_attempts=3, non_retryable=(ValueError,))).add_step(
    "check", raises("check", UnicodeError("odd"))
)
retry_after = Chain("retry-after", retry=QUICK).add_step("ask", busy)
several_ends = graph("several-ends", "a>b a>c", plain("a", "b", "c"))
reduced = graph(
    "reduced",
    "l>end r>end",
    {"l": sets("l", points=3), "r": sets("r", points=4), **plain("end")},
    reducers={"points": lambda one, other: one + other},
)
conflict = graph("conflict", "l>end r>end", {"l": sets("l", points=3), "r": sets("r", points=4), **plain("end")})
conflict_at_skipped_end = (
    Graph("conflict-at-skipped-end", retry=ONCE)
    .add_node("l", sets("l", points=3), compensate=undoes("l"))
    .add_node("r", sets("r", points=4))
    .add_node("end", sets("end"))
    .add_edge("l", "end", when={"l": False})
    .add_edge("r", "end")
)

pack = Chain("pack").add_step("wrap", sets("wrap")).add_step("label", sets("label", at=1))
ship = graph("ship", "weigh>box box>stamp", {**plain("weigh", "stamp"), "box": pack})
nested = graph("nested", "a>ship ship>z", {**plain("a", "z"), "ship": ship})
nested_skipped = (
    graph("nested-skipped", "", {**plain("a", "z"), "ship": pack})
    .add_edge("a", "ship", when={"a": False})
    .add_edge("ship", "z")
)

refunded = (
    Chain("refunded", retry=ONCE)
    .add_step("reserve", sets("reserve"), compensate=undoes("reserve"))
    .add_step("charge", sets("charge"), compensate=undoes("charge"))
    .add_step("fulfil", raises("fulfil", RuntimeError("the truck is gone")))
)
not_refunded = (
    Chain("not-refunded", retry=QUICK)
    .add_step("reserve", sets("reserve"), compensate=undoes("reserve"))
    .add_step("charge", sets("charge"), compensate=raises("no refund", ConnectionError("the bank is closed")))
    .add_step("fulfil", raises("fulfil", InvalidInput("no address")))
)
nothing_undone = (
    Chain("nothing-undone", retry=ONCE)
    .add_step("stock", stops)
    .add_step("charge", sets("charge"), compensate=undoes("charge"))
)

slow_step = Chain("slow-step", retry=ONCE).add_step("sleep", hangs, timeout=0.2)
late = Chain("late", timeout=2, retry=QUICK).add_step("first", sets("first")).add_step("sleep", never)
late_inside = Chain("late-inside", retry=ONCE).add_step(
    "ship", Chain("slow-ship", timeout=2).add_step("first", sets("first")).add_step("sleep", never)
)

one_at_a_time = graph("one-at-a-time", "a>b c>d", plain("a", "b", "c", "d"), parallel=False)
capped = graph("capped", " ".join(f"a>{name}" for name in "bcdef"), plain("a", "b", "c", "d", "e", "f"), max_workers=2)
conditional_lanes = graph("conditional-lanes", "", plain("a", "b", "c"), parallel=False).add_edge(
    "a", "b", when={"a": False}
)
exited = Chain("exited", retry=QUICK).add_step("exit", exits)
airflow_skip = Chain("airflow-skip", retry=QUICK).add_step("skip", raises("skip", AirflowSkipException("not today")))
airflow_fail = Chain("airflow-fail", retry=QUICK).add_step("fail", raises("fail", AirflowFailException("at once")))
halts = Chain("halts", retry=QUICK).add_step("halt", raises("halt", Halt("out of order")))
odd_words = Chain("odd-words", retry=ONCE).add_step("say", raises("say", RuntimeError("half \ud800")))
keys = Chain("keys", retry=QUICK).add_step("keyed", keyed)


def by_name_of_case(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
    told("fulfil", data)
    if data["case"] == "bad" or (data["case"] == "again" and context.attempt == 1):
        raise RuntimeError("the truck is gone")
    return {"attempt": context.attempt}


def stock_of_case(data: dict[str, Any]) -> dict[str, Any] | Stop:
    return stops(data) if data["case"] == "stopped" else {"stock": True}


by_case = (
    Graph("by-case", retry=Retry(maximum_attempts=2, initial_interval=0.01))
    .add_node("stock", stock_of_case)
    .add_node("credit", sets("credit"))
    .add_node("charge", sets("charge"), compensate=undoes("charge"))
    .add_node("fulfil", by_name_of_case)
    .add_edge("stock", "charge")
    .add_edge("credit", "charge")
    .add_edge("charge", "fulfil")
)

speed = Decision(
    "How should this order be handled?",
    choices=["expedite", "standard"],
    reads=("tier",),
    rules=[(lambda data: data["tier"] == "tiny", "standard")],
)
decided = Chain("decided", retry=ONCE).add_step("speed", speed).add_step("charge", sets("charge"))
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (linear, {"order_id": "o-1"}),
    "diamond": (diamond, {}),
    "when_false": (when_false, {}),
    "predicate": (predicate, {}),
    "join_any": (join_any, {}),
    "stop_in_branch": (stop_in_branch, {}),
    "failure": (failure, {}),
    "used_up": (used_up, {}),
    "third": (third, {}),
    "invalid": (invalid, {}),
    "listed": (listed, {}),
    "retry_after": (retry_after, {}),
    "several_ends": (several_ends, {}),
    "reduced": (reduced, {}),
    "conflict": (conflict, {}),
    "conflict_at_skipped_end": (conflict_at_skipped_end, {}),
    "nested": (nested, {}),
    "nested_skipped": (nested_skipped, {}),
    "refunded": (refunded, {}),
    "not_refunded": (not_refunded, {}),
    "nothing_undone": (nothing_undone, {}),
    "slow_step": (slow_step, {}),
    "late": (late, {}),
    "late_inside": (late_inside, {}),
    "one_at_a_time": (one_at_a_time, {}),
    "capped": (capped, {}),
    "conditional_lanes": (conditional_lanes, {}),
    "exited": (exited, {}),
    "odd_words": (odd_words, {}),
    "airflow_skip": (airflow_skip, {}),
    "airflow_fail": (airflow_fail, {}),
    "decided": (decided, {"tier": "tiny"}),
}
"""Flow and input of each example; every input gets its name as ``case``."""
