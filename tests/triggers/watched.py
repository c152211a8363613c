"""A DAG that changes of state schedule, a real scheduler, and a real triggerer that is killed again and again.

Arguments: a folder that is AIRFLOW_HOME and dags folder at once, how many changes are made, and how often the triggerer
is killed meanwhile. The store is that of the connection ``beluga_state_default``. Prints as JSON the versions that were
made, those of the asset events in the order in which Airflow stored them, and those that runs of the DAG were given.
(Airflow gives the last of a burst to the next run, which comes with the next change.)
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, Asset, AssetWatcher

from beluga_airflow.hooks.state import StateHook
from beluga_airflow.triggers.state import StateChangeTrigger

WITHIN = 120.0
DAG_ID = "on_order"
ORDERS = Asset("orders", watchers=[AssetWatcher(name="orders", trigger=StateChangeTrigger(prefix="orders/"))])

with DAG(DAG_ID, schedule=[ORDERS], start_date=datetime(2026, 1, 1, tzinfo=UTC), max_active_runs=4):
    EmptyOperator(task_id="look")


def within(what: str, look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WITHIN
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {WITHIN:g} s: {what}"
        time.sleep(0.2)
    return found


def prepare(home: Path) -> None:
    """As the DAG processor does."""
    from airflow.dag_processing.bundles.manager import DagBundlesManager
    from airflow.dag_processing.dagbag import BundleDagBag, sync_bag_to_db
    from airflow.models.dag import DagModel
    from airflow.utils.db import initdb
    from airflow.utils.session import create_session

    initdb()
    DagBundlesManager().sync_bundles_to_db()  # type: ignore[no-untyped-call]  # Airflow's
    for paused in (True, False):
        # a DAG is unpaused when Airflow knows it, and only then are its assets watched
        bag = BundleDagBag(home, bundle_path=home, bundle_name="dags-folder")
        assert not bag.import_errors, bag.import_errors
        sync_bag_to_db(bag, "dags-folder", None)
        if paused:
            with create_session() as session:
                session.get_one(DagModel, DAG_ID).is_paused = False


@contextmanager
def running(home: Path, component: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "airflow", component, "--skip-serve-logs"]
    with (home / f"{component}.log").open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def versions() -> list[Any]:
    """Of the asset events, in the order in which they were stored."""
    from airflow.models.asset import AssetEvent
    from airflow.utils.session import create_session

    with create_session() as session:
        return [event.extra["payload"]["version"] for event in session.query(AssetEvent).order_by(AssetEvent.id)]


def has_stored_beyond(version: int) -> bool:
    return versions()[-1:] > [version]


def given_to_runs() -> list[Any]:
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session

    with create_session() as session:
        runs = session.query(DagRun).filter_by(dag_id=DAG_ID).order_by(DagRun.id)
        return [[event.extra["payload"]["version"] for event in run.consumed_asset_events] for run in runs]


def is_watching() -> bool:
    from airflow.models.asset_state_store import AssetStateStoreModel
    from airflow.utils.session import create_session

    with create_session() as session:
        return session.query(AssetStateStoreModel).count() > 0


async def change(changes: int, made: list[int], turn: float) -> None:
    store = await StateHook().store()
    try:
        for number in range(changes):
            made.append(await store.set(f"orders/{number % 20}", {"number": number}))
            if number % 3 == 0:
                await store.set("other", number)
            if number % 50 == 49:
                await store.delete(f"orders/{number % 20}")
                made.append((await anext(store.watch("nothing"))).version)
            await asyncio.sleep(turn)
    finally:
        await store.close()


def main(folder: str, changes: int, kills: int) -> None:
    home = Path(folder)
    prepare(home)
    made: list[int] = []
    with running(home, "scheduler"):
        for turn in range(kills + 1):
            with running(home, "triggerer") as triggerer:
                within("the watcher began", lambda: is_watching() or triggerer.poll() is not None)
                part = changes // (kills + 1)
                asyncio.run(change(1, made, 0))
                within("the watcher goes on", partial(has_stored_beyond, made[-1] - 1))
                asyncio.run(change(part - 1, made, 0.02))
                if turn < kills:
                    time.sleep(random.uniform(0, 2))  # noqa: S311  # no secret
                else:
                    within("all is stored", lambda: len(versions()) >= len(made))
                    time.sleep(3)
        within("a run was given some", given_to_runs)
    print(json.dumps({"made": made, "stored": versions(), "given": given_to_runs()}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
