"""One order on Temporal, where it survives whatever dies: the task waits for it without a worker."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from beluga_airflow.operators.temporal import TemporalWorkflowOperator
from orders.flows import EXAMPLE_ORDER, order_durable

with DAG(
    "order_durable",
    description="Validate, inventory, decision, payment, fulfilment: a graph on Temporal",
    schedule=None,
    params={
        "order_id": Param(EXAMPLE_ORDER["order_id"], type="string", minLength=1, maxLength=40),
        "order_value": Param(EXAMPLE_ORDER["order_value"], type="number", exclusiveMinimum=0),
        "customer_tier": Param(EXAMPLE_ORDER["customer_tier"], enum=["gold", "silver", "bronze", "guest"]),
        "product_id": Param(EXAMPLE_ORDER["product_id"], type="string", minLength=1, maxLength=40),
        "quantity": Param(EXAMPLE_ORDER["quantity"], type="integer", minimum=1),
    },
    # retries serve lost tasks of Airflow: they attach to the workflow, which retries its own steps
    default_args={"retries": 2, "retry_delay": timedelta(seconds=10)},
    tags=["beluga", "example"],
):
    TemporalWorkflowOperator(
        task_id="process_order",
        flow=order_durable,
        inputs="{{ params | tojson }}",
        key="order_id",
    )
