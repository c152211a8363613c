"""Random flows mean on every runtime what the reference says.

A test that fails shows a plan, which can be pasted: `assert told_by_run(plan) == {}`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import selectors
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import Phase, given, seed, settings

from beluga_airflow import FlowResult, run
from beluga_airflow.config import Settings
from beluga_airflow.execute import merge
from beluga_airflow.graph import Identity, Shape
from beluga_airflow.graph.locate import load_flow
from beluga_airflow.graph.progress import Progress
from beluga_airflow.temporal.client import Target, connect
from beluga_airflow.temporal.messages import FLOW_WORKFLOW, FlowCall
from beluga_airflow.testing import TemporalServer
from tests.conformance.random_flows import Plan, Report, path_of, plans, reports
from tests.conformance.reference import Meaning, Tie, meaning
from tests.temporal.conftest import Side

ROOT = Path(__file__).resolve().parents[2]
INPUTS = {"x": 0, "bag": []}
"""The input of every flow, beside the token under which its steps report."""
TICK = 0.01
"""Seconds of the virtual clock."""
AT_ONCE = 20
"""How many flows run at once on Temporal."""
PATIENCE = 30.0
"""Seconds after which what a flow is waited for is held never to come."""

Differences = dict[str, tuple[Any, Any]]
"""Where a run is not as it must be: how it is, and how it must be."""


def certain(plan: Plan) -> bool:
    """Whether nothing about a flow's end is left to chance."""
    try:
        meaning(plan, INPUTS)
    except Tie:
        return False
    return True


PLANS = plans().filter(certain)


def drawn(count: int) -> list[Plan]:
    """As many different plans, by pytest's random seed."""
    found: dict[str, Plan] = {}

    @seed(random.getrandbits(32))
    @settings(max_examples=3 * count, database=None, phases=[Phase.generate], deadline=None)
    @given(PLANS)
    def collect(plan: Plan) -> None:
        found[repr(plan)] = plan

    collect()
    return random.sample([*found.values()], count)


@pytest.fixture(scope="module")
def some() -> list[Plan]:
    """As many flows as shall agree everywhere."""
    return drawn(200)


def show(told: Sequence[tuple[Plan, Differences]]) -> None:
    """Fail with the smallest of the flows that differ, if any do."""
    faults = [(plan, found) for plan, found in told if found]
    if faults:
        plan, found = min(faults, key=lambda fault: len(repr(fault[0])))
        lines = "\n".join(f"{what}: {is_}\n  must be {must}" for what, (is_, must) in found.items())
        pytest.fail(f"{len(faults)} of {len(told)} flows differ, the smallest is\nplan = {plan!r}\n{lines}")


def differences(wanted: Meaning, result: FlowResult, report: Report) -> Differences:
    """Of a run in this process or on Temporal, from the reference."""
    trace = [(path, running & wanted.functions) for path, running in wanted.trace if path in wanted.functions]
    pairs = {
        "status": (result.status, wanted.status),
        "data": (result.data, wanted.data),
        "steps": (result.steps, wanted.steps),
        "order": (report.trace, trace),
        **_of_calls(wanted, report.calls, result.undone),
    }
    return _differing(wanted, pairs, result.error)


def _of_calls(wanted: Meaning, calls: Sequence[tuple[str, int, Any]], undone: Mapping[str, str]) -> Differences:
    by_path = [(key.rpartition("/")[2], number, saw) for key, number, saw in calls]
    undos, wanted_undos = ([call for call in some if call[0].endswith(".undo")] for some in (by_path, wanted.calls))
    return {
        "calls": (sorted(by_path, key=str), sorted(wanted.calls, key=str)),
        "order of undoing": (undos, wanted_undos),
        "undone": ({step: how == "undone" for step, how in undone.items()}, wanted.undone),
        "number of scopes": (len({key.rpartition("/")[0] for key, *_ in calls}), min(1, len(calls))),
    }


def _differing(wanted: Meaning, pairs: Differences, error: str | None) -> Differences:
    as_said = error is None if not wanted.errors else any(all(word in str(error) for word in w) for w in wanted.errors)
    found = {what: pair for what, pair in pairs.items() if pair[0] != pair[1]}
    return found if as_said else {**found, "error": (error, wanted.errors)}


# in this process


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes at once, and only while there is nothing to do."""

    def __init__(self) -> None:
        self._waits = _Waits()
        super().__init__(self._waits)

    def time(self) -> float:
        return self._waits.passed


class _Waits(selectors.DefaultSelector):
    passed = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.passed += timeout or 0.0
        return super().select(timeout and 0)


def by_run(plan: Plan, token: str) -> tuple[FlowResult, Report]:
    """Run a flow in this process, every step as long as it takes."""

    async def sleeping(path: str, ticks: int) -> None:
        await asyncio.sleep(ticks * TICK)

    report = reports[token] = Report(pace=sleeping)
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        result = runner.run(run(load_flow(path_of(plan)), {**INPUTS, "token": token}, key=token))
    return result, report


def told_by_run(plan: Plan) -> Differences:
    """Where `run()` differs from the reference."""
    return differences(meaning(plan, {**INPUTS, "token": "run"}), *by_run(plan, "run"))


@given(PLANS)
@settings(max_examples=200, deadline=None)
def test_by_run(plan: Plan) -> None:
    show([(plan, told_by_run(plan))])


MUTATIONS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "all edges are taken": (
        Shape,
        "ready",
        lambda old: lambda self, done, *more: old(self, {step: self.targets[step] for step in done}, *more),
    ),
    "something new starts": (Progress, "ending", lambda old: False),
    "undone in order": (Progress, "to_undo", lambda old: property(lambda self: old.fget(self)[::-1])),
    "no cap": (
        Progress,
        "__init__",
        lambda old: lambda self, shape, *more: old(self, replace(shape, max_workers=len(shape.steps)), *more),
    ),
    "reduced backwards": (merge, "reduce", lambda old: lambda reducer, values: old(reducer, values[::-1])),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_another_meaning_is_noticed(some: list[Plan], mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the checks."""
    owner, name, change = MUTATIONS[mutation]
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))
    assert any(told_by_run(plan) for plan in some)


# on Temporal


async def on_temporal(side: Side, plan: Plan, token: str) -> tuple[FlowResult, Report]:
    """Run a flow on Temporal; its steps end in the order of the reference."""
    flow = load_flow(path_of(plan))
    gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
    report = reports[token] = Report(pace=lambda path, ticks: gates[path].wait())
    call = FlowCall(
        path=path_of(plan),
        shape=Settings().settle(flow.check(), durable=True).to_json(),
        inputs={**INPUTS, "token": token},
        scope=Identity.of(flow.name, token).scope,
    )
    started = await side.start(FLOW_WORKFLOW, call)

    async def run_at_once(paths: Set[str]) -> bool:
        return report.in_flight >= paths

    async def has_ended(path: str) -> bool:
        progress = await side.handle(started).query("progress")
        return path in [*progress["finished"], *progress["failed"]]

    wanted = meaning(plan, {**INPUTS, "token": token})
    for path, running in wanted.trace:
        await _until(run_at_once, running & wanted.functions)
        gates[path].set()
        await _until(has_ended, path)
    return await side.result(started), report


async def _until(holds: Callable[[Any], Awaitable[bool]], what: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not await holds(what):
        assert time.monotonic() < deadline, f"it did not come in time that {what} {holds.__name__}"
        await asyncio.sleep(0.01)


async def _all_on_temporal(server: TemporalServer, plans: Mapping[str, Plan]) -> dict[str, Any]:
    target = Target(address=server.address, task_queue=f"random-{uuid4().hex}")
    side = Side(client=await connect(target), target=target)
    places = asyncio.Semaphore(AT_ONCE)

    async def one(token: str, plan: Plan) -> tuple[FlowResult, Report]:
        async with places:
            return await on_temporal(side, plan, token)

    # room for all steps of all flows: those that wait for others must not keep them out
    async with side.worker(concurrency=10 * AT_ONCE):
        ended = await asyncio.gather(*(one(*item) for item in plans.items()), return_exceptions=True)
    return dict(zip(plans, ended, strict=True))


def test_on_temporal(some: list[Plan], temporal_server: TemporalServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)  # hundreds of steps fail as they must
    plans = {uuid4().hex: plan for plan in some}
    local = {token: by_run(plan, token)[0] for token, plan in plans.items()}
    told: list[tuple[Plan, Differences]] = []
    for token, ended in asyncio.run(_all_on_temporal(temporal_server, plans)).items():
        if isinstance(ended, BaseException):
            told.append((plans[token], {"end": (repr(ended), local[token])}))
            continue
        result, report = ended
        found = differences(meaning(plans[token], {**INPUTS, "token": token}), result, report)
        told.append((plans[token], found if result == local[token] else {**found, "by run()": (result, local[token])}))
    show(told)


# as a task group

DAGS = """\
from airflow.sdk import DAG

from beluga_airflow.task_group import GraphTaskGroup

for token, path in {paths!r}.items():
    with DAG(token, schedule=None):
        GraphTaskGroup(group_id="flow", flow=path, inputs={{**{inputs!r}, "token": token}})
"""


def run_dags(folder: str, result: str) -> None:
    """In a process of its own: run every DAG of a folder and write what came of it to a file."""
    from airflow.utils.db import initdb

    initdb()
    from airflow.dag_processing.dagbag import BundleDagBag

    bag = BundleDagBag(folder, bundle_path=Path(folder), bundle_name="dags-folder")
    assert not bag.import_errors, bag.import_errors
    ended = {}
    for token, dag in bag.dags.items():
        run = dag.test()
        tasks = {task.task_id.removeprefix("flow."): task for task in run.get_task_instances()}
        ended[token] = {
            "state": str(run.state),
            "tasks": {
                path: (str(task.state), task.start_date.timestamp(), task.end_date.timestamp())
                for path, task in tasks.items()
                if task.state in ("success", "failed")
            },
            **{
                key: {path: task.xcom_pull(task_ids=task.task_id, key=key) for path, task in tasks.items()}
                for key in ("return_value", "failure")
            },
            "calls": reports[token].calls,
            "events": reports[token].events,
        }
    Path(result).write_text(json.dumps(ended))


class Seen:
    """The order in which the tasks of a group ran, for the reference to play."""

    def __init__(self, events: Sequence[tuple[float, str, str]]) -> None:
        self.events = [(what, path) for _, what, path in sorted(events)]
        self.waiting: list[str] = []

    def starts(self, ready: Sequence[str]) -> list[str]:
        """Who of the ready begins before the next one ends."""
        found = []
        while self.events and self.events[0] in [("began", path) for path in ready]:
            found.append(self.events.pop(0)[1])
        self.waiting = [path for path in ready if path not in found]
        return found

    def ends(self, running: Mapping[str, int]) -> str:
        """Who of the running ends next."""
        place = next(place for place, event in enumerate(self.events) if event in [("ended", path) for path in running])
        return self.events.pop(place)[1]


def told_by_group(plan: Plan, token: str, ended: Mapping[str, Any]) -> Differences:
    """Where a task group differs from the reference, which plays the order in which the tasks ran."""
    steps = {path: task for path, task in ended["tasks"].items() if path not in ("result", "undo")}
    events = [tuple(event) for event in ended["events"]]
    told = {path for *_, path in events}
    for path, (_, start, end) in steps.items():
        if path not in told:  # no function was called
            events += (start, "began", path), (end, "ended", path)
    seen = Seen(events)
    wanted = meaning(plan, {**INPUTS, "token": token}, seen.ends, seen.starts)
    failed, returned = wanted.status == "failed", ended["return_value"]
    # its task runs, to see what the flow's data is
    skipped_end = {path for path, how in wanted.steps.items() if how == "failed"} - {path for path, _ in wanted.trace}
    pairs = {
        "state": (ended["state"], "failed" if failed else "success"),
        "result": (returned["result"], None if failed else {"status": wanted.status, "data": wanted.data}),
        "steps": (
            {path: "failed" if state == "failed" else "completed" for path, (state, *_) in steps.items()},
            {path: how for path, how in wanted.steps.items() if how != "skipped"},
        ),
        "never ran": (seen.waiting, []),
        "ran": ({path for _, path in seen.events}, skipped_end),
        **_of_calls(wanted, [tuple(call) for call in ended["calls"]], (returned.get("undo") or {}).get("undone", {})),
    }
    # each step that failed says why
    said = [failure["error"] for failure in ended["failure"].values() if failure]
    return _differing(wanted, pairs, "; ".join(said) or None)


def test_as_task_groups(some: list[Plan], tmp_path: Path) -> None:
    plans = {f"random_{number}": plan for number, plan in enumerate(some[:20])}
    dags, result = tmp_path / "dags", tmp_path / "result.json"
    dags.mkdir()
    paths = {token: path_of(plan) for token, plan in plans.items()}
    (dags / "random_flows_dags.py").write_text(DAGS.format(paths=paths, inputs=INPUTS))
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import run_dags; run_dags({str(dags)!r}, {str(result)!r})"],
        cwd=ROOT,
        env=os.environ
        | {
            "AIRFLOW_HOME": str(tmp_path),
            "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.exists(), (done.stdout + done.stderr)[-4000:]
    ended = json.loads(result.read_text())
    assert ended.keys() == plans.keys()
    show([(plan, told_by_group(plan, token, ended[token])) for token, plan in plans.items()])
