"""The example flows with flows inside; see flows.py."""

from __future__ import annotations

import time
from typing import Any

from beluga_airflow import Chain, Decision, Graph, StepContext, Stop
from tests.conformance.flows import ONCE, TWICE
from tests.conformance.trace import Trace, fails, gives, meets, never, nothing, step


@step
def label(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
    """Tells the path and the key of the step that it is."""
    return {f"label of {context.step}": context.idempotency_key}


no_courier = fails(RuntimeError, "no courier")
packing = Graph("packing").add_node("pack", gives(packed=True)).add_node("label", label).add_edge("pack", "label")
shipping = Chain("shipping").add_step("weigh", gives(weight=3)).add_step("packing", packing)

nested = Chain("nested").add_step("pay", gives(paid=True)).add_step("ship", packing).add_step("notify", nothing)
nested_at_the_end = Graph("nested-at-the-end").add_node("ship", packing).add_node("bill", gives(bill=1))
nested_twice = (
    Graph("nested-twice")
    .add_node("home", packing)
    .add_node("gift", shipping)
    .add_node("end", nothing)
    .add_edge("home", "end")
    .add_edge("gift", "end")
)
nested_when = (
    Graph("nested-when")
    .add_node("ship", shipping)
    .add_node("van", gives(by="van"))
    .add_node("bike", gives(by="bike"))
    .add_node("truck", nothing)
    .add_edge("ship", "van", when={"weight": 7})
    .add_edge("ship", "bike", when=lambda output: output["weight"] < 5 and "product" not in output)
    .add_edge("ship", "truck", when={"product": "p-1"})
)
gifts = (
    Graph("gifts")
    .add_node("look", gives(gift=False))
    .add_node("wrap", gives(wrapped=True))
    .add_node("box", gives(boxed=True))
    .add_edge("look", "wrap", when={"gift": True})
    .add_edge("look", "box")
)
nested_skipped_finish = Chain("nested-skipped-finish").add_step("prepare", gifts).add_step("ship", gives(shipped=True))
wrapping = (
    Graph("wrapping")
    .add_node("look", gives(gift=False))
    .add_node("wrap", gives(wrapped=True))
    .add_edge("look", "wrap", when={"gift": True})
)
nested_all_finishes_skipped = Chain("nested-all-finishes-skipped").add_step("wrap", wrapping).add_step("end", nothing)
nested_skipped = (
    Graph("nested-skipped")
    .add_node("look", gives(ship=False))
    .add_node("ship", shipping)
    .add_node("after", nothing)
    .add_node("end", gives(ended=True), join="any")
    .add_edge("look", "ship", when={"ship": True})
    .add_edge("ship", "after")
    .add_edge("ship", "end")
    .add_edge("look", "end")
)
nested_join_any = (
    Graph("nested-join-any")
    .add_node("card", gives(card=False))
    .add_node("cash", gives(cash=True))
    .add_node("ship", packing, join="any")
    .add_edge("card", "ship", when={"card": True})
    .add_edge("cash", "ship", when={"cash": True})
)
checking = (
    Chain("checking").add_step("stock", step(lambda data: Stop("out_of_stock", {"left": 0}))).add_step("end", nothing)
)
nested_stop = Chain("nested-stop").add_step("check", checking).add_step("pay", nothing)
failing = Chain("failing", retry=ONCE).add_step("pack", gives(packed=True)).add_step("call", no_courier)
nested_failure = Chain("nested-failure").add_step("ship", failing).add_step("notify", nothing)
calling = Chain("calling").add_step("call", no_courier).add_step("end", nothing)
nested_retry = Chain("nested-retry", retry=ONCE).add_step("ship", calling, retry=TWICE)
totals = Graph("totals").add_node("one", gives(total=1)).add_node("other", gives(total=2))
nested_conflict = Chain("nested-conflict", retry=TWICE).add_step("sum", totals).add_step("end", nothing)
sums = Graph("sums", reducers={"total": lambda one, other: one + other})
sums.add_node("one", gives(total=1)).add_node("other", gives(total=2))
nested_reducers = (
    Chain("nested-reducers").add_step("sum", sums).add_step("end", step(lambda data: {"is": data["total"]}))
)
lasting = Graph("lasting", timeout=0.5).add_node("slow", never).add_node("quick", nothing)
nested_out_of_time = Chain("nested-out-of-time", retry=ONCE).add_step("ship", lasting).add_step("end", nothing)
patient = Graph("patient", timeout=60).add_node("slow", never)
nested_own_time = Chain("nested-own-time", retry=ONCE).add_step("ship", patient, timeout=0.5)
brief = Chain("brief", timeout=3).add_step("pack", gives(packed=True))
asking = Chain("asking").add_step(
    "decide",
    Decision("Ship today?", output_type=bool, reads=("says",), rules=[(lambda data: data["says"] == "", True)]),
)
nested_decision = Chain("nested-decision").add_step("ask", asking).add_step("end", nothing)
nested_late_clock = (
    Chain("nested-late-clock").add_step("wait", step(lambda data: time.sleep(3.2))).add_step("ship", brief)
)
two_at_once = Graph("two-at-once", max_workers=2, retry=ONCE)
for name in ("a", "b", "c", "d"):
    two_at_once.add_node(name, meets(2))
nested_capped = Chain("nested-capped").add_step("ship", two_at_once)
one_by_one = Graph("one-by-one", parallel=False)
for name in ("c", "a", "b"):
    one_by_one.add_node(name, gives(**{name: 1}))
nested_in_turn = Chain("nested-in-turn").add_step("ship", one_by_one).add_step("end", nothing)

reserving = (
    Chain("reserving")
    .add_step("goods", gives(goods="g-1"), compensate=nothing)
    .add_step("van", gives(van="v-1"), compensate=nothing)
)
nested_undone = (
    Chain("nested-undone", retry=ONCE)
    .add_step("pay", gives(paid=True), compensate=nothing)
    .add_step("reserve", reserving, compensate=step(lambda data: {"seen": [data["goods"], data["van"]]}))
    .add_step("ship", no_courier)
)
half = (
    Chain("half", retry=ONCE)
    .add_step("goods", gives(goods="g-1"), compensate=nothing)
    .add_step("van", no_courier, compensate=nothing)
)
nested_half_undone = (
    Chain("nested-half-undone", retry=ONCE)
    .add_step("pay", gives(paid=True), compensate=nothing)
    .add_step("reserve", half, compensate=nothing)
)


@step
async def first(data: dict[str, Any], trace: Trace) -> None:
    await trace.wait_for("began", "ship.beside")
    raise RuntimeError("no courier")


@step
async def outlive_first(data: dict[str, Any], trace: Trace) -> None:
    await trace.wait_for_end("first")


aside = Graph("aside").add_node("beside", outlive_first)
nested_ends_after_failure = (
    Graph("nested-ends-after-failure", retry=ONCE)
    .add_node("first", first)
    .add_node("ship", aside, compensate=nothing)
    .add_node("after", nothing)
    .add_edge("ship", "after")
)
