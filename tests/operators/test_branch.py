"""A decision about which way a DAG run goes on: LLMBranchDecisionOperator."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG, BaseOperator, TaskGroup
from airflow.sdk.exceptions import AirflowFailException

from beluga_airflow import InvalidFlow, Retry
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.operators.branch import LLMBranchDecisionOperator
from beluga_airflow.testing import OperatorRunner, TaskRun

FOLDER = Path(__file__).with_name("branch_dags")
PROGRAM = Path(__file__).with_name("run_branches.py")
RULES = [
    {"when": {"tier": "gold"}, "question": "Whole?", "answer": "wrapping"},
    {"when": {"tier": "bronze"}, "question": "By courier?", "answer": "join"},
    {"when": {"tier": "gold"}, "answer": "courier", "reason": "gold goes first"},
    {"when": {"tier": "bronze"}, "answer": "queue"},
]
ONCE = Retry(maximum_attempts=1)


# the skips are Airflow's: its scheduler's rules, by dag.test()


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    from anyio.from_thread import start_blocking_portal

    server = ModelServer(rules=RULES)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(server):
        yield server


@pytest.fixture(scope="module")
def ended(model: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of each DAG of the folder."""
    home = tmp_path_factory.mktemp("airflow")
    result = home / "result.json"
    connection = {"conn_type": "beluga_llm", "extra": {"provider": "simulated", "base_url": model.base_url}}
    done = subprocess.run(
        [sys.executable, PROGRAM, FOLDER, result],
        env={
            **os.environ,
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(FOLDER),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW_CONN_BELUGA_LLM_DEFAULT": json.dumps(connection),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.exists(), (done.stdout + done.stderr)[-4000:]
    print(done.stdout[-20000:])
    runs: dict[str, Any] = json.loads(result.read_text())
    return {**runs, "log": done.stdout}


def states(run: dict[str, Any]) -> dict[str, str]:
    return {name: task["state"] for name, task in run["tasks"].items()}


def ran(run: dict[str, Any]) -> set[str]:
    return {name for name, state in states(run).items() if state == "success"}


@pytest.mark.parametrize(
    ("dag", "prefix", "route"),
    [("plain", "", "route"), ("in_a_group", "orders.", "route"), ("decorated", "", "route_it")],
)
def test_one_way_is_taken_and_the_others_are_skipped(ended: dict[str, Any], dag: str, prefix: str, route: str) -> None:
    run = ended[dag]
    assert run["state"] == "success"
    assert states(run) == {
        f"{prefix}{route}": "success",
        f"{prefix}courier": "success",
        f"{prefix}desk": "skipped",
        f"{prefix}queue": "skipped",
        f"{prefix}join": "success",
    }


def test_record_and_return_value_are_there_although_it_skipped(ended: dict[str, Any]) -> None:
    route = ended["in_a_group"]["tasks"]["orders.route"]
    assert route["return_value"] == "orders.courier"
    assert (route["decision"]["answer"], route["decision"]["decided_by"]) == ("courier", "model")
    assert route["decision"]["reason"] == "gold goes first"


def test_what_follows_from_the_chosen_task_too_is_not_skipped(ended: dict[str, Any]) -> None:
    assert states(ended["empty_branch"]) == {"route": "success", "courier": "skipped", "join": "success"}


def test_a_task_group_is_one_choice(ended: dict[str, Any]) -> None:
    run = ended["to_a_group"]
    assert ran(run) == {"route", "wrapping.paper", "wrapping.bow"}
    assert states(run)["sending.desk"] == "skipped"
    assert run["tasks"]["route"]["return_value"] == "wrapping"


def test_each_of_a_mapped_group_goes_its_own_way(ended: dict[str, Any]) -> None:
    run = ended["mapped_group"]
    assert run["state"] == "success"
    assert {name for name in ran(run) if "route" not in name and "join" not in name} == {
        "one.courier[0]",
        "one.queue[1]",
        "one.desk[2]",
    }
    assert run["tasks"]["one.route[2]"]["decision"]["decided_by"] == "rule"
    assert {name for name in ran(run) if "join" in name} == {f"one.join[{index}]" for index in range(3)}


def test_each_of_a_mapped_task_goes_its_own_way_where_what_is_behind_it_is_mapped_alike(ended: dict[str, Any]) -> None:
    run = ended["mapped_pairwise"]
    assert ran(run) == {"orders", "route_each[0]", "route_each[1]", "courier[0]", "queue[1]"}


@pytest.mark.parametrize("dag", ["mapped_over_a_task", "mapped_alone"])
def test_where_airflow_would_run_every_branch_it_fails_before_it_asks(ended: dict[str, Any], dag: str) -> None:
    run = ended[dag]
    assert run["state"] == "failed"
    assert ran(run) <= {"orders"}
    assert {task["decision"] for task in run["tasks"].values()} == {None}
    assert "and would run every branch; map a task group around both over values in the DAG file" in ended["log"]


def test_a_choice_that_is_not_behind_it_fails_before_it_asks(ended: dict[str, Any]) -> None:
    assert ended["nowhere"]["tasks"]["route"]["state"] == "failed"
    says = "choice 'moon' of task 'route' is no task or task group directly behind it; there are courier, desk, queue"
    assert says in ended["log"]


# the decision, by the operator runner


@pytest.fixture
def model_rules() -> Any:
    return RULES


def operator(*behind: str, group: str | None = None, **arguments: Any) -> LLMBranchDecisionOperator:
    given: dict[str, Any] = {"task_id": "route", "question": "Who handles this order?", "data": {"tier": "gold"}}
    with DAG("orders", schedule=None):
        if group is None:
            return _wired(behind, given | arguments)
        with TaskGroup(group):
            return _wired(behind, given | arguments)


def _wired(behind: tuple[str, ...], arguments: dict[str, Any]) -> LLMBranchDecisionOperator:
    route = LLMBranchDecisionOperator(**arguments)
    for name in behind or ("courier", "desk", "queue"):
        route >> BaseOperator(task_id=name)
    return route


def offered(server: ModelServer) -> str:
    """What the model was told about the choices."""
    lines = str(server.requests[-1]["messages"][-1]["content"]).splitlines()
    return " ".join(line for line in lines if line.startswith("- "))


def assert_took(run: TaskRun, branch: str, decided_by: str) -> None:
    assert (run.state, run.return_value) == ("success", branch), run.error
    assert run.xcoms["decision"]["decided_by"] == decided_by
    assert run.xcoms["skipmixin_key"] == {"followed": [branch]}


def test_the_tasks_behind_it_are_the_choices(runner: OperatorRunner, model_server: ModelServer) -> None:
    assert_took(runner.run(operator()), "courier", "model")
    assert re.findall("courier|desk|queue", offered(model_server)) == ["courier", "desk", "queue"]


def test_choices_may_be_described_and_leave_some_out(runner: OperatorRunner, model_server: ModelServer) -> None:
    choices = {"queue": "the normal one", "courier": "ship today"}
    assert_took(runner.run(operator(choices=choices)), "courier", "model")
    told = re.findall("desk|queue|courier|the normal one|ship today", offered(model_server))
    assert told == ["queue", "the normal one", "courier", "ship today"]


@pytest.mark.parametrize("label", ["courier", "shop.courier"])
def test_in_a_group_a_choice_may_be_called_by_both_its_names(runner: OperatorRunner, label: str) -> None:
    rules = [(lambda _: True, label)]
    run = runner.run(operator(group="shop", choices=[label, "desk"], rules=rules))
    assert_took(run, "shop.courier", "rule")


@pytest.mark.parametrize(
    ("arguments", "branch", "decided_by"),
    [
        ({"rules": [(lambda order: order["tier"] == "gold", "desk")]}, "desk", "rule"),
        ({"fallback": "queue"}, "queue", "fallback"),
        ({"fallback": lambda order: "desk" if order["tier"] == "gold" else "queue"}, "desk", "fallback"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_rules_and_fallback(
    runner: OperatorRunner,
    model_server: ModelServer,
    arguments: dict[str, Any],
    branch: str,
    decided_by: str,
    given: bool,
) -> None:
    model_server.fail("status", status=503, times=9)
    choices = {"choices": ["courier", "desk", "queue"]} if given else {}
    assert_took(runner.run(operator(retry=ONCE, **choices, **arguments)), branch, decided_by)


def test_uncertain_without_a_fallback_branches_nowhere(runner: OperatorRunner, model_server: ModelServer) -> None:
    model_server.fail("refusal", times=9)
    run = runner.run(operator(retries=3))
    assert (run.state, type(run.error), run.xcoms) == ("failed", AirflowFailException, {})
    assert "Undecided" in str(run.error)


def test_a_lost_task_goes_the_same_way_without_asking_again(runner: OperatorRunner, model_server: ModelServer) -> None:
    first = runner.run(operator(retries=1))
    again = first.lose().retry()
    assert_took(again, "courier", "model")
    assert (again.xcoms, model_server.calls) == (first.xcoms, 1)
    assert (again.clear().return_value, model_server.calls) == ("courier", 2)


def test_without_xcoms_only_the_record_is_pushed(runner: OperatorRunner) -> None:
    assert "return_value" not in runner.run(operator(do_xcom_push=False)).xcoms


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"choices": ["courier"]}, "choices must be two or more different answers"),
        (
            {"choices": ["courier", "desk"], "fallback": "moon"},
            "'moon', of its rules or fallback, is none of its choices",
        ),
        ({"choices": ["courier", "desk"], "output_type": bool}, "it needs either choices or an output_type"),
        ({"output_type": bool}, "it needs either choices or an output_type"),
        ({"question": " "}, "its question is empty"),
        ({"retry": Retry(maximum_attempts=0)}, "maximum_attempts is 0"),
    ],
)
def test_what_can_never_be_sound_is_an_import_error_of_the_dag(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidFlow) as caught:
        operator(**arguments)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("behind", "arguments", "says"),
    [
        (
            (),
            {"choices": ["courier", "moon"]},
            "choice 'moon' of task 'route' is no task or task group directly behind",
        ),
        ((), {"fallback": "moon"}, "'moon', of its rules or fallback, is none of its choices"),
        (("courier",), {}, "choices must be two or more different answers"),
    ],
)
def test_what_shows_only_when_the_edges_are_drawn_fails_before_the_model_is_asked(
    runner: OperatorRunner, model_server: ModelServer, behind: tuple[str, ...], arguments: dict[str, Any], says: str
) -> None:
    run = runner.run(operator(*behind, retries=3, **arguments))
    assert (run.state, type(run.error), model_server.calls) == ("failed", AirflowFailException, 0)
    assert says in str(run.error)
