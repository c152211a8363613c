"""What a GraphTaskGroup consists of, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG, TaskGroup, task, task_group
from airflow.sdk.definitions.xcom_arg import XComArg
from airflow.serialization.serialized_objects import DagSerialization

from beluga_airflow import Chain, Graph, InvalidFlow, Retry
from beluga_airflow.errors import FlowNotFound, InvalidSetting
from beluga_airflow.task_group import GraphTaskGroup
from beluga_airflow.task_group.tasks import ResultOperator
from tests.task_group import sample_flows as flows

EVERYTHING = {"reserve", "charge", "fulfil", "undo", "result"}


def group_of(flow: Any, **options: Any) -> GraphTaskGroup:
    with DAG("orders", schedule=None, default_args=options.pop("dag_args", {})):
        return GraphTaskGroup("g", flow=flow, **options)


def edges_of(group: TaskGroup) -> set[tuple[str, str]]:
    return {
        (source.removeprefix("g."), each.task_id.removeprefix("g."))
        for each in group
        for source in each.upstream_task_ids
    }


def test_there_is_a_task_for_each_step_and_the_end() -> None:
    group = group_of(flows.diamond)
    assert edges_of(group) == {
        *(("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")),
        *((name, "result") for name in "abcd"),
    }
    assert {each.task_id: each.trigger_rule for each in group} == {
        "g.a": "all_success",
        **dict.fromkeys(("g.b", "g.c", "g.d", "g.result"), "none_failed"),
    }


def test_what_can_be_undone_is_undone_by_a_task_of_its_own() -> None:
    group = group_of(flows.refunded)
    assert {edge for edge in edges_of(group) if "undo" in edge} == {
        *((name, "undo") for name in ("reserve", "charge", "fulfil")),
        ("undo", "result"),
    }
    assert group["undo"].trigger_rule == "all_done"


@pytest.mark.parametrize("flow", [flows.diamond, flows.refunded, flows.nested, flows.several_ends, flows.capped])
def test_the_result_is_the_only_leaf(flow: Any) -> None:
    group = group_of(flow)
    assert [leaf.task_id for leaf in group.leaves] == ["g.result"]
    assert isinstance(group.result, ResultOperator)
    assert isinstance(group.output, XComArg)
    assert group.output.operator is group.result


def test_a_nested_flow_is_a_group_in_the_group() -> None:
    group = group_of(flows.nested)
    ship = group["ship"]
    assert isinstance(ship, TaskGroup)
    assert [child.node_id for child in ship["box"].children.values()] == [
        *("g.ship.box.wrap", "g.ship.box.label", "g.ship.box.result")
    ]
    assert ("a", "ship.weigh") in edges_of(group)
    assert ("ship.result", "z") in edges_of(group)


def test_edges_are_added_where_the_flow_is_wider_than_it_may() -> None:
    added = edges_of(group_of(flows.capped)) - edges_of(group_of(flows.capped, pool="bank"))
    assert added == {("b", "d"), ("c", "e"), ("d", "f")}


def test_an_entry_step_that_waits_is_not_skipped_with_what_it_waits_for() -> None:
    group = group_of(flows.conditional_lanes)
    assert ("b", "c") in edges_of(group)
    assert (group["a"].trigger_rule, group["c"].trigger_rule) == ("all_success", "none_failed")


def test_a_chain_and_an_import_path_will_do() -> None:
    group = group_of("tests.task_group.sample_flows:linear")
    assert ("validate", "charge") in edges_of(group)


# arguments of the operators


def test_a_steps_retry_becomes_the_tasks_retries() -> None:
    flow = Chain("f", retry=Retry(maximum_attempts=7, initial_interval=timedelta(seconds=3)))
    flow.add_step("a", flows.sets("a")).add_step("b", flows.sets("b"), retry=flows.ONCE)
    flow.add_step("c", flows.sets("c"), compensate=flows.undoes("c"))
    of_dag = {"retries": 2, "retry_delay": timedelta(minutes=9), "retry_exponential_backoff": 4}
    group = group_of(flow, dag_args=of_dag)
    retries = {label: (group[label].retries, group[label].retry_delay.seconds) for label in ("a", "b")}
    assert retries == {"a": (6, 3), "b": (0, 0)} | {"b": (0, retries["b"][1])}
    assert [(group[label].retries, group[label].retry_delay.seconds) for label in ("undo", "result")] == [(2, 540)] * 2
    assert group["a"].retry_exponential_backoff == 0


def test_a_default_retry_is_that_of_the_kind_of_flow() -> None:
    chain, graph = Chain("c").add_step("a", flows.stops), Graph("g").add_node("a", flows.stops)
    assert (group_of(chain)["a"].retries, group_of(graph)["a"].retries) == (3, 2)


def test_a_step_has_operator_arguments_of_its_own() -> None:
    def noted(context: Any) -> None:
        raise AssertionError("not called")

    charge = {"pool": "bank", "queue": "safe", "executor_config": {"cpu": 2}, "on_failure_callback": noted}
    group = group_of(flows.refunded, pool="shop", step_args={"charge": charge})
    own = group["charge"]
    assert (own.pool, own.queue, own.executor_config) == ("bank", "safe", {"cpu": 2})
    assert own.on_failure_callback == [noted]
    others = {label: (group[label].pool, group[label].queue) for label in EVERYTHING - {"charge"}}
    assert others == {
        **dict.fromkeys(("reserve", "fulfil", "undo"), ("shop", "default")),
        "result": ("default_pool", "default"),
    }


def test_the_last_tasks_have_operator_arguments_of_their_own() -> None:
    def noted(context: Any) -> None:
        raise AssertionError("not called")

    own = {"pool": "bank", "queue": "safe", "on_success_callback": noted, "retries": 5}
    group = group_of(flows.refunded, pool="shop", step_args={"undo": own, "result": {**own, "pool": "till"}})

    told = {label: (group[label].pool, group[label].queue, group[label].retries) for label in EVERYTHING}
    assert told == {
        **dict.fromkeys(("reserve", "charge", "fulfil"), ("shop", "default", 0)),
        "undo": ("bank", "safe", 5),
        "result": ("till", "safe", 5),
    }
    assert group["undo"].on_success_callback == group["result"].on_success_callback == [noted]


def test_the_end_of_a_nested_flow_has_operator_arguments_as_a_step() -> None:
    group = group_of(flows.nested, step_args={"ship.result": {"pool": "bank"}, "result": {"pool": "till"}})

    pools = {each.task_id: each.pool for each in group if each.pool != "default_pool"}
    assert pools == {"g.ship.result": "bank", "g.result": "till"}
    with pytest.raises(InvalidSetting, match=r"step_args\['ship.result'\] sets 'retries': a step's attempts are its"):
        group_of(flows.nested, step_args={"ship.result": {"retries": 2}})


def test_a_group_that_undoes_nothing_has_no_arguments_for_it() -> None:
    with pytest.raises(InvalidSetting, match=r"names 'undo', which is no step of flow .*; there are a, .*, result$"):
        group_of(flows.diamond, step_args={"undo": {"pool": "bank"}})


def test_default_args_hold_where_nothing_else_is_said() -> None:
    of_dag = {"state_conn_id": "of_dag", "llm_conn_id": "of_dag", "do_xcom_push": False, "trigger_rule": "always"}
    group = group_of(flows.refunded, dag_args=of_dag, llm_conn_id="of_group", default_args={"queue": "slow"})
    for label in EVERYTHING:
        each = group[label]
        assert (each.state_conn_id, each.llm_conn_id, each.queue) == ("of_dag", "of_group", "slow")
        assert each.do_xcom_push is True
        assert each.trigger_rule != "always"


@pytest.mark.parametrize(
    ("step_args", "says"),
    [
        (
            {"refund": {}},
            "step_args names 'refund', which is no step of flow 'refunded'; there are reserve, charge, fulfil, undo, "
            "result",
        ),
        ({"charge": "bank"}, "step_args['charge'] is a str, it must be a mapping of operator arguments"),
        ({"undo": {"trigger_rule": "always"}}, "step_args['undo'] sets 'trigger_rule': the group sets it"),
        ({"result": {"do_xcom_push": False}}, "step_args['result'] sets 'do_xcom_push': the group sets it"),
        ({"charge": {"retries": 2}}, "step_args['charge'] sets 'retries': a step's attempts are its Retry"),
        ({"charge": {"retry_delay": 2}}, "sets 'retry_delay': a step's attempts are its Retry"),
        ({"charge": {"execution_timeout": 2}}, "sets 'execution_timeout': a step's time is its timeout"),
        ({"charge": {"trigger_rule": "always"}}, "sets 'trigger_rule': the group sets it"),
        ({"charge": {"task_id": "pay"}}, "sets 'task_id': the group sets it"),
        ({"charge": {"flow": flows.linear}}, "sets 'flow': the group sets it"),
    ],
)
def test_an_argument_that_cannot_hold_is_refused(step_args: Any, says: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        group_of(flows.refunded, step_args=step_args)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("flow", "error", "says"),
    [
        (Chain("empty"), InvalidFlow, "flow 'empty' cannot run: it has no steps"),
        ("nowhere:chain", FlowNotFound, "flow 'nowhere:chain' cannot be imported"),
        (7, InvalidSetting, "flow= is a int, it must be a Chain or a Graph"),
    ],
)
def test_a_flow_that_cannot_run_is_an_import_error_of_the_dag(flow: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as caught:
        group_of(flow)
    assert says in str(caught.value)


def test_a_dag_that_fails_fast_is_refused() -> None:
    with DAG("orders", schedule=None, fail_fast=True), pytest.raises(InvalidSetting, match="has fail_fast=True"):
        GraphTaskGroup("g", flow=flows.linear)


# Airflow's own needs


def test_arguments_of_a_task_group_are_its_own() -> None:
    dag = DAG("orders", schedule=None)
    outer = TaskGroup("outer", dag=dag)
    group = GraphTaskGroup("g", flow=flows.linear, parent_group=outer, tooltip="an order", ui_color="green", dag=dag)
    assert (group.group_id, group.tooltip, group.ui_color) == ("outer.g", "an order", "green")
    assert group.result.task_id == "outer.g.result"
    assert set(dag.task_ids) == {"outer.g.validate", "outer.g.charge", "outer.g.result"}


def test_what_comes_before_and_after_the_group_is_joined_to_its_ends() -> None:
    with DAG("orders", schedule=None) as dag:

        @task
        def around() -> None: ...

        first, last = around.override(task_id="first")(), around.override(task_id="last")()
        first >> GraphTaskGroup("g", flow=flows.several_ends) >> last
    assert dag.get_task("g.a").upstream_task_ids == {"first"}
    assert dag.get_task("last").upstream_task_ids == {"g.result"}


def test_a_dag_with_it_is_stored_as_any_other() -> None:
    with DAG("orders", schedule=None) as dag:

        @task
        def orders() -> list[dict[str, Any]]:
            return [{}]

        @task_group
        def one(order: Any) -> Any:
            return GraphTaskGroup("order", flow=flows.not_refunded, inputs=order, key="{{ run_id }}").output

        one.expand(order=orders())
        GraphTaskGroup("nested", flow=flows.nested, inputs={"day": "{{ ds }}"})
    stored = json.loads(json.dumps(DagSerialization.to_dict(dag)))
    again = DagSerialization.from_dict(stored)
    assert set(again.task_dict) == set(dag.task_dict)
    assert "nested.ship.box" in again.task_group_dict
    charge = again.task_dict["one.order.charge"]
    assert (charge.retries, charge.has_retry_policy, charge.trigger_rule) == (2, True, "none_failed")
    assert charge.template_fields == ["inputs", "key"]
    assert json.loads(json.dumps(DagSerialization.to_dict(dag))) == stored


def test_a_part_of_a_dag_keeps_the_group() -> None:
    group = group_of(flows.refunded)
    part = group.dag.partial_subset("g.charge", include_upstream=True)
    assert set(part.task_ids) == {"g.reserve", "g.charge"}
    assert set(part.task_group_dict["g"].children) == {"g.reserve", "g.charge"}


def test_building_one_loads_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text("""
from beluga_airflow import Decision, Graph

def step(data):
    return {}

judge = Decision("Well?", output_type=bool, reads=("x",), fallback=False)
graph = Graph("graph", max_workers=1).add_node("step", step, compensate=step).add_node("judge", judge)
""")
    program = """
import sys
import airflow.sdk
heavy = {"openai", "temporalio", "redis", "psycopg", "pydantic", "genai_prices", "aiohttp", "jsonschema", "rich"}
before = heavy & set(sys.modules)
import shop
from beluga_airflow.task_group import GraphTaskGroup
print(sorted(heavy & set(sys.modules) - before))

with airflow.sdk.DAG("orders", schedule=None) as dag:
    before = heavy & set(sys.modules)
    GraphTaskGroup("g", flow=shop.graph, inputs={"x": 1})
print(len(dag.tasks), sorted(heavy & set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-2:] == ["[]", "4 []"], done.stderr
