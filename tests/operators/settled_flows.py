"""Flows that leave open what the settings say. Steps report to `attempts`, by the token in the flow's input."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from beluga_airflow import Chain, Decision, Graph, Retry

attempts: Counter[str] = Counter()


def failing(data: dict[str, Any]) -> None:
    attempts[data["token"]] += 1
    raise ConnectionError("the bank is closed")


async def never(data: dict[str, Any]) -> None:
    await asyncio.Event().wait()


ASKED = Decision("How should this order be handled?", choices=["expedite", "standard"], reads=("tier",))
NAMED = Decision("How is it handled?", choices=["expedite", "standard"], reads=("tier",), model="gpt-4.1")

open_chain = Chain("open-chain").add_step("pay", failing)
open_graph = Graph("open-graph").add_node("pay", failing)
own_retry = Chain("own-retry", retry=Retry(maximum_attempts=2, initial_interval=0.01)).add_step("pay", failing)
stuck = Graph("stuck").add_node("wait", never)
stuck_for_itself = Graph("stuck-for-itself", timeout=0.3).add_node("wait", never)
asking = Chain("asking").add_step("handling", ASKED).add_step("named", NAMED)
