"""A budget of a task, where each step is a task: it is the group's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.state import open_store
from beluga_airflow.testing import OperatorRunner
from tests.operators.budget_flows import frugal


@pytest.mark.parametrize("key", [None, "text"])
def test_the_steps_of_a_group_share_a_budget_per_task(
    tasks_of: Any, operator_runner: OperatorRunner, model_server: ModelServer, tmp_path: Path, key: str | None
) -> None:
    extra = {"provider": "simulated", "base_url": model_server.base_url}
    operator_runner.connections["beluga_llm_default"] = {"conn_type": "beluga_llm", "extra": extra}
    tasks = tasks_of(frugal, inputs={"text": "hello"}, key=key)
    deciders = [tasks.run(step).xcoms["decision"]["decided_by"] for step in frugal.steps]
    assert deciders.count("model") == model_server.calls in range(1, 6)
    assert deciders[-1] == "fallback"

    async def names() -> list[str]:
        store = open_store(f"sqlite:///{tmp_path / 'state.db'}")
        found = [name async for name in store.keys("beluga/budgets/")]
        await store.close()
        return found

    (name,) = asyncio.run(names())
    dag, _, group = name.removeprefix("beluga/budgets/task/").split("/")
    assert (dag, group) == ("orders", "g")
