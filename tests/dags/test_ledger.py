from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from orders import ledger

DAGS = Path(ledger.__file__).resolve().parents[1]


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(DAGS)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_repeated_key_gets_the_same_payment_and_both_calls_are_kept() -> None:
    first = ledger.charge("700001", "12.50", idempotency_key="invoice/700001/charge")
    again = ledger.charge("700001", "12.50", idempotency_key="invoice/700001/charge")

    assert first == again
    assert first.amount == Decimal("12.50")
    made = ledger.calls("charge", "700001")
    assert [call.reference for call in made] == [first.id, first.id]
    assert {(call.amount, call.idempotency_key, call.pid) for call in made} == {
        ("12.50", "invoice/700001/charge", os.getpid())
    }
    assert made[0].at <= made[1].at


def test_another_key_is_another_payment_and_shows_as_a_double_one() -> None:
    first = ledger.charge("700001", Decimal("12.50"), idempotency_key="a")
    second = ledger.charge("700001", Decimal("12.50"), idempotency_key="b")

    assert first.id != second.id
    assert ledger.summary() == {"charge": {"calls": 2, "keys": 2, "orders": 1, "amount": "25.00"}}


def test_a_summary_counts_a_repeated_key_once() -> None:
    for _ in range(3):
        ledger.charge("700001", "0.10", idempotency_key="a")
    ledger.charge("700002", "0.20", idempotency_key="b")
    ledger.refund("700002", "0.20", idempotency_key="b")

    assert ledger.summary() == {
        "charge": {"calls": 4, "keys": 2, "orders": 2, "amount": "0.30"},
        "refund": {"calls": 1, "keys": 1, "orders": 1, "amount": "0.20"},
    }


def test_operations_with_one_key_have_references_of_their_own() -> None:
    references = [
        ledger.charge("700001", "1.00", idempotency_key="k").id,
        ledger.refund("700001", "1.00", idempotency_key="k"),
        ledger.reserve("700001", idempotency_key="k"),
        ledger.ship("700001", idempotency_key="k"),
        ledger.notify("700001", idempotency_key="k"),
    ]

    assert len(set(references)) == 5
    assert [call.reference for call in ledger.calls()] == references
    assert [call.operation for call in ledger.calls()] == ["charge", "refund", "reserve", "ship", "notify"]
    assert [call.amount for call in ledger.calls("ship")] == [None]


def test_hostile_text_is_kept_as_it_is() -> None:
    hostile = "'); DROP TABLE calls; --"
    ledger.ship(hostile, idempotency_key=hostile)

    (call,) = ledger.calls(order_id=hostile)
    assert call.order_id == call.idempotency_key == hostile
    assert ledger.calls(order_id="700001") == []


def test_an_amount_that_is_no_number_is_not_recorded() -> None:
    with pytest.raises(ArithmeticError):
        ledger.charge("700001", "a lot", idempotency_key="k")

    assert ledger.calls() == []


def test_where_the_ledger_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "home"))
    assert ledger.ledger_path() == tmp_path / "ledger.db"

    monkeypatch.delenv("BELUGA_LEDGER")
    assert ledger.ledger_path() == tmp_path / "home" / "beluga" / "ledger.db"
    ledger.ship("700001", idempotency_key="k")
    assert ledger.ledger_path().exists()

    monkeypatch.delenv("AIRFLOW_HOME")
    assert ledger.ledger_path() == Path.home() / "airflow" / "beluga" / "ledger.db"


CHARGE_MANY = """
import sys
from orders import ledger
print("ready", flush=True)
sys.stdin.readline()
for number in range(40):
    ledger.charge(f"{number}", "1.00", idempotency_key=f"{sys.argv[1]}/{number % 10}")
"""


def test_processes_that_create_and_write_it_at_once_lose_nothing(ledger_file: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", CHARGE_MANY, str(number)],
            env={**os.environ, "PYTHONPATH": str(DAGS)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(6)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    assert not ledger_file.exists()
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)

    assert [writer.returncode for writer in writers] == [0] * 6
    made = ledger.calls()
    assert len(made) == 240
    assert {call.pid for call in made} == {writer.pid for writer in writers}
    assert ledger.summary()["charge"] == {"calls": 240, "keys": 60, "orders": 40, "amount": "60.00"}
    with sqlite3.connect(ledger_file) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()
    assert [path.name for path in ledger_file.parent.iterdir() if path.is_dir()] == []


def test_what_was_recorded_outlives_a_killed_process() -> None:
    process = python(
        "import signal\n"
        "from orders import ledger\n"
        "print(ledger.charge('700001', '1.00', idempotency_key='k').id, flush=True)\n"
        "signal.pause()\n"
    )
    assert process.stdout is not None
    payment_id = process.stdout.readline().strip()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)

    assert [(call.reference, call.pid) for call in ledger.calls()] == [(payment_id, process.pid)]
    assert ledger.charge("700001", "1.00", idempotency_key="k").id == payment_id
