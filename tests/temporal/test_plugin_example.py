"""The shop of docs/temporal.md as it stands there: its worker in processes of its own, and its workflow replayed.

``python -m tests.temporal.test_plugin_example`` records the histories anew, where the page's workflow was changed.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import pytest
from temporalio.client import Client, WorkflowHandle, WorkflowHistory
from temporalio.worker import Replayer
from temporalio.workflow import NondeterminismError

from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.state import open_store
from beluga_airflow.testing import TemporalServer
from tests.temporal.record_histories import _without_place

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "temporal.md"
HISTORIES = Path(__file__).parent / "example_histories"
ORDER = {"order_id": "order-1", "order_value": 250.0, "customer_tier": "gold", "quantity": 2}
RULES = [{"when": {"customer_tier": "gold"}, "answer": "expedite"}]
KEY = "sk-live-4f9aKEYc1"
RUNS = {"completed": ORDER, "out_of_stock": {**ORDER, "quantity": 11}}

DYING = """
# the page's worker, which is killed as soon as its first decision is on record
import asyncio, functools, os, signal
from pathlib import Path
from beluga_airflow.state.sqlite import SqliteStore
from shop import worker

kept = SqliteStore.set

async def set_and_die(self, key, *args, **kwargs):
    version = await kept(self, key, *args, **kwargs)
    mark = Path(os.environ["MARK"])
    if key.startswith("beluga/decisions/") and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return version

SqliteStore.set = set_and_die
# nor do the workflows that it had wait 10 s for it
worker.Worker = functools.partial(worker.Worker, max_cached_workflows=0)
asyncio.run(worker.main())
"""


def write_shop(folder: Path) -> None:
    """The page's modules, as a package that can be imported from there."""
    (folder / "shop").mkdir()
    (folder / "shop" / "__init__.py").touch()
    found = re.findall(r"^```python\n# (shop/\w+\.py)\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(found) == 4
    for name, code in found:
        (folder / name).write_text(code)


@contextmanager
def worker(folder: Path, queue: str, temporal: TemporalServer, model: ModelServer, code: str) -> Iterator[Any]:
    """A process of the page's worker."""
    environment = os.environ | {
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "TEMPORAL_ADDRESS": temporal.address,
        "STATE_URL": f"sqlite:///{folder}/state.db",
        "OPENAI_API_KEY": KEY,
        "OPENAI_BASE_URL": model.base_url,
        "MARK": str(folder / "mark"),
    }
    code = f"from shop import worker\nworker.TASK_QUEUE = {queue!r}\n{code}"
    with (folder / f"{uuid4().hex}.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


RUNNING = "import asyncio\nasyncio.run(worker.main())"


async def start(client: Client, queue: str, order: dict[str, Any]) -> WorkflowHandle[Any, Any]:
    return await client.start_workflow("OrderWorkflow", order, id=uuid4().hex, task_queue=queue)


@pytest.fixture
def model_rules() -> Any:
    return RULES


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    write_shop(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


async def test_the_order_workflow_of_the_page(
    shop: Path, temporal_server: TemporalServer, model_server: ModelServer
) -> None:
    client, queue = await temporal_server.client(), f"shop-{uuid4().hex}"
    with worker(shop, queue, temporal_server, model_server, RUNNING):
        gold, small, sold_out = [
            await start(client, queue, order)
            for order in (ORDER, {**ORDER, "order_value": 5.0}, {**ORDER, "quantity": 11})
        ]
        async with asyncio.timeout(60):
            assert await gold.result() == {
                "status": "completed",
                "handling": "expedite",
                "decided_by": "model",
                "payment_id": "payment-order-1",
                "parcel_id": "parcel-order-1-expedite",
            }
            assert (await small.result())["decided_by"] == "rule"
            # a success: the workflow completed, and after it nothing ran
            assert await sold_out.result() == {"status": "out_of_stock", "order_id": "order-1"}
        model_server.fail("status", status=503, every=1)
        in_trouble = await start(client, queue, {**ORDER, "order_value": 300.0})
        async with asyncio.timeout(60):
            assert (await in_trouble.result())["decided_by"] == "fallback"
    assert model_server.calls == 1 + 3  # no layer but Temporal's retries
    history = (await in_trouble.fetch_history()).to_json()
    scheduled = [
        event["activityTaskScheduledEventAttributes"]
        for event in json.loads(history)["events"]
        if "activityTaskScheduledEventAttributes" in event
    ]
    assert [task["activityType"]["name"] for task in scheduled] == [
        *("check_inventory", "beluga.decision", "take_payment", "fulfil")
    ]
    for task in scheduled:
        assert (task["startToCloseTimeout"], task["retryPolicy"]["maximumAttempts"]) == ("60s", 3)
    assert KEY not in history


async def test_a_worker_that_is_killed_when_the_answer_is_on_record_does_not_ask_again(
    shop: Path, temporal_server: TemporalServer, model_server: ModelServer
) -> None:
    client, queue = await temporal_server.client(), f"shop-{uuid4().hex}"
    # a lost worker shows after its silence: the page's 10 s would do, and take as long
    file = shop / "shop" / "workflows.py"
    by_key = 'key=order["order_id"], '
    assert by_key in file.read_text()
    file.write_text(file.read_text().replace(by_key, f"{by_key}heartbeat_timeout=timedelta(seconds=1), "))
    handle = await start(client, queue, ORDER)
    with worker(shop, queue, temporal_server, model_server, DYING) as first:
        await asyncio.to_thread(first.wait, 60)
        assert first.returncode == -9
    assert model_server.calls == 1
    with worker(shop, queue, temporal_server, model_server, DYING):
        async with asyncio.timeout(60):
            result = await handle.result()
    assert (result["handling"], result["decided_by"], result["status"]) == ("expedite", "model", "completed")
    assert model_server.calls == 1
    store = open_store(f"sqlite:///{shop}/state.db")
    kept = [key async for key in store.keys("beluga/decisions/")]
    await store.close()
    assert kept == [f"beluga/decisions/temporal/default/{handle.id}/order-1/handling@0"]


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, *changes: tuple[str, str]) -> ModuleType:
    """The page's workflows, or a copy of them in which other code stands in place of some."""
    code = (folder / "shop" / "workflows.py").read_text()
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    name = f"workflows_{uuid4().hex}"
    (folder / f"{name}.py").write_text(code)
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def recorded(name: str) -> WorkflowHistory:
    return WorkflowHistory.from_json(name, (HISTORIES / f"{name}.json").read_text())


@pytest.mark.parametrize("name", RUNS)
async def test_what_was_recorded_of_it_replays_without_a_plugin(
    name: str, shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayer = Replayer(workflows=[module(shop, monkeypatch).OrderWorkflow])
    assert (await replayer.replay_workflow(recorded(name))).replay_failure is None


PAYMENT = '        payment_id = await workflow.execute_activity("take_payment", order, **ACTIVITY)\n'
DECISION = '        handling = await decide("handling", order, key=order["order_id"], **ACTIVITY)\n'


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param([(PAYMENT, ""), (DECISION, PAYMENT + DECISION)], id="payment before the decision"),
        pytest.param([('decide("handling"', 'decide("fraud"')], id="another decision"),
        pytest.param([('key=order["order_id"]', 'key="another"')], id="another key"),
    ],
)
async def test_another_order_of_it_is_noticed(
    changes: list[tuple[str, str]], shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayer = Replayer(workflows=[module(shop, monkeypatch, *changes).OrderWorkflow])
    with pytest.raises(NondeterminismError):
        await replayer.replay_workflow(recorded("completed"))


async def record() -> None:
    HISTORIES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made, TemporalServer() as temporal:
        folder = Path(made)
        write_shop(folder)
        client = await temporal.client()
        async with ModelServer(rules=RULES) as model:
            with worker(folder, "recorded", temporal, model, RUNNING):
                for name, order in RUNS.items():
                    handle = await start(client, "recorded", order)
                    await handle.result()
                    history = _without_place(json.loads((await handle.fetch_history()).to_json()))
                    (HISTORIES / f"{name}.json").write_text(json.dumps(history, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    asyncio.run(record())
    time.sleep(0.3)  # the threads of a Temporal client
