"""Conversations of LLMDecisionOperator, and of flows in one task."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowFailException

from beluga_airflow import Chain, Decision, InvalidFlow, Memory
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.operators.decision import LLMDecisionOperator
from beluga_airflow.operators.flow import ChainOperator
from beluga_airflow.state import open_store
from beluga_airflow.testing import OperatorRunner

MEMORY = Memory(key="customer")
TALK = Chain("talk").add_step("answer", Decision("Which?", choices=["a", "b"], reads=["tier"], memory=MEMORY))


def operator(task_id: str = "decide", **arguments: Any) -> LLMDecisionOperator:
    given: dict[str, Any] = {
        "question": "How should this order be handled?",
        "choices": ["expedite", "standard"],
        "data": {"tier": "{{ params.tier }}", "customer": "{{ params.customer }}"},
        "memory": MEMORY,
    }
    return LLMDecisionOperator(task_id=task_id, **given | arguments)


def talk(tier: str, customer: str = "c-1") -> dict[str, Any]:
    return {"tier": tier, "customer": customer}


def seen(server: ModelServer, number: int = -1) -> list[str]:
    """The tiers of the earlier turns that the model was told of."""
    blocks = [message["content"] for message in server.requests[number]["messages"] if message["role"] == "user"]
    return [json.loads(block.splitlines()[1])["data"]["tier"] for block in blocks[:-1]]


def kept(file: Path) -> dict[str, list[str]]:
    """The tiers of the turns in the store, by conversation."""

    async def read() -> dict[str, list[str]]:
        store = open_store(f"sqlite:///{file}")
        entries = {name: await store.get(name) async for name in store.keys("beluga/memory/")}
        await store.close()
        return {name: [turn["asked"]["data"]["tier"] for turn in entry["turns"]] for name, entry in entries.items()}

    return asyncio.run(read())


def test_a_task_sees_what_it_decided_in_earlier_runs(
    runner: OperatorRunner, model_server: ModelServer, state_file: Path
) -> None:
    for run_id, conf in [("r1", talk("gold")), ("r2", talk("x", "c-2")), ("r3", talk("lead"))]:
        assert runner.run(operator(), run_id=run_id, conf=conf).state == "success"
    assert [seen(model_server, number) for number in range(3)] == [[], [], ["gold"]]
    assert kept(state_file) == {
        "beluga/memory/test-dag%2Fdecide/c-1": ["gold", "lead"],
        "beluga/memory/test-dag%2Fdecide/c-2": ["x"],
    }


def test_tasks_share_a_memory_by_its_name_only(
    runner: OperatorRunner, model_server: ModelServer, state_file: Path
) -> None:
    shared = Memory(key="customer", name="orders")
    runner.run(operator("one"), run_id="r1", conf=talk("gold"))
    runner.run(operator("two"), run_id="r1", conf=talk("lead"))
    assert seen(model_server) == []
    runner.run(operator("three", memory=shared), run_id="r1", conf=talk("tin"))
    runner.run(operator("four", memory=shared), run_id="r1", conf=talk("zinc"))
    assert seen(model_server) == ["tin"]
    assert kept(state_file)["beluga/memory/orders/c-1"] == ["tin", "zinc"]


def test_a_lost_task_adds_its_turn_once_and_a_cleared_one_replaces_it(
    runner: OperatorRunner, model_server: ModelServer, state_file: Path
) -> None:
    first = runner.run(operator(retries=1), run_id="r1", conf=talk("gold"))
    runner.run(operator(), run_id="r2", conf=talk("lead"))
    again = first.lose().retry()
    assert (again.state, model_server.calls) == ("success", 2)
    cleared = again.clear()
    assert (cleared.state, model_server.calls, seen(model_server)) == ("success", 3, [])
    assert kept(state_file) == {"beluga/memory/test-dag%2Fdecide/c-1": ["gold", "lead"]}


def test_a_mapped_task_is_one_memory(runner: OperatorRunner, state_file: Path) -> None:
    with DAG("orders", schedule=None):
        mapped = LLMDecisionOperator.partial(
            task_id="decide", question="How?", choices=["expedite", "standard"], memory=MEMORY
        ).expand(data=[talk("gold"), talk("lead")])
    for index in (0, 1):
        assert runner.run(mapped, map_index=index).state == "success"
    assert kept(state_file) == {"beluga/memory/orders%2Fdecide/c-1": ["gold", "lead"]}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"tier": "gold"}, "MissingKey: step 'decision' reads 'customer'"),
        (talk("gold", ""), "InvalidInput: step 'decision' finds its conversation by 'customer', which is empty"),
        (talk("gold", "{{ params.nobody }}"), "which is empty"),
    ],
)
def test_without_a_conversation_it_fails_for_good(
    runner: OperatorRunner, model_server: ModelServer, data: dict[str, Any], says: str
) -> None:
    run = runner.run(operator(data=data, retries=3), conf={"nobody": None})
    assert (run.state, type(run.error), model_server.calls) == ("failed", AirflowFailException, 0)
    assert says in str(run.error)


@pytest.mark.parametrize(
    ("memory", "says"),
    [("customer", "memory is 'customer', it must be a Memory"), (Memory(key="x", max_tokens=0), "max_tokens is 0")],
)
def test_a_memory_that_cannot_be_sound_is_an_import_error_of_the_dag(memory: Any, says: str) -> None:
    with pytest.raises(InvalidFlow) as caught:
        operator(memory=memory)
    assert says in str(caught.value)


def test_a_flow_in_one_task_talks(runner: OperatorRunner, model_server: ModelServer, state_file: Path) -> None:
    for run_id in ("r1", "r2"):
        task = ChainOperator(task_id="talk", flow=TALK, inputs=talk(run_id))
        assert runner.run(task, run_id=run_id).state == "success"
    assert seen(model_server) == ["r1"]
    assert kept(state_file) == {"beluga/memory/talk/answer/c-1": ["r1", "r2"]}
