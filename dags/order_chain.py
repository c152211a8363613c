"""One order, in one task: validated, decided on by a model, paid. Trigger it from the UI; its form has an example."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from beluga_airflow.operators.flow import ChainOperator
from orders.flows import order_chain
from orders.forms import ORDER, ORDER_PARAMS, again_params

with DAG(
    "order_chain",
    description="Validate, decide, payment: a chain in one task",
    schedule=None,
    params={**ORDER_PARAMS, **again_params(order_chain)},
    # retries serve lost workers: a step that fails is retried inside the task
    default_args={"retries": 2, "retry_delay": timedelta(seconds=10)},
    tags=["beluga", "example"],
):
    ChainOperator(
        task_id="process_order",
        flow=order_chain,
        inputs=ORDER,
        key="order_id",
        again_from="{{ params.again_from }}",
        again_run="{{ params.again_run }}",
    )
