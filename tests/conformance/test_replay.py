"""What was recorded of the examples on Temporal replays on today's workflow code, and on no other."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer
from temporalio.workflow import NondeterminismError

from beluga_airflow.temporal import flow_workflow
from beluga_airflow.temporal.messages import DATA_CONVERTER
from beluga_airflow.temporal.worker import workflow_runner
from tests.conformance.record_histories import FOLDER, missing

HISTORIES = sorted(file.stem for file in FOLDER.glob("*.json"))
TOO_MUCH: set[str] = set()
STARTS, UNDOES = "in self._progress.start():", "in self._progress.to_undo:"


def recorded(name: str) -> WorkflowHistory:
    return WorkflowHistory.from_json(name, (FOLDER / f"{name}.json").read_text())


def replayer(module: ModuleType) -> Replayer:
    return Replayer(workflows=[module.FlowWorkflow], workflow_runner=workflow_runner(), data_converter=DATA_CONVERTER)


def copied(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str = "", other: str = "") -> ModuleType:
    """The module of the workflow as a copy in which other code stands in place of some."""
    text = inspect.getsource(flow_workflow)
    assert code in text
    (folder / "copy_of_flow_workflow.py").write_text(text.replace(code, other))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "copy_of_flow_workflow", raising=False)
    return importlib.import_module("copy_of_flow_workflow")


def test_every_example_is_recorded_but_those_with_much_data() -> None:
    assert {example.name for example in missing()} == TOO_MUCH


@pytest.mark.parametrize("name", HISTORIES)
async def test_runs_that_began_on_an_earlier_version_can_go_on(name: str) -> None:
    replayed = await replayer(flow_workflow).replay_workflow(recorded(name))
    assert replayed.replay_failure is None


@pytest.mark.parametrize("name", ["copies", "undone"])
async def test_a_copy_of_the_workflow_can_go_on_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the next test: it is the order that makes the difference."""
    replayed = await replayer(copied(tmp_path, monkeypatch)).replay_workflow(recorded(name))
    assert replayed.replay_failure is None


@pytest.mark.parametrize(
    ("name", "code"),
    [("copies", STARTS), ("merged", STARTS), ("nested_twice", STARTS), ("undone", UNDOES), ("nested_undone", UNDOES)],
)
async def test_another_order_in_a_copy_of_the_workflow_is_noticed(
    name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = code.replace("in ", "in reversed(").replace(":", "):")
    module = copied(tmp_path, monkeypatch, code, other)
    with pytest.raises(NondeterminismError, match=r"does not match activity id"):
        await replayer(module).replay_workflow(recorded(name))
