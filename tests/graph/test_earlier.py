"""What stands of an earlier run, when a flow is run again from one of its steps."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow import Graph
from beluga_airflow.config import Settings
from beluga_airflow.graph import Flow, Outcome, Shape
from beluga_airflow.graph.earlier import EarlierRun
from tests.graph.random_flows import flows, nothing, outcomes
from tests.graph.test_progress import played

ship = Graph("ship").add_node("pack", nothing).add_node("label", nothing).add_edge("pack", "label")
shop = (
    Graph("shop")
    .add_node("check", nothing)
    .add_node("pay", nothing)
    .add_node("ship", ship)
    .add_node("notify", nothing)
    .add_edge("check", "pay")
    .add_edge("check", "ship")
    .add_edge("ship", "notify")
    .check()
)
SHIPPED = {"ship.pack", "ship.label", "ship.result", "notify"}


def run_of(shape: Shape = shop, **changes: Any) -> EarlierRun:
    """A run in which all steps finished."""
    every = {step: Outcome(output={"by": step}, taken=shape.targets[step]) for step in shape.order}
    return EarlierRun(fingerprint=shape.fingerprint, inputs={"x": 1}, scope="shop/1", outcomes={**every, **changes})


@given(flows(), st.data())
def test_run_again_from_anywhere_a_flow_ends_as_it_did(flow: Flow, data: st.DataObject) -> None:
    shape = Settings().settle(flow.check())
    left = data.draw(outcomes(shape))
    whole, ran = played(shape, left, data)
    again = data.draw(st.sampled_from([*shape.order, *(group.path for group in shape.groups)]))
    earlier = EarlierRun(fingerprint="", inputs={}, scope="", outcomes={step: left[step] for step in ran})

    kept = earlier.kept(shape, again)
    second, ran_again = played(shape, left, data, kept)

    assert set(ran_again) == set(ran) & shape.rerun_from(again)
    assert {*kept, *ran_again} == set(ran)
    assert second.result({}) == whole.result({})


@pytest.mark.parametrize(
    ("again", "runs"),
    [
        ("ship", SHIPPED),
        ("ship.label", SHIPPED - {"ship.pack"}),
        ("pay", {"pay"}),
        ("check", set(shop.order)),
        ("shi", set()),
        ("", set()),
    ],
)
def test_what_runs_again_of_flows_inside_of_flows(again: str, runs: set[str]) -> None:
    assert shop.rerun_from(again) == runs
    assert set(run_of().kept(shop, again)) == set(shop.order) - runs


@pytest.mark.parametrize("changes", [{"stop": "out_of_stock", "state": {}}, {"fault": "the condition is broken"}])
def test_a_step_that_ended_the_flow_does_not_stand_nor_what_follows(changes: dict[str, Any]) -> None:
    earlier = run_of(**{"ship.label": replace(run_of().outcomes["ship.label"], **changes)})
    assert set(earlier.kept(shop, "pay")) == {"check", "ship.pack"}


def test_what_was_undone_or_may_have_been_does_not_stand() -> None:
    earlier = replace(run_of(), undone={"pay": "undone", "ship.label": "ConnectionError: the courier is away"})
    assert set(earlier.kept(shop, "notify")) == {"check", "ship.pack"}
    assert earlier.doubtful == {"ship.label": "ConnectionError: the courier is away"}


@given(flows(), st.data())
def test_it_goes_through_json(flow: Flow, data: st.DataObject) -> None:
    left = data.draw(outcomes(flow.check()))
    texts = st.dictionaries(st.text(), st.text())
    earlier = EarlierRun(
        fingerprint="f", inputs=data.draw(texts), scope="s", outcomes=left, undone=dict.fromkeys(left, "undone")
    )
    assert EarlierRun.from_json(json.loads(json.dumps(earlier.to_json()))) == earlier
