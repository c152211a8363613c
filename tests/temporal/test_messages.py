from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from temporalio.exceptions import ApplicationError

from beluga_airflow.temporal.messages import (
    DATA_CONVERTER,
    PAYLOAD_LIMIT,
    BatchCall,
    FlowCall,
    ItemCall,
    RunCall,
    StatusCall,
    StepCall,
)

CONVERTER = DATA_CONVERTER.payload_converter
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=20,
)

FLOW = FlowCall(path="a:b", shape={"flow": "f"}, inputs={"z": 1, "a": [{"y": 2, "b": None}]}, scope="s", generation=2)
STEP = StepCall(
    of=RunCall(flow="f", total=2, started=1.5),
    path="a:b",
    place={"step": "one"},
    retry={"maximum_attempts": 3},
    timeout=None,
    inputs={"b": 1, "a": 2},
    outputs={"two": {"d": 1, "c": 2}, "one": {}},
    scope="s",
    generation=0,
    run="d/r/t/-1",
    llm_conn_id=None,
    state_conn_id="x",
)
STATUS = StatusCall(
    of=RunCall(flow="f", total=2, started=1.5),
    scope="s",
    generation=0,
    state_conn_id=None,
    status="failed",
    error="why",
    steps={"one": "failed"},
    undone={"two": "undone"},
)
BATCH = BatchCall(path="a:b", batch="n", total=7, item_timeout=1.5, max_in_flight=2, lost={"3": "why"})
ITEM = ItemCall(path="a:b", batch="n", index=3, generation=0, llm_conn_id="l", state_conn_id=None)


def carried(value: Any, kind: Any = None) -> Any:
    (payload,) = CONVERTER.to_payloads([value])
    (returned,) = CONVERTER.from_payloads([payload], [kind] if kind else None)
    return returned


@pytest.mark.parametrize("call", [FLOW, STEP, STATUS, BATCH, ITEM], ids=lambda call: type(call).__name__)
def test_a_call_arrives_as_it_was_sent(call: Any) -> None:
    assert carried(call, type(call)) == call


def test_keys_arrive_in_their_order() -> None:
    assert list(carried(FLOW, FlowCall).inputs) == ["z", "a"]
    assert list(carried(STEP, StepCall).outputs) == ["two", "one"]


@given(JSON)
def test_any_json_arrives_as_it_was_sent(value: Any) -> None:
    assert repr(carried(value)) == repr(value)


def test_what_is_too_large_is_refused_for_good() -> None:
    assert carried("a" * (PAYLOAD_LIMIT - 2)) == "a" * (PAYLOAD_LIMIT - 2)
    with pytest.raises(
        ApplicationError, match=r"TooLarge: 2\.0 MB of data in one piece, and Temporal carries 2 MB"
    ) as caught:
        carried("a" * (PAYLOAD_LIMIT - 1))
    assert caught.value.non_retryable


def test_a_call_of_an_earlier_version_lacks_what_came_later() -> None:
    (payload,) = CONVERTER.to_payloads([{"path": "a:b", "shape": {}, "inputs": {}, "scope": "s"}])
    (call,) = CONVERTER.from_payloads([payload], [FlowCall])
    assert call == FlowCall(path="a:b", shape={}, inputs={}, scope="s")
