"""Hand-written workflows that ask for decisions, and the decisions."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import RetryPolicy

from beluga_airflow import Decision
from beluga_airflow.temporal import DecisionRecord, decide

CHOICES = {"expedite": "ship today", "standard": "the normal queue"}
QUESTION = "How should this order be QUESTIONMARKed?"


def is_small(data: dict[str, Any]) -> bool:
    return bool(data["value"] < 20)


def handling(**given: Any) -> Decision:
    return Decision(QUESTION, choices=CHOICES, reads=("value", "tier"), rules=[(is_small, "standard")], **given)


STRICT = handling()
EASY = handling(fallback="standard")
UNSOUND = Decision("Well?", choices=["one"], reads=("value",))
NO_DECISION = "a text"


@dataclass
class Order:
    """What a user's own converter makes JSON of."""

    value: int
    tier: str


@dataclass
class Question:
    decision: str
    data: Any
    key: str | None = None
    attempts: int = 3
    seconds: float = 20


@workflow.defn
class Ask:
    """One decision."""

    @workflow.run
    async def run(self, question: Question) -> DecisionRecord:
        record = await decide(
            question.decision,
            question.data,
            key=question.key,
            start_to_close_timeout=timedelta(seconds=question.seconds),
            retry_policy=RetryPolicy(maximum_attempts=question.attempts, initial_interval=timedelta(milliseconds=10)),
        )
        assert isinstance(record, DecisionRecord)
        return record


@workflow.defn
class AskWithDefaults:
    """One decision of a dataclass, with no option given."""

    @workflow.run
    async def run(self) -> str:
        return str((await decide("strict", Order(value=50, tier="gold"))).answer)


@workflow.defn
class AskMany:
    """Several at once, without keys and with some."""

    @workflow.run
    async def run(self, values: list[int]) -> list[str]:
        without = [decide("strict", {"value": value, "tier": "gold"}) for value in values]
        within = [decide("strict", {"value": value, "tier": "gold"}, key=f"line-{value}") for value in values]
        return [f"{record.answer} by {record.decided_by}" for record in await asyncio.gather(*without, *within)]


@workflow.defn
class AskByType:
    """By the activity's type, as another language would."""

    @workflow.run
    async def run(self) -> dict[str, Any]:
        record: dict[str, Any] = await workflow.execute_activity(
            "beluga.decision",
            {"decision": "strict", "data": {"value": 50, "tier": "gold"}, "key": "k"},
            start_to_close_timeout=timedelta(seconds=20),
            result_type=dict,
        )
        return record
