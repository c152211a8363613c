"""A model that answers from a script, in the process of the test."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from pydantic import JsonValue

from beluga_airflow.llm.client import ModelReply, ModelRequest, Usage

if TYPE_CHECKING:
    from beluga_airflow.llm.model_requests import Prompt

__all__ = ["Answer", "ScriptedModel", "prompt_of", "reply"]

Answer = JsonValue | ModelReply | BaseException
"""The decision's answer as JSON; or a whole reply, see `reply`; or an error to raise."""


USAGE = Usage(input=100, output=10)


def reply(content: str = "", *, trouble: str | None = None, usage: Usage = USAGE) -> ModelReply:
    """A reply with exactly this content: for answers that are cut off, refused (by `trouble`) or no JSON."""
    return ModelReply(
        content=content,
        trouble=trouble,
        model="scripted",
        provider="simulated",
        usage=usage,
        simulated=True,
        seconds=0.0,
    )


def prompt_of(request: ModelRequest) -> Prompt:
    """The question and the data that a request holds."""
    from beluga_airflow.llm.model_requests import Prompt

    return Prompt.read([message["content"] for message in request.messages if message["role"] == "user"])


class ScriptedModel:
    """A ``ModelClient`` that gives the answers of a script, in their order.

        model = ScriptedModel(["expedite", ModelUnavailable("overloaded"), "standard"])
        model = ScriptedModel(lambda request: "expedite" if prompt_of(request).data["tier"] == "gold" else "standard")

    Args:
        answers: the answers, or what gives the answer to a request.

    Attributes:
        requests: what was asked, oldest first.
        closed: whether it was closed.
    """

    def __init__(self, answers: Iterable[Answer] | Callable[[ModelRequest], Answer]) -> None:
        self.requests: list[ModelRequest] = []
        self.closed = False
        self._give = answers if callable(answers) else None
        self._script = [] if callable(answers) else list(answers)
        self._lock = threading.Lock()  # a worker may ask from several threads

    refused = False

    @property
    def calls(self) -> int:
        """How often it was asked."""
        return len(self.requests)

    async def answer(self, request: ModelRequest) -> ModelReply:
        """The next answer of the script.

        Raises:
            AssertionError: the script has no more answers.
            BaseException: what the script says.
        """
        with self._lock:
            turn = len(self.requests)
            self.requests.append(request)
        answer = self._give(request) if self._give else self._scripted(turn)
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, ModelReply):
            return answer
        return reply(json.dumps({"answer": answer, "reason": "scripted"}))

    def asks(self, request: ModelRequest) -> tuple[str, str]:
        """As `reply` has it."""
        return "simulated", request.model or "scripted"

    async def check(self) -> None:
        """It lets everybody in."""

    async def close(self) -> None:
        """Take note; it may be asked again all the same."""
        self.closed = True

    def _scripted(self, turn: int) -> Answer:
        if turn >= len(self._script):
            raise AssertionError(
                f"the model was asked {turn + 1} times and the script has {len(self._script)} answers: "
                "add answers, or look at model.requests for who asks too often"
            )
        return self._script[turn]
