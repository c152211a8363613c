"""Flows whose steps do what a test tells them by files, and write down what they did.

Every input has ``folder``: a step waits while ``hold/<step>`` is in it, fails for good where ``fail/<step>`` is, and
stops the flow where ``stop/<step>`` is. When it began and ended is in ``journal.jsonl``, a line for each.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beluga_airflow import Chain, Decision, Graph, InvalidInput, Retry, StepContext, Stop

__all__ = ["CAPS", "large", "shop", "wide"]

LONGEST = 240.0
"""Seconds that a step waits for its test."""
ONCE = Retry(maximum_attempts=1)
TWICE = Retry(maximum_attempts=2, initial_interval=0.5)


def told(data: dict[str, Any], context: StepContext) -> dict[str, Any] | Stop:
    """Does what the test says, and returns the key that it was given."""
    folder = Path(data["folder"])
    with _noted(folder, context):
        _wait_while((folder / "hold" / context.step).exists)
        if (folder / "fail" / context.step).exists():
            raise InvalidInput("the truck is gone")
        if (folder / "stop" / context.step).exists():
            return Stop("out_of_stock", {"product_id": "p-1"})
    return {context.step: context.idempotency_key}


def undo(data: dict[str, Any], context: StepContext) -> None:
    folder = Path(data["folder"])
    with _noted(folder, context):
        _wait_while((folder / "hold" / context.step).exists)


def works(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
    """Takes so many seconds from when so many steps of the flow have begun."""
    folder = Path(data["folder"])
    with _noted(folder, context):
        _wait_while(lambda: _begun(folder) < data["together"])
        time.sleep(data["seconds"])
    return {context.step: True}


def hangs(data: dict[str, Any], context: StepContext) -> None:
    with _noted(Path(data["folder"]), context):
        _wait_while(lambda: True)


def writes_much(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
    """Returns more than Airflow's task state takes."""
    with _noted(Path(data["folder"]), context):
        return {"text": "x" * 70_000}


@contextmanager
def _noted(folder: Path, context: StepContext) -> Iterator[None]:
    line = {
        "step": context.step,
        "key": context.idempotency_key,
        "attempt": context.attempt,
        "generation": context.generation,
        "pid": os.getpid(),
    }
    _note(folder, {"event": "begins", **line})
    try:
        yield
    finally:
        _note(folder, {"event": "ends", **line})


def _note(folder: Path, line: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # one write each, so that lines of several processes do not mix
    with (folder / "journal.jsonl").open("ab", buffering=0) as journal:
        journal.write(json.dumps(line).encode() + b"\n")


def _begun(folder: Path) -> int:
    return (folder / "journal.jsonl").read_text().count('"begins"')


def _wait_while(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST
    while condition():
        if time.monotonic() > deadline:
            raise InvalidInput("nobody let this step go on")
        time.sleep(0.05)


speed = Decision(
    "How should this order be handled?",
    choices=["expedite", "standard"],
    reads=("order_value", "customer_tier"),
    output_key="handling",
)

shop = (
    Graph("shop", retry=TWICE, timeout=900)
    .add_node("stock", told, timeout=300)
    .add_node("credit", told, timeout=300)
    .add_node("decide", speed)
    .add_node("charge", told, timeout=300, compensate=undo)
    .add_node("fulfil", told, timeout=300)
    .add_edge("stock", "decide")
    .add_edge("credit", "decide")
    .add_edge("decide", "charge")
    .add_edge("charge", "fulfil")
)

wide = (
    Graph("wide", retry=ONCE)
    .add_node("a", told, timeout=300)
    .add_node("b", told)
    .add_node("c", told, timeout=300)
    .add_node("d", told)
    .add_edge("a", "b")
    .add_edge("c", "d")
)

large = Chain("large", retry=ONCE).add_step("small", told).add_step("large", writes_much).add_step("after", told)

barrier = Graph("barrier", retry=ONCE)
for name in ("left", "middle", "right"):
    barrier.add_node(name, works, timeout=300)

capped = Graph("capped", retry=ONCE, max_workers=2)
for name in ("a", "b", "c", "d", "e"):
    capped.add_node(name, works, timeout=300)

in_order = Graph("in-order", retry=ONCE, parallel=False)
for name in ("third", "first", "second"):
    in_order.add_node(name, works)
in_order.add_edge("first", "third")

step_timeout = Chain("step-timeout", retry=ONCE).add_step("quick", works).add_step("hangs", hangs, timeout=2)
flow_timeout = Chain("flow-timeout", timeout=15, retry=ONCE).add_step("quick", works).add_step("hangs", hangs)

CAPS = {
    "barrier": (barrier, 3),
    "capped": (capped, 2),
    "in_order": (in_order, 1),
    "step_timeout": (step_timeout, 1),
    "flow_timeout": (flow_timeout, 1),
}
"""Flows by the ids of their DAGs, with how many steps wait for each other."""
