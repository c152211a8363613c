"""The whole system on one machine: ``python -m beluga_airflow.cli.stack demo|up|down``.

It is Airflow, a Temporal server, our worker and, without an OpenAI key, a model server that simulates one; all of
their state is in one folder. Airflow is not imported here: it takes seconds, and reads its settings as it is imported.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
from pydantic import BaseModel
from rich.console import Console

from beluga_airflow.cli.demo import AirflowApi, DemoError, run_order_batch, table
from beluga_airflow.cli.parts import Site, claim_site, parts, write_private
from beluga_airflow.cli.processes import AlreadyRunningError, Ports, end_leftovers, holder, lock
from beluga_airflow.cli.supervisor import Change, PartError, SignalledError, Supervisor

__all__ = ["main", "run_stack"]

STOP_SECONDS = 90.0

Work = Callable[[Site, AirflowApi], Awaitable[None]]


class _Running(BaseModel):
    """What a stack writes down about itself, for other commands and for whoever cleans up after it was killed."""

    site: Site
    ready: bool
    processes: dict[str, list[dict[str, Any]]]


def say(text: str) -> None:
    """Shows a line to whoever still looks."""
    # The terminal may be gone, and what runs must be stopped all the same.
    with suppress(OSError):
        print(text, flush=True)


async def run_stack(state: Path, dags: Path, work: Work) -> None:
    """Starts the whole system, does the work once all of it is ready, and leaves nothing running.

    Args:
        state: the folder of its state, absolute; made if it is not there.
        dags: Airflow's DAGs folder, absolute.
        work: given the site and the API of its Airflow.

    Raises:
        AlreadyRunningError: a stack runs in this folder.
        PartError: a part died, got stuck, or was not ready in time.
        SignalledError: a signal asked for the end.
        OSError: no port is free, or the folder cannot be written.
    """
    _make_folders(state)
    with lock(state / "stack.lock"), Ports() as ports:
        if left := await _end_what_was_left(state):
            say(f"A stack that was killed had left {left} processes running here; they have been ended.")
        site = claim_site(state, dags, ports)
        say(f"Starting. Everything is kept in {state}, the logs are in {state / 'logs'}.")
        if site.model:
            say("The model is a SIMULATION, as OPENAI_API_KEY is not set: a local server answers by rules.")
        else:
            say("OPENAI_API_KEY is set: OpenAI's model decides, and its answers cost money.")
        try:
            await _run_at(site, work)
        finally:
            await _end_what_was_left(state)


def _make_folders(state: Path) -> None:
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    (state / "logs").mkdir(exist_ok=True)


async def _run_at(site: Site, work: Work) -> None:
    begun = monotonic()
    waiting: set[str] = set()

    def changed(name: str, change: Change) -> None:
        if change == "stopping":
            return say(f"  stopping {name}")
        if change == "ready":
            waiting.remove(name)
            say(f"  {name} is ready after {monotonic() - begun:.1f} s")
        running = _Running(site=site, ready=not waiting, processes=supervisor.record())
        return write_private(site.state / "stack.json", running.model_dump_json())

    async with AirflowApi(site.airflow_url) as api:
        programs = parts(site, api)
        waiting.update(part.name for part in programs)
        supervisor = Supervisor(programs, logs=site.state / "logs", changed=changed)
        await supervisor.run(lambda: work(site, api))


def _running(state: Path) -> _Running | None:
    try:
        return _Running.model_validate_json((state / "stack.json").read_text())
    except FileNotFoundError:
        return None


async def _end_what_was_left(state: Path) -> int:
    running = _running(state)
    ended = await end_leftovers(running.processes) if running else 0
    (state / "stack.json").unlink(missing_ok=True)
    return ended


async def _stay(site: Site, _: AirflowApi) -> None:
    say(f"Everything is up. {_addresses(site)}")
    say("Ctrl-C stops it, and so does `down` from another shell.")
    await asyncio.Event().wait()


def _addresses(site: Site) -> str:
    return "Web pages: " + ", ".join(f"{name} {url}" for name, url in site.pages.items())


async def _demo(site: Site, api: AirflowApi) -> None:
    say(_addresses(site))  # now: in the end they are gone
    begun = monotonic()
    manifest = await run_order_batch(api, site.temporal_address, say)
    console = Console()
    with console.capture() as shown:
        console.print(table(manifest, monotonic() - begun))
    say(shown.get().rstrip())
    say(f"The result of every order: {manifest.results}")


async def _demo_anywhere(state: Path, dags: Path) -> None:
    try:
        await run_stack(state, dags, _demo)
    except AlreadyRunningError:
        running = _running(state)
        if running is None or not running.ready or running.site.dags != dags:
            raise
        say(f"{_who_runs(state)} The demo runs on it, and leaves it running.")
        async with AirflowApi(running.site.airflow_url) as api:
            await _demo(running.site, api)


def _who_runs(state: Path) -> str:
    process, running = holder(state / "stack.lock"), _running(state)
    number = f", process {process.pid}" if process else ""
    ready = "" if running and running.ready else " (still starting, or stopping)"
    return f"A stack is running in {state}{number}{ready}. {_addresses(running.site) + '.' if running else ''}"


async def _down(state: Path) -> None:
    asked: psutil.Process | None = None
    deadline = monotonic() + STOP_SECONDS
    while True:
        try:
            with lock(state / "stack.lock"):
                left = await _end_what_was_left(state)
        except FileNotFoundError:
            return say(f"No stack is running: there is no folder {state}.")
        except AlreadyRunningError:
            supervisor = holder(state / "stack.lock")
            if supervisor and supervisor != asked:
                say(f"{_who_runs(state)} Stopping it.")
                supervisor.terminate()
                asked = supervisor
            elif supervisor and monotonic() > deadline:
                say(f"It has not stopped within {STOP_SECONDS:.0f} s, and is killed.")
                supervisor.kill()
            await asyncio.sleep(0.2)
            continue
        if left:
            return say(f"A stack had been killed in {state}; {left} processes that it left have been ended.")
        return say("Stopped; nothing is left running." if asked else f"No stack is running in {state}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command, and returns its exit code: 0 when it did what was asked, also when `up` was asked to stop."""
    arguments = _parser().parse_args(argv)
    state, dags = Path(arguments.state_dir).absolute(), Path(arguments.dags).absolute()
    try:
        _check(state, None if arguments.command == "down" else dags)
        asyncio.run(_command(arguments.command, state, dags))
    except SignalledError as interrupt:
        say(f"Stopped by {interrupt}; nothing is left running.")
        return 0 if arguments.command == "up" else 128 + interrupt.number
    except KeyboardInterrupt:
        return 130
    except PartError as failure:
        words = "\n".join(f"  | {line}" for line in failure.last_words)
        complaint = f"{failure}\nThe end of {failure.log}:\n{words or '  (it is empty)'}\nEverything was stopped."
    except AlreadyRunningError:
        complaint = f"{_who_runs(state)} Stop it first: `make down`, or `down` with the same --state-dir."
    except (DemoError, OSError, ValueError, psutil.Error) as error:
        complaint = str(error)
    else:
        return 0
    with suppress(OSError):
        print(complaint, file=sys.stderr, flush=True)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m beluga_airflow.cli.stack", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("command", choices=("demo", "up", "down"), help="run the demo; start and stay; stop what stays")
    parser.add_argument("--state-dir", default=".beluga", help="where all state is kept (default: %(default)s)")
    parser.add_argument("--dags", default="dags", help="Airflow's DAGs folder (default: %(default)s)")
    return parser


def _check(state: Path, dags: Path | None) -> None:
    if strange := re.search(r"[?#%$]", str(state)):
        raise ValueError(
            f"The path of the state folder, {state}, has a {strange[0]!r}, which a database's URL cannot hold: "
            "choose another folder with --state-dir."
        )
    if dags and not dags.is_dir():
        raise ValueError(f"There is no DAGs folder {dags}: start this in the project's folder, or give --dags.")


async def _command(command: str, state: Path, dags: Path) -> None:
    if command == "up":
        await run_stack(state, dags, _stay)
    elif command == "demo":
        await _demo_anywhere(state, dags)
    else:
        await _down(state)


if __name__ == "__main__":
    sys.exit(main())
