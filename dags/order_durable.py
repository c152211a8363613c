"""One order on Temporal, where it survives whatever dies: the task waits for it without a worker."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from beluga_airflow.operators.temporal import TemporalWorkflowOperator
from orders.flows import order_durable
from orders.forms import ORDER, ORDER_PARAMS, again_params

with DAG(
    "order_durable",
    description="Validate, inventory, decision, payment, fulfilment: a graph on Temporal",
    schedule=None,
    params={**ORDER_PARAMS, **again_params(order_durable)},
    # retries serve lost tasks of Airflow: they attach to the workflow, which retries its own steps
    default_args={"retries": 2, "retry_delay": timedelta(seconds=10)},
    tags=["beluga", "example"],
):
    TemporalWorkflowOperator(
        task_id="process_order",
        flow=order_durable,
        inputs=ORDER,
        key="order_id",
        again_from="{{ params.again_from }}",
        again_run="{{ params.again_run }}",
    )
