"""A small real ledger: who was charged, what was reserved, sent, told and paid back, in one SQLite file.

It stands for the shop's payment, stock and parcel services. Like a good payment service it answers a
repeated idempotency key with the same reference. Unlike one it refuses nothing and records **every** call, so
that a double payment can be seen: two keys for one order. Any number of processes may write at once; what a
call recorded is not lost when its process is killed.

The file is at ``$BELUGA_LEDGER``, else at ``$AIRFLOW_HOME/beluga/ledger.db``.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

__all__ = [
    "Call",
    "Payment",
    "calls",
    "charge",
    "ledger_path",
    "notify",
    "refund",
    "reserve",
    "ship",
    "summary",
]

_BUSY_SECONDS = 30
_SCHEMA = """
CREATE TABLE calls (
    id INTEGER PRIMARY KEY,
    at TEXT NOT NULL,
    operation TEXT NOT NULL,
    order_id TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,
    amount TEXT,
    reference TEXT NOT NULL,
    pid INTEGER NOT NULL
);
CREATE INDEX calls_of_order ON calls (order_id, operation);
"""


@dataclass(frozen=True, kw_only=True)
class Payment:
    """Money taken. ``amount`` is in the shop's currency."""

    id: str
    amount: Decimal


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call as recorded. ``at`` is UTC, ``amount`` decimal text, ``pid`` the process that called."""

    id: int
    at: str
    operation: str
    order_id: str
    idempotency_key: str
    amount: str | None
    reference: str
    pid: int


def charge(order_id: str, amount: Decimal | str, *, idempotency_key: str) -> Payment:
    """Take money for an order."""
    return Payment(id=_record("charge", order_id, idempotency_key, Decimal(amount)), amount=Decimal(amount))


def refund(order_id: str, amount: Decimal | str, *, idempotency_key: str) -> str:
    """Pay money back; returns the refund's id."""
    return _record("refund", order_id, idempotency_key, Decimal(amount))


def reserve(order_id: str, *, idempotency_key: str) -> str:
    """Set the goods of an order aside; returns the reservation's id."""
    return _record("reserve", order_id, idempotency_key)


def ship(order_id: str, *, idempotency_key: str) -> str:
    """Hand the parcel of an order to the carrier; returns the parcel's id."""
    return _record("ship", order_id, idempotency_key)


def notify(order_id: str, *, idempotency_key: str) -> str:
    """Tell the customer that the order is on its way; returns the message's id."""
    return _record("notify", order_id, idempotency_key)


def calls(operation: str | None = None, order_id: str | None = None) -> list[Call]:
    """The calls in the order they were recorded, all of them or those of an operation or an order."""
    with closing(_connection()) as db:
        rows = db.execute(
            "SELECT * FROM calls WHERE (?1 IS NULL OR operation = ?1) AND (?2 IS NULL OR order_id = ?2) ORDER BY id",
            (operation, order_id),
        )
        return [Call(**dict(row)) for row in rows]


def summary() -> dict[str, dict[str, Any]]:
    """By operation: how many ``calls``, different ``keys`` and ``orders``, and the ``amount``, a key once.

    More calls than keys: something was repeated, harmlessly. More keys than orders: it was done twice.
    """
    by_operation: dict[str, list[Call]] = {}
    for call in calls():
        by_operation.setdefault(call.operation, []).append(call)
    return {
        operation: {
            "calls": len(made),
            "keys": len({call.idempotency_key for call in made}),
            "orders": len({call.order_id for call in made}),
            "amount": str(sum({call.idempotency_key: Decimal(call.amount or 0) for call in made}.values())),
        }
        for operation, made in sorted(by_operation.items())
    }


def ledger_path() -> Path:
    """Where the ledger is."""
    if path := os.environ.get("BELUGA_LEDGER"):
        return Path(path).expanduser()
    return Path(os.environ.get("AIRFLOW_HOME", "~/airflow")).expanduser() / "beluga" / "ledger.db"


def _record(operation: str, order_id: str, key: str, amount: Decimal | None = None) -> str:
    reference = f"{operation}-{hashlib.sha256(f'{operation}/{key}'.encode()).hexdigest()[:16]}"
    money = None if amount is None else str(amount)
    row = (datetime.now(UTC).isoformat(), operation, order_id, key, money, reference, os.getpid())
    # a connection a call: it may come from any thread, and from a process that was forked since the last one
    with closing(_connection()) as db, db:
        db.execute(
            "INSERT INTO calls (at, operation, order_id, idempotency_key, amount, reference, pid) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            row,
        )
    return reference


def _connection() -> sqlite3.Connection:
    path = ledger_path()
    if not path.exists():
        _create(path)
    db = sqlite3.connect(path, timeout=_BUSY_SECONDS)
    db.row_factory = sqlite3.Row
    return db


def _create(path: Path) -> None:
    # made aside and linked into place: processes that switch a new file to WAL at once lock each other out
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder) / path.name
        with closing(sqlite3.connect(new)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(_SCHEMA)
        try:
            path.hardlink_to(new)
        except FileExistsError:
            return
