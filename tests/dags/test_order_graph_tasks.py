"""The order graph as tasks: it ends as it does in one task."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orders.flows import EXAMPLE_ORDER
from tests.task_group.running import runs_of

DAGS = Path(__file__).resolve().parents[2] / "dags"
LARGE = {"order_id": "order-8", "order_value": 5000.01}
MANY = {"order_id": "order-9", "quantity": 900}
CASES = {"example": {}, "large": LARGE, "many": MANY}
FORMS = ("order_graph", "order_graph_tasks")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("airflow")


@pytest.fixture(scope="module")
def ended(home: Path) -> dict[tuple[str, str], Any]:
    """What came of each case, by form."""
    wanted = [[form, conf, None] for form in FORMS for conf in CASES.values()]
    runs = runs_of(DAGS, wanted, home=home, environment={"BELUGA_LEDGER": str(home / "ledger.db")})
    return dict(zip([(form, case) for form in FORMS for case in CASES], runs, strict=True))


def tasks(run: Any) -> dict[str, Any]:
    return {task["task_id"].removeprefix("process_order."): task for task in run["tasks"]}


@pytest.mark.parametrize(
    ("case", "status"), [("example", "completed"), ("large", "completed"), ("many", "out_of_stock")]
)
def test_both_forms_end_alike(ended: Any, case: str, status: str) -> None:
    one = tasks(ended["order_graph", case])["process_order"]["xcoms"]["return_value"]
    several = tasks(ended["order_graph_tasks", case])["result"]["xcoms"]["return_value"]
    assert one == several
    assert several["status"] == status
    assert several["data"]["order_id"] == (EXAMPLE_ORDER | CASES[case])["order_id"]


def test_each_step_is_a_task(ended: Any) -> None:
    steps = {
        case: {name: task["state"] for name, task in tasks(ended["order_graph_tasks", case]).items()} for case in CASES
    }
    checks = {"validate": "success", "check_inventory": "success", "result": "success"}
    assert steps["example"] == {
        **checks,
        **dict.fromkeys(("check_credit", "process_payment", "fulfill", "notify"), "success"),
    }
    skipped = dict.fromkeys(("process_payment", "fulfill", "notify"), "skipped")
    assert steps["large"] == {**checks, "check_credit": "success", **skipped}
    assert steps["many"] == steps["many"] | checks | skipped


def test_a_business_key_is_the_same_in_both_forms(ended: Any, home: Path) -> None:
    assert len(ended) == len(FORMS) * len(CASES)
    with closing(sqlite3.connect(home / "ledger.db")) as db:
        keys = db.execute(
            "SELECT idempotency_key, count(*) FROM calls WHERE operation = 'charge' GROUP BY 1"
        ).fetchall()
    assert keys == [("order-graph/order-123/process_payment", 2)]
