"""Flows for the tests of running again: importable, as a worker needs them.

Steps report to `seen` of sample_flows.py, under the token in the flow's input; `broken` holds the tokens for which they
fail, or stop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from beluga_airflow import Chain, Graph, Stop
from tests.operators.sample_flows import ONCE, broken, charge, fragile, handling, idle, refund, told, validate

LARGE = 500_000


def step(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A step that tells its name and leaves it."""

    def tells(data: dict[str, Any]) -> dict[str, Any]:
        told(name, data)
        return {name: True}

    return tells


def stock(data: dict[str, Any]) -> dict[str, Any] | Stop:
    told("stock", data)
    return Stop("out_of_stock") if data["token"] in broken else {"in_stock": True}


def token_of(data: dict[str, Any]) -> dict[str, Any]:
    told("first", data)
    return {"of": data["token"]}


def is_well(output: Mapping[str, Any]) -> bool:
    if output["of"] in broken:
        raise RuntimeError("the condition is broken")
    return True


def large(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda data: {name: "x" * LARGE}


ship = (
    Graph("shipping")
    .add_node("pack", step("pack"))
    .add_node("label", step("label"))
    .add_node("insure", step("insure"))
    .add_edge("pack", "label")
)
nested = (
    Graph("nested", retry=ONCE)
    .add_node("validate", validate)
    .add_node("audit", step("audit"))
    .add_node("ship", ship)
    .add_node("pay", fragile)
    .add_node("notify", step("notify"))
    .add_edge("validate", "audit")
    .add_edge("validate", "ship")
    .add_edge("ship", "pay")
    .add_edge("pay", "notify")
)
stock_beside = (
    Graph("stock-beside", max_workers=1)
    .add_node("validate", validate)
    .add_node("stock", stock)
    .add_node("pick", step("pick"))
    .add_node("charge", charge)
    .add_edge("validate", "stock")
    .add_edge("stock", "pick")
    .add_edge("validate", "charge")
)
conditional = (
    Graph("conditional")
    .add_node("first", token_of)
    .add_node("then", step("then"))
    .add_edge("first", "then", when=is_well)
)
parted = (
    Graph("parted", retry=ONCE)
    .add_node("validate", validate)
    .add_node("charge", charge, compensate=refund)
    .add_node("notify", step("notify"))
    .add_node("pay", fragile)
    .add_edge("validate", "charge")
    .add_edge("charge", "notify")
    .add_edge("charge", "pay")
)
decided = Chain("decided").add_step("handling", handling).add_step("charge", charge)
bulky = (
    Graph("bulky").add_node("a", large("a")).add_node("b", large("b")).add_node("c", large("c")).add_node("last", idle)
)
