from __future__ import annotations

import importlib.util
import json
import re
import runpy
from pathlib import Path
from typing import Any

import curve
import harness
import imports
import pytest
import with_beluga
import with_taskgroup
from harness import HERE, PAGE, PEERS, Comparison, compared, sides
from work import INPUTS, Step, steps_of

QUESTIONS = sorted(file.stem for file in HERE.glob("*.py") if file.stem not in ("__main__", "harness"))
WORKS = [{"shape": shape, "sync": sync} for shape in ("order", 1, 10) for sync in (False, True)]
ORDER_ENDS = INPUTS | {
    "valid": True,
    "in_stock": True,
    "credit_ok": True,
    "payment_id": "payment-123",
    "fulfillment_id": "parcel-123",
    "message_id": "message-123",
}
with_peers = pytest.mark.skipif(not PEERS.exists(), reason="make bench installs the peers")


def step(name: str, *before: str, returns: dict[str, Any], seen: dict[str, Any] | None = None) -> Step:
    """An async step that leaves the data it got in ``seen``, and spoils it."""

    async def function(data):
        if seen is not None:
            seen[name] = json.loads(json.dumps(data))
        data.get("lines", []).append(name)
        data["spoilt"] = True
        return returns

    return Step(name=name, before=before, returns=returns, function=function)


def test_make_bench_asks_every_question() -> None:
    assert sorted(runpy.run_path(str(HERE / "__main__.py"))["QUESTIONS"]) == QUESTIONS
    assert all(callable(importlib.import_module(question).measured) for question in QUESTIONS)


def test_the_page_names_every_question_and_side_and_has_a_place_for_the_figures() -> None:
    page = PAGE.read_text()

    assert all(f"`benchmarks/{question}.py`" in page for question in QUESTIONS)
    assert all(f"| `{side.stem.removeprefix('with_')}` |" in page for side in HERE.glob("sides/with_*.py"))
    assert [page.count(mark) for mark in (harness.BEGIN, harness.END)] == [1, 1]
    assert page.index(harness.BEGIN) < page.index(harness.END)


def test_the_peers_are_pinned_whole() -> None:
    pins = [line for line in (HERE / "peers.txt").read_text().splitlines() if not line.startswith("#")]

    assert "langgraph==1.2.22" in pins
    assert len(pins) > 20
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)


@pytest.mark.parametrize("names", [("beluga", "taskgroup"), pytest.param(("beluga", "langgraph"), marks=with_peers)])
def test_the_sides_do_the_same_work(names: tuple[str, ...]) -> None:
    works = [work for work in WORKS if "taskgroup" not in names or not work["sync"]]
    with sides(*names) as running:
        found = [compared(running, work, runs=2, rounds=2) for work in works]
        ends = running[0].ask({"shape": "order", "sync": False}, 1)

    assert all(samples.keys() == set(names) for samples in found)
    assert all(len(costs) == 2 and min(costs) > 0 for samples in found for costs in samples.values())
    assert ends["data"] == ORDER_ENDS
    assert ends["ran"] == dict.fromkeys(
        ["validate", "check_inventory", "check_credit", "process_payment", "fulfill", "notify"], 1
    )


@with_peers
@pytest.mark.parametrize("question", ["steps", "curve"])
def test_a_question_is_answered(question: str) -> None:
    small = {"steps": {"runs": 2, "rounds": 2}, "curve": {"lengths": (3, 6), "steps": 6, "rounds": 2}}[question]

    answer = importlib.import_module(question).measured(**small)

    assert answer.versions.keys() == {"beluga", "langgraph"}
    assert answer.comparisons[0].samples.keys() == {"beluga", "langgraph", "taskgroup"}
    assert answer.question in harness.text(answer)


def test_without_the_peers_it_says_what_installs_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "PEERS", tmp_path / "python")

    with pytest.raises(FileNotFoundError, match="make bench installs the peers"), sides("langgraph"):
        pass


@pytest.mark.parametrize("side", [with_beluga, with_taskgroup])
async def test_steps_get_copies_of_the_same_data_on_both_sides(side: Any) -> None:
    seen: dict[str, Any] = {}
    program = side.program_of(
        [
            step("first", returns={"x": 1, "lines": ["a"]}, seen=seen),
            step("left", "first", returns={"x": 2}, seen=seen),
            step("right", "first", returns={"y": 3}, seen=seen),
            step("last", "left", "right", returns={"z": 4}, seen=seen),
        ]
    )
    inputs: dict[str, Any] = {"lines": []}

    ends = [await program(inputs), await program(inputs)]

    assert seen["first"] == {"lines": []}
    assert seen["left"] == seen["right"] == {"x": 1, "lines": ["a"]}
    # right has still the first step's x: it does not undo what left has set
    assert seen["last"] == {"x": 2, "y": 3, "lines": ["a"]}
    assert ends == [{"x": 2, "y": 3, "z": 4, "lines": ["a"]}] * 2
    assert inputs == {"lines": []}


def test_a_chain_is_as_long_as_asked_and_its_data_stays_small() -> None:
    steps = steps_of(300, sync=False, ran=[])

    assert [each.before for each in steps] == [(), *((each.name,) for each in steps[:-1])]
    assert {key for each in steps for key in each.returns} == {"seen"}


def test_growth_is_the_longest_over_the_shortest() -> None:
    found = [
        Comparison(work="10 steps", samples={"beluga": [4.0, 2.0, 3.0], "taskgroup": [1.0] * 3}),
        Comparison(work="30 steps", samples={"beluga": [99.0] * 3, "taskgroup": [99.0] * 3}),
        Comparison(work="100 steps", samples={"beluga": [6.0, 6.0, 9.0], "taskgroup": [0.5] * 3}),
    ]

    assert "at 100 steps, as a multiple of that at 10 steps: beluga 2.00, taskgroup 0.50." in curve.growth(found)


def test_our_modules_are_those_that_dag_files_import() -> None:
    modules = imports.our_modules()

    assert {"beluga_airflow.operators.flow", "beluga_airflow.triggers.temporal", "beluga_airflow.hooks.llm"} < {
        *modules
    }
    assert all(importlib.util.find_spec(module) for module in modules)
    assert not any(module.startswith("beluga_airflow.temporal") for module in modules)


def test_an_import_is_timed_and_what_heavy_it_brings_is_found(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(0.06)\nimport psycopg\n")
    (tmp_path / "psycopg.py").write_text("")

    cost, heavy = imports.imported(["slow"], str(tmp_path))

    assert cost >= 50
    assert heavy == ["psycopg"]


@pytest.mark.parametrize(
    ("heavy", "said"),
    [
        (set(), "with ours: none. Target: none of openai"),
        ({"rich"}, "ours: rich."),
        ({"redis"}, "redis, psycopg: missed"),
    ],
)
def test_what_heavy_came_with_us_is_said(heavy: set[str], said: str) -> None:
    sentence = imports.loaded_heavy(heavy)

    assert said in sentence
    assert sentence.endswith("missed." if "redis" in heavy else "met.")
