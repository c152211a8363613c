"""``airflow beluga worker``: a process that runs flows from Temporal."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import sys
import time
from argparse import Namespace

from airflow.configuration import conf

from beluga_airflow.errors import BelugaError
from beluga_airflow.hooks.backends import AirflowBackends
from beluga_airflow.hooks.settings import LastingSettings
from beluga_airflow.hooks.temporal import TemporalHook
from beluga_airflow.temporal.client import check, connect
from beluga_airflow.temporal.worker import serve, set_up_tracing, tracing_plugins, worker_for

__all__ = ["worker"]

log = logging.getLogger(__name__)

SETTLING = 0.3
"""Seconds that the threads of a Temporal client need: a process that ends sooner may abort (sdk-python, issue 300)."""


def worker(arguments: Namespace) -> None:
    """Serve until SIGTERM or SIGINT, then finish what has begun. Exits 1 with the reason when it cannot start."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "httpx2"):  # a line a model call
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # a traceback for every failed attempt, of which we tell ourselves
    logging.getLogger("temporalio.activity").setLevel(logging.ERROR)
    # connections that were made in Airflow's UI are in its database; this is how its own servers find them
    os.environ.setdefault("_AIRFLOW_PROCESS_CONTEXT", "server")
    dags = conf.get("core", "dags_folder")
    if dags not in sys.path:
        sys.path.append(dags)
    try:
        for name in arguments.imports:
            _imported(name)
        asyncio.run(_serve(arguments))
    except BelugaError as error:
        sys.exit(f"beluga worker: {error}")
    finally:
        time.sleep(SETTLING)


async def _serve(arguments: Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    set_up_tracing()
    settings = LastingSettings()
    target = await TemporalHook(arguments.temporal_conn_id).target()
    client = await connect(target, plugins=tracing_plugins())
    await check(client, target)
    async with AirflowBackends(settings) as backends:
        store = await backends.store(None)
        log.info("state store %s; Temporal %s, namespace %r", store.url, target.address, target.namespace)
        await serve(
            worker_for(
                client,
                backends,
                task_queue=arguments.task_queue or target.task_queue,
                concurrency=arguments.concurrency,
                settings=settings,
            ),
            stop,
        )


def _imported(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:  # a module may raise what it likes
        if not isinstance(error, ImportError | BelugaError):
            log.exception("--import %s", name)
        sys.exit(
            f"beluga worker: --import {name}: {type(error).__name__}: {error}; mend or install it here, or put its "
            "folder on PYTHONPATH"
        )
