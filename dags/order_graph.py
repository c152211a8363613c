"""One order as a graph, in two forms: in one task, and as one task for each step.

Inventory and credit are checked side by side, then payment, parcel, notice.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from beluga_airflow.operators.flow import GraphOperator
from beluga_airflow.task_group import GraphTaskGroup
from orders.flows import order_graph
from orders.forms import ORDER, ORDER_PARAMS, again_params

with DAG(
    "order_graph",
    description="Validate, inventory and credit side by side, payment, fulfil, notify: a graph in one task",
    schedule=None,
    params={**ORDER_PARAMS, **again_params(order_graph)},
    # retries serve lost workers: a step that fails is retried inside the task
    default_args={"retries": 2, "retry_delay": timedelta(seconds=10)},
    tags=["beluga", "example"],
):
    GraphOperator(
        task_id="process_order",
        flow=order_graph,
        inputs=ORDER,
        key="order_id",
        again_from="{{ params.again_from }}",
        again_run="{{ params.again_run }}",
    )

with DAG(
    "order_graph_tasks",
    description="The same graph as one task for each step, each of them seen, retried and cleared on its own",
    schedule=None,
    params=ORDER_PARAMS,
    # a step's Retry is its task's retries; these are for the task that ends the flow
    default_args={"retries": 2, "retry_delay": timedelta(seconds=10)},
    tags=["beluga", "example"],
):
    GraphTaskGroup(
        "process_order",
        flow=order_graph,
        inputs=ORDER,
        key="order_id",
    )
