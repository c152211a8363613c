from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from pytest_mock import MockerFixture

from beluga_airflow import Chain, Decision, FlowResult, InvalidFlow, InvalidInput, Retry
from beluga_airflow.errors import InvalidOutput, ModelUnavailable
from beluga_airflow.llm.client import Endpoint, OpenAIClient
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.testing.scripted_model import ScriptedModel
from tests.running import FAST, ended, graph_of, nothing


async def test_the_state_grows_from_step_to_step() -> None:
    seen: list[dict[str, Any]] = []

    def adds(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def step(data: dict[str, Any]) -> dict[str, Any]:
            seen.append(dict(data))
            return {key: len(data), "last": key}

        return step

    result = await ended(Chain("f").add_step("a", adds("a")).add_step("b", adds("b")), {"order": 7})

    assert seen == [{"order": 7}, {"order": 7, "a": 1, "last": "a"}]
    assert result == FlowResult(
        status="completed",
        data={"order": 7, "a": 1, "b": 3, "last": "b"},
        steps={"a": "completed", "b": "completed"},
    )


async def test_nobody_can_change_data_behind_anothers_back() -> None:
    held: list[Any] = []

    def spoils(data: dict[str, Any]) -> dict[str, Any]:
        data["lines"].append("spoilt")
        data["made"]["by"] = "spoilt"
        return {}

    def holds(data: dict[str, Any]) -> dict[str, Any]:
        held.append({"deep": ["kept"]})
        return {"made": {"by": "a"}, "held": held[0]}

    def changes_what_it_holds(data: dict[str, Any]) -> dict[str, Any]:
        held[0]["deep"].append("spoilt")
        return {"seen": data["held"], "lines_seen": data["lines"]}

    inputs = {"lines": ["mug"]}
    flow = graph_of("ab", "ac", "bd", "cd", nodes={"a": holds, "b": spoils, "c": spoils, "d": changes_what_it_holds})

    result = await ended(flow, inputs)

    assert inputs == {"lines": ["mug"]}
    assert result.data == {
        "lines": ["mug"],
        "made": {"by": "a"},
        "held": {"deep": ["kept"]},
        "seen": {"deep": ["kept"]},
        "lines_seen": ["mug"],
    }


@dataclass
class Order:
    number: str
    value: Decimal


async def test_what_one_step_returns_the_next_gets_as_it_is_annotated() -> None:
    def priced(order: Order) -> Order:
        return Order(order.number, order.value * 2)

    def checked(order: Order) -> dict[str, Any]:
        return {"large": order.value > 100}

    result = await ended(Chain("f").add_step("a", priced).add_step("b", checked), Order("7", Decimal("60.50")))

    assert result.data == {"number": "7", "value": "121.00", "large": True}


@pytest.mark.parametrize("inputs", [[1], "text", 7])
async def test_the_input_is_a_mapping(inputs: Any) -> None:
    with pytest.raises(InvalidInput, match=r"the input of flow 'f' is a (list|str|int); give a mapping"):
        await ended(Chain("f").add_step("a", nothing), inputs)


async def test_the_input_is_json() -> None:
    with pytest.raises(InvalidOutput, match=r"the input of flow 'f'\['ids'\] is a set, which is not JSON"):
        await ended(Chain("f").add_step("a", nothing), {"ids": {1}})


async def test_a_flow_that_cannot_run_is_an_error_and_no_result() -> None:
    with pytest.raises(InvalidFlow, match="flow 'f' cannot run: it has no steps"):
        await ended(Chain("f"))


async def test_several_finish_points_give_their_data_by_name() -> None:
    flow = graph_of("ab", "ac", nodes={"a": lambda d: {"a": 1}, "b": lambda d: {"k": "b"}, "c": lambda d: {"k": "c"}})

    assert (await ended(flow, {"in": 0})).data == {"b": {"in": 0, "a": 1, "k": "b"}, "c": {"in": 0, "a": 1, "k": "c"}}


async def test_a_skipped_finish_point_leaves_the_data_before_it() -> None:
    flow = graph_of("ab", "ac", nodes={"a": lambda d: {"ok": 0}, "b": lambda d: {"b": 1}, "c": lambda d: {"c": 2}})
    flow.add_node("d", lambda data: {"paid": True}).add_edge("b", "d").add_edge("c", "d", when={"ok": True})

    result = await ended(flow, {"in": 0})

    assert (result.status, result.data) == ("completed", {"in": 0, "ok": 0, "b": 1, "c": 2})
    assert result.steps == {"a": "completed", "b": "completed", "c": "completed", "d": "skipped"}


@pytest.mark.parametrize("joined", [True, False])
async def test_branches_that_disagree_fail_the_flow_whether_or_not_their_join_runs(joined: bool) -> None:
    flow = graph_of("ab", "ac", nodes={"a": nothing, "b": lambda d: {"k": 1}, "c": lambda d: {"k": 2}})
    flow.add_node("d", nothing).add_edge("b", "d").add_edge("c", "d", when={"k": 2 if joined else 0})

    result = await ended(flow)

    assert (result.status, result.data, result.steps["d"]) == ("failed", {}, "failed")
    assert str(result.error).startswith(
        "step 'd' failed: MergeConflict: steps 'b' and 'c' of flow 'g' run side by side"
    )


async def test_a_reducer_unites_what_branches_set() -> None:
    flow = graph_of(
        *("ac", "bc"),
        nodes={"a": lambda d: {"found": ["a"]}, "b": lambda d: {"found": ["b"]}, "c": nothing},
        reducers={"found": lambda one, two: one + two},
    )

    assert (await ended(flow)).data == {"found": ["a", "b"]}


# decisions


def handling(**options: Any) -> Decision:
    return Decision("How?", choices=["expedite", "standard"], reads=["tier"], **options)


async def test_a_decision_is_a_step_whose_answer_later_steps_and_edges_see() -> None:
    model = ScriptedModel(["expedite"])
    flow = graph_of(nodes={"how": handling(), "fast": lambda data: {"sent": data["how"]}, "slow": nothing})
    flow.add_edge("how", "fast", when={"how": "expedite"}).add_edge("how", "slow", when={"how": "standard"})

    result = await ended(flow, {"tier": "gold"}, model=model)

    assert result.steps == {"how": "completed", "fast": "completed", "slow": "skipped"}
    assert result.data["fast"]["sent"] == "expedite"
    assert result.decisions["how"]["decided_by"] == "model"
    assert not model.closed, "it belongs to the caller"


async def test_a_decision_falls_back_when_its_retries_are_used_up() -> None:
    model = ScriptedModel([ModelUnavailable("down")] * 3)

    result = await ended(
        Chain("f", retry=FAST).add_step("how", handling(fallback="standard")), {"tier": "gold"}, model=model
    )

    assert (result.data["how"], result.decisions["how"]["decided_by"], model.calls) == ("standard", "fallback", 3)


async def test_a_decision_without_a_fallback_fails_the_flow() -> None:
    model = ScriptedModel([ModelUnavailable("down")] * 2)

    result = await ended(
        Chain("f", retry=Retry(maximum_attempts=2, initial_interval=0)).add_step("how", handling()),
        {"tier": "gold"},
        model=model,
    )

    assert result.error == "step 'how' failed: ModelUnavailable: down"


async def test_an_answer_on_record_is_not_paid_for_again() -> None:
    model, state = ScriptedModel(["expedite", "standard", "standard"]), MemoryStore()
    flow = Chain("f").add_step("how", handling())
    gold = {"tier": "gold"}

    answers = [
        (await ended(flow, gold, key=key, model=model, state=state)).data["how"] for key in ("7", "7", "8", None)
    ]

    assert answers == ["expedite", "expedite", "standard", "standard"]
    assert model.calls == 3


async def test_a_model_that_is_not_needed_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    flow = Chain("f", retry=FAST).add_step("how", handling(rules=[(lambda data: data["tier"] == "gold", "expedite")]))

    by_rule, by_model = await ended(flow, {"tier": "gold"}), await ended(flow, {"tier": "guest"})

    assert by_rule.data["how"] == "expedite"
    assert by_model.status == "failed"
    assert "OPENAI_API_KEY" in str(by_model.error)


async def test_the_endpoint_is_asked_and_its_client_closed(mocker: MockerFixture) -> None:
    close = mocker.spy(OpenAIClient, "close")
    flow = graph_of(nodes={"one": handling(), "two": handling()})

    async with ModelServer(rules=[{"answer": "expedite"}]) as server:
        result = await ended(flow, {"tier": "gold"}, endpoint=Endpoint(provider="simulated", base_url=server.base_url))

    assert {result.data[step][step] for step in ("one", "two")} == {"expedite"}
    assert all(record["simulated"] for record in result.decisions.values())
    assert close.await_count == 1
