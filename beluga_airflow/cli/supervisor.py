"""Programs run as parts of one system: started in order, watched, and stopped whatever happens."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Literal

import psutil

from beluga_airflow.cli.processes import Record, alive, identity, kill, last_lines, session, terminate

__all__ = ["Change", "HopelessError", "Part", "PartError", "Probe", "SignalledError", "Supervisor"]

POLL_SECONDS = 0.1
HEALTH_SECONDS = 5.0
HEALTH_FAILURES = 12
ORPHAN_SECONDS = 5.0

# Given a part's process id: what it still lacks to serve, or None.
Probe = Callable[[int], Awaitable[str | None]]
Change = Literal["starting", "ready", "stopping"]


class HopelessError(Exception):
    """A part will not serve however long one waits; the text says why. Probes raise it.

    Lines of the part's log that begin with ``about`` tell more.
    """

    def __init__(self, text: str, *, about: str = "") -> None:
        super().__init__(text)
        self.about = about


class PartError(Exception):
    """A part died, got stuck or never became ready: the text says which and how.

    ``log`` is its own log, ``last_words`` are the lines that ended it when that happened.
    """

    def __init__(self, text: str, log: Path, *, about: str = "") -> None:
        super().__init__(text)
        self.log = log
        self.last_words = last_lines(log, about=about)


class SignalledError(Exception):
    """The signal ``number`` asked the supervisor to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(frozen=True, kw_only=True)
class Part:
    """A program of the system.

    Attributes:
        name: what the screen and its log file call it.
        argv: the command.
        env: its whole environment.
        ready: what it still lacks to serve, asked until there is nothing.
        healthy: the same for the time after; without it only the part's death is noticed.
        needs: parts that must be ready before this one is started.
        foundation: the others talk to it until their end, so it is stopped after them.
        stop_signal: what asks it to end.
        grace: seconds after which what is left of its session is killed.
        ready_within: seconds that it may take to become ready.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    ready: Probe
    healthy: Probe | None = None
    needs: tuple[str, ...] = ()
    foundation: bool = False
    stop_signal: signal.Signals = signal.SIGTERM
    grace: float = 15.0
    ready_within: float = 60.0


class Supervisor:
    """Runs parts around some work, and leaves none of them behind.

    Args:
        parts: what to run.
        logs: the folder that takes the parts' output, each in ``<name>.log``.
        changed: called with a part's name and what it now does.
    """

    def __init__(self, parts: Sequence[Part], *, logs: Path, changed: Callable[[str, Change], None]) -> None:
        self._parts = parts
        self._logs = logs
        self._changed = changed
        self._ready = {part.name: asyncio.Event() for part in parts}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._seen: dict[str, set[psutil.Process]] = {}
        self._broken: set[str] = set()
        self._interrupted = asyncio.Event()
        self._signals: list[int] = []

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Starts the parts, does the work once all are ready, and stops them whatever happened.

        Raises:
            PartError: a part died, got stuck, or was not ready in time.
            SignalledError: SIGINT, SIGTERM or SIGHUP came; a second signal kills what is slow to stop.
        """
        with self._receiving_signals():
            jobs = [self._raise_on_signal(), self._when_ready(work), *map(self._keep, self._parts)]
            tasks = [asyncio.create_task(job) for job in jobs]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._stop()

    def record(self) -> Record:
        """The processes of each part, its leader first, so that ``end_leftovers`` can recognise them later."""
        return {name: [identity(each) for each in session(child.pid)] for name, child in self._children.items()}

    @contextmanager
    def _receiving_signals(self) -> Iterator[None]:
        # What we handle is at its default again in the programs that we start. What we had inherited as ignored (shells
        # do that to SIGINT for background jobs) they would ignore too, and SIGINT could not stop them.
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup asks to outlive the terminal
            numbers.append(signal.SIGHUP)
        loop = asyncio.get_running_loop()
        for number in numbers:
            loop.add_signal_handler(number, self._receive, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _receive(self, number: int) -> None:
        self._signals.append(number)
        self._interrupted.set()

    async def _raise_on_signal(self) -> None:
        await self._interrupted.wait()
        raise SignalledError(self._signals[0])

    async def _when_ready(self, work: Callable[[], Awaitable[None]]) -> None:
        for event in self._ready.values():
            await event.wait()
        await work()

    async def _keep(self, part: Part) -> None:
        for name in part.needs:
            await self._ready[name].wait()
        self._start(part)
        deadline = monotonic() + part.ready_within
        while lack := await self._ask(part, part.ready):
            if monotonic() > deadline:
                raise self._failed(part, f"was not ready within {part.ready_within:.0f} s: {lack}")
            await asyncio.sleep(POLL_SECONDS)
        self._seen[part.name] = set(session(self._children[part.name].pid))
        self._ready[part.name].set()
        self._changed(part.name, "ready")
        failures = 0  # counted, not timed: a machine that slept has no stuck parts
        while failures < HEALTH_FAILURES:
            await self._outlives(part, HEALTH_SECONDS)
            lack = await self._ask(part, part.healthy)
            failures = failures + 1 if lack else 0
        raise self._failed(part, f"no longer works: {lack}")

    def _start(self, part: Part) -> None:
        try:
            with self._log(part).open("wb") as output:
                self._children[part.name] = subprocess.Popen(  # noqa: S603 - the commands are our own
                    part.argv,
                    env=dict(part.env),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise self._failed(part, f"could not be started: {error}") from error
        self._changed(part.name, "starting")

    async def _ask(self, part: Part, probe: Probe | None) -> str | None:
        self._check_alive(part)
        try:
            return await probe(self._children[part.name].pid) if probe else None
        except HopelessError as error:
            raise self._failed(part, str(error), about=error.about) from error

    async def _outlives(self, part: Part, seconds: float) -> None:
        end = monotonic() + seconds
        while monotonic() < end:
            self._check_alive(part)
            await asyncio.sleep(POLL_SECONDS)

    def _check_alive(self, part: Part) -> None:
        code = self._children[part.name].poll()
        if code is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise self._failed(part, how)

    def _failed(self, part: Part, what: str, *, about: str = "") -> PartError:
        self._broken.add(part.name)
        return PartError(f"{part.name} {what}", self._log(part), about=about)

    def _log(self, part: Part) -> Path:
        return self._logs / f"{part.name}.log"

    async def _stop(self) -> None:
        running = [part for part in self._parts if part.name in self._children]
        for foundation in (False, True):
            await asyncio.gather(*(self._end(part) for part in running if part.foundation is foundation))

    async def _end(self, part: Part) -> None:
        self._changed(part.name, "stopping")
        child = self._children[part.name]
        # Taken before the signal: who is in another session cannot be found once its parent has died.
        doomed = self._seen.get(part.name, set()) | set(session(child.pid))
        if child.poll() is None:
            child.send_signal(part.stop_signal)
        # A part that failed has lost whoever would end the rest of it in good order.
        deadline = monotonic() + (ORPHAN_SECONDS if part.name in self._broken else part.grace)
        orphaned = False
        while doomed := alive(doomed | set(session(child.pid))):
            if len(self._signals) > 1 or monotonic() > deadline:
                await kill(doomed)
                break
            if child.poll() is not None and not orphaned:
                orphaned = True
                deadline = monotonic() + ORPHAN_SECONDS
                terminate(doomed)
            await asyncio.sleep(POLL_SECONDS)
        child.poll()
