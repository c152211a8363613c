"""One order as a graph in one task: inventory and credit are checked side by side, then payment, parcel, notice."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from beluga_airflow.operators.flow import GraphOperator
from orders.flows import EXAMPLE_ORDER, order_graph

with DAG(
    "order_graph",
    description="Validate, inventory and credit side by side, payment, fulfil, notify: a graph in one task",
    schedule=None,
    params={
        "order_id": Param(EXAMPLE_ORDER["order_id"], type="string", minLength=1, maxLength=40),
        "order_value": Param(EXAMPLE_ORDER["order_value"], type="number", exclusiveMinimum=0),
        "customer_tier": Param(EXAMPLE_ORDER["customer_tier"], enum=["gold", "silver", "bronze", "guest"]),
        "product_id": Param(EXAMPLE_ORDER["product_id"], type="string", minLength=1, maxLength=40),
        "quantity": Param(EXAMPLE_ORDER["quantity"], type="integer", minimum=1),
    },
    # retries serve lost workers: a step that fails is retried inside the task
    default_args={"retries": 2, "retry_delay": timedelta(seconds=10)},
    tags=["beluga", "example"],
):
    GraphOperator(
        task_id="process_order",
        flow=order_graph,
        inputs="{{ params | tojson }}",
        key="order_id",
    )
