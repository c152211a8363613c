"""What is left to spend: kept in the state store, reserved before a call, settled after it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from secrets import token_hex
from typing import Any

from beluga_airflow.errors import BudgetSpent, LimitReached, StateError
from beluga_airflow.graph.retry import is_whole
from beluga_airflow.llm.client import ModelReply, Usage
from beluga_airflow.resilience.bounded import uncancelled
from beluga_airflow.resilience.shared import TRIES, SoonStore, pause, turn
from beluga_airflow.state import Versioned

__all__ = ["NANO", "NOTHING", "Amount", "Purse", "Reservation", "now"]

log = logging.getLogger(__name__)

LEASE = 30.0
"""Seconds for which a call holds what it reserved; renewed while it runs."""
KEPT = 30 * 86_400.0
"""Seconds that a purse of a task or a DAG run stays after it was used last."""
LATER = 86_400.0
"""Seconds that the purse of a day stays after it: who is asked past midnight still settles the day before."""
LOOKS = (0.05, 0.5)
"""Seconds: the first and the longest wait between two looks whether others have settled."""
HORIZON = 86_400.0
"""Seconds ahead beyond which a reservation is none of ours."""
NANO = 1_000_000_000
"""Dollars are counted in billionths: whole numbers add up."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """Something that is spent."""

    tokens: int = 0
    nanodollars: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(tokens=self.tokens + other.tokens, nanodollars=self.nanodollars + other.nanodollars)


NOTHING = Amount()


class Reservation:
    """What a call has reserved, and then what it spent."""

    def __init__(self, estimate: Amount, price: Callable[[Usage, str | None], int]) -> None:
        self.estimate = estimate
        self.spent = NOTHING
        self._price = price

    def settle(self, reply: ModelReply) -> None:
        """Say what it was; an endpoint that does not tell is taken to have used all that was reserved."""
        if reply.usage.total:
            dollars = 0 if reply.simulated else self._price(reply.usage, reply.model)
            self.spent = Amount(tokens=reply.usage.total, nanodollars=dollars)


@dataclass(frozen=True, kw_only=True)
class Purse:
    """What is left of budgets that are of one kind and name.

    Args:
        store: where it is kept.
        key: there.
        told: what it is called in messages.
        tokens, nanodollars: at most; None: any number.
        ends: when it begins anew; None: with the next DAG run.
        connection: whose it is, if a connection's.
    """

    store: SoonStore
    key: str
    told: str
    tokens: int | None
    nanodollars: int | None
    ends: datetime | None = None
    connection: str | None = None

    @asynccontextmanager
    async def holding(self, reservation: Reservation, patience: float) -> AsyncIterator[None]:
        """Hold what is reserved while the body runs, and count what it then has spent.

        Args:
            reservation: how much.
            patience: seconds to wait for others to settle, where only what they reserved is in the way.

        Raises:
            BudgetSpent: too little is left.
            LimitReached: others did not settle in time.
            StateUnavailable: the store cannot be reached, and nobody spends what he cannot count.
        """
        holder = token_hex(8)
        try:
            await self._reserve(holder, reservation.estimate, patience)
        except asyncio.CancelledError:
            # what was cut short may be written all the same
            await uncancelled(self._settle(holder, NOTHING))
            raise
        renewing = asyncio.create_task(self._renew(holder, reservation.estimate))
        try:
            yield
        finally:
            renewing.cancel()
            await uncancelled(self._settle(holder, reservation.spent))

    async def _reserve(self, holder: str, amount: Amount, patience: float) -> None:
        collisions = looks = 0
        ends = time.monotonic() + patience
        while collisions < TRIES:
            async with turn(self.store, self.key):
                found = await self.store.get_versioned(self.key)
                page = _Page.read(self, found)
                is_free = self._is_within(page.spent + page.held + amount)
                if is_free and await self._write(page.holding(holder, amount), found.version if found else None):
                    return
            if is_free:
                await pause(collisions)
                collisions += 1
                continue
            if not self._is_within(page.spent + amount):
                raise self._spent(page.spent, amount)
            left = ends - time.monotonic()
            if left <= 0:
                raise LimitReached(
                    f"{self.told} is held by {len(page.holders)} calls under way, which may use what is left; they did "
                    f"not end within {patience:.0f} s: try again later, or give it a higher bound"
                )
            first, longest = LOOKS
            await asyncio.sleep(min(left, first * 1.5 ** min(looks, 20), longest))
            looks += 1
        raise LimitReached(f"{self.told}: too many ask at once; try again later")

    async def _renew(self, holder: str, amount: Amount) -> None:
        while True:
            await asyncio.sleep(LEASE / 3)
            try:
                await self._change(lambda page: page.holding(holder, amount))
            except StateError as error:
                log.debug("%s: what is reserved could not be held: %s", self.told, error)

    async def _settle(self, holder: str, spent: Amount) -> None:
        try:
            if await self._change(lambda page: page.settled(holder, spent)):
                return
            reason = "too many write at once"
        except StateError as error:
            reason = str(error)
        if spent != NOTHING:
            log.warning("%s: %d tokens were spent that could not be counted: %s", self.told, spent.tokens, reason)

    async def _change(self, change: Callable[[_Page], _Page]) -> bool:
        for tries in range(TRIES):
            async with turn(self.store, self.key):
                found = await self.store.get_versioned(self.key)
                if await self._write(change(_Page.read(self, found)), found.version if found else None):
                    return True
            await pause(tries)
        return False

    async def _write(self, page: _Page, version: int | None) -> bool:
        ttl = KEPT if self.ends is None else max(0.0, self.ends.timestamp() - now()) + LATER
        return await self.store.compare_and_swap(self.key, page.to_json(), version=version, ttl=ttl) is not None

    def _is_within(self, amount: Amount) -> bool:
        bounds = ((amount.tokens, self.tokens), (amount.nanodollars, self.nanodollars))
        return all(bound is None or number <= bound for number, bound in bounds)

    def _spent(self, spent: Amount, amount: Amount) -> BudgetSpent:
        parts = []
        if self.tokens is not None:
            parts.append(f"{spent.tokens:,} of {self.tokens:,} tokens, and this call may use {amount.tokens:,}")
        if self.nanodollars is not None:
            dollars = [number / NANO for number in (spent.nanodollars, self.nanodollars, amount.nanodollars)]
            parts.append("{:.6g} of {:.6g} dollars, and this call may use {:.6g}".format(*dollars))
        anew = "with the next DAG run" if self.ends is None else f"at {self.ends:%Y-%m-%d %H:%M} UTC"
        return BudgetSpent(
            f"{self.told} has too little left: spent are {'; '.join(parts)}; it begins anew {anew}: wait for that, or "
            "give it a higher bound",
            retry_after=None if self.ends is None else max(0.0, self.ends.timestamp() - now()),
            connection=self.connection,
        )


@dataclass(frozen=True, kw_only=True)
class _Page:
    """The entry of a purse: what was spent, and what each call under way holds, until when."""

    spent: Amount = NOTHING
    holders: dict[str, tuple[Amount, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, purse: Purse, found: Versioned | None) -> _Page:
        """The page that is kept, without what has run out.

        Raises:
            StateError: it is not ours; spent anew, it would be lost.
        """
        if found is None:
            return cls()
        moment, entry = now(), found.value
        try:
            held = {name: (_amount(numbers[:2]), float(numbers[2])) for name, numbers in entry["held"].items()}
            spent = _amount(entry["spent"])
        except (AttributeError, LookupError, TypeError, ValueError):
            raise StateError(
                f"{purse.key!r} in {purse.store.url} is no budget that this version can read: deploy the version that "
                "wrote it, or delete it to begin anew"
            ) from None
        live = {name: each for name, each in held.items() if moment < each[1] < moment + HORIZON}
        return cls(spent=spent, holders=live)

    @property
    def held(self) -> Amount:
        """What the calls under way may spend."""
        return sum((amount for amount, _ in self.holders.values()), NOTHING)

    def holding(self, holder: str, amount: Amount) -> _Page:
        """This page, with so much held from now on."""
        return replace(self, holders={**self.holders, holder: (amount, now() + LEASE)})

    def settled(self, holder: str, spent: Amount) -> _Page:
        """This page, with so much spent in place of what was held."""
        left = {name: each for name, each in self.holders.items() if name != holder}
        return _Page(spent=self.spent + spent, holders=left)

    def to_json(self) -> dict[str, Any]:
        """The entry in the store."""
        held = {name: [each.tokens, each.nanodollars, until] for name, (each, until) in self.holders.items()}
        return {"spent": [self.spent.tokens, self.spent.nanodollars], "held": held}


def _amount(numbers: Any) -> Amount:
    """Raises: ValueError: they are none."""
    tokens, nanodollars = numbers
    if not all(is_whole(number) and number >= 0 for number in (tokens, nanodollars)):
        raise ValueError("no amount")
    return Amount(tokens=tokens, nanodollars=nanodollars)


def now() -> float:
    """Seconds since the epoch, by the clock of this worker."""
    return time.time()
