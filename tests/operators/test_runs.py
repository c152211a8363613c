"""What operators share: which run a task is, and what its input may be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowFailException

from beluga_airflow import Chain, FlowResult, Graph
from beluga_airflow.errors import InvalidInput, InvalidSetting, ModelRefused, StateUnavailable, TemporalUnavailable
from beluga_airflow.operators.runs import (
    checked_flow,
    ended,
    failing_for_good,
    identity_of,
    is_template,
    mapping_of,
    parsed_text,
    run_parts,
)
from tests.operators import sample_flows as flows


def context(*, map_index: int | None = -1) -> Context:
    parts = {"dag_id": "d", "run_id": "r", "task_id": "t", "map_index": map_index}
    return cast(Context, {"ti": SimpleNamespace(**parts)})


def test_a_run_is_named_by_dag_run_task_and_map_index() -> None:
    assert run_parts(context()) == run_parts(context(map_index=None)) == ("d", "r", "t", -1)
    assert run_parts(context(map_index=0)) == ("d", "r", "t", 0)


@pytest.mark.parametrize(
    ("inputs", "mapping"),
    [(None, {}), ({}, {}), ({"a": 1}, {"a": 1}), ('{"a": [1]}', {"a": [1]}), (" {} ", {}), ("null", {})],
)
def test_an_input_is_a_mapping_or_its_json(inputs: Any, mapping: dict[str, Any]) -> None:
    assert mapping_of(inputs) == mapping


@pytest.mark.parametrize("inputs", ["", "SECRET", "'SECRET'", "[1]", '"SECRET"', "5", [("a", 1)], 5, {"a"}, b"{}"])
def test_an_input_that_is_none_is_refused_without_being_quoted(inputs: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        mapping_of(inputs)
    assert "SECRET" not in str(caught.value)


def test_a_text_that_python_printed_is_told_how_to_become_json() -> None:
    with pytest.raises(InvalidInput, match=r"end the template with '\| tojson'"):
        parsed_text("{'a': 1}", "the input")


@pytest.mark.parametrize(
    ("value", "template"),
    [("order_id", False), ("", False), ("{{ x }}", True), ("a-{% if x %}b{% endif %}", True), (None, True), (5, True)],
)
def test_what_is_a_template(value: object, template: bool) -> None:
    assert is_template(value) is template


def test_an_identity_without_a_business_key() -> None:
    found = identity_of(context(), "flow", {}, key=None, key_is_field=False, generation=1)
    assert (found.scope, found.generation) == ("d/r/t/-1", 1)


@pytest.mark.parametrize(("key", "is_field"), [("n", True), ("7", False), (7, False)])
def test_an_identity_by_business_key(key: Any, is_field: bool) -> None:
    found = identity_of(context(), "flow", {"n": 7}, key=key, key_is_field=is_field, generation=1)
    assert (found.scope, found.generation) == ("flow/7", 1)


@pytest.mark.parametrize("value", [None, "", "  ", "\n", "None"])
def test_an_empty_business_key_is_refused(value: Any) -> None:
    for key, inputs, is_field in [("n", {"n": value}, True), (value or " ", {}, False)]:
        with pytest.raises(InvalidInput, match="the business key of flow 'flow' is empty"):
            identity_of(context(), "flow", inputs, key=key, key_is_field=is_field, generation=0)


def test_a_missing_field_says_what_there_is() -> None:
    with pytest.raises(InvalidInput, match="key='n' names no field of the input; there is: a, b"):
        identity_of(context(), "flow", {"b": 1, "a": 2}, key="n", key_is_field=True, generation=0)
    with pytest.raises(InvalidInput, match="there is: nothing"):
        identity_of(context(), "flow", {}, key="n", key_is_field=True, generation=0)


def test_a_flow_by_object_or_path() -> None:
    assert checked_flow(flows.chain) is checked_flow("tests.operators.sample_flows:chain") is flows.chain
    assert checked_flow(flows.graph, kind=Graph) is flows.graph
    with pytest.raises(InvalidSetting, match="flow= is a Graph, it must be a Chain"):
        checked_flow(flows.graph, kind=Chain)
    with pytest.raises(InvalidSetting, match="flow= is a dict, it must be a Chain or a Graph"):
        checked_flow(cast(Any, flows.not_a_flow))


@pytest.mark.parametrize("status", ["completed", "out_of_stock"])
def test_a_good_end_is_returned(status: str) -> None:
    assert ended(FlowResult(status=status, data={"a": 1})) == {"status": status, "data": {"a": 1}}


@pytest.mark.parametrize("status", ["failed", "timed_out", "cancelled"])
def test_a_bad_end_fails_for_good(status: str) -> None:
    with pytest.raises(AirflowFailException, match=f"flow {status}: the reason"):
        ended(FlowResult(status=status, error="the reason"))


@pytest.mark.parametrize("error", [StateUnavailable("x"), TemporalUnavailable("x")])
def test_what_may_pass_is_left_to_airflows_retries(error: Any) -> None:
    assert failing_for_good(error) is error


def test_what_no_retry_can_help_fails_for_good() -> None:
    failure = failing_for_good(ModelRefused("no key"))
    assert isinstance(failure, AirflowFailException)
    assert str(failure) == "ModelRefused: no key"
