from __future__ import annotations

import json
from itertools import product
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow import FlowResult
from beluga_airflow.graph import Identity, Outcome
from beluga_airflow.graph.outcome import KEY_LENGTH

# with what could be mistaken for a joint, a mark or an escape, and lone surrogates out of somebody's JSON
tricky = st.sampled_from(["/", "~", "%", "%2F", "@", "@0", " ", "\n", "", "a", "a/b", "ü", "\ud800", "~" + "0" * 64])
part = st.lists(tricky | st.text(st.characters(), max_size=5), max_size=4).map("".join) | st.text("ab/~%", max_size=300)
parts = st.lists(part, min_size=1, max_size=4)
step = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", fullmatch=True)


@given(parts)
def test_a_scope_can_be_read_back_so_that_no_two_lists_of_parts_share_one(parts: list[str]) -> None:
    scope = Identity.of(*parts).scope

    assert [unquote(name, errors="surrogatepass") for name in scope.split("/")] == parts


def test_no_two_lists_of_parts_give_one_key() -> None:
    atoms = ["", "a", "/", "%2F", "%", "~", "@0", "a/pay", "x" * 250, "x" * 250 + "/", "x" * 250 + "/a"]
    lists = [list(parts) for length in (1, 2, 3) for parts in product(atoms, repeat=length)]

    keys = {Identity.of(*parts).key(step) for parts in lists for step in ("pay", "a", "x" * 100)}

    assert len(keys) == 3 * len(lists)


@given(parts, step, st.integers(0, 9))
def test_a_shortened_key_is_never_that_of_a_short_one(parts: list[str], step: str, generation: int) -> None:
    long = Identity.of("x" * 300, generation=generation).key(step)

    # whoever chooses a business key may know how keys are shortened
    assert all(
        Identity.of(*beginning).key(step) != long for beginning in (parts, [long], long.split("/"), long.split("~"))
    )


@given(parts, step, st.integers(0, 1_000))
def test_keys_are_bounded_and_can_stand_in_a_header(parts: list[str], step: str, generation: int) -> None:
    identity = Identity.of(*parts, generation=generation)

    assert 0 < len(identity.key(step)) <= KEY_LENGTH == 200
    assert identity.key(step).isascii()
    assert identity.key(step).isprintable()
    assert len(identity.record(step)) <= KEY_LENGTH + 5


@given(parts, step, st.integers(1, 9))
def test_a_clear_changes_records_and_never_idempotency_keys(parts: list[str], step: str, generation: int) -> None:
    first, cleared = Identity.of(*parts), Identity.of(*parts, generation=generation)

    assert first.key(step) == cleared.key(step)
    assert first.record(step) != cleared.record(step)


def test_keys_are_readable() -> None:
    identity = Identity.of("order_batch", "scheduled__2025-12-01T00:00:00+00:00", "process orders", -1, generation=2)

    assert identity.key("pay") == "order_batch/scheduled__2025-12-01T00:00:00+00:00/process orders/-1/pay"
    assert identity.record("pay").startswith(f"{identity.key('pay')}@2")


def test_runs_with_one_business_key_share_the_first_record_and_no_other() -> None:
    runs = [Identity.of("shop", "A-1", generation=generation, run=run) for run in "ab" for generation in (0, 1)]

    assert len({identity.key("pay") for identity in runs}) == 1
    assert len({identity.record("pay") for identity in runs}) == 3


def test_long_keys_keep_their_beginning_and_differ_in_their_end() -> None:
    keys = {Identity.of("flow", "x" * 300 + end).key(step) for end in "ab" for step in ("pay", "ship")}

    assert len(keys) == 4
    assert {len(key) for key in keys} == {200}
    assert all(key.startswith("flow/xxx") for key in keys)


def test_a_key_of_exactly_the_bound_is_left_alone() -> None:
    scope = "x" * (KEY_LENGTH - len("/pay"))

    assert Identity.of(scope).key("pay") == f"{scope}/pay"
    assert "~" in Identity.of(scope + "x").key("pay")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=3), json_values, max_size=3)
outcomes = st.builds(
    Outcome,
    output=objects,
    taken=st.lists(st.text(max_size=3), max_size=3).map(tuple),
    stop=st.none() | st.text(min_size=1, max_size=5),
    state=st.none() | objects,
    decision=st.none() | objects,
)


@given(outcomes)
def test_an_outcome_survives_json(outcome: Outcome) -> None:
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome


@given(outcomes)
def test_the_json_of_an_outcome_is_json_already(outcome: Outcome) -> None:
    # Airflow's task state takes JSON and hands back the very objects in tests
    assert json.loads(json.dumps(outcome.to_json())) == outcome.to_json()


@pytest.mark.parametrize(
    ("status", "ok"),
    [("completed", True), ("out_of_stock", True), ("failed", False), ("timed_out", False), ("cancelled", False)],
)
def test_a_flow_ends_well_when_it_completes_or_stops(status: str, ok: bool) -> None:
    assert FlowResult(status=status).ok is ok


@given(objects, st.dictionaries(st.text(max_size=3), objects, max_size=2))
def test_a_result_survives_json(data: dict[str, Any], decisions: dict[str, dict[str, Any]]) -> None:
    result = FlowResult(status="failed", data=data, error="step 'a' failed", steps={"a": "failed"}, decisions=decisions)

    assert FlowResult.from_json(json.loads(json.dumps(result.to_json()))) == result
