"""A circuit breaker that all workers share: what has failed too often is left alone, until one call finds it well."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any, ClassVar, TypeVar

from beluga_airflow.errors import BreakerOpen, NotNow, StateError
from beluga_airflow.graph.retry import Retry, is_whole, seconds
from beluga_airflow.resilience.calling import called
from beluga_airflow.resilience.shared import TRIES, SoonStore, duration, named, pause, store_of, turn, whole
from beluga_airflow.state import StateStore

__all__ = ["BreakerState", "CircuitBreaker", "breakers"]

log = logging.getLogger(__name__)

T = TypeVar("T")

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half_open"
STATES = "beluga/breakers/"
PROBES = "beluga/probes/"
LEASE = 10.0
"""Seconds for which a probe keeps the others out; it is renewed while the probe runs."""


@dataclass(frozen=True, kw_only=True)
class BreakerState:
    """What is kept of a breaker.

    Args:
        name: of the breaker.
        state: ``closed``, ``open`` or ``half_open``.
        failures: in a row, so far.
        changes: how often its state has changed.
        since: when it did so last, as ISO 8601 in UTC, by the clock of whoever changed it.
    """

    name: str
    state: str = CLOSED
    failures: int = 0
    changes: int = 0
    since: str

    def to_json(self) -> dict[str, Any]:
        """The entry in the store."""
        entry = asdict(self)
        del entry["name"]
        return entry

    @classmethod
    def of(cls, name: str, entry: Any) -> BreakerState:
        """The state that an entry tells; one that makes no sense is that of a breaker nobody has used yet."""
        if not _makes_sense(entry):
            return cls(name=name, since=_now())
        return cls(name=name, **{part: entry[part] for part in ("state", "failures", "changes", "since")})


@dataclass(frozen=True)
class CircuitBreaker:
    """Lets nothing through for a while after too many failures in a row, of all processes together.

    Closed, it lets every call through. Open, it raises ``BreakerOpen``, until ``recovery_timeout`` is over by the
    store's clock. Then it is half open: one call of all, anywhere, is the probe. If that succeeds the breaker closes,
    if it fails it stays open for as long again; if its process is lost, another call takes its place within seconds.

    A failure is an error worth another try, as a step's ``Retry`` has it. Invalid input, refusals, cancellations and
    what our own guards keep back are none: a probe that ends so decides nothing, and the next call is the probe.

    While the state store cannot be used, calls go on unguarded, with a warning: a breaker is no new way to fail.

    Args:
        name: shared by all breakers of this name in the same store; letters, digits, ``-``, ``_``, ``.``, ``:``.
        failure_threshold: failures in a row that open it.
        recovery_timeout: seconds or a timedelta that it stays open.
        store: where it is kept; None: the state store of whoever runs it.

    Raises:
        InvalidSetting: one of these cannot be used.
    """

    name: str
    _: KW_ONLY
    failure_threshold: int = 5
    recovery_timeout: float | timedelta = 30.0
    store: StateStore | None = field(default=None, repr=False)

    kind: ClassVar[str] = "breaker"

    def __post_init__(self) -> None:
        who = named("breaker", self.name, self.store)
        whole(who, "failure_threshold", self.failure_threshold)
        # a store's keys have no shorter lives than that
        duration(who, "recovery_timeout", self.recovery_timeout, least=0.001)

    @asynccontextmanager
    async def guard(self, store: StateStore | None = None, *, retry: Retry | None = None) -> AsyncIterator[None]:
        """Let the body of an ``async with`` through, and learn from how it ends.

        Args:
            store: where the breaker is kept if it has no store of its own.
            retry: says by its ``non_retryable`` which errors are no failures.

        Raises:
            BreakerOpen: it is not let through.
            InvalidSetting: the breaker has no store.
        """
        keeper = _Keeper(self, store_of(f"breaker {self.name!r}", self.store, store))
        passage = await self._or_unguarded(keeper.let_in())
        if passage is None:
            yield
            return
        renewing = asyncio.create_task(passage.lease.renew()) if passage.lease else None
        try:
            yield
        except Exception as error:
            ends = keeper.failed(passage) if _is_failure(error, retry) else keeper.undecided(passage)
            await self._or_unguarded(ends)
            raise
        except BaseException:
            await self._or_unguarded(keeper.undecided(passage))
            raise
        else:
            await self._or_unguarded(keeper.succeeded(passage))
        finally:
            if renewing is not None:
                renewing.cancel()

    async def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function, sync (in a thread of its own) or async, behind this breaker.

        Raises:
            BreakerOpen: it is not called.
            InvalidSetting: the breaker has no store of its own.
        """
        async with self.guard():
            return await called(function, *args, **kwargs)

    async def _or_unguarded(self, work: Coroutine[Any, Any, T]) -> T | None:
        try:
            return await work
        except StateError as error:
            log.warning("breaker %r guards nothing for now: %s", self.name, error)
            return None


async def breakers(store: StateStore) -> list[BreakerState]:
    """All breakers that are kept in a store, by name.

    Raises:
        StateUnavailable: it cannot be reached.
    """
    entries = [(key, await store.get(key)) async for key in store.keys(STATES)]
    return [BreakerState.of(key.removeprefix(STATES), entry) for key, entry in entries if entry is not None]


def _is_failure(error: Exception, retry: Retry | None) -> bool:
    from beluga_airflow.resilience.retrying import judge

    return not isinstance(error, NotNow) and judge(error, retry or Retry()).retryable


def _makes_sense(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.get("state") not in (CLOSED, OPEN, HALF_OPEN):
        return False
    numbers: list[Any] = [entry.get("failures"), entry.get("changes")]
    return all(is_whole(number) and number >= 0 for number in numbers) and _moment(entry.get("since")) is not None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _moment(text: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo else None


class _Lease:
    """The key that keeps all others out while one call probes. Whoever holds it knows it by its own word."""

    def __init__(self, store: SoonStore, key: str) -> None:
        self._store, self._key = store, key
        self._word = token_hex(8)

    async def take(self) -> bool:
        """Take it, if nobody has it."""
        return await self._store.compare_and_swap(self._key, self._word, version=None, ttl=LEASE) is not None

    async def hold(self, ttl: float) -> bool:
        """Hold it for so many seconds from now, 0: give it back; False: it was lost."""
        while True:
            # by the word and not by a version: after a write that was cut short nobody knows that
            found = await self._store.get_versioned(self._key)
            if found is None or found.value != self._word:
                return False
            if await self._store.compare_and_swap(self._key, self._word, version=found.version, ttl=ttl) is not None:
                return True

    async def renew(self) -> None:
        """Hold it until it is lost, or this is cancelled."""
        is_held = True
        while is_held:
            await asyncio.sleep(LEASE / 3)
            try:
                is_held = await self.hold(LEASE)
            except StateError as error:
                log.debug("the lease %s could not be renewed: %s", self._key, error)


@dataclass(frozen=True, kw_only=True)
class _Passage:
    """A call that was let through.

    Args:
        seen: the breaker's state then.
        version: of that entry; None: there was none.
        lease: of the probe, if it is one.
    """

    seen: BreakerState
    version: int | None
    lease: _Lease | None = None


@dataclass(frozen=True)
class _Keeper:
    """One breaker in one store.

    Two keys, and no order of losses may leave them unsound. The key that keeps everybody out is written before the
    state opens: a process lost in between leaves a closed breaker, which asks nobody for that key. A probe takes that
    key, then writes ``half_open`` over the version that it saw, and ends by writing over its own version: lost
    anywhere, its lease runs out, and the next probe's ``half_open`` leaves it, should it still live, without a say.
    """

    breaker: CircuitBreaker
    store: SoonStore

    @property
    def _key(self) -> str:
        return STATES + self.breaker.name

    @property
    def _probe_key(self) -> str:
        return PROBES + self.breaker.name

    async def _read(self) -> tuple[BreakerState, int | None]:
        found = await self.store.get_versioned(self._key)
        return BreakerState.of(self.breaker.name, found and found.value), found.version if found else None

    async def let_in(self) -> _Passage:
        """Let one call through.

        Raises:
            BreakerOpen: it is not.
        """
        for tries in range(TRIES):
            seen, version = await self._read()
            if seen.state == CLOSED:
                return _Passage(seen=seen, version=version)
            lease = _Lease(self.store, self._probe_key)
            if not await lease.take():
                break
            probing, version = await self._swap(seen, version, HALF_OPEN, seen.failures)
            if version is not None:
                return _Passage(seen=probing, version=version, lease=lease)
            # another probe came to its end between our two looks
            await lease.hold(0)
            await pause(tries)
        raise self._refusal(seen)

    async def succeeded(self, passage: _Passage) -> None:
        """The call did what it should."""
        if passage.lease is None:
            if passage.seen.failures:
                await self._count(passage, lambda _: 0)
        elif await passage.lease.hold(LEASE):
            await self._swap(passage.seen, passage.version, CLOSED, 0)
            await passage.lease.hold(0)

    async def failed(self, passage: _Passage) -> None:
        """The call failed."""
        if passage.lease is None:
            await self._count(passage, lambda failures: failures + 1)
        elif await passage.lease.hold(self._recovery):
            await self._swap(passage.seen, passage.version, OPEN, passage.seen.failures + 1)

    async def undecided(self, passage: _Passage) -> None:
        """The call says nothing about what is guarded."""
        if passage.lease is not None:
            await passage.lease.hold(0)

    async def _count(self, passage: _Passage, count: Callable[[int], int]) -> None:
        for tries in range(TRIES):
            async with turn(self.store, self._key):
                # read before the state: one that was written meanwhile is then not overwritten
                door = await self.store.get_versioned(self._probe_key)
                seen, version = await self._read()
                failures = count(seen.failures)
                if seen.state != CLOSED or seen.changes != passage.seen.changes or failures == seen.failures:
                    return  # a call that began before the breaker changed has no say after it
                state = OPEN if failures >= self.breaker.failure_threshold else CLOSED
                is_shut = state == CLOSED or await self._shut(door.version if door else None)
                if is_shut and (await self._swap(seen, version, state, failures))[1] is not None:
                    return
            await pause(tries)
        log.warning("breaker %r: too many write at once, this call was not counted", self.breaker.name)

    async def _shut(self, version: int | None) -> bool:
        done = await self.store.compare_and_swap(self._probe_key, "open", version=version, ttl=self._recovery)
        return done is not None

    async def _swap(
        self, seen: BreakerState, version: int | None, state: str, failures: int
    ) -> tuple[BreakerState, int | None]:
        """Write the next state over the one that was seen, with its version; None: that was not there any more."""
        changed = state != seen.state
        # a new probe writes too where nothing changes: that takes the say from a probe before it
        entry = replace(seen, state=state, failures=failures)
        if changed:
            entry = replace(entry, changes=seen.changes + 1, since=_now())
        written = await self.store.compare_and_swap(self._key, entry.to_json(), version=version)
        if changed and written is not None:
            _tell(seen, entry)
        return entry, written

    @property
    def _recovery(self) -> float:
        return seconds(self.breaker.recovery_timeout)

    def _refusal(self, seen: BreakerState) -> BreakerOpen:
        who = f"breaker {self.breaker.name!r}"
        if seen.state == HALF_OPEN:
            return BreakerOpen(
                f"{who} is half open since {seen.since}: one call tries whether it goes again; wait for it",
                # so that nobody uses up his attempts while the probe is under way
                retry_after=min(LEASE, self._recovery),
            )
        since = _moment(seen.since)
        assert since is not None, "an entry that makes sense"
        # a hint only, by the clocks of two machines; what decides is the key that runs out in the store
        left = since.timestamp() + self._recovery - time.time()
        after = min(max(left, 0.0), self._recovery)
        return BreakerOpen(
            f"{who} is open since {seen.since}, after {seen.failures} failures in a row: nothing is called, and in "
            f"{after:.0f} s one call may try; see what is wrong behind it (or delete {self._key!r} to close it now)",
            retry_after=after,
        )


def _tell(before: BreakerState, now: BreakerState) -> None:
    from beluga_airflow.telemetry import count_breaker_change

    count_breaker_change(now.name, now.state)
    log.warning("breaker %r is %s, it was %s (failures in a row: %d)", now.name, now.state, before.state, now.failures)
