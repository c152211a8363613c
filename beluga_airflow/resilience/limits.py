"""A rate limit that all workers share: requests and tokens a minute, and calls at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from datetime import timedelta
from secrets import token_hex
from typing import Any, ClassVar, Literal, TypeVar

from beluga_airflow.errors import InvalidSetting, LimitReached, StateError
from beluga_airflow.graph.retry import is_number, is_whole, seconds
from beluga_airflow.resilience.bounded import uncancelled
from beluga_airflow.resilience.calling import called
from beluga_airflow.resilience.shared import TRIES, SoonStore, duration, named, pause, store_of, turn, whole
from beluga_airflow.state import StateStore

__all__ = ["Booking", "LimitState", "RateLimit", "limits"]

log = logging.getLogger(__name__)

T = TypeVar("T")

LIMITS = "beluga/limits/"
BUCKET = 5.0
"""Seconds that are booked as one."""
RUN = 13
"""Buckets that 60 seconds can touch."""
HORIZON = 86_400.0
"""Seconds ahead beyond which a booking is none of ours."""
LEASE = 30.0
"""Seconds for which a call holds its place among the concurrent ones; it is renewed while the call runs."""
LOOKS = (0.05, 0.5)
"""Seconds: the first and the longest wait between two looks for a place among the concurrent calls."""


@dataclass(frozen=True, kw_only=True)
class LimitState:
    """What is kept of a limit.

    Args:
        name: of the limit.
        requests, tokens: booked in the minute that ends now.
        holders: calls that run.
    """

    name: str
    requests: int
    tokens: int
    holders: int


class Booking:
    """What a call has booked.

    Args:
        bucket: when.
        tokens: how many, by an estimate.
        holder: the name of its place among the concurrent calls, if those are limited.

    ``waited``: seconds that it waited for its place.
    """

    def __init__(self, *, bucket: int = 0, tokens: int = 0, holder: str | None = None) -> None:
        self.bucket = bucket
        self.holder = holder
        self.tokens = self.used = tokens
        self.waited = 0.0

    def settle(self, tokens: int) -> None:
        """Say how many tokens it really were."""
        self.used = max(0, tokens)


@dataclass(frozen=True)
class RateLimit:
    """Lets no more through than this, of all processes together; whoever comes too early waits for the next place.

    No 60 seconds see more requests, or more tokens as estimated, than their bound; bursts up to it are allowed. A place
    is booked in one go, so that nobody is passed over while waiting. Tokens are booked by an estimate, and
    settled when the call has ended; of an estimate above the bound only the bound is booked. The place of a call whose
    process was lost comes free within 30 s.

    The clocks that count are those of the workers: the bounds hold as far as these agree.

    While the state store cannot be used, calls go on unlimited, with a warning: a limit is no new way to fail.

    Args:
        name: shared by all limits of this name in the same store; letters, digits, ``-``, ``_``, ``.``, ``:``.
        requests_per_minute, tokens_per_minute: in any 60 seconds; None: any number.
        concurrent: calls at once; None: any number.
        max_wait: seconds or a timedelta; a call that would wait longer is not made.
        store: where it is kept; None: the state store of whoever runs it.

    Raises:
        InvalidSetting: one of these cannot be used, or nothing is limited.
    """

    name: str
    _: KW_ONLY
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    max_wait: float | timedelta = 30.0
    store: StateStore | None = field(default=None, repr=False)

    kind: ClassVar[str] = "limit"

    def __post_init__(self) -> None:
        who = named("limit", self.name, self.store)
        bounds = ("requests_per_minute", "tokens_per_minute", "concurrent")
        given = [name for name in bounds if getattr(self, name) is not None]
        for name in given:
            whole(who, name, getattr(self, name))
        if not given:
            raise InvalidSetting(f"{who} limits nothing; give at least one of {', '.join(bounds)}")
        if duration(who, "max_wait", self.max_wait, least=0.0) > HORIZON / 2:
            raise InvalidSetting(f"max_wait of {who} is {self.max_wait}, it must be at most {HORIZON / 2:g} s")

    @asynccontextmanager
    async def guard(
        self, store: StateStore | None = None, *, tokens: int = 1, within: float | None = None
    ) -> AsyncIterator[Booking]:
        """Wait until the body of an ``async with`` may begin; it may settle what was booked for it.

        Args:
            store: where the limit is kept if it has no store of its own.
            tokens: how many it will use, by an estimate; whoever does not say books one.
            within: seconds that the caller can wait, if that is less than ``max_wait``.

        Raises:
            LimitReached: it would have to wait longer; nothing is booked then.
            InvalidSetting: the limit has no store.
        """
        keeper = _Keeper(self, store_of(f"limit {self.name!r}", self.store, store))
        longest = seconds(self.max_wait)
        came = time.monotonic()
        booked = await self._or_unlimited(
            keeper.book(tokens, longest if within is None else max(0.0, min(within, longest)))
        )
        if booked is None:
            yield Booking()
            return
        booking, wait = booked
        renewing = asyncio.create_task(keeper.renew(booking)) if booking.holder else None
        has_begun = False
        try:
            if wait:
                await asyncio.sleep(wait)
            has_begun = True
            booking.waited = time.monotonic() - came
            yield booking
        finally:
            if renewing is not None:
                renewing.cancel()
            # who is cancelled right then would keep the place of others until its lease is over
            await uncancelled(self._or_unlimited(keeper.end(booking, has_begun=has_begun)))

    async def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function, sync (in a thread of its own) or async, within this limit.

        Raises:
            LimitReached: it is not called.
            InvalidSetting: the limit has no store of its own.
        """
        async with self.guard():
            return await called(function, *args, **kwargs)

    async def _or_unlimited(self, work: Coroutine[Any, Any, T]) -> T | None:
        try:
            return await work
        except StateError as error:
            log.warning("limit %r limits nothing for now: %s", self.name, error)
            return None


async def limits(store: StateStore) -> list[LimitState]:
    """All limits that are kept in a store, by name; one that nobody has used for a minute is not.

    Raises:
        StateUnavailable: it cannot be reached.
    """
    pages = [(key, _Page(await store.get(key), now())) async for key in store.keys(LIMITS)]
    return [page.told(key.removeprefix(LIMITS), now()) for key, page in pages]


def now() -> float:
    """Seconds since the epoch, by the clock of this worker."""
    return time.time()


class _Page:
    """The entry of a limit: what is booked in each bucket that counts, and until when each call holds its place."""

    def __init__(self, entry: Any, moment: float) -> None:
        entry = entry if isinstance(entry, dict) else {}
        first, last = int(moment // BUCKET) - RUN + 1, int((moment + HORIZON) // BUCKET)
        self.requests = _counts(entry.get("requests"), first, last)
        self.tokens = _counts(entry.get("tokens"), first, last)
        holders = entry.get("holders")
        self.holders: dict[str, float] = {
            name: until
            for name, until in (holders.items() if isinstance(holders, dict) else ())
            if is_number(until) and moment < until < moment + HORIZON
        }

    def to_json(self) -> dict[str, Any]:
        """The entry in the store."""
        return {
            "requests": {str(bucket): number for bucket, number in self.requests.items() if number},
            "tokens": {str(bucket): number for bucket, number in self.tokens.items() if number},
            "holders": self.holders,
        }

    def first(self, limit: RateLimit, tokens: int, moment: float) -> int:
        """The first bucket from now on that has room for a request of so many tokens."""
        bucket, later = -1, int(moment // BUCKET)
        while later > bucket:
            bucket = later
            later = max(
                _with_room(self.requests, bucket, 1, limit.requests_per_minute),
                _with_room(self.tokens, bucket, tokens, limit.tokens_per_minute),
            )
        return bucket

    def add(self, limit: RateLimit, bucket: int, requests: int, tokens: int) -> None:
        """Count these there, as far as they are limited."""
        for counts, number, bound in (
            (self.requests, requests, limit.requests_per_minute),
            (self.tokens, tokens, limit.tokens_per_minute),
        ):
            if bound is not None and number:
                counts[bucket] = max(0, counts.get(bucket, 0) + number)

    def life(self, moment: float) -> float:
        """Seconds for which the entry says something."""
        last = max([*self.requests, *self.tokens], default=0)
        return max([(last + RUN) * BUCKET, *self.holders.values(), moment + BUCKET]) - moment

    def told(self, name: str, moment: float) -> LimitState:
        """What it comes to."""
        last = int(moment // BUCKET)
        requests, tokens = (
            sum(number for bucket, number in counts.items() if bucket <= last)
            for counts in (self.requests, self.tokens)
        )
        return LimitState(name=name, requests=requests, tokens=tokens, holders=len(self.holders))


def _counts(entry: Any, first: int, last: int) -> dict[int, int]:
    found = entry.items() if isinstance(entry, dict) else ()
    # as long as they are short: nobody knows who wrote there
    numbers = {int(name): number for name, number in found if len(name) < 20 and name.isdecimal() and is_whole(number)}
    return {bucket: number for bucket, number in numbers.items() if first <= bucket <= last and number > 0}


def _with_room(booked: Mapping[int, int], bucket: int, number: int, bound: int | None) -> int:
    """This bucket, if no run of buckets would hold more than the bound with so many there; else the next to look at."""
    if bound is None or not number:
        return bucket
    for last in range(bucket + RUN - 1, bucket - 1, -1):
        if sum(booked.get(each, 0) for each in range(last - RUN + 1, last + 1)) + number > bound:
            return last + 1  # whatever lies before is in that run too
    return bucket


@dataclass(frozen=True)
class _Keeper:
    """One limit in one store."""

    limit: RateLimit
    store: SoonStore

    @property
    def _key(self) -> str:
        return LIMITS + self.limit.name

    async def book(self, tokens: int, patience: float) -> tuple[Booking, float]:
        """Book the next place, and how many seconds it is away.

        Raises:
            LimitReached: more than these.
        """
        holder = None if self.limit.concurrent is None else token_hex(8)
        try:
            return await self._book(tokens, patience, holder)
        except asyncio.CancelledError:
            # what was cut short may be written all the same, and nobody would give that place back
            if holder is not None:
                with suppress(StateError):
                    await self.end(Booking(holder=holder), has_begun=True)
            raise

    async def _book(self, tokens: int, patience: float, holder: str | None) -> tuple[Booking, float]:
        collisions = looks = 0
        ends = time.monotonic() + patience
        while collisions < TRIES:
            async with turn(self.store, self._key):
                left = max(0.0, ends - time.monotonic())
                booked = await self._try(min(tokens, self.limit.tokens_per_minute or 0), holder, left, patience)
            if booked == "collided":
                await pause(collisions)
                collisions += 1
            elif booked == "full":
                # looked for, not watched: each watch would read all changes of the store meanwhile
                await asyncio.sleep(min(left, _look(looks)))
                looks += 1
            else:
                return booked
        raise self._reached("too many ask at once", None, patience)

    async def _try(
        self, tokens: int, holder: str | None, left: float, patience: float
    ) -> tuple[Booking, float] | Literal["full", "collided"]:
        """The next place, unless too many calls run now, or somebody else wrote first."""
        found = await self.store.get_versioned(self._key)
        moment, most = now(), self.limit.concurrent
        page = _Page(found and found.value, moment)
        if most is not None and len(page.holders) >= most:
            if not left:
                raise self._reached(f"{most} calls at once", None, patience)
            return "full"
        bucket = page.first(self.limit, tokens, moment)
        wait = max(0.0, bucket * BUCKET - moment)
        if wait > left:
            raise self._reached(self._bounds, wait, patience)
        booking = Booking(bucket=bucket, tokens=tokens, holder=holder)
        page.add(self.limit, bucket, 1, tokens)
        if holder is not None:
            page.holders[holder] = moment + LEASE
        written = await self._write(page, found.version if found else None, moment)
        return (booking, wait) if written else "collided"

    async def renew(self, booking: Booking) -> None:
        """Hold the place of a call until this is cancelled."""
        while True:
            await asyncio.sleep(LEASE / 3)
            try:
                await self._change(lambda page, moment: _held(page, booking, moment))
            except StateError as error:
                log.debug("limit %r: a place could not be held: %s", self.limit.name, error)

    async def end(self, booking: Booking, *, has_begun: bool) -> None:
        """Give the place back, and settle the tokens; of a call that did not begin, all that it booked."""
        requests, tokens = (0, booking.used - booking.tokens) if has_begun else (-1, -booking.tokens)
        is_counted = requests or (tokens and self.limit.tokens_per_minute is not None)
        if booking.holder is None and not is_counted:
            return

        def ended(page: _Page, moment: float) -> None:
            page.holders.pop(booking.holder or "", None)
            if booking.bucket > int(moment // BUCKET) - RUN:
                page.add(self.limit, booking.bucket, requests, tokens)

        await self._change(ended)

    async def _change(self, change: Callable[[_Page, float], None]) -> None:
        for tries in range(TRIES):
            async with turn(self.store, self._key):
                found = await self.store.get_versioned(self._key)
                moment = now()
                page = _Page(found and found.value, moment)
                change(page, moment)
                if await self._write(page, found.version if found else None, moment):
                    return
            await pause(tries)
        log.warning("limit %r: too many write at once, the end of a call was not noted", self.limit.name)

    async def _write(self, page: _Page, version: int | None, moment: float) -> bool:
        written = await self.store.compare_and_swap(self._key, page.to_json(), version=version, ttl=page.life(moment))
        return written is not None

    @property
    def _bounds(self) -> str:
        bounds = {"requests": self.limit.requests_per_minute, "tokens": self.limit.tokens_per_minute}
        return " and ".join(f"{bound} {what} a minute" for what, bound in bounds.items() if bound is not None)

    def _reached(self, what: str, wait: float | None, patience: float) -> LimitReached:
        place = "no place came free" if wait is None else f"its next place is {wait:.0f} s away"
        return LimitReached(
            f"limit {self.limit.name!r} is reached ({what}): {place}, and this call may wait {patience:.0f} s; try "
            "again later, or give it more time or a higher bound",
            retry_after=wait,
        )


def _held(page: _Page, booking: Booking, moment: float) -> None:
    page.holders[booking.holder or ""] = moment + LEASE


def _look(looks: int) -> float:
    first, longest = LOOKS
    return min(first * 1.5 ** min(looks, 20), longest)
