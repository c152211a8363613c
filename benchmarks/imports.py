"""What do our modules add to the parsing of a DAG file? Imports in fresh processes, after ``import airflow.sdk``."""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from harness import Answer, Comparison, text

__all__ = ["measured"]

PROCESSES = 10
LIMIT = 50
ROOMS = ("operators", "sensors", "triggers", "hooks", "task_group")
FORBIDDEN = ("openai", "temporalio", "redis", "psycopg")
HEAVY = (*FORBIDDEN, "aiohttp", "genai_prices", "jsonschema", "langgraph", "pydantic_ai", "rich")
PEER = ["airflow.providers.standard.operators.python"]

PROGRAM = """
import importlib, json, sys, time
import airflow.sdk
names, heavy = json.loads(sys.argv[1])
before = set(sys.modules)
start = time.perf_counter()
for name in names:
    importlib.import_module(name)
milliseconds = (time.perf_counter() - start) * 1000
new = sys.modules.keys() - before
print(json.dumps({"cost": round(milliseconds, 3), "heavy": [name for name in heavy if name in new]}))
"""


def measured(processes: int = PROCESSES) -> Answer:
    """Our modules for DAG files and one of Airflow's own in turn; the first process of each does not count."""
    sides = {"beluga": our_modules(), "standard": PEER}
    samples: dict[str, list[float]] = {side: [] for side in sides}
    heavy: set[str] = set()
    with tempfile.TemporaryDirectory() as home:
        for turn in range(processes + 1):
            for side, modules in sides.items():
                cost, loaded = imported(modules, home)
                heavy.update(loaded if side == "beluga" else ())
                if turn:
                    samples[side].append(cost)
    return Answer(
        question=f"What does importing us cost? {processes} fresh processes, after airflow.sdk",
        unit="milliseconds",
        comparisons=[Comparison(work=f"{len(sides['beluga'])} modules of ours", samples=samples, limit=LIMIT)],
        versions={
            "apache-airflow": version("apache-airflow"),
            "standard": version("apache-airflow-providers-standard"),
        },
        notes=[loaded_heavy(heavy)],
    )


def our_modules() -> list[str]:
    """Every module of the rooms that DAG files import from, as far as the rooms exist."""
    found = []
    for room in ROOMS:
        spec = importlib.util.find_spec(f"beluga_airflow.{room}")
        if spec is not None:
            names = [module.name for module in pkgutil.iter_modules(spec.submodule_search_locations or [])]
            found += [spec.name, *(f"{spec.name}.{name}" for name in names)]
    return found


def imported(modules: list[str], home: str) -> tuple[float, list[str]]:
    """Milliseconds for these modules in a fresh process whose Airflow lives in ``home``, and what heavy they load."""
    # compiled once, by the first process, as an installation does: whatever this environment says of bytecode
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([modules, HEAVY])],
        cwd=home,
        env={**inherited, "AIRFLOW_HOME": home, "PYTHONPYCACHEPREFIX": str(Path(home, "bytecode"))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["cost"], answer["heavy"]


def loaded_heavy(heavy: set[str]) -> str:
    """What heavy came with our modules, for a reader."""
    wrong = sorted(heavy.intersection(FORBIDDEN))
    verdict = f"Target: none of {', '.join(FORBIDDEN)}: {'missed' if wrong else 'met'}."
    return f"Heavy modules that came with ours: {', '.join(sorted(heavy)) or 'none'}. {verdict}"


if __name__ == "__main__":
    print(text(measured()))
