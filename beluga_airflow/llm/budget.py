"""What the budgets of a decision, or of a connection, come to, and what a call takes of them."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from beluga_airflow.errors import InvalidSetting, ModelRefused, ModelUnavailable, NotNow
from beluga_airflow.graph import Budget, Identity
from beluga_airflow.llm.client import ModelClient, ModelRequest, Usage
from beluga_airflow.llm.estimate import estimated
from beluga_airflow.llm.prices import cost_usd
from beluga_airflow.llm.purse import NANO, NOTHING, Amount, Purse, Reservation, now
from beluga_airflow.resilience.shared import SoonStore
from beluga_airflow.state import StateStore

__all__ = ["purse_of_connection", "purses_of", "reserved"]

DAY = timedelta(days=1)
PATIENCE = 30.0
"""Seconds that a call waits for others to settle, where nobody says how long it may."""


def purses_of(budgets: Iterable[Budget], *, flow: str, identity: Identity, state: StateStore) -> list[Purse]:
    """What the budgets of a decision come to in this run of a flow, each purse once.

    Args:
        budgets: sound ones.
        flow: the flow's name.
        identity: of the run.
        state: where they are kept.
    """
    found: dict[str, Purse] = {}
    for budget in budgets:
        purse = _purse(budget, flow, identity, state)
        other = found.get(purse.key)
        if other is not None:
            purse = replace(
                purse,
                tokens=_least(purse.tokens, other.tokens),
                nanodollars=_least(purse.nanodollars, other.nanodollars),
            )
        found[purse.key] = purse
    # all callers hold them in one order, so that no two wait for each other
    return [found[key] for key in sorted(found)]


def purse_of_connection(budget: Budget, conn_id: str, store: StateStore) -> Purse:
    """What a connection's own budget of a day comes to today."""
    day, ends = _today()
    key, told = _key("day", day, "connection", conn_id), f"the budget of {day} (UTC) of connection {conn_id!r}"
    return replace(_purse_at(key, told, budget, store, ends), connection=conn_id)


@asynccontextmanager
async def reserved(
    purses: Sequence[Purse], client: ModelClient, request: ModelRequest
) -> AsyncIterator[Reservation | None]:
    """Reserve for the body what the request may cost at most; the body settles what it did cost.

    A body that ends with an error by which the model was not asked has spent nothing; with another, as it cannot be
    told, all that was reserved. What a process reserved that is lost meanwhile comes free within 30 s.

    Args:
        purses: as ``purses_of`` gives them; with none there is nothing to reserve.
        client: to be asked.
        request: what it is to be asked.

    Raises:
        BudgetSpent: too little is left.
        LimitReached: others hold what is left, and did not settle in time.
        InvalidSetting: a budget is in dollars, and nobody knows what the model costs.
        StateUnavailable: the store cannot be reached.
    """
    if not purses:
        yield None
        return
    provider, asked = client.asks(request)
    estimate = estimated(request)
    dollars = _nanodollars(estimate, provider, asked)
    bounding = next((purse for purse in purses if purse.nanodollars is not None), None)
    if dollars is None and bounding is not None:
        raise InvalidSetting(
            f"nobody knows what model {asked!r} of provider {provider!r} costs, and {bounding.told} is in dollars: "
            "bound it in tokens, or name a model that genai-prices lists"
        )

    def price(usage: Usage, answered: str | None) -> int:
        known = (_nanodollars(usage, provider, model) for model in (answered, asked) if model)
        return next((found for found in known if found is not None), 0)

    reservation = Reservation(Amount(tokens=estimate.total, nanodollars=dollars or 0), price)
    patience = PATIENCE if request.within is None else request.within
    async with AsyncExitStack() as stack:
        for purse in purses:
            await stack.enter_async_context(purse.holding(reservation, patience))
        reservation.spent = reservation.estimate
        try:
            yield reservation
        except (NotNow, ModelRefused):
            reservation.spent = NOTHING
            raise
        except ModelUnavailable as error:
            if not error.may_cost:
                reservation.spent = NOTHING
            raise


def _purse(budget: Budget, flow: str, identity: Identity, store: StateStore) -> Purse:
    dag, run, task = identity.task or ("", identity.run or identity.scope, "")
    own = f"the budget {budget.name!r}" if budget.name else "the budget"
    name = ("name", budget.name) if budget.name else ()
    ends = None
    if budget.per == "day":
        day, ends = _today()
        parts = (day, *(name or ("of", dag or flow)))
        told = f"{own} of {day} (UTC)"
        if not budget.name:
            told += f" of DAG {dag!r}" if dag else f" of flow {flow!r}"
    elif not dag:
        parts, told = (run, *name), f"{own} of run {run!r} of flow {flow!r}"
    elif budget.per == "task":
        parts, told = (dag, run, task, *name), f"{own} of task {task!r} of run {run!r} of DAG {dag!r}"
    else:
        parts, told = (dag, run, *name), f"{own} of run {run!r} of DAG {dag!r}"
    return _purse_at(_key(budget.per, *parts), told, budget, store, ends)


def _key(*parts: str) -> str:
    return f"beluga/budgets/{Identity.of(*parts[:-1]).key(Identity.of(parts[-1]).scope)}"


def _purse_at(key: str, told: str, budget: Budget, store: StateStore, ends: datetime | None) -> Purse:
    dollars = None if budget.dollars is None else round(budget.dollars * NANO)
    return Purse(store=SoonStore(store), key=key, told=told, tokens=budget.tokens, nanodollars=dollars, ends=ends)


def _least(one: int | None, other: int | None) -> int | None:
    return min((bound for bound in (one, other) if bound is not None), default=None)


def _today() -> tuple[str, datetime]:
    """This day in UTC, and when it ends."""
    today = datetime.fromtimestamp(now(), UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return f"{today:%Y-%m-%d}", today + DAY


def _nanodollars(usage: Usage, provider: str, model: str) -> int | None:
    """What it costs, rounded up; None: nobody knows."""
    if provider == "simulated":
        return 0
    dollars = cost_usd(usage, provider=provider, model=model)
    return None if dollars is None else math.ceil(dollars * NANO)
