"""What an endpoint can do: as it was set, or as it turned out, which is remembered while the process lives."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.llm.presets import preset
from beluga_airflow.llm.prompt import with_schema

if TYPE_CHECKING:
    import openai

    from beluga_airflow.llm.client import Endpoint, ModelRequest

__all__ = ["WAYS", "Abilities", "completed", "forget"]

log = logging.getLogger(__name__)

WAYS: Mapping[str, tuple[str, ...]] = {
    "structured_output": ("auto", "schema", "text"),
    "logprobs": ("auto", "on", "off"),
}
"""The words by which an endpoint's abilities are set."""

TOP_LOGPROBS = 20
FEWER = {TOP_LOGPROBS: 5, 5: 0}
"""The most alternatives for a token that are asked for, and what is asked for when that is refused: some allow 5."""
REFUSING = frozenset({400, 403, 422})
OTHER = frozenset({"invalid_json_schema", "simulation_cannot_answer"})
"""Codes of refusals that are about what was asked, not about what can be asked."""
SCHEMA = re.compile(r"response.?format|json.?schema", re.IGNORECASE)
LOGPROBS = re.compile(r"log_?probs", re.IGNORECASE)
TOP = re.compile(r"top.?log_?probs", re.IGNORECASE)
BAD_SCHEMA = re.compile(r"invalid schema", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What is asked of an endpoint.

    Args:
        schema: an answer that fits a JSON schema; in words only where not.
        top_logprobs: log-probabilities, with so many alternatives; 0: none.
    """

    schema: bool = True
    top_logprobs: int = TOP_LOGPROBS

    def __and__(self, other: Abilities) -> Abilities:
        return Abilities(schema=self.schema and other.schema, top_logprobs=min(self.top_logprobs, other.top_logprobs))

    @classmethod
    def documented(cls, endpoint: Endpoint) -> Abilities:
        """Those that its provider tells of, and those that it is set to have all the same."""
        found = preset(endpoint.provider)
        return cls(
            schema=found.json_schema or endpoint.structured_output == "schema",
            top_logprobs=TOP_LOGPROBS if found.logprobs or endpoint.logprobs == "on" else 0,
        )

    def within(self, endpoint: Endpoint) -> Abilities:
        """These, as far as the endpoint is set to use them."""
        return self & Abilities(
            schema=endpoint.structured_output != "text", top_logprobs=0 if endpoint.logprobs == "off" else TOP_LOGPROBS
        )

    def without(self, refusal: openai.APIStatusError, request: ModelRequest, endpoint: Endpoint) -> Abilities:
        """What is left of them after a refusal: the same where it is about something else."""
        if refusal.status_code not in REFUSING or refusal.code in OTHER or BAD_SCHEMA.search(refusal.message):
            return self
        # a message may repeat what was asked, so it is looked at only where no parameter is named
        named = refusal.param if isinstance(refusal.param, str) and refusal.param else refusal.message
        if request.logprobs != "no" and self.top_logprobs and LOGPROBS.search(named):
            fewer = FEWER[self.top_logprobs] if TOP.search(named) else 0
            return self if fewer == 0 and endpoint.logprobs == "on" else replace(self, top_logprobs=fewer)
        if endpoint.structured_output == "auto" and SCHEMA.search(named):
            return replace(self, schema=False)
        return self


_known: dict[tuple[str | None, ...], Abilities] = {}


def forget() -> None:
    """Ask everybody for everything again."""
    _known.clear()


async def completed(client: openai.AsyncOpenAI, endpoint: Endpoint, request: ModelRequest) -> Any:
    """What the endpoint answers, asked for what it can do: the JSON of the body as it came.

    What it refuses is left out and asked again at once, and not asked of it any more once it has answered without.

    Raises:
        InvalidSetting: the request needs what the connection switches off, or its provider tells that it does not do.
        openai.OpenAIError: no answer.
        ValueError, RecursionError: the body is no JSON.
    """
    import openai

    most = Abilities.documented(endpoint).within(endpoint)
    if request.logprobs == "needed" and not most.top_logprobs:
        why = "switched off" if endpoint.logprobs == "off" else f"none from provider {endpoint.provider!r}"
        raise InvalidSetting(
            f"{endpoint.owner} has logprobs {why}, and a decision with min_confidence needs them: switch them on, or "
            "take another connection for it"
        )
    model = request.model or endpoint.model
    # what was learnt under another setting says nothing about this one
    place = (endpoint.conn_id, endpoint.address, model, endpoint.structured_output, endpoint.logprobs)
    can = known = _known.get(place, most)
    while True:
        try:
            # the library's own models of a thousand log-probabilities cost 10 ms of CPU
            response = await client.chat.completions.with_raw_response.create(
                model=model, **_arguments(endpoint, request, can)
            )
        except openai.APIStatusError as error:
            less = can.without(error, request, endpoint)
            if less == can:
                raise
            can = less
            continue
        if can != known:
            log.info("model %r of %s is from now on asked for no more than it takes: %s", model, endpoint.owner, can)
            # another call may have learnt something else meanwhile
            _known[place] = can & _known.get(place, can)
        return json.loads(response.content)


def _arguments(endpoint: Endpoint, request: ModelRequest, can: Abilities) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "messages": [*request.messages],
        preset(endpoint.provider).limit: request.max_tokens,
    }
    if can.schema:
        arguments["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "decision", "strict": True, "schema": dict(request.schema)},
        }
    else:
        arguments["messages"] = with_schema(request.messages, request.schema)
    if can.top_logprobs and request.logprobs != "no":
        arguments |= {"logprobs": True, "top_logprobs": can.top_logprobs}
    return arguments
