"""A step that belongs to a conversation, as a task."""

from __future__ import annotations

import json
from typing import Any

from beluga_airflow import Chain, Decision, Memory
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.testing import OperatorRunner

TALK = (
    Chain("talk")
    .add_step("first", Decision("Which?", choices=["a", "b"], reads=["text"], memory=Memory(key="who", name="talk")))
    .add_step("second", Decision("And now?", choices=["a", "b"], reads=["text"], memory=Memory(key="who", name="talk")))
)


def test_steps_of_a_group_talk_each_once(
    tasks_of: Any, operator_runner: OperatorRunner, model_server: ModelServer
) -> None:
    extra = {"provider": "simulated", "base_url": model_server.base_url}
    operator_runner.connections["beluga_llm_default"] = {"conn_type": "beluga_llm", "extra": extra}
    tasks = tasks_of(TALK, inputs={"who": "c-1", "text": "hello"})
    tasks.run("first")
    tasks.lose("first")
    assert tasks.retry("first").state == "success"
    assert tasks.run("second").state == "success"
    first, second = (request["messages"] for request in model_server.requests)
    assert [len(first), len(second)] == [2, 4]
    assert json.loads(second[1]["content"].splitlines()[1]) == {"data": {"text": "hello"}, "question": "Which?"}
