"""Flows as task groups, by `dag.test()`: they end as they do by `run()`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from beluga_airflow import FlowResult, run
from beluga_airflow.testing import ScriptedModel
from tests.task_group import sample_flows as flows
from tests.task_group.running import runs_of

HERE = Path(__file__).parent
RUNS = [
    ["examples", {}, None],
    ["mapped", {}, None],
    ["mapped_over_nothing", {}, None],
    ["failing", {}, None],
    ["neighbours", {}, None],
    ["marked", {}, r"middle\.charge|end\.bad"],
]
NEVER_ASKED = {"conn_type": "beluga_llm", "extra": {"provider": "simulated", "base_url": "http://127.0.0.1:9/v1"}}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of each of RUNS, by DAG."""
    connections = {"AIRFLOW_CONN_BELUGA_LLM_DEFAULT": json.dumps(NEVER_ASKED)}
    runs = runs_of(HERE / "dags", RUNS, home=tmp_path_factory.mktemp("airflow"), environment=connections)
    return {run["dag"]: run for run in runs}


class Group:
    """What became of one group of a DAG, of one map index."""

    def __init__(self, ended: dict[str, Any], dag: str, group: str, index: int = -1) -> None:
        self.seen: list[str] = ended[dag]["seen"].get(group.rpartition(".")[2], [])
        self.tasks = {
            task["task_id"].removeprefix(f"{group}."): task
            for task in ended[dag]["tasks"]
            if task["task_id"].startswith(f"{group}.") and task["map_index"] == index
        }

    @property
    def states(self) -> dict[str, str]:
        return {name: task["state"] for name, task in self.tasks.items()}

    def in_state(self, *states: str) -> set[str]:
        return {name for name in self.tasks if self.states[name] in states and name not in ("undo", "result")}

    def left(self, task: str, key: str = "return_value") -> Any:
        return self.tasks[task]["xcoms"].get(key)

    @property
    def failures(self) -> list[dict[str, str]]:
        return [failure for name in self.tasks if (failure := self.left(name, "failure"))]


async def by_run(case: str, known: dict[str, FlowResult] = {}) -> FlowResult:  # noqa: B006  # runs each case once
    if case not in known:
        flow, inputs = flows.CASES[case]
        known[case] = await run(flow, {**inputs, "case": f"{case} by run()"}, model=ScriptedModel([]))
    return known[case]


def named(data: Any, case: str) -> Any:
    """``data`` of a run, as if its case had this name."""
    return json.loads(json.dumps(data).replace(f"{case} by run()", case))


@pytest.mark.parametrize("case", flows.CASES)
async def test_a_group_ends_as_a_run_does(ended: dict[str, Any], case: str) -> None:
    group, expected = Group(ended, "examples", case), await by_run(case)
    if expected.ok:
        assert group.states["result"] == "success"
        assert group.left("result") == {"status": expected.status, "data": named(expected.data, case)}
        assert not group.failures
    else:
        assert group.states["result"] == "upstream_failed"
        assert [failure["status"] for failure in group.failures] == [expected.status]
        # what could not be undone is added by the task that undoes
        assert (expected.error or "").startswith(group.failures[0]["error"])
    assert (group.left("result", "decisions") or {}).keys() == expected.decisions.keys()


@pytest.mark.parametrize("case", flows.CASES)
async def test_the_steps_of_a_group_end_as_those_of_a_run(ended: dict[str, Any], case: str) -> None:
    group, expected = Group(ended, "examples", case), await by_run(case)
    steps = {state: {step for step, end in expected.steps.items() if end == state} for state in expected.steps.values()}
    # of two steps that start at once, dag.test() runs one after the other: after a stop or failure the other one may
    # be among those that do not start any more
    assert group.in_state("success") <= steps.get("completed", set())
    if expected.status == "completed":
        assert group.in_state("success") == steps.get("completed", set())
        assert group.in_state("skipped") == steps.get("skipped", set())
    # in a run, the step in which time was up has not ended at all
    assert group.in_state("failed") == steps.get(
        "failed", {"late": {"sleep"}, "late_inside": {"ship.sleep"}}.get(case, set())
    )
    assert group.in_state("success", "skipped", "failed", "upstream_failed") == flows.CASES[case][0].steps.keys()


def test_a_step_is_tried_as_its_retry_says(ended: dict[str, Any]) -> None:
    tries = {
        f"{case}.{step}": Group(ended, "examples", case).tasks[step]["tries"]
        for case, step in (
            ("third", "try"),
            ("used_up", "pay"),
            ("invalid", "check"),
            ("listed", "check"),
            ("retry_after", "ask"),
            # what would mean something to Airflow means nothing else here than in a run
            ("airflow_skip", "skip"),
            ("airflow_fail", "fail"),
            ("exited", "exit"),
        )
    }
    assert list(tries.values()) == [3, 3, 1, 1, 2, 3, 3, 1]
    assert Group(ended, "examples", "used_up").seen == ["pay"] * 3


def test_what_a_server_asks_to_wait_is_waited(ended: dict[str, Any]) -> None:
    first, second = ended["examples"]["times"]["retry_after"]
    assert second - first >= flows.Busy.retry_after


def test_a_conflict_comes_before_the_finish_that_is_skipped(ended: dict[str, Any]) -> None:
    group = Group(ended, "examples", "conflict_at_skipped_end")
    assert "MergeConflict: steps 'l' and 'r'" in group.failures[0]["error"]
    assert group.left("undo") == {"undone": {"l": "undone"}}


# undoing


def test_finished_steps_are_undone_the_last_one_first(ended: dict[str, Any]) -> None:
    group = Group(ended, "examples", "refunded")
    assert group.seen == [
        *("reserve", "charge", "fulfil"),
        *("undo charge True charge.undo", "undo reserve True reserve.undo"),
    ]
    assert group.states["undo"] == "success"
    assert group.left("undo") == {"undone": {"charge": "undone", "reserve": "undone"}}


async def test_what_could_not_be_undone_is_loud(ended: dict[str, Any]) -> None:
    group = Group(ended, "examples", "not_refunded")
    assert group.seen[3:] == ["no refund", "no refund", "no refund", "undo reserve True reserve.undo"]
    assert group.states["undo"] == "failed"
    assert group.left("undo") == {"undone": (await by_run("not_refunded")).undone}


def test_nothing_is_undone_where_nothing_failed(ended: dict[str, Any]) -> None:
    undone = {case: Group(ended, "examples", case).states.get("undo") for case in flows.CASES}
    assert {case: state for case, state in undone.items() if state} == {
        "conflict_at_skipped_end": "success",
        "refunded": "success",
        "not_refunded": "failed",
        "nothing_undone": "skipped",
    }


# order


def test_one_at_a_time_is_in_topological_order(ended: dict[str, Any]) -> None:
    assert Group(ended, "examples", "one_at_a_time").seen == ["a", "b", "c", "d"]


def test_a_skipped_step_holds_up_no_entry_step_behind_it(ended: dict[str, Any]) -> None:
    group = Group(ended, "examples", "conditional_lanes")
    assert group.states == {"a": "success", "b": "skipped", "c": "success", "result": "success"}


# mapped


@pytest.mark.parametrize(
    ("index", "case", "states"),
    [
        (0, "good", {"fulfil": "success", "undo": "skipped", "result": "success"}),
        (1, "bad", {"fulfil": "failed", "undo": "success", "result": "upstream_failed"}),
        (2, "stopped", {"charge": "skipped", "fulfil": "skipped", "undo": "skipped", "result": "success"}),
        (3, "again", {"fulfil": "success", "undo": "skipped", "result": "success"}),
    ],
)
def test_each_of_a_mapped_group_comes_to_its_own_end(
    ended: dict[str, Any], index: int, case: str, states: dict[str, str]
) -> None:
    group = Group(ended, "mapped", "process.order", index)
    assert group.states == group.states | states
    seen = ended["mapped"]["seen"][case]
    assert [step for step in seen if step.startswith("undo")] == (
        ["undo charge True charge.undo"] if case == "bad" else []
    )
    if case != "bad":
        status = "out_of_stock" if case == "stopped" else "completed"
        assert (group.left("result")["status"], group.left("result")["data"]["case"]) == (status, case)


def test_the_results_of_a_mapped_group_are_a_list(ended: dict[str, Any]) -> None:
    (collected,) = (task for task in ended["mapped"]["tasks"] if task["task_id"] == "collect")
    assert [result["data"]["case"] for result in collected["xcoms"]["return_value"]] == ["good", "stopped", "again"]


def test_a_group_that_is_mapped_over_nothing_is_skipped(ended: dict[str, Any]) -> None:
    states = Group(ended, "mapped_over_nothing", "none.order").states
    assert states == dict.fromkeys(("stock", "credit", "charge", "fulfil", "undo", "result"), "skipped")


def test_a_group_that_cannot_be_mapped_fails_with_what_is_before_it(ended: dict[str, Any]) -> None:
    states = Group(ended, "mapped_over_nothing", "lost.order").states
    assert set(states.values()) == {"upstream_failed"}
    assert ended["mapped_over_nothing"]["state"] == "failed"


# with neighbours


def test_a_dag_run_whose_flow_failed_fails(ended: dict[str, Any]) -> None:
    assert ended["failing"]["state"] == "failed"


def test_input_comes_from_a_task_a_template_or_a_group(ended: dict[str, Any]) -> None:
    dag = "neighbours"
    data = {name: Group(ended, dag, name).left("result")["data"] for name in ("from_task", "from_params", "from_group")}
    assert data["from_task"]["order_id"] == "{{ not rendered }}"
    assert data["from_params"]["order_id"] == "o-7"
    assert data["from_group"]["data"] == data["from_params"]


def test_the_output_goes_to_the_next_task(ended: dict[str, Any]) -> None:
    (summary,) = (task for task in ended["neighbours"]["tasks"] if task["task_id"] == "summary")
    assert summary["xcoms"]["return_value"].startswith("completed ['attempt', 'case', ")


def test_keys_name_the_group_or_the_business_key(ended: dict[str, Any]) -> None:
    dag = "neighbours"
    keys = {name: Group(ended, dag, name).left("result")["data"]["key"] for name in ("from_task", "from_params")}
    assert keys["from_task"] == "keys/%7B%7B not rendered %7D%7D/keyed"
    assert keys["from_params"] == f"neighbours/{ended[dag]['run_id']}/from_params/-1/keyed"


def test_a_group_may_be_inside_a_group(ended: dict[str, Any]) -> None:
    data = Group(ended, "neighbours", "outer.inner").left("result")["data"]
    assert data["key"] == f"neighbours/{ended['neighbours']['run_id']}/outer.inner/-1/keyed"


def test_a_group_may_have_no_prefix(ended: dict[str, Any]) -> None:
    tasks = {task["task_id"]: task for task in ended["neighbours"]["tasks"]}
    assert tasks["ship.box.wrap"]["state"] == tasks["ship.result"]["state"] == tasks["result"]["state"] == "success"
    assert tasks["result"]["xcoms"]["return_value"]["data"]["label"] is True


@pytest.mark.parametrize("group", ["not_taken", "lanes_not_taken"])
def test_a_group_on_a_branch_that_is_not_taken_is_skipped(ended: dict[str, Any], group: str) -> None:
    assert set(Group(ended, "neighbours", group).states.values()) == {"skipped"}
    assert Group(ended, "neighbours", "taken").states["result"] == "success"


def test_a_group_behind_a_failed_task_undoes_nothing(ended: dict[str, Any]) -> None:
    states = Group(ended, "neighbours", "after_failure").states
    assert states.pop("undo") == "skipped"
    assert set(states.values()) == {"upstream_failed"}


# marked as success by hand


def test_a_step_that_was_marked_as_success_counts_as_having_returned_nothing(ended: dict[str, Any]) -> None:
    group = Group(ended, "marked", "end")
    assert group.left("result") == {"status": "completed", "data": {"a": True, "b": True, "c": True, "d": True}}


def test_what_was_done_by_hand_is_undone_loudly(ended: dict[str, Any]) -> None:
    group = Group(ended, "marked", "middle")
    assert group.states["undo"] == "failed"
    assert group.left("undo")["undone"]["reserve"] == "undone"
    assert "MissingKey: step 'charge.undo' reads 'charge'" in group.left("undo")["undone"]["charge"]
