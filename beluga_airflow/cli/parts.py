"""What the whole system consists of: where it lives, what its programs find in their environment, when each serves."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import signal
import sqlite3
import sys
import sysconfig
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from beluga_airflow.cli.demo import AirflowApi
from beluga_airflow.cli.processes import Ports, children, listens
from beluga_airflow.cli.supervisor import HopelessError, Part, Probe

__all__ = ["Site", "claim_site", "environment", "parts", "write_private"]

TASK_QUEUE = "beluga-workflows"
COMPONENTS = ("scheduler", "dag-processor", "api-server", "triggerer")


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where one stack lives: its folders (absolute) and its TCP ports on 127.0.0.1; ``model`` None: no simulation."""

    state: Path
    dags: Path
    airflow: int
    worker_logs: int
    trigger_logs: int
    temporal: int
    temporal_ui: int
    model: int | None

    @property
    def airflow_url(self) -> str:
        return f"http://127.0.0.1:{self.airflow}"

    @property
    def temporal_address(self) -> str:
        return f"127.0.0.1:{self.temporal}"

    @property
    def pages(self) -> dict[str, str]:
        """The addresses of the web pages."""
        return {"Airflow": self.airflow_url, "Temporal": f"http://127.0.0.1:{self.temporal_ui}"}


def claim_site(state: Path, dags: Path, ports: Ports) -> Site:
    """A site on the usual ports, or near them where they are taken."""
    return Site(
        state=state,
        dags=dags,
        airflow=ports.claim(8080),
        worker_logs=ports.claim(8793),
        trigger_logs=ports.claim(8794),
        temporal=ports.claim(7233),
        temporal_ui=ports.claim(8233),
        model=None if os.environ.get("OPENAI_API_KEY") else ports.claim(8089),
    )


def environment(site: Site) -> dict[str, str]:
    """What every part finds in its environment: the settings of this stack, and of no other."""
    # Another Airflow or Temporal that the shell is set up for would leak into this one.
    foreign = ("AIRFLOW_", "_AIRFLOW_", "TEMPORAL_", "BELUGA_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    local = {
        name: ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"])) for name in ("NO_PROXY", "no_proxy")
    }
    keys: dict[str, str] = json.loads((site.state / "secrets.json").read_text())
    home = site.state / "airflow"
    return (
        inherited
        | local
        | keys
        | _connections(site)
        | {
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(site.dags), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(site.dags),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__CORE__PARALLELISM": "4",  # SQLite locks up under more, and takes the scheduler with it
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",  # nobody logs in, so only this machine may ask
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}?timeout=60",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_SESSION_MAKER": "beluga_airflow.cli.database.sessions",
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(site.airflow),
            "AIRFLOW__API__BASE_URL": site.airflow_url,
            "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "5",
            "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "5",
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(site.worker_logs),
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(site.trigger_logs),
            "AIRFLOW__LOGGING__COLORED_CONSOLE_LOG": "False",
            "AIRFLOW__LOGGING__NAMESPACE_LEVELS": "http.access=WARNING",  # or our own asking fills the log
        }
    )


def _prepare(state: Path) -> None:
    home = state / "airflow"
    home.mkdir(exist_ok=True)
    if not (home / "airflow.cfg").exists():
        # Or Airflow writes all its defaults there, two processes at a time, and they outlive an upgrade.
        write_private(home / "airflow.cfg", "# The launcher gives its settings by environment; they win over these.\n")
    with closing(sqlite3.connect(home / "airflow.db")) as file:
        # Reading and writing then do not wait for each other; the file remembers it.
        file.execute("PRAGMA journal_mode=wal")
    if not (state / "secrets.json").exists():
        keys = {
            "AIRFLOW__CORE__FERNET_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
            "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_urlsafe(64),
            "AIRFLOW__API__SECRET_KEY": secrets.token_urlsafe(32),
        }
        write_private(state / "secrets.json", json.dumps(keys))


def _connections(site: Site) -> dict[str, str]:
    connections: dict[str, dict[str, Any]] = {
        "TEMPORAL_DEFAULT": {
            "conn_type": "temporal",
            "host": "127.0.0.1",
            "port": site.temporal,
            "extra": {"namespace": "default", "task_queue": TASK_QUEUE, "ui_url": site.pages["Temporal"]},
        },
        "BELUGA_STATE_DEFAULT": {
            "conn_type": "beluga_state",
            "extra": {"url": f"sqlite:///{site.state / 'state.db'}"},
        },
    }
    if site.model:  # without the simulation the connection stays undefined, and the key comes from OPENAI_API_KEY
        connections["BELUGA_LLM_DEFAULT"] = {
            "conn_type": "beluga_llm",
            "password": "simulation",
            "extra": {
                "provider": "simulated",
                "model": "gpt-4o",
                "base_url": f"http://127.0.0.1:{site.model}/v1",
                "timeout": 30,
            },
        }
    return {f"AIRFLOW_CONN_{name}": json.dumps(connection) for name, connection in connections.items()}


def write_private(path: Path, text: str) -> None:
    """Replaces the file's content in one go; nobody else on this machine can read it."""
    new = path.with_suffix(".new")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


def parts(site: Site, api: AirflowApi) -> list[Part]:
    """The programs of the stack; ``api`` is that of its Airflow."""
    _prepare(site.state)
    env = environment(site)
    keyless = {name: value for name, value in env.items() if name != "OPENAI_API_KEY"}
    fast = ["--sqlite-pragma", "journal_mode=wal", "--sqlite-pragma", "synchronous=normal"]
    # The development server slows itself down after a few runs, and refuses many waiting clients.
    for setting in ("history.transferProcessorMaxPollRPS=1000", "frontend.namespaceCount=20000"):
        fast += ["--dynamic-config-value", setting]
    temporal = Part(
        name="temporal",
        argv=[
            *("temporal", "server", "start-dev", "--ip", "127.0.0.1", "--port", str(site.temporal)),
            *("--ui-port", str(site.temporal_ui), "--db-filename", str(site.state / "temporal.db")),
            *("--ui-disable-news-fetch", "--log-level", "error", *fast),
        ],
        env=keyless,
        ready=_temporal_probe(site),
        foundation=True,
    )
    airflow = Part(
        name="airflow",
        argv=["airflow", "standalone"],
        env=env,
        ready=_airflow_probe(site, api, with_dag=True),
        healthy=_airflow_probe(site, api, with_dag=False),
        stop_signal=signal.SIGINT,  # SIGTERM would end the parent alone
        grace=30.0,
        ready_within=240.0,
    )
    worker = Part(
        name="worker",
        argv=["airflow", "beluga", "worker", "--task-queue", TASK_QUEUE, "--import", "orders.flows"],
        env=env,
        ready=_worker_probe(site),
        needs=("temporal",),
        ready_within=120.0,
    )
    if not site.model:
        return [temporal, airflow, worker]
    model = Part(
        name="model",
        argv=[
            *(sys.executable, "-m", "beluga_airflow.llm.model_server", "--host", "127.0.0.1"),
            *("--port", str(site.model), "--rules", str(site.dags / "data" / "model_rules.yaml")),
        ],
        env=keyless,
        ready=_http_probe(site.model),
        foundation=True,
    )
    return [temporal, model, airflow, worker]


def _http_probe(port: int) -> Probe:
    async def lacks(pid: int) -> str | None:
        if not listens(pid, port):
            return f"it does not listen on port {port}"
        try:
            timeout = aiohttp.ClientTimeout(total=5.0)
            async with aiohttp.ClientSession(timeout=timeout) as http, http.get(f"http://127.0.0.1:{port}/"):
                return None
        except (aiohttp.ClientError, TimeoutError) as error:
            return f"port {port} does not speak HTTP ({error or type(error).__name__})"

    return lacks


def _temporal_probe(site: Site) -> Probe:
    page_lacks = _http_probe(site.temporal_ui)

    async def lacks(pid: int) -> str | None:
        from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
        from temporalio.client import Client
        from temporalio.service import RPCError

        if not listens(pid, site.temporal):
            return f"it does not listen on port {site.temporal}"
        try:
            client = await Client.connect(site.temporal_address)
            await client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace="default"))
        except (RPCError, RuntimeError) as error:  # a refused connection is a plain RuntimeError
            return f"it does not answer ({error})"
        return await page_lacks(pid)

    return lacks


def _worker_probe(site: Site) -> Probe:
    async def lacks(_: int) -> str | None:
        from temporalio.api.enums.v1 import TaskQueueType
        from temporalio.api.taskqueue.v1 import TaskQueue
        from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
        from temporalio.client import Client
        from temporalio.service import RPCError

        question = DescribeTaskQueueRequest(
            namespace="default",
            task_queue=TaskQueue(name=TASK_QUEUE),
            task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
        )
        try:
            client = await Client.connect(site.temporal_address)
            answer = await client.workflow_service.describe_task_queue(question)
        except (RPCError, RuntimeError) as error:
            return f"Temporal does not answer ({error})"
        return None if answer.pollers else f"it does not ask Temporal for work on {TASK_QUEUE}"

    return lacks


def _airflow_probe(site: Site, api: AirflowApi, *, with_dag: bool) -> Probe:
    since = datetime.now(UTC)

    async def lacks(pid: int) -> str | None:
        # `airflow standalone` goes on when one of its own has died. One that it is just reaping is not lost.
        if "" in children(pid):
            await asyncio.sleep(0.5)
            titles = children(pid)
            if "" in titles:
                lost = [name for name in COMPONENTS if not any(name in title.replace("_", "-") for title in titles)]
                raise HopelessError(f"lost its {' and '.join(lost)}", about=lost[0] if lost else "")
        if not listens(pid, site.airflow):
            return f"its API does not listen on port {site.airflow}"
        return await api.lacks(since) or (await api.dag_lacks(since) if with_dag else None)

    return lacks
