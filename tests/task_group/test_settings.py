"""What of the configuration file becomes part of the DAG, and what each task reads when it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG

from beluga_airflow import Chain, Graph, Retry
from beluga_airflow.errors import InvalidSetting
from beluga_airflow.task_group import GraphTaskGroup

Write = Callable[[str], Path]


def nothing(data: dict[str, Any]) -> None:
    return None


def slow(data: dict[str, Any]) -> None:
    time.sleep(0.3)


def chain(timeout: str = "5m", max_retries: int = 3) -> str:
    return f"orchestration: {{chain: {{timeout: {timeout}, max_retries: {max_retries}}}}}\n"


def group_of(flow: Any) -> GraphTaskGroup:
    with DAG("orders", schedule=None):
        return GraphTaskGroup("g", flow=flow)


def wide(**options: Any) -> Graph:
    return Graph("wide", **options).add_node("a", nothing).add_node("b", nothing).add_node("c", nothing)


def edges(group: GraphTaskGroup) -> set[tuple[str, str]]:
    return {
        (name, below.removeprefix("g."))
        for name in "abc"
        for below in group.dag.get_task(f"g.{name}").downstream_task_ids
        if below != "g.result"
    }


def test_retries_and_the_order_of_tasks_are_the_dags(config_file: Write) -> None:
    config_file("{}")
    assert edges(group_of(wide())) == set()
    assert group_of(wide()).dag.get_task("g.a").retries == 2
    config_file("orchestration: {graph: {max_workers: 2}, chain: {max_retries: 7}}")
    assert edges(group_of(wide())) == {("a", "c")}
    assert edges(group_of(wide(max_workers=3))) == set(), "the flow goes before the file"
    assert group_of(Chain("c").add_step("a", nothing)).dag.get_task("g.a").retries == 7
    assert group_of(Chain("c", retry=Retry(maximum_attempts=2)).add_step("a", nothing)).dag.get_task("g.a").retries == 1
    config_file("orchestration: {graph: {parallel_execution: false}}")
    assert edges(group_of(wide())) == {("a", "b"), ("b", "c")}
    assert edges(group_of(wide(parallel=True))) == set()


def test_workflows_on_temporal_are_no_matter_of_it(config_file: Write) -> None:
    config_file("orchestration: {workflow: {max_retries: 9, timeout: 1}}")
    assert group_of(wide()).dag.get_task("g.a").retries == 2


@pytest.mark.parametrize("text", ["llm: {", None])
def test_a_fault_in_it_is_an_import_error(text: str | None, config_file: Write) -> None:
    path = config_file(text or "")
    if text is None:
        path.unlink()
    with pytest.raises(InvalidSetting, match=str(path)):
        group_of(wide())


def test_a_task_reads_the_time_when_it_starts(tasks_of: Any, config_file: Write) -> None:
    config_file("{}")
    tasks = tasks_of(Chain("slow").add_step("a", slow).add_step("b", slow))
    assert tasks.run("a").state == "success"
    config_file(chain("250ms"))
    run = tasks.run("b")
    assert "flow 'slow' used up its timeout of 0.25 s" in str(run.error)


def test_a_task_tells_of_a_fault_that_came_later(tasks_of: Any, config_file: Write) -> None:
    path = config_file("{}")
    tasks = tasks_of(Chain("c").add_step("a", nothing))
    config_file("llm:\n  modl: x\n")
    run = tasks.run("a")
    assert run.state == "failed"
    assert str(run.error).startswith(f"InvalidSetting: {path}:2: unknown key 'llm.modl': did you mean 'llm.model'?")


def test_tasks_go_on_when_the_caps_of_the_file_have_changed(tasks_of: Any, config_file: Write) -> None:
    config_file("{}")
    tasks = tasks_of(wide())
    config_file("orchestration: {graph: {max_workers: 1, parallel_execution: false}}")
    for step in ("c", "b", "a", "result"):
        run = tasks.run(step)
        assert run.state == "success", run.error
    assert run.return_value["status"] == "completed"


def test_undoing_has_the_retries_that_are_in_force(tasks_of: Any, config_file: Write) -> None:
    undone: list[str] = []

    def undo(data: dict[str, Any]) -> None:
        undone.append("a")
        raise ConnectionError("not now")

    def fails(data: dict[str, Any]) -> None:
        raise ValueError("no")

    config_file(chain(max_retries=0))
    tasks = tasks_of(Chain("c").add_step("a", nothing, compensate=undo).add_step("b", fails))
    tasks.run("a", "b")
    config_file(chain(max_retries=1))
    assert tasks.run("undo").state == "failed"
    assert len(undone) == 2
