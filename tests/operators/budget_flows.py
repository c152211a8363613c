"""Flows with budgets and other connections, importable, as a worker needs them."""

from __future__ import annotations

from beluga_airflow import Budget, Chain, Decision, Retry

# the estimate of one of these is about 600 tokens, and it uses about 200
PER_TASK, PER_RUN = Budget(tokens=900), Budget(tokens=900, per="dag_run")


def asking(budget: Budget) -> Decision:
    return Decision(
        "Which?", choices=["a", "b"], reads=["text"], reason=False, max_tokens=20, budget=budget, fallback="b"
    )


def of(name: str, budget: Budget) -> Chain:
    chain = Chain(name)
    for step in ("one", "two", "three", "four", "five", "six"):
        chain.add_step(step, asking(budget))
    return chain


frugal = of("frugal", PER_TASK)
frugal_run = of("frugal_run", PER_RUN)
item = Chain("item").add_step("one", asking(PER_TASK))
covered = Chain("covered", retry=Retry(maximum_attempts=3, initial_interval=0.01)).add_step(
    "one",
    Decision(
        "Which?",
        choices=["a", "b"],
        reads=["text"],
        llm_conn_id="primary",
        fallback_conn_ids=["nowhere", "backup"],
        fallback="b",
    ),
)
