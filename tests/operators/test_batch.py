"""Many items as one task: a real server, a worker in the test, and a results file."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowFailException

from beluga_airflow.errors import FlowNotFound, InvalidSetting, StateUnavailable, TemporalUnavailable
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.operators.batch import TemporalBatchOperator
from tests.operators import sample_flows as flows
from tests.operators.conftest import Side, lines_of, until_seen

PATH = "tests.operators.sample_flows"


def operator(items: Any, flow: Any = flows.item, **arguments: Any) -> TemporalBatchOperator:
    return TemporalBatchOperator(task_id="t", flow=flow, items=items, **arguments)


def items(token: str, *ends: str | None) -> list[dict[str, Any]]:
    return [{"id": number, "order_id": f"o-{number}", "end": end, "token": token} for number, end in enumerate(ends)]


async def test_every_item_comes_to_its_own_end(side: Side, token: str, state_file: Path) -> None:
    given = items(token, None, "stop", "invalid", "error", None)
    run = await side.run(operator(given, key="order_id"))
    assert run.state == "deferred"
    assert run.links["Temporal run"].endswith(run.xcoms["run_id"])
    async with side.worker():
        end = await run.run_to_end()
    assert end.state == "success", "a bad item is a line, and no failure of the task"
    manifest = end.return_value
    results = state_file.parent / "results" / "test-dag" / side.run_id / "t" / "-1@0.jsonl"
    assert manifest == {
        "workflow_id": f"test-dag/{side.run_id}/t/-1@0",
        "run_id": run.xcoms["run_id"],
        "flow": "item",
        "total": 5,
        "statuses": {"completed": 2, "failed": 2, "out_of_stock": 1},
        "decisions": {"choices": {}, "decided_by": {}},
        "tokens": {"input": 0, "output": 0},
        "cost_usd": 0.0,
        "simulated": False,
        "duration_seconds": manifest["duration_seconds"],
        "items_per_second": manifest["items_per_second"],
        "results": str(results),
    }
    assert 0 < manifest["duration_seconds"] < 60
    assert manifest["items_per_second"] == pytest.approx(5 / manifest["duration_seconds"], rel=0.01)
    lines = lines_of(results)
    assert [(line["index"], line["key"], line["status"]) for line in lines] == [
        (0, "o-0", "completed"),
        (1, "o-1", "out_of_stock"),
        (2, "o-2", "failed"),
        (3, "o-3", "failed"),
        (4, "o-4", "completed"),
    ]
    assert lines[0] == {
        "index": 0,
        "key": "o-0",
        "status": "completed",
        "data": {
            **given[0],
            "treated": True,
            "idempotency_key": "item/o-0/charge",
            "attempt": 1,
            "generation": 0,
        },
        "error": None,
        "steps": {"treated": "completed", "charge": "completed"},
        "decisions": {},
        "undone": {},
    }
    assert lines[2]["error"] == "step 'treated' failed: InvalidInput: the item is not good"
    assert lines[3]["error"] == "step 'treated' failed: ConnectionError: the bank is closed"
    assert sorted(flows.seen[token]) == ["0", "1", "2", "3", "4", "charge", "charge"]
    assert [file.name for file in results.parent.iterdir()] == ["-1@0.jsonl"]


async def test_decisions_tokens_and_cost_are_summed(side: Side, token: str, model_server: ModelServer) -> None:
    tiers = ["gold", "gold", "bronze", "tiny"]
    given = [{"id": number, "tier": tier, "token": token} for number, tier in enumerate(tiers)]
    end = await side.run_to_end(operator(given, flow=flows.judged))
    manifest = end.return_value
    assert manifest["statuses"] == {"completed": 4}
    assert manifest["decisions"] == {
        "choices": {"expedite": 3, "standard": 1},
        "decided_by": {"model": 3, "rule": 1},
    }
    records = [line["decisions"]["handling"] for line in lines_of(manifest["results"])]
    assert manifest["tokens"] == {
        name: sum(record["tokens"][name] for record in records) for name in ("input", "output")
    }
    assert manifest["cost_usd"] == pytest.approx(sum(record["cost_usd"] for record in records), abs=1e-6)
    assert manifest["cost_usd"] > 0
    assert manifest["simulated"] is True
    assert model_server.calls == 3


# where items come from


@pytest.mark.parametrize("source", ["output", "text"])
async def test_items_may_come_from_another_task(side: Side, token: str, source: str) -> None:
    with DAG("orders", schedule=None):
        up = operator([], flow=flows.chain)
        up.task_id = "up"
        text = "{{ ti.xcom_pull('up') | tojson }}"
        batch = TemporalBatchOperator(task_id="batch", flow=flows.item, items=up.output if source == "output" else text)
    given = [{"id": "{{ 7 * 7 }}", "token": token}, {"id": "<&'\">", "token": token}]
    end = await side.run_to_end(batch, xcoms={"up": given})
    assert [line["data"]["id"] for line in lines_of(end.return_value["results"])] == ["{{ 7 * 7 }}", "<&'\">"]


@pytest.mark.parametrize(("function", "count"), [("orders", 3), ("orders_by_and_by", 2)])
async def test_items_may_come_from_a_function(side: Side, token: str, function: str, count: int) -> None:
    batch = operator(f"{PATH}:{function}", items_args={"token": "{{ params.token }}"}, key="order_id")
    end = await side.run_to_end(batch, conf={"token": token})
    assert [line["key"] for line in lines_of(end.return_value["results"])] == [f"o-{n}" for n in range(count)]


async def test_without_a_key_the_place_names_an_item(side: Side, token: str) -> None:
    end = await side.run_to_end(operator(items(token, None, None)))
    lines = lines_of(end.return_value["results"])
    assert [line["key"] for line in lines] == ["0", "1"]
    assert [line["data"]["idempotency_key"] for line in lines] == [
        f"test-dag/{side.run_id}/t/-1/{number}/charge" for number in (0, 1)
    ]


async def test_an_empty_batch_is_an_empty_result(side: Side) -> None:
    end = await side.run_to_end(operator([]))
    assert end.state == "success"
    assert (end.return_value["total"], end.return_value["statuses"], end.return_value["items_per_second"]) == (0, {}, 0)
    assert lines_of(end.return_value["results"]) == []


async def test_items_that_cannot_be_run_are_failed_lines(side: Side, token: str) -> None:
    good, also_good = items(token, None, None)
    given = [
        good,
        {"id": 1, "token": token},
        {"id": 2, "order_id": "  ", "token": token},
        {"id": 3, "order_id": None, "token": token},
        {"order_id": "o-4", "token": token, "value": float("nan")},
        {"order_id": "o-5", "token": token, 5: "x"},
        "o-6",
        7,
        None,
        ["order_id", "o-9"],
        also_good,
    ]
    end = await side.run_to_end(operator(iter(given), key="order_id"))
    assert end.state == "success"
    assert end.return_value["statuses"] == {"completed": 2, "failed": 9}
    lines = lines_of(end.return_value["results"])
    assert [line["key"] for line in lines] == ["o-0", *(f"item {number}" for number in range(1, 10)), "o-1"]
    errors = [line["error"] for line in lines[1:10]]
    for number, says in enumerate(
        [
            *["it has no 'order_id', which key= names as its business key"] * 3,
            "item 4['value'] is nan, which JSON cannot hold",
            "has the key 5, a int; keys must be texts",
            "it is a str, it must be a mapping",
            "it is a int, it must be a mapping",
            "it is a NoneType, it must be a mapping",
            "it is a list, it must be a mapping",
        ]
    ):
        assert errors[number].startswith(f"item {number + 1} cannot be run: ")
        assert says in errors[number]
    assert sorted(flows.seen[token]) == ["0", "1", "charge", "charge"]


async def test_any_text_goes_through_and_what_is_none_fails_alone(side: Side, token: str) -> None:
    end = await side.run_to_end(operator(f"{PATH}:texts", items_args={"token": token}, key="order_id"))
    half, *lines = lines_of(end.return_value["results"])
    assert [line["data"]["id"] for line in lines] == flows.TEXTS[1:]
    assert [line["key"] for line in lines] == flows.TEXTS[1:]
    assert end.return_value["statuses"] == {"completed": len(flows.TEXTS) - 1, "failed": 1}
    assert "item 0['id'] has half a character in it (a lone surrogate), which is no text" in half["error"]


async def test_two_items_with_one_key_are_an_error(side: Side, token: str) -> None:
    given = [*items(token, None, None), {"order_id": "o-1", "token": token}]
    run = await side.run(operator(given, key="order_id", retries=2))
    assert (run.state, type(run.error)) == ("failed", AirflowFailException)
    assert "two items have the key 'o-1' (order_id); keys must be unique in a batch" in str(run.error)
    assert (run.xcoms, flows.seen[token]) == ({}, []), "nothing was started"


@pytest.mark.parametrize(
    ("source", "arguments", "says"),
    [
        (f"{PATH}:nothing", None, f"InvalidSetting: items='{PATH}:nothing' cannot be imported"),
        ("nowhere:orders", None, "items='nowhere:orders' cannot be imported"),
        (f"{PATH}:orders", {"day": 1}, "items_args= does not fit"),
        (f"{PATH}:a_number", None, "items= gave a int"),
        ("[{'a': 1}]", None, "InvalidInput: items= is a text that is not JSON"),
        (None, None, "items= gave a NoneType"),
    ],
)
async def test_what_gives_no_items_fails_for_good(
    side: Side, source: Any, arguments: dict[str, Any] | None, says: str
) -> None:
    run = await side.run(operator(source, items_args=arguments, retries=2))
    assert (run.state, type(run.error)) == ("failed", AirflowFailException)
    assert says in str(run.error)
    assert run.xcoms == {}


# lost and found


async def test_a_retry_goes_on_with_what_is_stored(side: Side, token: str) -> None:
    batch = operator(f"{PATH}:orders", flow=flows.patient, items_args={"token": token}, retries=1, key="order_id")
    async with side.worker():
        first = await side.run(batch)
        await until_seen(token, "waiting")
        second = await side.retry(first.lose())
        assert (second.state, second.xcoms["run_id"]) == ("deferred", first.xcoms["run_id"])
        flows.gates[token].set()
        end = await second.run_to_end()
    assert end.return_value["statuses"] == {"completed": 3}
    assert flows.seen[token].count("orders(3)") == 1, "the source is not read again"
    assert sorted(flows.seen[token]) == ["0", "1", "2", "orders(3)", "waiting", "waiting", "waiting"]


async def test_retries_that_are_edited_while_it_waits_lose_nothing(side: Side, token: str) -> None:
    batch = operator(items(token, None, None), retries=2)
    run = await side.run(batch)
    batch.retries = 1
    async with side.worker():
        end = await run.run_to_end()
    assert end.state == "success", end.error
    assert end.return_value["statuses"] == {"completed": 2}


async def test_a_key_that_the_endpoint_refuses_fails_the_batch_before_any_item(
    side: Side, token: str, state_file: Path
) -> None:
    async with ModelServer(api_key="another key") as server:
        extra = {"provider": "simulated", "base_url": server.base_url}
        llm = side.runner.connections["beluga_llm_default"]
        side.runner.connections["beluga_llm_default"] = {**llm, "extra": extra}
        end = await side.run_to_end(operator([{"tier": "gold", "token": token}] * 3, flows.judged))
    assert isinstance(end.error, AirflowFailException)
    assert "mend the password of connection 'beluga_llm_default'" in str(end.error)
    assert server.calls == 0
    assert not list(state_file.parent.glob("results/**/*.jsonl"))


async def test_a_batch_that_ended_while_nobody_looked_is_taken(side: Side, token: str) -> None:
    async with side.worker():
        first = await side.run(operator(items(token, None, "error"), retries=1))
        await side.handle(first).result()
    end = await (await side.retry(first.lose())).run_to_end()
    assert end.return_value["statuses"] == {"completed": 1, "failed": 1}
    assert sorted(flows.seen[token]) == ["0", "1", "charge"]


async def test_a_task_that_was_lost_after_it_published_publishes_the_same(side: Side, token: str) -> None:
    first = await side.run_to_end(operator(items(token, None, "stop"), retries=1))
    written = lines_of(first.return_value["results"])
    end = await (await side.retry(first.lose())).run_to_end()
    assert lines_of(end.return_value["results"]) == written
    assert end.return_value["statuses"] == first.return_value["statuses"]


async def test_an_attempt_that_was_lost_while_it_read_its_items_begins_anew(side: Side, token: str) -> None:
    flows.broken.add(token)
    first = await side.run(operator(f"{PATH}:spoiled", items_args={"token": token}, key="order_id", retries=1))
    assert (first.state, type(first.error)) == ("up_for_retry", OSError)
    flows.broken.discard(token)
    async with side.worker():
        end = await (await side.retry(first)).run_to_end()
    assert end.return_value["statuses"] == {"completed": 4}


async def test_what_an_attempt_that_was_lost_had_refused_is_looked_at_again(side: Side, token: str) -> None:
    def source(first: dict[str, Any]) -> Any:
        yield first
        if "order_id" not in first:
            raise OSError("the file ends too early")

    batch = operator(source({"token": token}), key="order_id", retries=1)
    first = await side.run(batch)
    assert first.state == "up_for_retry"
    batch.items = source({"token": token, "order_id": "o-1"})
    async with side.worker():
        end = await (await side.retry(first)).run_to_end()
    assert end.return_value["statuses"] == {"completed": 1}


async def test_a_clear_runs_all_again_with_the_same_keys(side: Side, token: str, model_server: ModelServer) -> None:
    given = [{**item, "tier": "gold"} for item in items(token, None, None)]
    async with side.worker():
        first = await (await side.run(operator(given, flow=flows.judged, key="order_id"))).run_to_end()
        second = await (await side.clear(first)).run_to_end()
    assert second.return_value["workflow_id"].endswith("@1")
    assert second.return_value["results"] != first.return_value["results"]
    assert len(lines_of(first.return_value["results"])) == len(lines_of(second.return_value["results"])) == 2
    assert (sorted(flows.seen[token]), model_server.calls) == (["0", "0", "1", "1"], 4)


async def test_business_keys_are_the_same_for_every_run(side: Side, token: str, model_server: ModelServer) -> None:
    given = [{**item, "tier": "gold"} for item in items(token, None, None)]
    found = []
    async with side.worker():
        for number in (1, 2):
            run = await side.run(operator(given, key="order_id"), run_id=f"{token}-{number}")
            end = await run.run_to_end()
            found.append([line["data"]["idempotency_key"] for line in lines_of(end.return_value["results"])])
    assert found[0] == found[1] == ["item/o-0/charge", "item/o-1/charge"]


# the results file


async def test_results_go_where_they_are_wanted(side: Side, token: str, tmp_path: Path) -> None:
    path = str(tmp_path / "{{ ds }}" / "{{ params.name }}.jsonl")
    end = await side.run_to_end(operator(items(token, None), results_path=path), conf={"name": "out"})
    assert end.return_value["results"] == str(tmp_path / "2026-01-01" / "out.jsonl")
    assert len(lines_of(end.return_value["results"])) == 1


@pytest.mark.parametrize("place", ["file/out.jsonl", "folder"])
async def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(
    side: Side, token: str, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    run = await side.run(operator(items(token, None), results_path=str(tmp_path / place), retries=1))
    assert (run.state, type(run.error)) == ("failed", AirflowFailException)
    assert f"the results cannot be written to {tmp_path / place}" in str(run.error)
    assert "set results_path= to another place" in str(run.error)
    assert run.xcoms == {}


async def test_a_store_without_a_place_for_results_is_refused_before_anything_runs(side: Side, token: str) -> None:
    side.runner.connections["beluga_state_default"] = {"conn_type": "beluga_state", "extra": {"url": "memory://"}}
    run = await side.run(operator(items(token, None), retries=1))
    assert (run.state, type(run.error)) == ("failed", AirflowFailException)
    assert "results_path= is needed" in str(run.error)
    assert run.xcoms == {}


# what goes wrong


async def test_a_store_that_is_away_is_retried_by_airflow(side: Side, token: str, tmp_path: Path) -> None:
    there = side.runner.connections["beluga_state_default"]
    away = {"conn_type": "beluga_state", "extra": {"url": f"sqlite:///{tmp_path}"}}
    side.runner.connections["beluga_state_default"] = away
    first = await side.run(operator(items(token, None), retries=2))
    assert (first.state, type(first.error)) == ("up_for_retry", StateUnavailable)
    side.runner.connections["beluga_state_default"] = there
    async with side.worker():
        second = await side.retry(first)
        event = await second.run_trigger()
        side.runner.connections["beluga_state_default"] = away
        third = await asyncio.to_thread(second.resume, event)
        assert (third.state, type(third.error)) == ("up_for_retry", StateUnavailable)
        side.runner.connections["beluga_state_default"] = there
        end = await (await side.retry(third)).run_to_end()
    assert end.return_value["statuses"] == {"completed": 1}
    assert flows.seen[token] == ["0", "charge"]


async def test_a_server_that_is_down_is_retried_by_airflow(side: Side, token: str, unused_tcp_port: int) -> None:
    there = side.runner.connections["temporal_default"]
    side.runner.connections["temporal_default"] = {
        "conn_type": "temporal",
        "host": "127.0.0.1",
        "port": unused_tcp_port,
    }
    batch = operator(f"{PATH}:orders", items_args={"token": token}, retries=1)
    first = await side.run(batch)
    assert (first.state, type(first.error)) == ("up_for_retry", TemporalUnavailable)
    side.runner.connections["temporal_default"] = there
    async with side.worker():
        end = await (await side.retry(first)).run_to_end()
    assert end.return_value["total"] == 3
    assert flows.seen[token].count("orders(3)") == 1


async def test_a_worker_with_another_store_is_named(side: Side, token: str, tmp_path: Path) -> None:
    run = await side.run(operator(items(token, None), retries=1))
    ours = side.runner.connections["beluga_state_default"]
    other = {"conn_type": "beluga_state", "extra": {"url": f"sqlite:///{tmp_path / 'other.db'}"}}
    side.runner.connections["beluga_state_default"] = other
    async with side.worker():
        event = await run.run_trigger()
    side.runner.connections["beluga_state_default"] = ours
    end = await asyncio.to_thread(run.resume, event)
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    assert "is not in the state store" in str(end.error)
    assert "give both the same beluga_state connection" in str(end.error)
    assert flows.seen[token] == []


async def test_a_flow_that_the_worker_has_not_is_named(side: Side, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = await side.run(operator(items(token, None), flow=f"{PATH}:item", retries=1))
    monkeypatch.delattr(flows, "item")
    async with side.worker():
        end = await run.run_to_end()
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    assert f"FlowNotFound: flow '{PATH}:item'" in str(end.error)


@pytest.mark.parametrize("extra", [{"provider": "oracle-at-delphi"}, {"provider": "openai"}])
async def test_a_model_that_cannot_be_asked_fails_the_batch_before_any_item(
    side: Side, token: str, extra: dict[str, str], monkeypatch: pytest.MonkeyPatch, state_file: Path
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    side.runner.connections["beluga_llm_default"] = {"conn_type": "beluga_llm", "extra": extra}
    end = await side.run_to_end(operator([{"tier": "gold"}] * 3, flows.judged))
    assert end.state == "failed"
    assert isinstance(end.error, AirflowFailException)
    assert "beluga_llm_default" in str(end.error) or "oracle-at-delphi" in str(end.error)
    assert not list(state_file.parent.glob("results/**/*.jsonl")), "nothing was run, so nothing is published"


async def test_a_user_who_clears_the_waiting_task_cancels_the_batch(side: Side, token: str) -> None:
    batch = operator(items(token, None, None), flow=flows.patient, max_in_flight=1)
    async with side.worker():
        run = await side.run(batch)
        await until_seen(token, "waiting")
        assert run.deferral is not None
        await run.deferral.trigger().on_kill()
        end = await run.run_to_end()
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    assert "the batch did not end: the workflow was cancelled" in str(end.error)
    assert await side.status(run) == "CANCELED"
    assert "1" not in flows.seen[token], "no further item was begun"


async def test_no_more_items_run_at_once_than_allowed(side: Side, token: str) -> None:
    batch = operator(items(token, None, None, None, None), flow=flows.patient, max_in_flight=2)
    async with side.worker():
        run = await side.run(batch)
        await until_seen(token, "waiting")
        while flows.seen[token].count("waiting") < 2:  # noqa: ASYNC110  # steps have no event for the test
            await asyncio.sleep(0.01)
        progress = await side.handle(run).query("progress")
        assert progress == {"total": 4, "ended": 0, "in_flight": 2, "statuses": {}}
        flows.gates[token].set()
        end = await run.run_to_end()
    assert end.return_value["statuses"] == {"completed": 4}


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"max_in_flight": 0}, InvalidSetting, "max_in_flight is 0, it must be 1 or more"),
        ({"flow": "nowhere:flow"}, FlowNotFound, "cannot be imported in this process"),
    ],
)
def test_what_cannot_run_is_an_import_error_of_the_dag(
    arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as caught:
        operator([], **arguments)
    assert says in str(caught.value)


def test_a_dag_with_it_is_stored_as_any_other() -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    with DAG("orders", schedule=None) as dag:
        operator(f"{PATH}:orders", items_args={"day": "{{ ds }}"}, key="order_id")
    again = DagSerialization.from_dict(json.loads(json.dumps(DagSerialization.to_dict(dag)))).task_dict["t"]
    assert again.template_fields == ["items", "items_args", "results_path", "task_queue"]
    assert [link.name for link in again.operator_extra_links] == ["Temporal run"]
