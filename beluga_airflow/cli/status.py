"""``airflow beluga status``: how flow runs, circuit breakers and rate limits stand, now or live."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from argparse import Namespace
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import aclosing, suppress
from datetime import datetime
from heapq import nlargest
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, Group, OverflowMethod
from rich.live import Live
from rich.table import Table
from rich.text import Text

from beluga_airflow.cli.owners import Owners
from beluga_airflow.errors import BelugaError, HistoryLost, StateUnavailable
from beluga_airflow.execute.settling import run_statuses, settled
from beluga_airflow.execute.status import FLOWS, SILENT, RunStatus
from beluga_airflow.hooks.state import StateHook
from beluga_airflow.resilience.breaker import BreakerState, breakers
from beluga_airflow.resilience.limits import LimitState, limits
from beluga_airflow.state import Change, StateStore

__all__ = ["status"]

BREAKERS, LIMITS = "beluga/breakers/", "beluga/limits/"
PAUSE, TICK = 0.25, 1.0
"""The least and the most seconds between two pictures."""
ASKING = 10.0
"""Seconds between two looks whether somebody still has the runs that are shown."""
SETTLING = 0.3
"""Seconds that the threads of a Temporal client need: a process that ends sooner may abort (sdk-python, issue 300)."""
COLUMNS = ("Run", "Status", "Steps", "Since", "Runtime", "Error")
WIDE, NARROW = 100, 60
"""Widths of a terminal with room for all columns, and with too little for more than three."""
MOST = 10_000
"""Runs that are kept in memory, the newest: of batches there may be any number in the store."""
PIPE = 200
"""The width where nobody says one."""
STYLES = {"running": "cyan", "completed": "green", "failed": "red", "timed_out": "red", "cancelled": "yellow"}
"""Of a status; that of a Stop is a success."""


def status(arguments: Namespace) -> None:
    """Show them, with ``--watch`` until Ctrl-C. Exits 1 with the reason when the store cannot be reached."""
    # connections that were made in Airflow's UI are in its database; this is how its own servers find them
    os.environ.setdefault("_AIRFLOW_PROCESS_CONTEXT", "server")
    try:
        console = Console()
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console = Console(width=PIPE)
        asyncio.run(_status(arguments, console))
    except KeyboardInterrupt:
        pass
    except BelugaError as error:
        sys.exit(f"beluga status: {error}")
    finally:
        if "temporalio" in sys.modules:
            time.sleep(SETTLING)


async def _status(arguments: Namespace, console: Console) -> None:
    store = await StateHook(arguments.state_conn_id).store()
    owners = Owners(store, arguments.temporal_conn_id)
    board = _Board(store, owners, console, flow=arguments.flow, limit=arguments.limit)
    try:
        await board.read()
        if not arguments.watch:
            board.show()
        elif console.is_terminal:
            await board.live()
        else:
            await board.lines()
    finally:
        owners.close()
        await store.close()


class _Board:
    """What is shown."""

    def __init__(self, store: StateStore, owners: Owners, console: Console, *, flow: str | None, limit: int) -> None:
        self._store = store
        self._owners = owners
        self._console = console
        self._flow = flow
        self._limit = limit
        self._runs: dict[str, RunStatus] = {}
        self._most = max(limit, MOST)
        self._is_cut = False
        self._breakers: list[BreakerState] = []
        self._limits: list[LimitState] = []
        self._changed = asyncio.Event()

    async def read(self) -> None:
        """Take what the store has now, and settle what nobody has any more."""
        async for key, entry in run_statuses(self._store, self._flow):
            self._keep(key, entry)
        await self._settle()
        await self._read_guards()

    def show(self) -> None:
        """Print it once."""
        for part in self._parts():
            self._console.print(part)

    async def live(self) -> None:
        """Keep it in the terminal as it changes."""
        await _together(
            *(self._follow(prefix) for prefix in (self._prefix, BREAKERS, LIMITS)), self._ask(), self._draw()
        )

    async def lines(self) -> None:
        """Print what there is, then a line for each change."""
        self.show()
        said = {key: _run_line(key, entry) for key, entry in self._runs.items()}
        said |= {f"{BREAKERS}{breaker.name}": _breaker_line(breaker) for breaker in self._breakers}
        await _together(*(self._follow(prefix, said) for prefix in (self._prefix, BREAKERS)), self._ask())

    @property
    def _prefix(self) -> str:
        return f"{FLOWS}{self._flow}/" if self._flow else FLOWS

    async def _draw(self) -> None:
        with Live(console=self._console, auto_refresh=False) as picture:
            while True:
                self._changed.clear()
                await self._read_guards()
                picture.update(Group(*self._parts(self._console.height)), refresh=True)
                with suppress(TimeoutError):
                    async with asyncio.timeout(TICK):
                        await self._changed.wait()
                        await asyncio.sleep(PAUSE)

    async def _follow(self, prefix: str, said: dict[str, str] | None = None) -> None:
        """Take every change of the keys that begin so; print a line of each that is new, where ``said`` is known."""
        while True:
            try:
                async with aclosing(self._store.watch(prefix, prefix=True)) as changes:
                    async for change in changes:
                        line = self._taken(change)
                        self._changed.set()
                        if said is not None and said.get(change.key) != line:
                            said[change.key] = line
                            self._print(f"{datetime.now():%H:%M:%S}  {line}")  # noqa: DTZ005  # the reader's own clock
            except HistoryLost:
                # what is there now comes next, and is all that is shown
                for key in [key for key in self._runs if key.startswith(prefix)]:
                    del self._runs[key]

    def _taken(self, change: Change) -> str:
        """Take a change; what there is to say of it, in one line."""
        if change.key.startswith(BREAKERS):
            return _breaker_line(BreakerState.of(change.key.removeprefix(BREAKERS), change.value))
        entry = None if change.is_gone else RunStatus.from_json(change.value)
        if entry is None:
            self._runs.pop(change.key, None)
            return f"{plain(change.key.removeprefix(FLOWS))}  gone"
        self._keep(change.key, entry)
        return _run_line(change.key, entry)

    def _keep(self, key: str, entry: RunStatus) -> None:
        self._runs[key] = entry
        if len(self._runs) > 2 * self._most:
            self._runs = dict(self._newest(self._most))
            self._is_cut = True

    def _print(self, line: str) -> None:
        self._console.print(Text(self._sayable(line)), soft_wrap=True)

    async def _ask(self) -> None:
        while True:
            await asyncio.sleep(ASKING)
            with suppress(StateUnavailable):  # the watches wait for it
                await self._settle()

    async def _settle(self) -> None:
        """Ask for the runs that are shown and have not changed for a while."""
        for key, entry in self._newest(self._limit):
            if entry.ended is None and entry.age > SILENT:
                now = await settled(self._store, key, self._owners.ended)
                if now is not None:
                    self._runs[key] = now
                else:
                    self._runs.pop(key, None)

    async def _read_guards(self) -> None:
        with suppress(StateUnavailable):
            self._breakers, self._limits = await breakers(self._store), await limits(self._store)

    def _newest(self, limit: int) -> list[tuple[str, RunStatus]]:
        return nlargest(limit, self._runs.items(), key=lambda item: item[1].started)

    def _parts(self, height: int | None = None) -> Iterator[Table | Text]:
        guards = [*self._guards()]
        # of a terminal: the heads of the tables, the foot, and a line in which nothing is written
        room = self._limit if height is None else max(1, min(self._limit, height - 5 - len(guards) - bool(guards) * 2))
        newest = self._newest(room)
        yield self._table([self._cells(key, entry) for key, entry in newest])
        more = f"{'more than ' * self._is_cut}{len(self._runs) - len(newest)}"
        if not self._runs:
            yield Text(
                "no flow has run yet" if self._flow is None else f"no flow {self._shown(self._flow)} has run yet"
            )
        elif len(self._runs) > len(newest):
            yield Text(f"{more} older not shown", style="dim")
        for told in self._owners.silent.values():
            yield Text(self._shown(told), style="yellow")
        if guards:
            yield Text()
        yield from guards

    def _table(self, rows: Sequence[Sequence[Text]]) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        cut: OverflowMethod = "crop" if self._console.options.ascii_only else "ellipsis"
        widths = [
            max(map(cell_len, column)) for column in zip(self._columns, *(map(str, row) for row in rows), strict=True)
        ]
        widths[2] = min(widths[2], max(self._console.width // 4, 7))  # names of steps may be long
        # what else may be shares the room that the others leave
        room = self._console.width - sum(widths[1:5]) - 3 * len(widths)
        widths[0] = max(min(widths[0], room if len(widths) < len(COLUMNS) else room * 2 // 3), 1)
        if len(widths) == len(COLUMNS):
            widths[-1] = max(min(widths[-1], room - widths[0]), 1)
        for name, width in zip(self._columns, widths, strict=True):
            table.add_column(name, no_wrap=True, overflow=cut, width=width)
        for row in rows:
            table.add_row(*row)
        return table

    @property
    def _columns(self) -> tuple[str, ...]:
        width = self._console.width
        if width < NARROW:
            return COLUMNS[:3]
        return COLUMNS if width >= WIDE else COLUMNS[:5]

    def _cells(self, key: str, entry: RunStatus) -> list[Text]:
        word = entry.status if entry.ended or not entry.is_silent else f"no sign for {_length(entry.silence)}"
        style = "yellow" if entry.ended is None and entry.is_silent else _style(entry)
        cells = [
            Text(self._shown(key.removeprefix(FLOWS))),
            Text(self._shown(word), style),
            Text(self._shown(_steps(entry))),
            Text(_length(entry.age if entry.ended else entry.length)),
            Text(self._shown(entry.runtime), "dim"),
            Text(self._shown(entry.error or "")),
        ]
        return cells[: len(self._columns)]

    def _guards(self) -> Iterator[Text]:
        for breaker in self._breakers:
            yield Text(
                self._sayable(_breaker_line(breaker)), {"open": "red", "half_open": "yellow"}.get(breaker.state, "")
            )
        for limit in self._limits:
            counts = f"{limit.requests} requests and {limit.tokens} tokens in the last minute, {limit.holders} at once"
            yield Text(f"limit {self._shown(limit.name)}: {counts}")

    def _shown(self, text: str) -> str:
        return self._sayable(plain(text))

    def _sayable(self, text: str) -> str:
        return text.encode(self._console.encoding, "backslashreplace").decode(self._console.encoding)


def plain(text: str) -> str:
    """Text from outside with nothing in it that a terminal would obey, or that would look like other text."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


async def _together(*works: Coroutine[Any, Any, None]) -> None:
    """Do all of these until one fails, with its error."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for work in works:
                tasks.create_task(work)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def _run_line(key: str, entry: RunStatus) -> str:
    parts = (key.removeprefix(FLOWS), entry.status, _steps(entry), entry.error or "")
    return "  ".join(plain(part) for part in parts if part)


def _breaker_line(breaker: BreakerState) -> str:
    failed = f", {breaker.failures} failures in a row" if breaker.failures else ""
    return f"breaker {plain(breaker.name)}: {plain(breaker.state)}{failed}, {breaker.changes} changes"


def _steps(entry: RunStatus) -> str:
    running = [step for step, how in entry.steps.items() if how == "running"]
    told = f"{len(entry.steps) - len(running)}/{max(entry.total, len(entry.steps))}"
    if running:
        told += f" {running[0]}" + (f" +{len(running) - 1}" if len(running) > 1 else "")
    return told


def _style(entry: RunStatus) -> str:
    return STYLES.get(entry.status, "green")


def _length(seconds: float) -> str:
    """A length of time in its largest unit."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
