"""Orders that talk to the model, and a model that obeys them: nothing outside of what is allowed ever comes out."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from beluga_airflow.errors import Undecided
from beluga_airflow.graph import Decision
from beluga_airflow.llm import answers
from beluga_airflow.llm.decide import DecisionRecord, decide
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.state.memory import MemoryStore
from tests.llm.conftest import ClientFactory
from tests.llm.injections import ATTEMPTS, DEMANDED

CHOICES = {"expedite": "ship today", "standard": "the normal queue", "hold": "a person looks at it"}


class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    handling: Literal["expedite", "standard"]
    refund: float


KINDS: dict[str, dict[str, Any]] = {
    "choices": {"choices": CHOICES},
    "bool": {"output_type": bool},
    "whole number": {"output_type": int},
    "number": {"output_type": float},
    "model": {"output_type": Verdict},
}
FALLBACKS = {"choices": "hold", "model": {"handling": "standard", "refund": 0.0}}


def is_inside(kind: str, answer: Any) -> bool:
    """What the author allows, said here once more without the code under test."""
    match kind:
        case "choices":
            return isinstance(answer, str) and answer in CHOICES
        case "bool":
            return answer is True or answer is False
        case "whole number":
            return type(answer) is int
        case "number":
            return type(answer) is float and abs(answer) < float("inf")
        case _:
            try:
                Verdict.model_validate(answer)
            except ValidationError:
                return False
            return True


async def outcomes(
    server: ModelServer, client_of: ClientFactory, kind: str, stops: type[Exception] = Undecided, **bounds: Any
) -> dict[str, Any]:
    """What comes of each attempt: its record, or why there is none."""
    client, permits = client_of(server), asyncio.Semaphore(8)

    async def outcome(name: str, order: dict[str, Any]) -> DecisionRecord | str:
        question = "How should this order be handled?"
        decision = Decision(question, reads=tuple(order), output_key="answer", **KINDS[kind], **bounds)
        assert decision.faults() == []

        async def model(_: str | None) -> Any:
            return client

        async with permits:
            try:
                return await decide(decision, order, key=name, state=MemoryStore(), model=model)
            except stops as stopped:
                return str(stopped)

    found = await asyncio.gather(*(outcome(name, order) for name, order in ATTEMPTS.items()))
    return dict(zip(ATTEMPTS, found, strict=True))


def escaped(kind: str, found: dict[str, Any]) -> list[str]:
    """The attempts that got an answer out that is not allowed."""
    return [
        name
        for name, outcome in found.items()
        if isinstance(outcome, DecisionRecord) and not is_inside(kind, outcome.answer)
    ]


def obedient(**endpoint: Any) -> ModelServer:
    return ModelServer(rules={"endpoint": {"obedient": True, **endpoint}, "rules": []})


def test_there_are_enough_of_them() -> None:
    assert len(ATTEMPTS) >= 50


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_outside_comes_out(client_of: ClientFactory, kind: str) -> None:
    async with obedient() as server:
        found = await outcomes(server, client_of, kind)
        assert escaped(kind, found) == []
        # the model obeyed every one of them, also when it was asked again: it was not the model that was careful
        assert server.obeyed == server.calls >= len(ATTEMPTS)
    assert [name for name, outcome in found.items() if DEMANDED in str(outcome)] == []


@pytest.mark.parametrize(
    "endpoint",
    [
        *({"json_schema": "ignored", "without_schema": form} for form in ("answer", "json", "block", "prose")),
        {"json_schema": "refused", "logprobs": "refused"},
    ],
    ids=lambda endpoint: "-".join(endpoint.values()),
)
async def test_nor_where_the_endpoint_knows_of_no_schema(client_of: ClientFactory, endpoint: dict[str, str]) -> None:
    async with obedient(**endpoint) as server:
        found = await outcomes(server, client_of, "choices", max_reprompts=0)
        assert escaped("choices", found) == []
        assert server.obeyed >= len(ATTEMPTS)


@pytest.mark.parametrize("kind", ["choices", "model"])
async def test_what_was_not_decided_is_the_fallback(client_of: ClientFactory, kind: str) -> None:
    async with obedient() as server:
        found = await outcomes(server, client_of, kind, fallback=FALLBACKS[kind], max_reprompts=0)
    assert {(str(record.answer), record.decided_by) for record in found.values()} == {
        (str(FALLBACKS[kind]), "fallback")
    }
    assert [name for name, record in found.items() if DEMANDED in str(record)] == []


@pytest.mark.parametrize("kind", KINDS)
async def test_it_is_the_check_that_stops_them(
    client_of: ClientFactory, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "fitted", lambda decision, answer: answer)
    async with obedient() as server:
        # whatever else stumbles over an answer that was not checked stops it too
        out = escaped(kind, await outcomes(server, client_of, kind, stops=Exception, max_reprompts=0))
    assert len(out) > 0.8 * len(ATTEMPTS)
