"""Asking another connection where one cannot answer, and each within its share of the time."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from beluga_airflow.errors import BudgetSpent, InvalidSetting, ModelRefused, ModelUnavailable, NotNow
from beluga_airflow.graph import Decision
from beluga_airflow.llm.client import ModelClient, ModelRequest
from beluga_airflow.resilience.bounded import bounded
from beluga_airflow.resilience.calling import WAITING

__all__ = ["Until", "first_answer"]

log = logging.getLogger(__name__)

T = TypeVar("T")

TELLING = 0.95
"""Of its share, what an endpoint has for one answer: it tells itself that it was late, and its breaker hears."""


@dataclass(frozen=True, kw_only=True)
class Until:
    """By when an answer must be there.

    Args:
        moment: as ``time.monotonic`` has it; None: at any time.
        is_share: whether others are to have a share of the time too.
    """

    moment: float | None
    is_share: bool = False

    @property
    def left(self) -> float | None:
        """Seconds from now."""
        return None if self.moment is None else max(0.0, self.moment - time.monotonic())

    def share(self, parties: int) -> Until:
        """The time of the first of so many who come one after the other; what it leaves is for the rest."""
        if parties < 2 or self.left is None:
            return self
        return Until(moment=time.monotonic() + self.left / parties, is_share=True)

    def of(self, request: ModelRequest) -> ModelRequest:
        """A request that is told of it."""
        left = self.left
        if left is None:
            return request
        return replace(request, within=WAITING * left, timeout=TELLING * left if self.is_share else None)


async def first_answer(
    decision: Decision,
    request: ModelRequest,
    model: Callable[[str | None], Awaitable[ModelClient]],
    ask: Callable[[ModelClient, ModelRequest, Until], Awaitable[T]],
    *,
    until: Until,
    last: bool,
) -> T:
    """The answer of the decision's connection, or of the first of its fallbacks that can give one.

    Another one is asked where a guard keeps a connection back, in any attempt, since waiting would not help; and on the
    last attempt where an endpoint cannot answer, since before that it is asked again. Not where an endpoint refuses,
    nor where a model does. Until then nobody looks at a fallback; what is wrong with one is logged, and the next is
    asked. Of the time that is left, each has the same share as those after it.

    Args:
        decision: names the connections.
        request: for each; the decision's own model is for its own connection, the others are asked for theirs.
        model: the client for a connection id.
        ask: asks one of them.
        until: by when all of it must have ended.
        last: whether no other attempt follows.

    Raises:
        ModelUnavailable: none can answer now; as the decision's own connection said it, and with what the others said.
        NotNow: none may be asked now; the same.
        ModelRefused: the decision's own connection refuses the key or the request.
        InvalidSetting: it cannot be used.
        BudgetSpent: the decision may spend no more, whoever is asked.
    """
    conn_ids = (decision.llm_conn_id, *decision.fallback_conn_ids)
    troubles: list[ModelUnavailable | NotNow] = []
    told: list[str] = []
    for place, conn_id in enumerate(conn_ids):
        is_own = not place
        try:
            client = await _opened(model, conn_id, is_own=is_own)
            share = until.share(1 if is_own and not last else len(conn_ids) - place)
            asked = request if is_own else replace(request, model=None)
            with bounded(share.left if share.is_share else None, partial(_too_slow, conn_id)):
                return await ask(client, asked, share)
        except (ModelUnavailable, NotNow) as error:
            if _is_final(error, is_own=is_own, last=last):
                raise
            troubles.append(error)
            told.append(str(error) if is_own else f"connection {conn_id!r}: {error}")
        except (InvalidSetting, ModelRefused) as error:
            if is_own:
                raise
            told.append(f"connection {conn_id!r}: {error}")
        if place + 1 < len(conn_ids):
            log.warning("no answer (%s), asking connection %r", told[-1], conn_ids[place + 1])
    raise _of_all(troubles, told)


async def _opened(
    model: Callable[[str | None], Awaitable[ModelClient]], conn_id: str | None, *, is_own: bool
) -> ModelClient:
    try:
        return await model(conn_id)
    except Exception as error:
        if is_own or isinstance(error, InvalidSetting):
            raise
        # whatever is wrong with a fallback, it is not what the decision fails of
        raise InvalidSetting(f"it cannot be opened ({type(error).__name__})") from error


def _is_final(error: ModelUnavailable | NotNow, *, is_own: bool, last: bool) -> bool:
    if isinstance(error, BudgetSpent):
        return error.connection is None
    return is_own and isinstance(error, ModelUnavailable) and not last


def _of_all(troubles: list[ModelUnavailable | NotNow], told: list[str]) -> ModelUnavailable | NotNow:
    """One error for all: worth another try if that of any is."""
    hopeful = [error for error in troubles if error.retryable]
    main = (hopeful or troubles)[0]
    if len(told) == 1:
        return main
    waits = [error.retry_after for error in hopeful or troubles]
    soonest = min((wait for wait in waits if wait is not None), default=None) if None not in waits else None
    return type(main)("; ".join(told), retry_after=soonest)


def _too_slow(conn_id: str | None) -> ModelUnavailable:
    who = "the decision's connection" if conn_id is None else f"connection {conn_id!r}"
    return ModelUnavailable(
        f"{who} gave no answer within its share of the step's timeout, and others are to have theirs; give the step "
        "more time, or the connection less",
        may_cost=True,
    )
