"""DAGs of task groups, run by `dag.test()`: all examples side by side, mapped ones, and groups with neighbours."""

from __future__ import annotations

from typing import Any

from airflow.sdk import DAG, Param, TaskGroup, task, task_group

from beluga_airflow.task_group import GraphTaskGroup
from tests.task_group import sample_flows as flows

with DAG("examples", schedule=None):
    for name, (flow, inputs) in flows.CASES.items():
        GraphTaskGroup(name, flow=flow, inputs={**inputs, "case": name})

with DAG("mapped", schedule=None):

    @task
    def orders() -> list[dict[str, str]]:
        return [{"case": name} for name in ("good", "bad", "stopped", "again")]

    @task_group
    def process(order: Any) -> Any:
        return GraphTaskGroup("order", flow=flows.by_case, inputs=order).output

    ended = process.expand(order=orders())

    @task(trigger_rule="all_done")
    def collect(results: Any) -> list[Any]:
        return list(results)

    collect(ended)

with DAG("mapped_over_nothing", schedule=None):

    @task
    def no_orders() -> list[dict[str, str]]:
        return []

    @task
    def lost_orders() -> list[dict[str, str]]:
        raise OSError("the file is gone")

    process.override(group_id="none").expand(order=no_orders())
    process.override(group_id="lost").expand(order=lost_orders())

with DAG("failing", schedule=None):
    GraphTaskGroup("flow", flow=flows.failure)

with DAG("neighbours", schedule=None, params={"order_id": Param("o-7")}):

    @task
    def order() -> dict[str, str]:
        return {"order_id": "{{ not rendered }}", "case": "from_task"}

    @task
    def summary(result: dict[str, Any]) -> str:
        return f"{result['status']} {sorted(result['data'])}"

    from_task = GraphTaskGroup("from_task", flow=flows.keys, inputs=order(), key="order_id")
    summary(from_task.output)
    from_params = GraphTaskGroup("from_params", flow=flows.keys, inputs="{{ params | tojson }}")
    GraphTaskGroup("from_group", flow="tests.task_group.sample_flows:linear", inputs=from_params.output)

    @task.branch
    def choose() -> str:
        return "taken.validate"

    choice = choose()
    for name in ("taken", "not_taken"):
        choice >> GraphTaskGroup(name, flow=flows.linear)
    choice >> GraphTaskGroup("lanes_not_taken", flow=flows.conditional_lanes)

    with TaskGroup("outer"):
        GraphTaskGroup("inner", flow=flows.keys)
    GraphTaskGroup("without_prefix", flow=flows.nested, prefix_group_id=False)

    @task
    def broken() -> None:
        raise ValueError("broken")

    broken() >> GraphTaskGroup("after_failure", flow=flows.refunded)

with DAG("marked", schedule=None):
    GraphTaskGroup("middle", flow=flows.refunded)
    GraphTaskGroup("end", flow=flows.failure)
