"""What decisions may spend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from beluga_airflow.graph.parts import told
from beluga_airflow.graph.retry import is_number, is_whole

__all__ = ["Budget"]

PERIODS = ("task", "dag_run", "day")
MOST = 1_000_000_000
"""Dollars."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bounds what decisions spend, all attempts, processes and machines together: no call is made that may exceed it.

    Decisions whose budgets are of the same kind (``per``) and name spend from one purse; each is held to the bounds
    that its own budget says.

    Args:
        tokens: read and written, at most; None: any number.
        dollars: US dollars by the public price list, at most; None: any number. A model that the list does not know
            cannot be asked then. Simulations cost nothing.
        per: what has such a purse: a ``"task"`` of a DAG run, with all its map indexes and all items of its batch, or
            a task group as a whole; a ``"dag_run"``; or a ``"day"`` in UTC. Without Airflow one ``run(...)``, or all
            with the same ``key=``, are both. Neither a retry nor a clear begins it anew.
        name: a purse of its own. Of a task or a DAG run it is that one's; of a day it is shared by all that use the
            name, in whatever DAG. Without a name a day's purse is that of one DAG, or without Airflow of one flow.
    """

    tokens: int | None = None
    dollars: float | None = None
    per: Literal["task", "dag_run", "day"] = "task"
    name: str | None = None

    def faults(self) -> list[str]:
        """What makes this budget meaningless, as clauses of a sentence; empty when it is sound."""
        found = []
        if self.tokens is None and self.dollars is None:
            found.append("it bounds nothing, give tokens or dollars")
        if self.tokens is not None and (not is_whole(self.tokens) or self.tokens < 1):
            found.append(f"tokens is {told(self.tokens)}, it must be a whole number, 1 or more")
        if self.dollars is not None and not (is_number(self.dollars) and 0 < self.dollars <= MOST):
            found.append(f"dollars is {told(self.dollars)}, it must be a number above 0, at most {MOST:,}")
        if not (isinstance(self.per, str) and self.per in PERIODS):
            found.append(f"per is {told(self.per)}, it must be one of {', '.join(map(repr, PERIODS))}")
        if self.name is not None and not (isinstance(self.name, str) and self.name.strip()):
            found.append(f"name is {told(self.name)}, it must be a text that is not empty")
        return found
