"""The flows of the system's tests, on each runtime."""

from __future__ import annotations

from datetime import timedelta

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, Param, task, task_group
from system_flows import CAPS, large, shop, wide

from beluga_airflow.operators.flow import ChainOperator, FlowOperator, GraphOperator
from beluga_airflow.operators.temporal import TemporalWorkflowOperator
from beluga_airflow.task_group import GraphTaskGroup

ORDER = {"folder": "{{ params.folder }}", "order_value": 250.0, "customer_tier": "gold"}
COMMON = {
    "schedule": None,
    "params": {"folder": Param("", type="string", minLength=1)},
    # time enough to clear something meanwhile
    "default_args": {"retries": 1, "retry_delay": timedelta(seconds=10)},
}

with DAG("shop_in_one_task", **COMMON):
    GraphOperator(task_id="shop", flow=shop, inputs=ORDER)
    EmptyOperator(task_id="other")

with DAG("shop_as_tasks", **COMMON):
    GraphTaskGroup("shop", flow=shop, inputs=ORDER)

with DAG("shop_on_temporal", **COMMON):
    TemporalWorkflowOperator(task_id="shop", flow=shop, inputs=ORDER)

with DAG("shop_mapped", **COMMON):

    @task
    def folders(params):
        return [f"{params['folder']}/{name}" for name in ("good", "bad", "stopped")]

    @task_group
    def order(folder):
        return GraphTaskGroup("shop", flow=shop, inputs={**ORDER, "folder": folder}).output

    order.expand(folder=folders())

with DAG("wide_as_tasks", **COMMON):
    GraphTaskGroup("wide", flow=wide, inputs=ORDER)

with DAG("large_in_one_task", **COMMON):
    ChainOperator(task_id="large", flow=large, inputs=ORDER, state_conn_id="system_state")
    EmptyOperator(task_id="other")

for dag_id, (flow, together) in CAPS.items():
    with DAG(dag_id, **COMMON):
        FlowOperator(
            task_id="one_task",
            flow=flow,
            inputs={"folder": "{{ params.folder }}/one_task", "together": together, "seconds": 0.3},
        )
        # as long as Airflow takes to start another task, where it may
        GraphTaskGroup(
            "tasks",
            flow=flow,
            inputs={"folder": "{{ params.folder }}/tasks", "together": together, "seconds": 3},
        )
