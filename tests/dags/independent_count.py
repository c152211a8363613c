"""How every order of a file must end: the rules of dags/README.md, counted a second time without the code."""

from __future__ import annotations

import csv
import gzip
import re
from collections import Counter
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any


def expected(path: Path, day: str | None = None) -> Counter[str]:
    orders: dict[str, list[Any]] = {}
    days: dict[str, str] = {}
    today = ""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for place, row in enumerate(list(csv.reader(file))[1:]):
            try:
                _, code, _, quantity, time, price, customer, country = row
                today = str(datetime.fromisoformat(time).date())
                line = (code, int(quantity), Decimal(price), customer, country) if price != "NaN" and row[0] else None
            except (ValueError, ArithmeticError):
                line = None
            days.setdefault(row[0] or f"row {place}", today)
            orders.setdefault(row[0] or f"row {place}", []).append(line)
    return Counter(status(number, lines) for number, lines in orders.items() if day in (None, days[number]))


def status(number: str, lines: list[Any]) -> str:
    if None in lines or number.startswith("C"):
        return "failed" if None in lines else "cancellation"
    sold = [(code, quantity, quantity * price) for code, quantity, price, *_ in lines if quantity > 0 and price > 0]
    value = sum((money for *_, money in sold), Decimal(0)).quantize(Decimal("0.01"), "ROUND_HALF_UP")
    customer, country = lines[0][3:]
    asked = Counter({code: sum(q for other, q, _ in sold if other == code) for code, *_ in sold})
    limit = {"0": 5000, "1": 2500, "2": 2500, "3": 2500, "": 500}.get(customer[-1:], 1000)
    if not value or value > limit:
        return "credit_refused" if value else "no_sale"
    if any(n > 100 * int(re.sub(r"\D", "", code)[-1]) + 100 for code, n in asked.items() if re.search(r"\d", code)):
        return "out_of_stock"
    strange = (country != "United Kingdom" and value >= 1000) or (not customer and value >= 300)
    return "held" if value >= 50 and (strange or max(asked.values()) >= 250) else "completed"
