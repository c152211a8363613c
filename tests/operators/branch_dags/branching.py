"""DAGs that branch by a decision; for test_branch.py, which runs them by `dag.test()`."""

from __future__ import annotations

from airflow.sdk import DAG, TaskGroup, task, task_group
from airflow.sdk.definitions.xcom_arg import XComArg

from beluga_airflow.operators.branch import LLMBranchDecisionOperator

GIFTS, TOYS = {"tier": "gold"}, {"tier": "bronze"}
WHERE = "Who handles this order?"
ARGS = {"question": WHERE, "rules": [(lambda order: order["tier"] == "none", "desk")]}
PLACES = {"courier": "ship today", "desk": "a person looks at it", "queue": "the normal queue"}


def place(name: str) -> XComArg:
    @task(task_id=name)
    def handle() -> str:
        return name

    return handle()


def places() -> list[XComArg]:
    return [place(name) for name in PLACES]


def join(name: str = "join") -> XComArg:
    @task(task_id=name, trigger_rule="none_failed_min_one_success")
    def joined() -> None:
        pass

    return joined()


with DAG("plain", schedule=None):
    LLMBranchDecisionOperator(task_id="route", choices=PLACES, data=GIFTS, **ARGS) >> places() >> join()

with DAG("empty_branch", schedule=None):
    # the join is a choice of its own, and never skipped
    route = LLMBranchDecisionOperator(task_id="route", question="By courier?", data=TOYS, choices=["join", "courier"])
    after = join()
    route >> place("courier") >> after
    route >> after

with DAG("in_a_group", schedule=None), TaskGroup("orders"):
    LLMBranchDecisionOperator(task_id="route", choices=PLACES, data=GIFTS, **ARGS) >> places() >> join()

with DAG("to_a_group", schedule=None):
    route = LLMBranchDecisionOperator(task_id="route", question="Whole?", data=GIFTS, fallback="wrapping")
    with TaskGroup("wrapping") as wrapping:
        place("paper") >> join("bow")
    with TaskGroup("sending") as sending:
        places()
    route >> [wrapping, sending]

with DAG("decorated", schedule=None):

    @task.llm_branch_decision(choices=PLACES, **ARGS)
    def route_it(tier: str) -> dict[str, str]:
        return {"tier": tier}

    route_it("gold") >> places() >> join()


@task_group
def one(order: dict[str, str]) -> None:
    LLMBranchDecisionOperator(task_id="route", choices=PLACES, data=order, **ARGS) >> places() >> join()


@task
def orders() -> list[dict[str, str]]:
    return [GIFTS, TOYS]


with DAG("mapped_group", schedule=None):
    one.expand(order=[GIFTS, TOYS, {"tier": "none"}])

with DAG("mapped_over_a_task", schedule=None):
    one.expand(order=orders())

with DAG("mapped_alone", schedule=None):
    LLMBranchDecisionOperator.partial(task_id="route", choices=PLACES, **ARGS).expand(data=[GIFTS, TOYS]) >> places()


def mapped(name: str) -> XComArg:
    @task(task_id=name)
    def handle(order: dict[str, str]) -> str:
        return f"{name} {order['tier']}"

    return handle.expand(order=orders_of_the_day)


with DAG("mapped_pairwise", schedule=None):
    orders_of_the_day = orders()

    @task.llm_branch_decision(choices=PLACES, **ARGS)
    def route_each(order: dict[str, str]) -> dict[str, str]:
        return order

    route_each.expand(order=orders_of_the_day) >> [mapped(name) for name in PLACES]

with DAG("nowhere", schedule=None):
    LLMBranchDecisionOperator(task_id="route", choices=[*PLACES, "moon"], data=GIFTS, question=WHERE) >> places()
