"""What the forms of the DAGs for one order ask."""

from __future__ import annotations

from typing import Any

from airflow.sdk import Param

from beluga_airflow.graph import Flow
from orders.flows import EXAMPLE_ORDER

__all__ = ["ORDER", "ORDER_PARAMS", "again_params"]

ORDER_PARAMS: dict[str, Any] = {
    "order_id": Param(EXAMPLE_ORDER["order_id"], type="string", minLength=1, maxLength=40),
    "order_value": Param(EXAMPLE_ORDER["order_value"], type="number", exclusiveMinimum=0),
    "customer_tier": Param(EXAMPLE_ORDER["customer_tier"], enum=["gold", "silver", "bronze", "guest"]),
    "product_id": Param(EXAMPLE_ORDER["product_id"], type="string", minLength=1, maxLength=40),
    "quantity": Param(EXAMPLE_ORDER["quantity"], type="integer", minimum=1),
}

ORDER = "{{ {" + ", ".join(f"'{name}': params.{name}" for name in ORDER_PARAMS) + "} | tojson }}"
"""The flow's input: the order of the form, and nothing else that the form asks."""


def again_params(flow: Flow) -> dict[str, Any]:
    """For running an order again from one step, or from a flow inside its flow."""
    return {
        "again_from": Param(
            None,
            title="Run again from step",
            description="The run below gives the order, and what the steps that do not follow from this one did.",
            type=["null", "string"],
            enum=[None, *flow.steps, *(group.path for group in flow.check().groups)],
        ),
        "again_run": Param(
            None,
            title="... of the DAG run",
            description="The id of an earlier run of this DAG.",
            type=["null", "string"],
        ),
    }
