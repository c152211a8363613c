from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from beluga_airflow import Chain, InvalidFlow
from beluga_airflow.errors import FlowNotFound
from beluga_airflow.graph.locate import load_flow, path_of

HEAD = "from beluga_airflow import Chain\ndef step(data): return None\n"

at_the_top = Chain("at-the-top").add_step("a", len)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Writes a module that can be imported while the test runs."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(HEAD + code)

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_flow_is_found_checked_and_the_same_each_time(module: Callable[[str, str], None]) -> None:
    module("shop_flows", "flow = Chain('orders').add_step('a', step)\n")

    flow = load_flow("shop_flows:flow")

    assert (flow.name, flow.step_count) == ("orders", 1)
    with pytest.raises(InvalidFlow, match="in use"):
        flow._change("a change")
    assert load_flow("shop_flows:flow") is flow
    assert path_of(flow) == "shop_flows:flow"


@pytest.mark.parametrize("path", ["", "module", "module:", ":flow", "module.flow"])
def test_a_path_needs_a_module_and_a_name(path: str) -> None:
    with pytest.raises(FlowNotFound, match=r"is not the import path of a flow; write it as 'package\.module:name'"):
        load_flow(path)


@pytest.mark.parametrize("path", ["no_such_module_of_ours:flow", "beluga_airflow.nowhere:flow", ".relative:flow"])
def test_a_module_that_is_not_there_is_named(path: str) -> None:
    with pytest.raises(FlowNotFound, match="cannot be imported in this process") as refused:
        load_flow(path)

    assert path in str(refused.value)
    assert "--import" in str(refused.value)


@pytest.mark.parametrize(
    ("code", "reason"),
    [("1 / 0", "ZeroDivisionError: division by zero"), ("def", "SyntaxError"), ("import nothing_such", "nothing_such")],
)
def test_a_module_that_cannot_be_imported_says_why(module: Callable[[str, str], None], code: str, reason: str) -> None:
    module("broken_flows", code)

    with pytest.raises(FlowNotFound, match=reason):
        load_flow("broken_flows:flow")


@pytest.mark.parametrize(
    ("code", "found"),
    [("", "has nothing of that name"), ("flow = 7", "has a int"), ("flow = Chain", "has a type")],
)
def test_something_else_than_a_flow_is_not_one(module: Callable[[str, str], None], code: str, found: str) -> None:
    module("other_flows", code)

    with pytest.raises(FlowNotFound, match=f"{found} where a Chain or Graph is wanted"):
        load_flow("other_flows:flow")


@pytest.mark.parametrize("code", ["flow = Chain('empty')", "flow = Chain('empty')\nflow.check()"])
def test_a_flow_that_cannot_run_is_refused_as_such(module: Callable[[str, str], None], code: str) -> None:
    module("bad_flows", code)

    with pytest.raises(InvalidFlow, match="flow 'empty' cannot run: it has no steps"):
        load_flow("bad_flows:flow")


def test_a_flow_at_the_top_of_its_module_has_a_path() -> None:
    assert path_of(at_the_top) == f"{__name__}:at_the_top"


def test_a_flow_inside_a_function_has_no_path_and_the_error_says_how_to_move_it() -> None:
    flow = Chain("inside").add_step("a", len)

    with pytest.raises(FlowNotFound) as refused:
        path_of(flow)

    assert f"flow 'inside', made in {__name__!r}, cannot be found by a worker" in str(refused.value)
    assert "Move it to the top level of a module that Airflow and the worker can both import" in str(refused.value)


@pytest.mark.parametrize("name", ["__main__", "unusual_prefix_1234_order_dag"])
def test_a_flow_of_a_script_or_a_dag_file_has_no_path(
    module: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    module("script_flows", "flow = Chain('script').add_step('a', step)\n")
    flow = load_flow("script_flows:flow")
    # as if the file had been loaded under that name
    monkeypatch.setitem(sys.modules, name, sys.modules["script_flows"])
    monkeypatch.delitem(sys.modules, "script_flows")
    monkeypatch.setattr(flow, "_module", name)

    with pytest.raises(FlowNotFound, match=f"made in '{name}', cannot be found"):
        path_of(flow)


def test_a_flow_that_a_function_made_for_a_module_is_found_there(module: Callable[[str, str], None]) -> None:
    module("flow_factory", "def make():\n    return Chain('made').add_step('a', step)\n")
    module("made_flows", "import flow_factory\nmade = flow_factory.make()\n")
    assert path_of(load_flow("made_flows:made")) == "made_flows:made"


def test_a_module_that_exits_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaves_at_once.py").write_text("import sys; sys.exit(0)")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(FlowNotFound, match="cannot be imported in this process: SystemExit: 0"):
        load_flow("leaves_at_once:flow")
