"""One order, routed: a model decides which of the tasks behind it runs. In two forms, as operators and as functions."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, task

from beluga_airflow.operators.branch import LLMBranchDecisionOperator
from orders import steps
from orders.forms import ORDER_PARAMS

ROUTING: dict[str, Any] = {
    "question": "How should this order be handled?",
    # each is a task behind the decision
    "choices": {
        "expedite": "ship today, costs us a courier",
        "standard": "the normal queue",
        "hold": "nothing is charged or sent until a person has looked at the order",
    },
    "instructions": "Couriers are for gold customers, and for large orders of silver ones. Hold slips of the pen.",
    "rules": [(steps.is_small, "standard")],
    "fallback": "hold",  # with no model to judge it, nothing is sent unseen
}
ARGS: dict[str, Any] = {
    "schedule": None,
    "params": ORDER_PARAMS,
    # retries serve lost workers: they find the decision on record, and take the same way
    "default_args": {"retries": 2, "retry_delay": timedelta(seconds=10)},
    "tags": ["beluga", "example"],
}


def ways() -> list[Any]:
    """A task for each choice."""

    @task
    def expedite(params: Any = None) -> str:
        return f"a courier takes {params['order_id']} today"

    @task
    def standard(params: Any = None) -> str:
        return f"{params['order_id']} waits in the queue"

    @task
    def hold(params: Any = None) -> str:
        return f"somebody looks at {params['order_id']}"

    return [expedite(), standard(), hold()]


@task(trigger_rule="none_failed_min_one_success")
def tell(ti: Any = None) -> str:
    """Say what became of the order, whichever way it went."""
    (said,) = [said for said in ti.xcom_pull(task_ids=[*ROUTING["choices"]]) if said]
    return str(said)


with DAG("order_routing", description="A model decides which task handles an order; the others are skipped", **ARGS):
    route = LLMBranchDecisionOperator(
        task_id="route",
        # the data that the model sees, and all of it
        data=(
            "{{ {'order_value': params.order_value, 'customer_tier': params.customer_tier, "
            "'largest_quantity': params.quantity} | tojson }}"
        ),
        **ROUTING,
    )
    route >> ways() >> tell()

with DAG("order_routing_taskflow", description="The same decision as a function that returns the data", **ARGS):

    @task.llm_branch_decision(**ROUTING)  # type: ignore[untyped-decorator]  # Airflow knows of it when it runs
    def route_order(params: Any = None) -> dict[str, Any]:
        """The data that the model sees, and all of it."""
        return {
            "order_value": params["order_value"],
            "customer_tier": params["customer_tier"],
            "largest_quantity": params["quantity"],
        }

    route_order() >> ways() >> tell()
