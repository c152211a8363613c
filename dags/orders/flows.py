"""The flows of the example shop, each defined once; the DAGs beside this package say where they run."""

from __future__ import annotations

from typing import Any

from beluga_airflow import Chain, Decision, Graph
from orders import steps

__all__ = ["EXAMPLE_ORDER", "invoice_flow", "order_chain", "order_durable", "order_graph"]

EXAMPLE_ORDER: dict[str, Any] = {
    "order_id": "order-123",
    "order_value": 250.0,
    "customer_tier": "gold",
    "product_id": "40117",
    "quantity": 2,
}

_ORDER = tuple(EXAMPLE_ORDER)
_INVOICE = ("InvoiceNo", "InvoiceDate", "CustomerID", "Country", "lines")

_speed = Decision(
    "How should this order be handled?",
    choices={"expedite": "ship today, costs us a courier", "standard": "the normal queue"},
    reads=("order_value", "customer_tier"),
    output_key="handling",
    instructions="Couriers are for gold customers, and for large orders of silver ones.",
    rules=[(steps.is_small, "standard")],
    fallback="standard",
)

_handling = Decision(
    "How should this order be handled?",
    choices={
        "expedite": "ship today, costs us a courier",
        "standard": "the normal queue",
        "hold": "nothing is charged or sent until a person has looked at the order",
    },
    reads=("order_value", "customer_tier", "destination", "line_count", "largest_quantity"),
    instructions=(
        "Hold what looks like fraud or a slip of the pen: a large order abroad, a large order of a guest, "
        "very many pieces of one product. Couriers are for gold customers, and for large orders of silver "
        "ones."
    ),
    rules=[(steps.is_small, "standard")],
    fallback="hold",  # with no model to judge it, no money is taken unseen
)

order_chain = (
    Chain("order-chain", inputs=_ORDER)
    .add_step("validate", steps.validate, provides=("order_total", "pieces"))
    .add_step("decide", _speed)
    .add_step("payment", steps.charge)
)

order_graph = (
    Graph("order-graph", max_workers=5)
    .add_node("validate", steps.validate)
    .add_node("check_inventory", steps.check_inventory)
    .add_node("check_credit", steps.check_credit)
    .add_node("process_payment", steps.charge)
    .add_node("fulfill", steps.fulfill)
    .add_node("notify", steps.notify)
    .add_edge("validate", "check_inventory")
    .add_edge("validate", "check_credit")
    .add_edge("check_inventory", "process_payment")
    .add_edge("check_credit", "process_payment", when={"credit_ok": True})
    .add_edge("process_payment", "fulfill")
    .add_edge("fulfill", "notify")
    .set_entry_point("validate")
    .set_finish_point("notify")
)

order_durable = (
    Graph("order-durable", inputs=_ORDER)
    .add_node("validate", steps.validate, provides=("order_total", "pieces"))
    .add_node("inventory", steps.reserve_stock, provides=("reservation_id",))
    .add_node("decision", _speed)
    .add_node("payment", steps.charge)
    .add_node("fulfil", steps.fulfill)
    .add_edge("validate", "inventory")
    .add_edge("inventory", "decision")
    .add_edge("decision", "payment")
    .add_edge("payment", "fulfil")
)

_JUDGED_BY = ("order_total", "pieces", *_handling.reads)

invoice_flow = (
    Chain("invoice", inputs=_INVOICE)
    .add_step("validate", steps.validate_invoice, provides=("order_id",))
    .add_step("assess", steps.assess, provides=_JUDGED_BY)
    .add_step("credit", steps.require_credit, provides=("credit_ok", "credit_limit"))
    .add_step("stock", steps.reserve_stock, provides=("reservation_id",))
    .add_step("handling", _handling)
    .add_step("set_aside", steps.set_aside)
    .add_step("charge", steps.charge)
    .add_step("fulfil", steps.fulfill)
    .add_step("notify", steps.notify)
)
