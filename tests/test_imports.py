"""A DAG file that names our operators is parsed every few seconds: it must not load what costs 0.3 to 2 s."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import beluga_airflow

HEAVY = {"openai", "temporalio", "redis", "psycopg", "genai_prices", "aiohttp", "jsonschema", "rich"}
ROOMS = ("operators", "sensors", "task_group", "hooks", "triggers")


def python(program: str, cwd: Path) -> str:
    """What a program prints, in a process of its own that knows what is heavy."""
    program = f"import sys\ndef heavy(): return sorted({HEAVY!r} & set(sys.modules))\n{program}"
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_module_for_dags_loads_anything_heavy(tmp_path: Path) -> None:
    root = Path(beluga_airflow.__path__[0])
    modules = [
        f"beluga_airflow.{room}.{found.name}" for room in ROOMS for found in pkgutil.iter_modules([str(root / room)])
    ]
    assert len(modules) > 10
    program = f"""
import importlib
import airflow.sdk
before = heavy()
for name in {modules!r}:
    importlib.import_module(name)
    new = sorted(set(heavy()) - set(before))
    assert not new, f"{{name}} loads {{new}}"
print("none")
"""
    assert python(program, tmp_path) == "none"


def test_a_dag_with_every_operator_loads_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text("""
from pydantic import BaseModel
from beluga_airflow import Chain, Decision, Graph

class Verdict(BaseModel):
    ok: bool

def step(data):
    return {}

judge = Decision("Well?", output_type=Verdict, reads=("x",), fallback={"ok": False})
chain = Chain("chain").add_step("step", step).add_step("judge", judge)
graph = Graph("graph").add_node("step", step)
""")
    program = """
from airflow.sdk import DAG, Asset, AssetWatcher, task
before = heavy()
import shop
from beluga_airflow.operators.batch import TemporalBatchOperator
from beluga_airflow.operators.branch import LLMBranchDecisionOperator
from beluga_airflow.operators.decision import LLMDecisionOperator
from beluga_airflow.operators.flow import ChainOperator, GraphOperator
from beluga_airflow.operators.temporal import TemporalWorkflowOperator
from beluga_airflow.sensors.state import StateSensor
from beluga_airflow.task_group import GraphTaskGroup
from beluga_airflow.triggers.state import StateChangeTrigger

orders = Asset("orders", watchers=[AssetWatcher(name="orders", trigger=StateChangeTrigger(prefix="orders/"))])
with DAG("orders", schedule=orders) as dag:
    StateSensor(task_id="sensor", key="orders/1")
    ChainOperator(task_id="chain", flow=shop.chain, inputs={"x": 1})
    GraphOperator(task_id="graph", flow="shop:graph")
    LLMDecisionOperator(task_id="decision", question="Well?", output_type=shop.Verdict, data={"x": 1})
    route = LLMBranchDecisionOperator(task_id="route", question="Where?", data={"x": 1})
    decorated = task.llm_decision(question="Well?", output_type=shop.Verdict)(shop.step)
    route >> [decorated({"x": 1}), decorated({"x": 2})]
    TemporalWorkflowOperator(task_id="durable", flow=shop.chain, inputs={"x": 1})
    TemporalBatchOperator(task_id="batch", flow="shop:graph", items=[{"x": 1}])
    GraphTaskGroup("group", flow="shop:graph", inputs={"x": 1})
print(len(dag.tasks), sorted(set(heavy()) - set(before)))
"""
    assert python(program, tmp_path) == "11 []"


def test_the_package_itself_loads_nothing_but_itself(tmp_path: Path) -> None:
    program = """
before = set(sys.modules)
import beluga_airflow
print(sorted(name for name in set(sys.modules) - before if name.startswith(("beluga", "airflow", "pydantic"))))
"""
    assert python(program, tmp_path) == "['beluga_airflow']"


def test_definitions_load_neither_airflow_nor_a_client(tmp_path: Path) -> None:
    program = """
from beluga_airflow import Chain, Decision, run
Chain("c").add_step("d", Decision("?", choices=["a", "b"], reads=("x",))).check()
print("airflow" in sys.modules, heavy())
"""
    assert python(program, tmp_path) == "False []"
