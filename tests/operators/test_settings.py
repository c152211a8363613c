"""The configuration file, as operators read it: when a task runs, and never when its DAG is parsed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException

from beluga_airflow.hooks import settings as hooks_settings
from beluga_airflow.operators.batch import TemporalBatchOperator
from beluga_airflow.operators.decision import LLMDecisionOperator
from beluga_airflow.operators.flow import ChainOperator, GraphOperator
from beluga_airflow.operators.temporal import TemporalWorkflowOperator
from beluga_airflow.testing import OperatorRunner, TaskRun
from tests.operators import settled_flows as flows
from tests.operators.conftest import GOLD, Side, lines_of

PATH = "tests.operators.settled_flows"
Write = Callable[[str], Path]
DAG_FILE = f"""
from airflow.sdk import DAG

from beluga_airflow.operators.batch import TemporalBatchOperator
from beluga_airflow.operators.decision import LLMDecisionOperator
from beluga_airflow.operators.flow import ChainOperator, GraphOperator
from beluga_airflow.operators.temporal import TemporalWorkflowOperator

with DAG("orders", schedule=None):
    ChainOperator(task_id="chain", flow="{PATH}:open_chain", inputs="{{{{ params | tojson }}}}", params={{"token": ""}})
    GraphOperator(task_id="graph", flow="{PATH}:stuck")
    LLMDecisionOperator(task_id="decision", question="Well?", choices=["a", "b"], data={{"x": 1}})
    TemporalWorkflowOperator(task_id="durable", flow="{PATH}:open_chain")
    TemporalBatchOperator(task_id="batch", flow="{PATH}:open_chain", items=[])
"""


def chain(*, timeout: Any = 300, max_retries: int = 3) -> str:
    return f"orchestration: {{chain: {{timeout: {timeout}, max_retries: {max_retries}}}}}\n"


def graph(timeout: Any) -> str:
    return f"orchestration: {{graph: {{timeout: {timeout}}}}}\n"


def workflow(**values: Any) -> str:
    return f"orchestration:\n  workflow: {{{', '.join(f'{name}: {value}' for name, value in values.items())}}}\n"


def parsed(folder: Path) -> Any:
    from airflow.dag_processing.dagbag import DagBag

    return DagBag(folder)


# when it is read


@pytest.mark.parametrize("text", [None, "llm: {", chain(timeout="soon")])
def test_a_dag_is_parsed_without_it(
    text: str | None, config_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file(text or "")
    if text is None:
        path.unlink()
    asked: list[Path] = []
    monkeypatch.setattr(hooks_settings, "config_file", lambda: asked.append(path))
    folder = tmp_path / "dags"
    folder.mkdir()
    (folder / "orders.py").write_text(DAG_FILE)
    bag = parsed(folder)
    assert bag.import_errors == {}
    assert len(bag.dags["orders"].tasks) == 5
    assert asked == []


def test_it_is_read_when_the_task_runs(runner: OperatorRunner, config_file: Write, tmp_path: Path, token: str) -> None:
    folder = tmp_path / "dags"
    folder.mkdir()
    (folder / "orders.py").write_text(DAG_FILE)
    task = parsed(folder).dags["orders"].task_dict["chain"]
    for number, retries in enumerate((0, 1)):
        config_file(chain(max_retries=retries))
        run = runner.run(task, conf={"token": f"{token}-{retries}"}, run_id=f"run-{number}")
        assert str(run.error) == "flow failed: step 'pay' failed: ConnectionError: the bank is closed"
        assert flows.attempts[f"{token}-{retries}"] == retries + 1


def test_a_change_holds_for_the_next_run(runner: OperatorRunner, config_file: Write) -> None:
    operator = GraphOperator(task_id="t", flow=flows.stuck)
    for timeout in (0.1, 0.2):
        config_file(graph(timeout))
        run = runner.run(operator, run_id=f"run-{timeout}")
        assert f"flow 'stuck' used up its timeout of {timeout} s in step 'wait'" in str(run.error)


@pytest.mark.parametrize(
    "operator",
    [
        ChainOperator(task_id="t", retries=3, flow=flows.open_chain, inputs={"token": "x"}),
        GraphOperator(task_id="t", retries=3, flow=flows.stuck),
        LLMDecisionOperator(task_id="t", retries=3, question="?", choices=["a", "b"], data={"x": 1}),
        TemporalWorkflowOperator(task_id="t", retries=3, flow=flows.open_chain),
        TemporalBatchOperator(task_id="t", retries=3, flow=flows.open_chain, items=[]),
    ],
    ids=lambda operator: type(operator).__name__,
)
def test_a_fault_in_it_fails_the_task_for_good(operator: Any, runner: OperatorRunner, config_file: Write) -> None:
    path = config_file("orchestration:\n  chain: {timeout: soon}\n")
    run = runner.run(operator)
    assert (run.state, type(run.error)) == ("failed", AirflowFailException)
    assert str(run.error).startswith(f"InvalidSetting: {path}:2: 'orchestration.chain.timeout' is 'soon', it must be")
    path.unlink()
    run = runner.run(operator, run_id="again")
    assert str(run.error) == f"InvalidSetting: there is no file {path}; make it, or correct the path"


# what goes before what


def test_the_flow_goes_before_the_file(runner: OperatorRunner, config_file: Write, token: str) -> None:
    config_file(chain(max_retries=0))
    run = runner.run(ChainOperator(task_id="t", flow=flows.own_retry, inputs={"token": token}))
    assert (run.state, flows.attempts[token]) == ("failed", 2)
    config_file(graph(100))
    run = runner.run(GraphOperator(task_id="t", flow=flows.stuck_for_itself), run_id="other")
    assert "used up its timeout of 0.3 s" in str(run.error)


def test_the_model_is_the_decisions_then_the_connections_then_the_files(
    runner: OperatorRunner, config_file: Write
) -> None:
    extra = runner.connections["beluga_llm_default"]["extra"]

    def models(run_id: str) -> list[str]:
        run = runner.run(ChainOperator(task_id="t", flow=flows.asking, inputs=GOLD), run_id=run_id)
        assert run.state == "success", run.error
        return [run.xcoms["decisions"][step]["model"] for step in ("handling", "named")]

    assert models("default") == ["gpt-4o", "gpt-4.1"]
    config_file("llm: {model: gpt-4o-mini}")
    assert models("file") == ["gpt-4o-mini", "gpt-4.1"]
    extra["model"] = "o3-mini"
    assert models("connection") == ["o3-mini", "gpt-4.1"]


def test_state_is_kept_where_the_file_says(runner: OperatorRunner, config_file: Write, tmp_path: Path) -> None:
    config_file(f"state: {{url: 'sqlite:///{tmp_path / 'of-the-file.db'}'}}")
    operator = ChainOperator(task_id="t", flow=flows.asking, inputs=GOLD)
    assert runner.run(operator).state == "success"
    assert not (tmp_path / "of-the-file.db").exists(), "the connection says otherwise"
    del runner.connections["beluga_state_default"]
    assert runner.run(operator, run_id="other").state == "success"
    assert (tmp_path / "of-the-file.db").exists()


# on Temporal


async def to_end(side: Side, flow: Any, token: str, run_id: str) -> TaskRun:
    operator = TemporalWorkflowOperator(task_id="t", flow=flow, inputs={"token": token})
    return await side.run_to_end(operator, run_id=f"{side.run_id}-{run_id}")


async def test_steps_on_temporal_have_their_own_retries(side: Side, config_file: Write, token: str) -> None:
    config_file(workflow(max_retries=1))
    for flow, expected in [(flows.open_chain, 2), (flows.open_graph, 2)]:
        end = await to_end(side, flow, f"{token}-{flow.name}", flow.name)
        assert str(end.error) == "flow failed: step 'pay' failed: ConnectionError: the bank is closed"
        assert flows.attempts[f"{token}-{flow.name}"] == expected
    config_file(workflow(max_retries=0))
    await to_end(side, flows.own_retry, token, "own")
    assert flows.attempts[token] == 2, "a flow's own Retry goes before"


async def test_without_them_they_are_as_elsewhere(side: Side, config_file: Write, token: str) -> None:
    config_file(chain(max_retries=0))
    await to_end(side, flows.open_chain, token, "chain")
    assert flows.attempts[token] == 1


async def test_a_flow_on_temporal_has_the_workflows_time(side: Side, config_file: Write) -> None:
    config_file("orchestration: {graph: {timeout: 0.1}, workflow: {timeout: 0.5}}")
    end = await to_end(side, flows.stuck, "", "stuck")
    assert str(end.error).startswith("flow timed_out: flow 'stuck' used up its timeout of 0.5 s in step 'wait'")
    end = await to_end(side, flows.stuck_for_itself, "", "own")
    assert "used up its timeout of 0.3 s" in str(end.error)


async def test_items_of_a_batch_are_runs_in_a_process(side: Side, config_file: Write, token: str) -> None:
    operator = TemporalBatchOperator(task_id="t", flow=flows.open_chain, items=[{"token": token}])
    for attempts in (1, 2):
        config_file(f"orchestration: {{chain: {{max_retries: {attempts - 1}}}, workflow: {{max_retries: 5}}}}")
        flows.attempts[token] = 0
        end = await side.run_to_end(operator, run_id=f"{side.run_id}-{attempts}")
        (line,) = lines_of(end.return_value["results"])
        assert line["status"] == "failed"
        assert flows.attempts[token] == attempts


async def test_the_server_is_where_the_file_says(side: Side, config_file: Write, token: str) -> None:
    connection = side.runner.connections.pop("temporal_default")
    address, queue = f"{connection['host']}:{connection['port']}", connection["extra"]["task_queue"]
    config_file(workflow(temporal=f"{{address: '{address}', task_queue: {queue}}}", max_retries=0))
    end = await to_end(side, flows.open_chain, token, "there")
    assert str(end.error) == "flow failed: step 'pay' failed: ConnectionError: the bank is closed"
    assert flows.attempts[token] == 1
