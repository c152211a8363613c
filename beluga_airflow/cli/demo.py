"""The demo: one run of the DAG ``order_batch`` over Airflow's REST API, watched as a user would, and its table."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import aiohttp
from pydantic import BaseModel, ValidationError
from rich.table import Column, Table
from rich.text import Text

from beluga_airflow.cli.supervisor import HopelessError

if TYPE_CHECKING:
    from temporalio.client import Client

__all__ = ["DAG_ID", "AirflowApi", "DemoError", "Manifest", "run_order_batch", "table"]

DAG_ID = "order_batch"
TASK_ID = "process_orders"
RUN_SECONDS = 900.0
POLL_SECONDS = 0.5
LOG_LINES = 20
UNANSWERED = 30

Say = Callable[[str], None]


class DemoError(Exception):
    """The run gave no result; the text says why, with the failing task's last words."""


class Decisions(BaseModel):
    """How many decisions there were, by choice and by who decided."""

    choices: dict[str, int]
    decided_by: dict[str, int]


class Tokens(BaseModel):
    """The tokens that the model read and wrote."""

    input: int
    output: int


class Manifest(BaseModel):
    """What the batch task says of its batch; ``results`` is the path of a file with one line for each order."""

    total: int
    statuses: dict[str, int]
    decisions: Decisions
    tokens: Tokens
    cost_usd: float | None
    simulated: bool
    duration_seconds: float
    items_per_second: float
    results: str


class AirflowApi:
    """Airflow's public REST API, for an Airflow where everybody is an admin.

    Its methods raise ``aiohttp.ClientError`` or ``TimeoutError`` where Airflow does not answer or refuses.
    """

    def __init__(self, url: str) -> None:
        timeout = aiohttp.ClientTimeout(total=10.0)
        self._http = aiohttp.ClientSession(url, timeout=timeout, raise_for_status=True)
        self._token = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """The JSON answer to one call below ``/api/v2``; ``arguments`` are aiohttp's (``json``, ``params``)."""
        if not self._token:
            async with self._http.get("/auth/token") as response:
                self._token = (await response.json())["access_token"]
        headers = {"Authorization": f"Bearer {self._token}"}
        async with self._http.request(method, f"/api/v2{path}", headers=headers, **arguments) as response:
            answer: dict[str, Any] = await response.json()
            return answer

    async def lacks(self, since: datetime) -> str | None:
        """Which of Airflow's components does not work, or None; what beat before ``since`` was another start's."""
        try:
            await self._wake_what_tasks_call()
            health = await self.call("GET", "/monitor/health")
        except (aiohttp.ClientError, TimeoutError) as error:
            return f"its API does not answer ({error or type(error).__name__})"
        for name in ("scheduler", "triggerer", "dag_processor"):
            beat = health[name][f"latest_{name}_heartbeat"]
            if health[name]["status"] != "healthy" or datetime.fromisoformat(beat) < since:
                return f"its {name} gives no sign of life"
        return None

    async def _wake_what_tasks_call(self) -> None:
        # It is built at its first call, seconds in which the server answers nobody: better now than at work.
        # Where a call has no header, Airflow adds a user's token, and this part of it logs a traceback at its sight.
        async with self._http.get("/execution/health", headers={"Authorization": "none"}):
            pass

    async def dag_lacks(self, since: datetime) -> str | None:
        """Why the demo's DAG cannot be run, or None; what was read before ``since`` may have changed.

        Raises:
            HopelessError: the DAG cannot be imported.
        """
        try:
            dags = (await self.call("GET", "/dags", params={"dag_id_pattern": DAG_ID}))["dags"]
            errors = (await self.call("GET", "/importErrors", params={"order_by": "-timestamp"}))["import_errors"]
        except (aiohttp.ClientError, TimeoutError) as error:
            return f"its API does not answer ({error or type(error).__name__})"
        if any(dag["dag_id"] == DAG_ID and datetime.fromisoformat(dag["last_parsed_time"]) >= since for dag in dags):
            return None
        for each in errors:
            if each["filename"].endswith(f"{DAG_ID}.py") and datetime.fromisoformat(each["timestamp"]) >= since:
                raise HopelessError(f"cannot import {each['filename']}:\n{each['stack_trace'].strip()[-1000:]}")
        return f"no DAG {DAG_ID} has been found in its DAGs folder"


async def run_order_batch(api: AirflowApi, temporal: str, say: Say) -> Manifest:
    """Runs the DAG once, for the day that it defaults to, and returns what its batch says.

    Args:
        api: of an Airflow that is up.
        temporal: the ``host:port`` where its batch runs, which is asked for progress.
        say: told whatever changes.

    Raises:
        DemoError: the run failed, did not end in time, or left no result.
    """
    try:
        return await _run(api, temporal, say)
    except (aiohttp.ClientError, TimeoutError, KeyError) as error:
        raise DemoError(f"Airflow's REST API gave no usable answer: {type(error).__name__} {error}") from error


async def _run(api: AirflowApi, temporal: str, say: Say) -> Manifest:
    await api.call("PATCH", f"/dags/{DAG_ID}", json={"is_paused": False})
    begun, asked = monotonic(), datetime.now(UTC)
    run = await api.call("POST", f"/dags/{DAG_ID}/dagRuns", json={"logical_date": None, "conf": {}})
    say(f"asked for a run of {DAG_ID}: {run['dag_run_id']}")
    path = f"/dags/{DAG_ID}/dagRuns/{run['dag_run_id']}"
    client = await _temporal_client(temporal)
    said, unanswered = "", 0
    try:
        while run["state"] not in ("success", "failed"):
            if monotonic() - begun > RUN_SECONDS:
                raise DemoError(f"The run did not end within {RUN_SECONDS:.0f} s. Last seen: {said}")
            await asyncio.sleep(POLL_SECONDS)
            try:
                run = await api.call("GET", path)
                states = [f"{task['task_id']} {task['state'] or 'waiting'}" for task in await _tasks(api, path)]
                unanswered = 0
            except (aiohttp.ClientError, TimeoutError):
                unanswered += 1
                if unanswered > UNANSWERED:  # if Airflow has died, the supervisor says so earlier, and better
                    raise
                continue
            news = "; ".join([*states, *await _batch_progress(client, asked)])
            if news != said:
                say(f"{monotonic() - begun:5.1f} s  {news}")
                said = news
    finally:
        # A client that outlives the event loop can crash its process at exit (temporalio/sdk-python issue 300).
        del client
        gc.collect()
    if run["state"] == "failed":
        raise DemoError(await _last_words(api, path))
    return await _manifest(api, path)


async def _tasks(api: AirflowApi, path: str) -> list[dict[str, Any]]:
    tasks: list[dict[str, Any]] = (await api.call("GET", f"{path}/taskInstances"))["task_instances"]
    return tasks


async def _temporal_client(address: str) -> Client:
    from temporalio.client import Client

    return await Client.connect(address)


async def _batch_progress(client: Client, since: datetime) -> list[str]:
    from temporalio.client import WorkflowQueryFailedError
    from temporalio.service import RPCError

    query = f"WorkflowType = 'beluga.batch' AND ExecutionStatus = 'Running' AND StartTime >= '{since.isoformat()}'"
    try:
        async for batch in client.list_workflows(query, limit=1):
            handle = client.get_workflow_handle(batch.id, run_id=batch.run_id)
            progress = await handle.query("progress", rpc_timeout=timedelta(seconds=2))
            return [f"on Temporal {progress['ended']} of {progress['total']} orders have ended"]
    except (RPCError, WorkflowQueryFailedError) as error:
        return [f"the batch on Temporal does not tell its progress ({error})"]
    return []


async def _manifest(api: AirflowApi, path: str) -> Manifest:
    xcom = await api.call("GET", f"{path}/taskInstances/{TASK_ID}/xcomEntries/return_value")
    try:
        return Manifest.model_validate(xcom["value"])
    except ValidationError as error:
        raise DemoError(f"The run succeeded, but its task {TASK_ID} returned something else: {error}") from error


async def _last_words(api: AirflowApi, path: str) -> str:
    words = []
    for task in await _tasks(api, path):
        if task["state"] == "failed":
            log = f"{path}/taskInstances/{task['task_id']}/logs/{task['try_number']}"
            lines = (await api.call("GET", log, params={"map_index": task["map_index"]}))["content"]
            words += [f"The task {task['task_id']} failed. The end of its log:"]
            words += [_log_line(line) for line in lines[-LOG_LINES:]]
    return "\n".join(words) or "The run failed, though none of its tasks did: look at its page in Airflow."


def _log_line(line: str | Mapping[str, Any]) -> str:
    if isinstance(line, str):
        return line[:500]
    causes = [f"{cause['exc_type']}: {cause['exc_value']}" for cause in line.get("error_detail") or []]
    return ": ".join([str(line.get("event")), *causes])[:500]


def table(manifest: Manifest, elapsed: float) -> Table:
    """The counts of a batch; ``elapsed`` is the seconds from asking for the run to having its result."""
    simulated = " (SIMULATION)" if manifest.simulated else ""
    cost = "unknown" if manifest.cost_usd is None else f"{manifest.cost_usd:.4f} USD"
    blocks: dict[str, Mapping[str, object]] = {
        "orders by status": {**manifest.statuses, "all": manifest.total},
        f"decisions by choice{simulated}": manifest.decisions.choices,
        f"decisions by who decided{simulated}": manifest.decisions.decided_by,
        f"tokens and cost{simulated}": {**manifest.tokens.model_dump(), "cost": cost},
        "time": {
            "whole run": f"{elapsed:.1f} s",
            "the batch in it": f"{manifest.duration_seconds:.1f} s",
            "orders a second": f"{manifest.items_per_second:.1f}",
        },
    }
    result = Table("", "", Column(justify="right"), title=f"A day of orders{simulated}", show_header=False)
    for title, block in blocks.items():
        for number, (name, value) in enumerate(block.items()):
            result.add_row(title if number == 0 else "", Text(name), Text(str(value)))
        result.add_section()
    return result
