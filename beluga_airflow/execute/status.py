"""The status of a flow's run in the state store: running, its steps, one terminal status; for whoever looks."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Literal

from beluga_airflow.errors import BelugaError
from beluga_airflow.execute.checkpoints import KEPT
from beluga_airflow.graph import FlowResult, Identity
from beluga_airflow.graph.progress import Progress
from beluga_airflow.graph.shape import RESULT
from beluga_airflow.resilience.bounded import uncancelled
from beluga_airflow.state import StateStore

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["FLOWS", "RunOf", "RunStatus", "StatusWriter", "moment", "status_key"]

log = logging.getLogger(__name__)

FLOWS = "beluga/flows/"
"""What the keys of all flow runs begin with."""
PACE = 0.5
"""Seconds between two writes of what steps do."""
BEAT = 10.0
"""Seconds after which a run in one process writes although nothing is new; also the wait after a write failed."""
SILENT = 30.0
"""Seconds without a sign after which such a run counts as lost."""
PATIENCE = 3.0
"""Seconds that one write may take."""
ENDING = 4.0
"""Seconds that the end of a flow waits until its terminal status is written, all tries together."""
END_TRIES = (0.2, 0.6, 1.2)
"""Seconds between these."""
SWAPS = 50
"""How often a write may find that another one came first."""
LONGEST, KEY_LENGTH = 500, 300
"""Characters of an error, and of a run's part of the key."""

Runtime = Literal["run", "task", "tasks", "temporal", "batch"]
BEATING = frozenset({"run", "task"})
"""The runtimes in which one process has the run, and writes every ``BEAT`` seconds."""


def status_key(flow: str, scope: str) -> str:
    """Where the status of a run is: flow, and what names the run.

    Args:
        flow: its name.
        scope: of the run's ``Identity``.
    """
    name = Identity.of(flow).scope
    parts = scope.split("/")
    # flow and business key, or what `run` makes; dag, run, task and map index are four
    run = "/".join(parts[1:]) if parts[0] in (name, flow) and 1 < len(parts) < 4 else scope
    if len(run) > KEY_LENGTH:
        digest = hashlib.sha256(run.encode()).hexdigest()
        run = f"{run[: KEY_LENGTH - len(digest) - 1]}~{digest}"
    return f"{FLOWS}{name}/{run}"


def moment(when: datetime | None = None) -> str:
    """A moment (None: this one) as entries have it: ISO 8601 in UTC, of one length, so that texts compare."""
    return (when or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, kw_only=True)
class RunOf:
    """Which run of a flow, and who has it.

    Args:
        key: of its entry, as ``status_key`` says.
        run: names the run, when several that follow each other have one key.
        generation: of the run, as ``Identity`` has it.
        runtime: what runs it.
        total: how many steps the flow has; a run in one process says so itself.
        started: when the run (of a group: its DAG run) began; of two with one key the later one's status counts.
        owner: how to find out whether somebody has it still: a task of Airflow's (``dag_id``, ``run_id``, ``task_id``,
            ``map_index``, of a group ``undo``), a workflow (``workflow_id``, ``run_id``), or nothing.
    """

    key: str
    run: str
    generation: int = 0
    runtime: Runtime
    total: int = 0
    started: str = field(default_factory=moment)
    owner: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def nobody(cls, flow: str, identity: Identity) -> RunOf:
        """Of a run that nobody goes on with when its process is lost, and that no other run is."""
        return cls(key=status_key(flow, identity.scope), run=token_hex(16), runtime="run")


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """An entry: how a run of a flow stands.

    Args:
        status: ``running``, or, once it has ended, that of its ``FlowResult``.
        steps: how each step ended, or ``running``; those that have not begun are absent.
        error: why it failed, shortened.
        undone: as in ``FlowResult``, shortened.
        attempt: how many processes have told of the run by now.
        updated: when this was written.
        ended: when the terminal status was; None while it runs.
        run, generation, runtime, total, started, owner: see ``RunOf``.
    """

    status: str
    steps: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    undone: dict[str, str] = field(default_factory=dict)
    runtime: str
    run: str
    generation: int = 0
    attempt: int = 1
    total: int = 0
    started: str
    updated: str
    ended: str | None = None
    owner: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """This entry as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> RunStatus | None:
        """The entry that ``to_json`` wrote; None: this is none."""
        try:
            return _adapter().validate_python(data)
        except ValueError:  # pydantic's
            return None

    @property
    def age(self) -> float:
        """Seconds since this was written."""
        return _since(self.updated)

    @property
    def length(self) -> float:
        """Seconds since the run began."""
        return _since(self.started)

    @property
    def silence(self) -> float:
        """Seconds since its process gave a sign; 0 where it has ended, or none is expected."""
        return 0.0 if self.ended is not None or self.runtime not in BEATING else self.age

    @property
    def is_silent(self) -> bool:
        """Whether its process should have given a sign by now."""
        return self.silence > SILENT

    def ended_as(self, result: FlowResult) -> RunStatus:
        """The same with its terminal status."""
        now = moment()
        # an end that was told by one task of several knows not all steps
        steps = {step: how for step, how in self.steps.items() if how != "running"} | _own(result.steps)
        undone = {step: how[:LONGEST] for step, how in result.undone.items()}
        error = None if result.error is None else result.error[:LONGEST]
        return replace(self, status=result.status, error=error, steps=steps, undone=undone, updated=now, ended=now)


@cache
def _adapter() -> TypeAdapter[RunStatus]:
    # a run that nobody looks at does without it
    from pydantic import TypeAdapter

    return TypeAdapter(RunStatus)


class StatusWriter:
    """Writes the entry of one run. It never fails the run, and where the store is away it warns and goes on.

    Args:
        store: where.
        of: the run.
        shared: whether others write this entry too, each what it knows; else its steps are all there are.
        begins: seconds after which a run is told of first; one that ends sooner has its terminal status alone.
        pace: seconds between two writes in the background.
        beats: whether to write also when nothing is new.
        kept: seconds that the entry stays after it was written last; None: ``KEPT``.
    """

    def __init__(
        self,
        store: StateStore,
        of: RunOf,
        *,
        shared: bool = False,
        begins: float = 0.0,
        pace: float = PACE,
        beats: bool = True,
        kept: float | None = None,
    ) -> None:
        self._store = store
        self._of = of
        self._shared = shared
        self._begins = begins
        self._pace = pace
        self._kept = KEPT if kept is None else kept
        self._beat = BEAT if beats else float("inf")
        self._steps: dict[str, str] = {}
        # one that is alone looks only where its guess, that there is none, was wrong
        self._known: tuple[RunStatus | None, int | None] | None = None if shared else (None, None)
        self._has_begun = shared
        self._noted = self._written = 0
        self._told_at = 0.0
        self._background: asyncio.Task[None] | None = None
        self._is_over = asyncio.Event()

    async def through(
        self, work: Callable[[], Awaitable[FlowResult]], progress: Progress, gives_up: Callable[[], bool]
    ) -> FlowResult:
        """Tell of a run in this process from its beginning to its end.

        Args:
            work: runs it.
            progress: its books, which are looked at now and then.
            gives_up: whether a cancellation ends the run, and not only this process.
        """
        self._of = replace(self._of, total=progress.shape.count)
        self._background = asyncio.create_task(self._follow(progress))
        try:
            result = await work()
        except asyncio.CancelledError:
            if gives_up():
                ended = progress.after_undoing(FlowResult(status="cancelled", error="the run was cancelled"))
                await uncancelled(self.end(replace(ended, steps=progress.ends)))
            raise
        except BelugaError as error:
            if not error.retryable:
                failed = FlowResult(status="failed", error=f"{type(error).__name__}: {error}", steps=progress.ends)
                await uncancelled(self.end(failed))
            raise
        else:
            await uncancelled(self.end(result))
            return result
        finally:
            self._background.cancel()

    def note(self, steps: Mapping[str, str]) -> None:
        """Tell what steps do, in the background; whatever comes within ``pace`` is written in one go."""
        self._steps |= _own(steps)
        self._noted += 1
        if self._background is None or self._background.done():
            self._background = asyncio.create_task(self._tell())

    async def flush(self) -> None:
        """Write now what was noted and is not written yet."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await self._hushed()
                if self._noted > self._written:
                    await self._told(self._next)

    async def end(self, result: FlowResult) -> None:
        """Write the terminal status; tried for a few seconds."""

        def ended(entry: RunStatus | None) -> RunStatus | None:
            return self._ended(entry, result)

        self._written = self._noted  # or it is told by this
        try:
            async with asyncio.timeout(ENDING):
                await self._hushed()
                for wait in END_TRIES:
                    if await self._told(ended, quietly=True):
                        return
                    await asyncio.sleep(wait)
                await self._told(ended)
        except TimeoutError:
            self._warn(f"no answer within {ENDING:g} s")

    async def _follow(self, progress: Progress) -> None:
        if self._begins and not await self._goes_on(self._begins):
            return
        clock, is_told = asyncio.get_running_loop().time, False
        while True:
            steps = _standing(progress)
            if not is_told or steps != self._steps or clock() - self._told_at >= self._beat:
                self._steps = steps
                is_told = await self._told(self._next)
            if not await self._goes_on(self._pace if is_told else BEAT):
                return

    async def _tell(self) -> None:
        while self._noted > self._written:
            if not await self._told(self._next):
                return
            await self._goes_on(self._pace)

    async def _goes_on(self, seconds: float) -> bool:
        """Wait so long; whether there is more to be told in the background then."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._is_over.wait()
        return not self._is_over.is_set()

    async def _hushed(self) -> None:
        """End what is told in the background: a write under way is not cut off, as it may have been made."""
        self._is_over.set()
        if self._background is not None:
            await asyncio.wait([self._background])

    async def _told(self, change: Callable[[RunStatus | None], RunStatus | None], *, quietly: bool = False) -> bool:
        """Write what ``change`` makes of the entry; whether the store took it."""
        self._told_at = asyncio.get_running_loop().time()
        noted = self._noted
        try:
            async with asyncio.timeout(PATIENCE):
                await self._swap(change)
        except Exception as error:  # whatever it is, the flow goes on
            self._known = None
            if not quietly:
                self._warn(str(error) or f"no answer within {PATIENCE:g} s")
            return False
        self._has_begun, self._written = True, noted
        return True

    def _warn(self, why: str) -> None:
        log.warning("the status of flow run %r is not written: %s; the flow goes on", self._of.key, why)

    async def _swap(self, change: Callable[[RunStatus | None], RunStatus | None]) -> None:
        key = self._of.key
        for _ in range(SWAPS):
            if self._known is None:
                found = await self._store.get_versioned(key)
                self._known = (RunStatus.from_json(found.value), found.version) if found else (None, None)
            entry, version = self._known
            changed = change(entry)
            if changed is None:
                return
            written = await self._store.compare_and_swap(key, changed.to_json(), version=version, ttl=self._kept)
            self._known = None if written is None else (changed, written)
            if written is not None:
                return
        raise TimeoutError(f"{SWAPS} other writes came first")

    def _next(self, entry: RunStatus | None) -> RunStatus | None:
        """The entry of a run that goes on; None: it is not ours to change."""
        entry = self._own_or_new(entry)
        if entry is None or entry.ended is not None:
            # one that has ended and begins again was lost before it could say so elsewhere
            return None
        steps = {**(entry.steps if self._shared else {}), **self._steps}
        attempt = entry.attempt + 1 if entry.updated and not self._has_begun else entry.attempt
        return replace(entry, steps=steps, attempt=attempt, owner=dict(self._of.owner), updated=moment())

    def _ended(self, entry: RunStatus | None, result: FlowResult) -> RunStatus | None:
        entry = self._own_or_new(entry)
        if entry is None or (entry.ended is not None and (self._shared or entry.status == result.status)):
            return None
        # ended by another word: somebody had held this run to be lost
        return entry.ended_as(result)

    def _own_or_new(self, entry: RunStatus | None) -> RunStatus | None:
        """The entry where it is this run's, one that was never written where it is an earlier run's, else None."""
        of = self._of
        if entry is not None and (entry.run, entry.generation) == (of.run, of.generation):
            return entry
        if entry is not None:
            same = entry.run == of.run
            if entry.generation > of.generation if same else (entry.started, entry.run) > (of.started, of.run):
                return None
        known = asdict(of)
        del known["key"]
        return RunStatus(status="running", updated="", **known)


def _since(when: str) -> float:
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(when)) / timedelta(seconds=1)
    except (TypeError, ValueError):  # nobody of ours wrote that
        return float(SILENT + 1)


def _standing(progress: Progress) -> dict[str, str]:
    return _own({**progress.ends, **dict.fromkeys(progress.running, "running")})


def _own(steps: Mapping[str, str]) -> dict[str, str]:
    """Without the ends of nested flows, which are no steps of anybody's."""
    return {step: how for step, how in steps.items() if not step.endswith(f".{RESULT}")}
