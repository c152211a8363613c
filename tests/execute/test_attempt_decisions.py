"""An attempt of a step that is a decision."""

from __future__ import annotations

import pytest

from beluga_airflow import Chain, Decision
from beluga_airflow.errors import MissingKey, ModelUnavailable
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.testing.scripted_model import ScriptedModel, prompt_of
from tests.execute.attempts import once

DECISION = Decision("Which?", choices=["left", "right"], reads=["x"], output_key="way", fallback="right")


async def test_a_decision_sees_what_it_reads_and_nothing_else() -> None:
    model = ScriptedModel(["left"])

    outcome = await once(Chain("f").add_step("a", DECISION), inputs={"x": 1, "secret": 2}, model=model)

    assert prompt_of(model.requests[0]).data == {"x": 1}
    assert outcome.output == {"way": "left"}
    assert outcome.decision is not None
    assert outcome.decision["decided_by"] == "model"


async def test_a_decision_names_the_key_that_it_misses() -> None:
    with pytest.raises(MissingKey, match="step 'a' reads 'x', which neither the input nor an earlier step provided"):
        await once(Chain("f").add_step("a", DECISION), inputs={"y": 1})


async def test_a_decision_is_paid_for_once_a_generation() -> None:
    model, state = ScriptedModel(["left", "right"]), MemoryStore()
    flow = Chain("f").add_step("a", DECISION)

    first = await once(flow, inputs={"x": 1}, model=model, state=state)
    again = await once(flow, inputs={"x": 1}, model=model, state=state, number=2)
    cleared = await once(flow, inputs={"x": 1}, model=model, state=state, generation=1)

    assert (first.output, again, cleared.output) == ({"way": "left"}, first, {"way": "right"})
    assert model.calls == 2


async def test_a_decision_falls_back_on_its_last_attempt_only() -> None:
    flow = Chain("f").add_step("a", DECISION)

    with pytest.raises(ModelUnavailable):
        await once(flow, inputs={"x": 1}, model=ScriptedModel([ModelUnavailable("down")]), last=False)

    outcome = await once(flow, inputs={"x": 1}, model=ScriptedModel([ModelUnavailable("down")]), last=True, number=3)
    assert outcome.output == {"way": "right"}
