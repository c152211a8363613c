"""The snippets of docs/ are right: all compile and import what there is; those of state.md and decisions.md run."""

from __future__ import annotations

import ast
import asyncio
import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag

from beluga_airflow.hooks.state import StateHook
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.testing import OperatorRunner

DOCS = Path(__file__).resolve().parents[1] / "docs"


def snippets(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


PYTHON = [
    pytest.param(text, id=f"{page.stem}-{number}")
    for page in sorted(DOCS.glob("*.md"))
    for number, text in enumerate(snippets(page))
]
STATE = snippets(DOCS / "state.md")


@pytest.mark.parametrize("text", PYTHON)
def test_a_snippet_compiles_and_imports_what_there_is(text: str) -> None:
    ours = [
        (node.module, name.name)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("beluga_airflow")
        for name in node.names
    ]
    assert [found for found in ours if not hasattr(importlib.import_module(found[0]), found[1])] == []


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def running(marker: str) -> str:
    """The one snippet of state.md that has this in it."""
    (text,) = [text for text in STATE if marker in text]
    return text


def names_of(marker: str) -> dict[str, Any]:
    """What that snippet leaves behind when it has run."""
    names: dict[str, Any] = {}
    exec(running(marker), names)  # noqa: S102  # our own page
    return names


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module that a predicate is imported from."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "rules.py").write_text("def is_large(value):\n    return value['total'] > 1000\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


def test_a_plain_task_counts(operator_runner: OperatorRunner, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/state.db"
    operator_runner.connections["beluga_state_default"] = {"conn_type": "beluga_state", "extra": {"url": url}}
    (tmp_path / "counting_dag.py").write_text(running('DAG("counting"'))
    bag = DagBag(tmp_path)
    assert not bag.import_errors
    task = bag.dags["counting"].task_dict["count"]
    assert [operator_runner.run(task, run_id=f"r{number}").return_value for number in range(3)] == [1, 2, 3]


async def test_what_must_not_be_lost_is_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = await asyncio.to_thread(names_of, "compare_and_swap")
    assert capsys.readouterr().out == "1\n"
    counts = await asyncio.gather(*(names["count"]("sqlite:///state.db") for _ in range(10)))
    assert sorted(counts) == list(range(2, 12))


async def test_a_follower_sees_every_change_and_survives_lost_history() -> None:
    follow = names_of("HistoryLost")["follow"]
    store, seen = MemoryStore(history=10), {}
    for number in range(20):
        await store.set("orders/1", number)
    following = asyncio.create_task(follow(store, seen, after=1))
    async with asyncio.timeout(10):
        while seen != {"orders/1": 19}:  # noqa: ASYNC110  # the page's function tells nobody
            await asyncio.sleep(0.01)
        await store.set("orders/2", "new")
        await store.delete("orders/1")
        while seen != {"orders/1": "gone", "orders/2": "new"}:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await store.close()


async def test_keys_that_begin_so_are_forgotten() -> None:
    store = MemoryStore()
    for name in ("beluga/decisions/d/r/1", "beluga/decisions/d/r/2", "beluga/decisions/d/r2/1"):
        await store.set(name, {})
    assert await names_of("gone +=")["forget"](store, "beluga/decisions/d/r/") == 2
    assert [key async for key in store.keys("")] == ["beluga/decisions/d/r2/1"]
    await store.close()


def test_sensors_and_watchers_are_as_described(shop: None) -> None:
    names_of("StateSensor(")
    watched = names_of("AssetWatcher(")["desk"].watchers
    assert [watcher.trigger.prefix for watcher in watched] == ["desk/"]


async def test_connections_lead_where_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    exports = [shlex.split(line)[1] for text in snippets(DOCS / "state.md", "sh") for line in text.splitlines()]
    names = [assignment.partition("=")[0] for assignment in exports]
    for assignment in exports:
        name, _, text = assignment.partition("=")
        assert json.loads(text)["conn_type"] in ("beluga_state", "redis", "postgres")
        monkeypatch.setenv(name, text)
    stores = [await StateHook(name.removeprefix("AIRFLOW_CONN_").lower()).store() for name in names]
    assert [store.url for store in stores] == [
        "rediss://cache.internal:6380/0",
        "rediss://cache.internal:6379/3",
        "postgresql://db.internal:5432/shop",
    ]
    for store in stores:
        await store.close()


def test_the_page_names_all_prefixes_of_our_keys() -> None:
    code = "".join(file.read_text() for file in (DOCS.parent / "beluga_airflow").rglob("*.py"))
    # of Airflow's task and asset state
    elsewhere = {"flow@", "began@", "attempt", "undoing", "undone", "workflow", "watcher"}
    elsewhere |= {"no-key", "state.db", "results"}  # no keys
    used = set(re.findall(r"""["`]beluga/([\w@.-]+)""", code)) - elsewhere
    page = (DOCS / "state.md").read_text()
    assert used >= {"batches", "breakers", "checkpoints", "decisions", "flows", "limits", "memory", "probes"}
    assert [prefix for prefix in sorted(used) if f"`beluga/{prefix}" not in page] == []


@pytest.mark.parametrize(
    ("dag_id", "task_id", "answer"),
    [
        ("my_decision", "decide", "expedite"),
        ("my_decided_function", "decide", "expedite"),
        ("my_routing", "route", "expedite"),
    ],
)
def test_decisions_are_as_described(
    operator_runner: OperatorRunner, model_server: ModelServer, tmp_path: Path, dag_id: str, task_id: str, answer: str
) -> None:
    extra = {"provider": "simulated", "base_url": model_server.base_url}
    operator_runner.connections["beluga_llm_default"] = {"conn_type": "beluga_llm", "extra": extra}
    url = f"sqlite:///{tmp_path}/state.db"
    operator_runner.connections["beluga_state_default"] = {"conn_type": "beluga_state", "extra": {"url": url}}
    (text,) = [text for text in snippets(DOCS / "decisions.md") if f'DAG("{dag_id}"' in text]
    (tmp_path / f"{dag_id}_dag.py").write_text(text)
    bag = DagBag(tmp_path)
    assert not bag.import_errors
    order = {"order_id": "A-1", "order_value": 250.0, "customer_tier": "gold"}
    run = operator_runner.run(bag.dags[dag_id].task_dict[task_id], conf=order, xcoms={"load": order})
    assert (run.return_value, run.xcoms["decision"]["decided_by"]) == (answer, "model")
