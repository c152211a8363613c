"""Running again from one step, in one task and on Temporal."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import pytest
from airflow.sdk import DAG

from beluga_airflow import Chain
from beluga_airflow.errors import InvalidSetting
from beluga_airflow.graph import Flow
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.operators.again import STEPS_LIMIT, Again
from beluga_airflow.operators.flow import ChainOperator, GraphOperator
from beluga_airflow.operators.temporal import TemporalWorkflowOperator
from beluga_airflow.testing import OperatorRunner, TaskRun
from tests.operators import again_flows
from tests.operators import sample_flows as flows
from tests.operators.conftest import GOLD, Side

AGAIN = {"again_from": "{{ params.again_from }}", "again_run": "{{ params.again_run }}"}


@dataclass
class Host:
    """Where flows run, and run again: in one task, or on Temporal."""

    side: Side
    durable: bool

    def kind(self, flow: Flow) -> Any:
        if self.durable:
            return TemporalWorkflowOperator
        return ChainOperator if isinstance(flow, Chain) else GraphOperator

    def run_id(self, name: str) -> str:
        return f"{self.side.run_id}-{name}"

    async def run(self, flow: Flow, inputs: Any, run: str, *again: str, conf: Any = None, **options: Any) -> TaskRun:
        """Run a flow in the DAG run of this name; ``again``: from which step, after which run."""
        if again:
            options |= {"again_from": again[0], "again_run": self.run_id(again[1])}
        operator = self.kind(flow)(task_id="t", flow=flow, inputs=inputs, **options)
        return await self.side.run_to_end(operator, run_id=self.run_id(run), conf=conf)


@pytest.fixture(params=[False, True], ids=["one task", "temporal"])
def host(request: pytest.FixtureRequest, side: Side) -> Host:
    return Host(side, durable=request.param)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "beluga_airflow.operators.again")
    return caplog


# what stands


def test_the_steps_before_it_stand(runner: OperatorRunner, token: str) -> None:
    flows.broken.add(token)
    operator = ChainOperator(task_id="t", flow=flows.used_up_late, inputs={"order_id": "o-1", "token": token}, **AGAIN)
    operator.params = {"again_from": None, "again_run": None}
    first = runner.run(operator, run_id="first")
    assert (first.state, flows.seen[token]) == ("failed", ["validate", "charge", "fragile"])
    charged = first.xcoms["steps"]["outcomes"]["charge"]["output"]["idempotency_key"]

    flows.broken.discard(token)
    second = runner.run(operator, run_id="second", conf={"again_from": "fulfil", "again_run": "first"})
    assert (second.state, flows.seen[token]) == ("success", ["validate", "charge", "fragile", "fragile"])
    assert second.return_value["data"]["idempotency_key"] == charged
    # a run that was begun in the middle can be begun again before that
    third = runner.run(operator, run_id="third", conf={"again_from": "charge", "again_run": "second"})
    assert (third.state, flows.seen[token][4:]) == ("success", ["charge", "fragile"])


def test_what_runs_beside_it_stands_too(runner: OperatorRunner, token: str) -> None:
    inputs = {"order_id": "o-1", "token": token}
    runner.run(GraphOperator(task_id="t", flow=flows.pair, inputs=inputs), run_id="first")
    assert sorted(flows.seen.pop(token)) == ["charge", "fragile", "validate"]
    again = GraphOperator(task_id="t", flow=flows.pair, inputs=inputs, again_from="charge", again_run="first")
    second = runner.run(again, run_id="second")
    assert (second.state, flows.seen[token]) == ("success", ["charge"])


def test_a_lost_task_goes_on_behind_what_stands(runner: OperatorRunner, token: str) -> None:
    inputs = {"order_id": "o-1", "token": token}
    runner.run(ChainOperator(task_id="t", flow=flows.chain, inputs=inputs), run_id="first")
    again = ChainOperator(
        task_id="t", flow=flows.chain, inputs=inputs, again_from="charge", again_run="first", retries=1
    )
    second = runner.run(again, run_id="second")
    assert second.lose().retry().return_value == second.return_value
    assert flows.seen[token] == ["validate", "charge", "charge"]


async def test_on_temporal_they_stand_by_the_history(side: Side, token: str) -> None:
    flows.broken.add(token)
    inputs = {"order_id": "o-1", "token": token}
    first = await side.run_to_end(
        TemporalWorkflowOperator(task_id="t", flow=flows.used_up_late, inputs=inputs), run_id=f"{side.run_id}-1"
    )
    assert (first.state, flows.seen[token]) == ("failed", ["validate", "charge", "fragile"])
    flows.broken.discard(token)
    again = TemporalWorkflowOperator(
        task_id="t", flow=flows.used_up_late, inputs=inputs, again_from="fulfil", again_run=f"{side.run_id}-1"
    )
    second = await side.run_to_end(again, run_id=f"{side.run_id}-2")
    assert (second.state, flows.seen[token]) == ("success", ["validate", "charge", "fragile", "fragile"])
    assert second.return_value["data"]["idempotency_key"].startswith(f"test-dag/{side.run_id}-1/")
    # what stood in the second run is in its history too
    third = TemporalWorkflowOperator(
        task_id="t", flow=flows.used_up_late, inputs=inputs, again_from="fulfil", again_run=f"{side.run_id}-2"
    )
    assert (await side.run_to_end(third, run_id=f"{side.run_id}-3")).state == "success"
    assert flows.seen[token][4:] == ["fragile"]


async def test_what_was_undone_does_not_stand_and_what_stands_is_undone_with_the_run(host: Host, token: str) -> None:
    flow, inputs = flows.refunded, {"order_id": "o-1", "token": token}
    paid_back, paid = (f"test-dag/{host.run_id(name)}/t/-1/charge" for name in "12")
    flows.broken.add(token)
    assert (await host.run(flow, inputs, "1")).state == "failed"
    undone = f"refund {paid_back} by {paid_back}.undo"
    assert flows.seen.pop(token) == ["validate", "charge", "fragile", undone]
    flows.broken.discard(token)
    assert (await host.run(flow, inputs, "2", "fulfil", "1")).state == "success"
    assert flows.seen.pop(token) == ["charge", "fragile"]
    flows.broken.add(token)
    assert (await host.run(flow, inputs, "3", "fulfil", "2")).state == "failed"
    assert flows.seen.pop(token) == ["fragile", f"refund {paid} by {paid}.undo"]


async def test_a_nested_flows_node_means_all_its_steps(host: Host, token: str) -> None:
    flow, inputs = again_flows.nested, {"order_id": "o-1", "token": token}
    first = await host.run(flow, inputs, "1")
    assert first.state == "success"
    for name, step, runs in (
        ("2", "ship", ["fragile", "insure", "label", "notify", "pack"]),
        ("3", "ship.label", ["fragile", "label", "notify"]),
        ("4", "ship.insure", ["fragile", "insure", "notify"]),
        ("5", "ship.result", ["fragile", "notify"]),
        ("6", "audit", ["audit"]),
    ):
        flows.seen.pop(token)
        # each after the one before it, which was itself run again
        run = await host.run(flow, inputs, name, step, str(int(name) - 1))
        assert (run.state, sorted(flows.seen[token])) == ("success", runs), step
        assert run.return_value == first.return_value
    assert first.return_value["data"]["audit"]["audit"] is True


async def test_a_run_that_failed_behind_a_nested_flow_goes_on_behind_it(host: Host, token: str) -> None:
    flow, inputs = again_flows.nested, {"order_id": "o-1", "token": token}
    flows.broken.add(token)
    assert (await host.run(flow, inputs, "1")).state == "failed"
    flows.broken.discard(token)
    flows.seen.pop(token)
    second = await host.run(flow, inputs, "2", "pay", "1")
    assert (second.state, flows.seen[token]) == ("success", ["fragile", "notify"])
    assert second.return_value["data"].keys() == {"audit", "notify"}


async def test_each_finish_point_keeps_its_data(host: Host, token: str) -> None:
    inputs = {"order_id": "o-1", "token": token}
    first = await host.run(flows.pair, inputs, "1", key="order_id")
    flows.seen.pop(token)
    second = await host.run(flows.pair, inputs, "2", "charge", "1", key="order_id")
    assert (second.state, flows.seen[token]) == ("success", ["charge"])
    generations = [run.return_value["data"]["charge"].pop("generation") for run in (first, second)]
    assert generations == [0, 1], "it counts as a clear"
    assert second.return_value == first.return_value


async def test_a_stop_elsewhere_does_not_stand(host: Host, token: str) -> None:
    flow, inputs = again_flows.stock_beside, {"order_id": "o-1", "token": token}
    flows.broken.add(token)
    first = await host.run(flow, inputs, "1")
    assert (first.return_value["status"], flows.seen.pop(token)) == ("out_of_stock", ["validate", "stock"])
    still = await host.run(flow, inputs, "2", "charge", "1")
    assert (still.return_value["status"], flows.seen.pop(token)) == ("out_of_stock", ["stock"])
    flows.broken.discard(token)
    second = await host.run(flow, inputs, "3", "charge", "2")
    assert (second.return_value["status"], flows.seen[token]) == ("completed", ["stock", "pick", "charge"])


async def test_a_step_whose_condition_failed_does_not_stand(host: Host, token: str) -> None:
    flow, inputs = again_flows.conditional, {"token": token}
    flows.broken.add(token)
    assert (await host.run(flow, inputs, "1")).state == "failed"
    assert set(flows.seen.pop(token)) == {"first"}
    flows.broken.discard(token)
    second = await host.run(flow, inputs, "2", "then", "1")
    assert (second.state, flows.seen[token]) == ("success", ["first", "then"])


async def test_what_may_have_been_undone_runs_again(host: Host, token: str, log: pytest.LogCaptureFixture) -> None:
    flow, inputs = again_flows.parted, {"order_id": "o-1", "token": token, "end": "no refund"}
    flows.broken.add(token)
    assert (await host.run(flow, inputs, "1", key="order_id")).state == "failed"
    assert flows.seen.pop(token)[-1].startswith("refund ")
    flows.broken.discard(token)
    second = await host.run(flow, inputs, "2", "pay", "1", key="order_id")
    assert (second.state, sorted(flows.seen[token])) == ("success", ["charge", "fragile", "notify"])
    assert second.return_value["data"]["pay"]["idempotency_key"] == "parted/o-1/charge"
    (warning,) = [record for record in log.records if record.levelname == "WARNING" and "nobody" in record.message]
    start = f"nobody knows whether step 'charge' of DAG run '{host.run_id('1')}' was undone"
    assert warning.message.startswith(start)


async def test_a_decision_is_asked_anew_where_it_runs_again(host: Host, token: str, model_server: ModelServer) -> None:
    flow, inputs = again_flows.decided, GOLD | {"token": token}
    first = await host.run(flow, inputs, "1", key="order_id")
    behind = await host.run(flow, inputs, "2", "charge", "1", key="order_id")
    assert (behind.state, behind.xcoms["decisions"], model_server.calls) == ("success", first.xcoms["decisions"], 1)
    anew = await host.run(flow, inputs, "3", "handling", "2", key="order_id")
    assert (anew.state, model_server.calls) == ("success", 2)
    assert anew.return_value["data"]["idempotency_key"] == "decided/o-1/charge"
    await host.run(flow, inputs, "4", "handling", "2", key="order_id")
    assert model_server.calls == 3, "each run again asks for itself"


async def test_each_mapped_task_runs_again_after_its_own(host: Host, token: str) -> None:
    items = [{"order_id": name, "token": token} for name in ("a", "b")]
    with DAG("test-dag", schedule=None, params={"again_from": None, "again_run": None}):
        mapped = host.kind(flows.chain).partial(task_id="t", flow=flows.chain, **AGAIN).expand(inputs=items)
    for index in (0, 1):
        await host.side.run_to_end(mapped, run_id=host.run_id("1"), map_index=index)
    flows.seen.pop(token)
    conf = {"again_from": "charge", "again_run": host.run_id("1")}
    for index, name in enumerate("ab"):
        run = await host.side.run_to_end(mapped, run_id=host.run_id("2"), map_index=index, conf=conf)
        assert (run.return_value["data"]["order_id"], flows.seen.pop(token)) == (name, ["charge"])


# of which item


async def test_the_earlier_input_is_taken(host: Host, token: str, log: pytest.LogCaptureFixture) -> None:
    earlier = {"order_id": "o-1", "token": token, "tier": "gold"}
    given = {"order_id": "secret-2", "token": token, "more": {"a\nb": "hush"}}
    first = await host.run(flows.chain, earlier, "1", key="order_id")
    second = await host.run(flows.chain, given, "2", "charge", "1", key="order_id")
    data = first.return_value["data"] | {"generation": 1}
    assert (second.return_value["data"], data["idempotency_key"]) == (data, "order-chain/o-1/charge")
    message = (
        f"running again with the input of DAG run '{host.run_id('1')}'; this run's own differs in: "
        "'order_id', 'tier', 'more'"
    )
    assert message in log.messages
    assert "secret-2" not in log.text
    assert "hush" not in log.text
    # and what it leaves is what it had
    third = await host.run(flows.chain, {"order_id": "o-3"}, "3", "charge", "2", key="order_id")
    assert third.return_value["data"] == data


async def test_a_business_key_must_name_the_same_item(host: Host, token: str) -> None:
    inputs = {"order_id": "o-1", "token": token}

    async def run(name: str, number: str, *again: str) -> TaskRun:
        return await host.run(flows.chain, inputs, name, *again, key="{{ params.number }}", conf={"number": number})

    first = await run("1", "7")
    refused = await run("2", "8", "charge", "1")
    assert (refused.state, flows.seen.pop(token)) == ("failed", ["validate", "charge"])
    assert str(refused.error) == (
        "InvalidInput: the item named by the key is another one: now 'order-chain/8', in DAG run "
        f"'{host.run_id('1')}' 'order-chain/7'; give the same key, or run this one whole"
    )
    second = await run("3", "7", "charge", "1")
    assert second.return_value["data"]["idempotency_key"] == first.return_value["data"]["idempotency_key"]


@pytest.mark.parametrize("host", [True], indirect=True)
async def test_a_run_again_has_a_workflow_of_its_own(host: Host, token: str) -> None:
    inputs, name = {"order_id": "o-1", "token": token}, f"order-{token}"
    first = await host.run(flows.chain, inputs, "1", workflow_id=name)
    flows.seen.pop(token)
    second = await host.run(flows.chain, inputs, "2", "charge", "1", workflow_id=name, retries=1)
    assert (second.state, flows.seen[token]) == ("success", ["charge"])
    assert [run.xcoms["workflow_id"] for run in (first, second)] == [name, f"{name}/{host.run_id('2')}@0"]
    retried = await host.side.retry(second.lose())
    assert retried.xcoms["workflow_id"] == second.xcoms["workflow_id"]
    assert retried.xcoms["run_id"] == second.xcoms["run_id"]


# what cannot be


async def test_what_is_too_large_to_stand_must_run_whole(host: Host, log: pytest.LogCaptureFixture) -> None:
    first = await host.run(again_flows.bulky, {}, "1")
    assert first.state == "success"
    second = await host.run(again_flows.bulky, {}, "2", "last", "1")
    assert second.state == "failed"
    told = str(second.error)
    if host.durable:
        assert told.startswith(
            f"InvalidInput: workflow 'test-dag/{host.run_id('2')}/t/-1@0' cannot be started: TooLarge"
        )
        assert told.endswith(f"; what stands of DAG run '{host.run_id('1')}' travels in it: run it whole")
    else:
        assert len(json.dumps(first.xcoms["steps"])) < 100
        assert told == (
            f"InvalidSetting: DAG run '{host.run_id('1')}' cannot be run again from one step: its input and what its "
            "steps returned are 3.0 MB, and a task leaves 1 MB; run it whole"
        )
        assert "this run cannot be run again from one step later" in log.text


def test_what_is_just_not_too_large_stands(runner: OperatorRunner, token: str) -> None:
    inputs = {"order_id": "o-1", "token": token, "note": "x" * (STEPS_LIMIT // 2 - 1000)}
    runner.run(ChainOperator(task_id="t", flow=flows.chain, inputs=inputs), run_id="first")
    again = ChainOperator(task_id="t", flow=flows.chain, inputs=inputs, again_from="charge", again_run="first")
    assert runner.run(again, run_id="second").state == "success"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"again_from": "charge"}, "again_from='charge' and again_run=None go together"),
        ({"again_run": "first"}, "again_from=None and again_run='first' go together"),
        (
            {"again_from": "pay", "again_run": "first"},
            "flow 'order-chain' has no step 'pay' to run again from; it has: validate, charge",
        ),
        ({"again_from": "charge", "again_run": "never"}, "this task left nothing in DAG run 'never'"),
    ],
)
def test_what_cannot_be_run_again_is_refused_before_anything_runs(
    runner: OperatorRunner, token: str, options: dict[str, Any], message: str
) -> None:
    inputs = {"order_id": "o-1", "token": token}
    runner.run(ChainOperator(task_id="t", flow=flows.chain, inputs=inputs), run_id="first")
    run = runner.run(ChainOperator(task_id="t", flow=flows.chain, inputs=inputs, **options), run_id="second")
    assert (run.state, flows.seen[token]) == ("failed", ["validate", "charge"])
    assert str(run.error).startswith(f"InvalidSetting: {message}")


def test_a_flow_with_flows_inside_names_them_among_what_can_be_run_again(runner: OperatorRunner, token: str) -> None:
    inputs = {"order_id": "o-1", "token": token}
    operator = GraphOperator(task_id="t", flow=again_flows.nested, inputs=inputs, again_from="s", again_run="first")
    assert str(runner.run(operator, run_id="second").error) == (
        "InvalidSetting: flow 'nested' has no step 's' to run again from; it has: validate, audit, ship.pack, "
        "ship.label, ship.insure, ship.result, pay, notify, ship"
    )


async def test_on_temporal_a_run_that_never_was_is_refused(side: Side, token: str) -> None:
    again = TemporalWorkflowOperator(task_id="t", flow=flows.chain, inputs=GOLD, again_from="charge", again_run="never")
    run = await side.run(again)
    assert run.state == "failed"
    assert str(run.error).startswith("InvalidSetting: this task left nothing in DAG run 'never'")


async def test_a_changed_flow_is_refused(host: Host, token: str) -> None:
    inputs = {"order_id": "o-1", "token": token}
    await host.run(flows.chain, inputs, "1")
    second = await host.run(flows.refunded, inputs, "2", "charge", "1")
    assert (second.state, flows.seen[token]) == ("failed", ["validate", "charge"])
    assert str(second.error) == (
        f"InvalidSetting: flow 'refunded' has changed since DAG run '{host.run_id('1')}': run it whole"
    )


@pytest.mark.parametrize("nothing", [None, "", "None"])
def test_nothing_is_a_whole_run(nothing: str | None) -> None:
    assert not Again(nothing, nothing)
    with pytest.raises(InvalidSetting, match="go together"):
        Again(nothing, "first")
