"""The example flows, of data and order: what every runtime must bring to the same end.

Those of time and trouble are in trouble_flows.py, flows inside flows in nested_flows.py. All are importable, as a
worker needs them; their steps leave traces in the folder that the input names.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from typing import Any

from pydantic import BaseModel

from beluga_airflow import Chain, Graph, Retry, StepContext, Stop
from tests.conformance.trace import Trace, fails, gives, meets, nothing, step

RULES = (
    # data
    "a step has a deep copy of its own",
    "a late step cannot change data",
    "between steps everything is JSON",
    "annotations bring types back",
    "what is not JSON is refused at its step",
    "merging goes in topological order, ties by definition",
    "different values of parallel branches are a conflict",
    "reducers settle a conflict",
    "a missing key names step and key",
    "one finish point returns the merged state",
    "several finish points return the state of each",
    "a finish point may be skipped",
    # order
    "a step runs when all its incoming edges are taken",
    "skips go on",
    "join any",
    "when by mapping",
    "when by predicate",
    "a stop ends the flow early and successfully",
    "the status of a stop is a word of the author's",
    "running siblings finish, nothing new starts",
    "independent steps run at once",
    "not parallel: in topological order",
    "max_workers is a cap",
    "a sync step blocks nobody",
    # time and trouble
    "a step's timeout bounds one attempt",
    "a flow's timeout bounds the whole and names the step",
    "a step is retried",
    "what is never retried",
    "retry after",
    "the key of a step is the same in every attempt",
    "sys.exit and cancellation are contained",
    "a step may be an object",
    # decisions
    "decided by a rule",
    "decided by the model",
    "decided by the fallback",
    "an answer outside the choices never leaves the decision",
    # flows in flows
    "a flow is a node of a flow",
    "a nested flow keeps its own bounds",
    # undoing
    "undone in reverse order",
    "undone with a key and retries of its own",
    "what cannot be undone is listed",
    "a step whose condition fails is done, and undone",
    "what was in flight at the end is listed",
    "nothing is undone after a good end",
)
"""What every runtime must mean by a flow. Each has an example."""

ONCE = Retry(maximum_attempts=1)
TWICE = Retry(maximum_attempts=2, initial_interval=0.01, maximum_interval=0.01)
QUICK = Retry(maximum_attempts=3, initial_interval=0.01, maximum_interval=0.01)
TAGS = ["kept by its step"]


@step
def meddle(data: dict[str, Any]) -> None:
    data["lines"].append("meddled")
    data["lines"][0]["sku"] = "meddled"
    del data["order_id"]
    data["new"] = 1


@step
def meddle_with_tags(data: dict[str, Any]) -> None:
    data["tags"].append("meddled")


copies = (
    Graph("copies")
    .add_node("give", gives(tags=TAGS))
    .add_node("meddle", meddle)
    .add_node("tags", meddle_with_tags)
    .add_node("look", step(lambda data: {"looked": [data["lines"], data["tags"], data["order_id"], "new" in data]}))
    .add_edge("give", "meddle")
    .add_edge("give", "tags")
    .add_edge("meddle", "look")
    .add_edge("tags", "look")
)


@step
def late_once(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
    if context.attempt > 1:
        return {"lines_seen": len(data["lines"])}
    time.sleep(1)
    data["lines"].append("late")
    return {"lines": data["lines"]}


@step
async def look_after_late(data: dict[str, Any], trace: Trace) -> dict[str, Any]:
    await trace.wait_for("ended", "late", times=2)
    return {"looked": data["lines"]}


late = Chain("late", retry=TWICE).add_step("late", late_once, timeout=0.4).add_step("look", look_after_late)


@dataclass
class Line:
    sku: str
    price: Decimal
    due: date


class Order(BaseModel):
    ordered: date
    discount: Decimal
    lines: list[Line]
    trace: str


@dataclass
class Priced:
    total: Decimal
    first: Line
    ordered: date
    trace: str


@step
def price(order: Order) -> dict[str, Any]:
    return {"total": sum(line.price for line in order.lines) - order.discount, "first": order.lines[0], "bill": order}


@step
def deliver(order: Priced) -> dict[str, Any]:
    return {
        "kinds": [type(value).__name__ for value in (order.total, order.first, order.first.due, order.ordered)],
        "triple": order.total * 3,
        "next": order.first.due + timedelta(days=1),
        "pair": (1, None),
    }


types = Chain("types").add_step("price", price).add_step("deliver", deliver)
keys_in_order = (
    Chain("keys-in-order")
    .add_step("give", gives(stops={"zoo": 1, "apple": 2, "museum": 3}))
    .add_step("read", step(lambda data: {"route": [*data["stops"]], "trip": [*data["given"]]}))
)
refused_by_annotation = Chain("refused-by-annotation", retry=QUICK).add_step("price", price)


@step
def puzzle(data: Nowhere) -> None:  # type: ignore[name-defined]  # noqa: F821  # no worker can resolve it
    """A step whose annotation means nothing."""


unknown_annotation = Chain("unknown-annotation", retry=QUICK).add_step("puzzle", puzzle)
not_json = Chain("not-json", retry=QUICK).add_step("give", gives(when={"at": [object()]})).add_step("end", nothing)
number_keys = Chain("number-keys", retry=QUICK).add_step("give", gives(stock={1: "one"}))
ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)
endless = Chain("endless", retry=QUICK).add_step("give", gives(list=ENDLESS))
odd_values = Chain("odd-values").add_step("give", step(lambda data: {"again": data["odd"]}))
half_character = (
    Chain("half-character")
    .add_step("give", gives(half="\ud800"))
    .add_step("read", step(lambda data: {"length": len(data["half"])}))
)
big_number = (
    Chain("big-number")
    .add_step("give", gives(big=2**70))
    .add_step("read", step(lambda data: {"more": data["big"] + 1}))
)
not_finite = Chain("not-finite", retry=QUICK).add_step("give", gives(rate=float("nan")))
no_mapping = Chain("no-mapping", retry=QUICK).add_step("give", step(lambda data: [1, 2]))

# "late" was defined first, but "early" comes before it
merged = (
    Graph("merged", reducers={"tags": lambda earlier, later: [*earlier, *later]})
    .add_node("late", gives(tags=["late"], same=1, word="late"))
    .add_node("early", gives(tags=["early"], word="early", kept="early"))
    .add_node("other", gives(tags=["other"], same=1))
    .add_node("third", gives(tags=["third"]))
    .add_node("end", step(lambda data: {"tags_seen": data["tags"]}))
    .add_edge("early", "late")
    .add_edge("third", "end")
    .add_edge("other", "end")
    .add_edge("late", "end")
)


@step
async def wait_for_other(data: dict[str, Any], trace: Trace) -> dict[str, Any]:
    await trace.wait_for("ended", "other")
    return {"tags": ["one"]}


finished_last = (
    Graph("finished-last", reducers={"tags": lambda earlier, later: [*earlier, *later]})
    .add_node("one", wait_for_other)
    .add_node("other", gives(tags=["other"]))
    .add_node("end", nothing)
    .add_edge("other", "end")
    .add_edge("one", "end")
)


def two_totals(name: str, when: Any = None, **options: Any) -> Graph:
    """Two steps that set one key, and a step after them."""
    return (
        Graph(name, retry=TWICE, **options)
        .add_node("one", gives(total=1, credit_ok=False))
        .add_node("other", gives(total=2))
        .add_node("end", gives(ended=True))
        .add_edge("one", "end", when=when)
        .add_edge("other", "end")
    )


conflict = two_totals("conflict")
reducer_fails = two_totals("reducer-fails", reducers={"total": lambda one, other: 1 / 0})
reducer_not_json = two_totals("reducer-not-json", reducers={"total": lambda one, other: {one, other}})
skipped_end = two_totals("skipped-end", when={"credit_ok": True}, reducers={"total": lambda one, other: one + other})
conflict_at_skipped_end = two_totals("conflict-at-skipped-end", when={"credit_ok": True})
overlaid = (
    Graph("overlaid")
    .add_node("start", gives(word="start", other="start"))
    .add_node("left", gives(word="left"))
    .add_node("right", gives(other="right"))
    .add_node("end", step(lambda data: {"both": [data["word"], data["other"]]}))
    .add_edge("start", "left")
    .add_edge("start", "right")
    .add_edge("left", "end")
    .add_edge("right", "end")
)
reducer_of_one = (
    Graph("reducer-of-one", reducers={"total": lambda one, other: one + other})
    .add_node("start", gives(total=5, one=False))
    .add_node("one", gives(total=1))
    .add_node("other", gives(total=2))
    .add_node("end", nothing, join="any")
    .add_edge("start", "one", when={"one": True})
    .add_edge("start", "other")
    .add_edge("one", "end")
    .add_edge("other", "end")
)
missing = Chain("missing", retry=QUICK).add_step("read", step(lambda data: {"x": data["nowhere"]}))

when = (
    Graph("when")
    .add_node("look", step(lambda data: {"size": data["size"], "color": "red"}))
    .add_node("red", gives(red=True))
    .add_node("small_red", gives(small_red=True))
    .add_node("large", gives(large=True))
    .add_node("end", nothing, join="any")
    .add_edge("look", "red", when={"color": "red"})
    .add_edge("look", "small_red", when={"color": "red", "size": 1})
    .add_edge("look", "large", when=lambda output: output.pop("size") > 10)
    .add_edge("red", "end")
    .add_edge("small_red", "end")
    .add_edge("large", "end")
)
when_missing = (
    Graph("when-missing", retry=TWICE)
    .add_node("look", gives(size=1))
    .add_node("end", nothing)
    .add_edge("look", "end", when=lambda output: output["color"] == "red")
)
when_raises = (
    Graph("when-raises", retry=TWICE)
    .add_node("look", gives(size=0))
    .add_node("end", nothing)
    .add_edge("look", "end", when=lambda output: 1 / output["size"] > 1)
)
when_nothing = (
    Graph("when-nothing")
    .add_node("look", gives(discount=None, address={"country": "FR", "lines": [1]}))
    .add_node("none", gives(none=True))
    .add_node("absent", nothing)
    .add_node("deep", gives(deep=True))
    .add_node("always", gives(always=True))
    .add_edge("look", "none", when={"discount": None})
    .add_edge("look", "absent", when={"gone": None})
    .add_edge("look", "deep", when={"address": {"country": "FR", "lines": [1]}})
    .add_edge("look", "always", when={})
)
paid = (
    Graph("paid")
    .add_node("by_card", step(lambda data: {"card_ok": data["card"]}))
    .add_node("by_cash", step(lambda data: {"cash_ok": data["cash"]}))
    .add_node("receipt", gives(receipt=True), join="any")
    .add_node("both", gives(both=True))
    .add_node("thank", gives(thanked=True))
    .add_edge("by_card", "receipt", when={"card_ok": True})
    .add_edge("by_cash", "receipt", when={"cash_ok": True})
    .add_edge("by_card", "both", when={"card_ok": True})
    .add_edge("by_cash", "both", when={"cash_ok": True})
    .add_edge("receipt", "thank")
)
skips = (
    Graph("skips")
    .add_node("look", gives(gift=False, letter=True))
    .add_node("wrap", gives(wrapped=True))
    .add_node("ribbon", gives(ribbon=True))
    .add_node("write", gives(letter="dear"))
    .add_node("hand_over", gives(handed=True))
    .add_node("post", gives(posted=True), join="any")
    .add_edge("look", "wrap", when={"gift": True})
    .add_edge("look", "write", when={"letter": True})
    .add_edge("wrap", "ribbon")
    .add_edge("ribbon", "hand_over")
    .add_edge("write", "hand_over")
    .add_edge("ribbon", "post")
    .add_edge("write", "post")
)
finishes = (
    Graph("finishes")
    .add_node("start", gives(a=1))
    .add_node("ship", gives(parcel=1))
    .add_node("bill", gives(invoice=2))
    .add_node("gift", gives(wrapped=True))
    .add_edge("start", "ship")
    .add_edge("start", "bill")
    .add_edge("start", "gift", when={"a": 2})
)
all_finishes_skipped = (
    Graph("all-finishes-skipped")
    .add_node("start", gives(a=1))
    .add_node("ship", nothing)
    .add_node("bill", nothing)
    .add_edge("start", "ship", when={"a": 2})
    .add_edge("start", "bill", when={"a": 3})
)

stop = (
    Chain("stop")
    .add_step("reserve", gives(reserved=True))
    .add_step("stock", step(lambda data: Stop("out_of_stock", {"product": data["product"], "reserved": False})))
    .add_step("charge", nothing)
)
stop_with_nothing = Graph("stop-with-nothing").add_node("stock", step(lambda data: Stop("out of stock")))
stop_reserved = Chain("stop-reserved", retry=QUICK).add_step("stock", step(lambda data: Stop("failed")))
stop_no_word = Chain("stop-no-word", retry=QUICK).add_step("stock", step(lambda data: Stop(7)))  # type: ignore[arg-type]
stop_not_json = Chain("stop-not-json", retry=QUICK).add_step("stock", step(lambda data: Stop("out", {"x": {1}})))


@step
async def beside(data: dict[str, Any], trace: Trace) -> dict[str, Any]:
    await trace.wait_for_end("first")
    return {"beside": True}


def ending(name: str, end: Any) -> Graph:
    """A graph that ``first`` ends while ``beside`` runs and ``queued`` waits for a free place."""

    async def first(data: dict[str, Any], trace: Trace) -> Any:
        await trace.wait_for("began", "beside")
        return end()

    return (
        Graph(name, retry=ONCE, max_workers=2)
        .add_node("first", step(first))
        .add_node("beside", beside)
        .add_node("queued", nothing)
        .add_node("after_first", nothing)
        .add_node("after_beside", nothing)
        .add_edge("first", "after_first")
        .add_edge("beside", "after_beside")
    )


def no_courier() -> None:
    raise RuntimeError("no courier")


def no_money() -> None:
    raise ValueError("no money")


stops_early = ending("stops-early", lambda: Stop("out_of_stock", {"product": "p-1"}))
fails_early = ending("fails-early", no_courier)
two_fail = Graph("two-fail", retry=ONCE).add_node("ship", meets(2, no_courier)).add_node("pay", meets(2, no_money))
two_stop = (
    Graph("two-stop")
    .add_node("ship", meets(2, lambda: Stop("no_courier")))
    .add_node("pay", meets(2, lambda: Stop("no_money")))
)
stop_and_failure = (
    Graph("stop-and-failure", retry=ONCE)
    .add_node("ship", meets(2, lambda: Stop("no_courier")))
    .add_node("pay", meets(2, no_money))
)


def fan(name: str, width: int, node: Any, **options: Any) -> Graph:
    """So many steps side by side, and one after them."""
    graph = Graph(name, retry=ONCE, **options)
    for number in range(width):
        graph.add_node(f"wide-{number}", node)
    graph.add_node("end", nothing)
    for number in range(width):
        graph.add_edge(f"wide-{number}", "end")
    return graph


@step
def block(data: dict[str, Any], context: StepContext, trace: Trace) -> None:
    """A step that blocks its thread until four steps run at once."""
    asyncio.run(trace.meet(context, 4))


wide = fan("wide", 6, meets(6))
blocking = fan("blocking", 4, block)
capped = fan("capped", 6, meets(2), max_workers=2)
in_turn = (
    Graph("in-turn", parallel=False)
    .add_node("c", gives(c=1))
    .add_node("b", gives(b=1))
    .add_node("a", gives(a=1))
    .add_node("d", gives(d=1))
    .add_edge("a", "c")
)
broken_in_turn = (
    Graph("broken-in-turn", parallel=False, retry=ONCE)
    .add_node("one", nothing)
    .add_node("two", fails(RuntimeError, "no courier"))
    .add_node("three", nothing)
)
