"""The steps: plain functions of an order that know nothing of where they run. Rules: ../README.md."""

from __future__ import annotations

import re
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Literal

from pydantic import BaseModel, Field

from beluga_airflow import InvalidInput, StepContext, Stop
from orders import ledger

CREDIT_LIMITS = {
    "gold": Decimal(5000),
    "silver": Decimal(2500),
    "bronze": Decimal(1000),
    "guest": Decimal(500),
}
HOME = "United Kingdom"


class Order(BaseModel):
    """An order as somebody types it into Airflow's form. ``order_value`` is in the shop's currency."""

    order_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$")
    order_value: Decimal = Field(ge=Decimal("0.01"), le=1_000_000)
    customer_tier: Literal["gold", "silver", "bronze", "guest"]
    product_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]{0,39}$")
    quantity: int = Field(gt=0, le=1_000_000)


def validate(order: Order) -> dict[str, Any]:
    """Refuse an order that makes no sense, and say what is to be paid and packed."""
    total = _cents(order.order_value)
    return {
        "order_total": str(total),
        "order_value": float(total),
        "pieces": {order.product_id: order.quantity},
    }


def validate_invoice(invoice: dict[str, Any]) -> dict[str, Any] | Stop:
    """Refuse a malformed invoice; a cancellation ends here."""
    number = invoice["InvoiceNo"]
    if "problem" in invoice:
        raise InvalidInput(f"order {number} is malformed, {invoice['problem']}; mend the file and run it again")
    if number.startswith("C"):
        return Stop("cancellation")
    return {"order_id": number}


def assess(invoice: dict[str, Any]) -> dict[str, Any] | Stop:
    """What is to be paid and packed, and the few numbers and words by which the order is judged."""
    sold = [line for line in invoice["lines"] if line["Quantity"] > 0 and Decimal(line["UnitPrice"]) > 0]
    total = _cents(sum((line["Quantity"] * Decimal(line["UnitPrice"]) for line in sold), Decimal(0)))
    if not total:
        return Stop("no_sale")
    pieces = Counter[str]()
    for line in sold:
        pieces[line["StockCode"]] += line["Quantity"]
    return {
        "order_total": str(total),
        "order_value": float(total),
        "pieces": dict(pieces),
        "largest_quantity": max(pieces.values()),
        "line_count": len(sold),
        "customer_tier": tier_of(invoice["CustomerID"]),
        "destination": "home" if invoice["Country"] == HOME else "abroad",
    }


def check_credit(order: dict[str, Any]) -> dict[str, Any]:
    """Whether the customer's tier may owe us that much."""
    limit = CREDIT_LIMITS[order["customer_tier"]]
    return {"credit_ok": Decimal(order["order_total"]) <= limit, "credit_limit": str(limit)}


def require_credit(order: dict[str, Any]) -> dict[str, Any] | Stop:
    """As ``check_credit``, but without credit the order ends here."""
    credit = check_credit(order)
    return credit if credit["credit_ok"] else Stop("credit_refused", credit)


def check_inventory(order: dict[str, Any]) -> dict[str, Any] | Stop:
    """Whether all pieces are there; otherwise the order ends here."""
    for product_id, quantity in order["pieces"].items():
        there = on_hand(product_id)
        if there is not None and quantity > there:
            return Stop("out_of_stock", {"product_id": product_id, "asked": quantity, "on_hand": there})
    return {"inventory_checked": True}


def reserve_stock(order: dict[str, Any], context: StepContext) -> dict[str, Any] | Stop:
    """As ``check_inventory``, and set the pieces aside."""
    checked = check_inventory(order)
    if isinstance(checked, Stop):
        return checked
    return {"reservation_id": ledger.reserve(order["order_id"], idempotency_key=context.idempotency_key)}


def set_aside(order: dict[str, Any]) -> Stop | None:
    """An order on hold ends here, unpaid: a person looks at it."""
    return Stop("held") if order["handling"] == "hold" else None


def charge(order: dict[str, Any], context: StepContext) -> dict[str, Any]:
    """Take the money."""
    payment = ledger.charge(order["order_id"], order["order_total"], idempotency_key=context.idempotency_key)
    return {"payment_id": payment.id}


def fulfill(order: dict[str, Any], context: StepContext) -> dict[str, Any]:
    """Send the parcel."""
    return {"fulfillment_id": ledger.ship(order["order_id"], idempotency_key=context.idempotency_key)}


def notify(order: dict[str, Any], context: StepContext) -> dict[str, Any]:
    """Tell the customer."""
    return {"message_id": ledger.notify(order["order_id"], idempotency_key=context.idempotency_key)}


def tier_of(customer_id: str | None) -> str:
    """The tier of a customer, from the last digit of the number; without a number a guest."""
    if not customer_id:
        return "guest"
    return {"0": "gold", "1": "silver", "2": "silver", "3": "silver"}.get(customer_id[-1], "bronze")


def on_hand(product_id: str) -> int | None:
    """Pieces in stock: 100 to 1,000, from the code's last digit; None for services, which have no digit."""
    digits = re.findall("[0-9]", product_id)
    return 100 * (int(digits[-1]) + 1) if digits else None


def is_small(order: dict[str, Any]) -> bool:
    """Too little money to pay anybody, or any model, for thinking about it."""
    return float(order["order_value"]) < 50


def _cents(amount: Decimal) -> Decimal:
    return amount.quantize(Decimal("0.01"), rounding=ROUND_HALF_UP)
