"""The rules of dags/README.md against the outcome of every order."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from beluga_airflow import FlowResult, run
from beluga_airflow.llm.client import Endpoint, OpenAIClient
from beluga_airflow.llm.model_server import ModelServer
from orders import ledger
from orders.flows import invoice_flow
from orders.source import orders_of
from tests.dags.independent_count import expected

DAGS = Path(__file__).resolve().parents[2] / "dags"
DAYS = ("2025-11-30", "2025-12-01", "2025-12-02")


async def outcomes(path: Path, day: str | None = None) -> dict[str, FlowResult]:
    """How every order of a file ends, 16 at a time, with the simulated model of the demo."""
    permits = asyncio.Semaphore(16)
    async with ModelServer(rules=DAGS / "data" / "model_rules.yaml") as server:
        model = OpenAIClient(Endpoint(provider="simulated", base_url=server.base_url))

        async def outcome(order: dict[str, Any]) -> tuple[str, FlowResult]:
            async with permits:
                number = order["InvoiceNo"]
                return number, await run(invoice_flow, order, key=number, model=model)

        try:
            return dict(await asyncio.gather(*map(outcome, orders_of(path, day))))
        finally:
            await model.close()


def assert_paid_once(results: dict[str, FlowResult]) -> None:
    paid = {number: result for number, result in results.items() if result.status == "completed"}
    for operation, key in (("charge", "payment_id"), ("ship", "fulfillment_id"), ("notify", "message_id")):
        made = ledger.calls(operation)
        assert {call.order_id: call.reference for call in made} == {
            number: result.data[key] for number, result in paid.items()
        }
        assert len({call.idempotency_key for call in made}) == len(paid)
    for call in ledger.calls("charge"):
        assert call.amount == paid[call.order_id].data["order_total"]


@pytest.mark.timeout(120)
async def test_every_order_of_the_demo_ends_as_the_rules_say(demo_file: Path) -> None:
    results = await outcomes(demo_file)

    assert Counter(result.status for result in results.values()) == expected(demo_file)
    assert len(results) == 266
    assert_paid_once(results)
    assert sum((expected(demo_file, day) for day in DAYS), Counter()) == expected(demo_file)


@pytest.mark.timeout(300)
async def test_every_order_of_a_real_month_ends_as_the_rules_say(real_file: Path) -> None:
    results = await outcomes(real_file)

    assert Counter(result.status for result in results.values()) == expected(real_file)
    assert len(results) == 2_025
    assert_paid_once(results)


@pytest.mark.timeout(120)
async def test_the_readme_says_how_many_of_each_there_are(demo_file: Path) -> None:
    rows = [
        [cell.strip(" *") for cell in line.strip("|\n ").split("|")]
        for line in (DAGS / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith(("| day ", "| 2025-", "| **2025-"))
    ]
    (_, _, *statuses), *days = rows
    for day, total, *counts in days:
        said = Counter({name: int(count) for name, count in zip(statuses, counts, strict=True)})
        assert +said == expected(demo_file, day), day
        assert said.total() == int(total)
    assert tuple(day for day, *_ in days) == DAYS

    results = await outcomes(demo_file, "2025-12-01")
    decisions = [result.decisions["handling"] for result in results.values() if result.decisions]
    assert Counter(decision["decided_by"] for decision in decisions) == {"rule": 23, "model": 148}
    assert Counter(decision["answer"] for decision in decisions) == {
        "standard": 141,
        "expedite": 19,
        "hold": 11,
    }


async def test_a_day_that_is_run_again_pays_with_the_same_keys(demo_file: Path) -> None:
    first = await outcomes(demo_file, "2025-12-02")
    again = await outcomes(demo_file, "2025-12-02")

    assert {number: result.data for number, result in again.items()} == {
        number: result.data for number, result in first.items()
    }
    paid = ledger.summary()["charge"]
    assert (paid["calls"], paid["keys"], paid["orders"]) == (46, 23, 23)
