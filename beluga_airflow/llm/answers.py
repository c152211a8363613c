"""What a decision may answer: the schema that asks for it, and the check that holds it to that."""

from __future__ import annotations

import json
import math
from typing import Any

from beluga_airflow.graph import Decision
from beluga_airflow.llm.client import ModelReply

__all__ = ["Misfit", "fitted", "parsed", "schema_of"]

REASON = 500
"""Characters of a reason that are kept."""


class Misfit(Exception):  # never leaves this room, where it is an outcome and not an error
    """Why an answer cannot be taken; quotes nothing of it."""


def schema_of(decision: Decision) -> dict[str, Any]:
    """The JSON schema of a whole answer, in the strict form that the OpenAI API wants."""
    properties: dict[str, Any] = {"answer": _schema_of_answer(decision)}
    if decision.reason:
        properties["reason"] = {"type": "string"}
    definitions = properties["answer"].pop("$defs", None)
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {**schema, "$defs": definitions} if definitions else schema


def _schema_of_answer(decision: Decision) -> dict[str, Any]:
    if decision.choices is not None:
        return {"type": "string", "enum": list(decision.labels)}
    if decision.output_type in (bool, int, float):
        return {"type": {bool: "boolean", int: "integer", float: "number"}[decision.output_type]}
    schema: dict[str, Any] = _strict(decision.output_type.model_json_schema())
    return schema


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items() if key != "default"}
    if strict.get("type") == "object" and "properties" in strict:
        strict |= {"additionalProperties": False, "required": list(strict["properties"])}
    return strict


def parsed(decision: Decision, reply: ModelReply) -> tuple[Any, str | None]:
    """The answer and the reason in a model's reply.

    Raises:
        Misfit: there is no answer in it that fits.
    """
    if reply.trouble:
        raise Misfit(reply.trouble)
    try:
        content = json.loads(reply.content)
    except (ValueError, RecursionError):
        raise Misfit("the answer is not JSON") from None
    if not isinstance(content, dict) or "answer" not in content:
        raise Misfit('the answer is not an object with "answer"')
    reason = content.get("reason") if decision.reason else None
    return fitted(decision, content["answer"]), str(reason)[:REASON] if reason else None


def fitted(decision: Decision, answer: Any) -> Any:
    """``answer`` as JSON, when it is inside what the decision allows.

    Raises:
        Misfit: it is outside.
    """
    if decision.choices is not None:
        if not isinstance(answer, str) or answer not in decision.labels:
            raise Misfit(f"the answer is none of the choices {', '.join(decision.labels)}")
        return answer
    kind = decision.output_type
    if kind is bool:
        if not isinstance(answer, bool):
            raise Misfit("the answer is not true or false")
        return answer
    if kind in (int, float):
        return _number(answer, kind)
    from pydantic import BaseModel, ValidationError

    try:
        model: BaseModel = kind.model_validate(answer.model_dump() if isinstance(answer, BaseModel) else answer)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        text = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults[:10])
        raise Misfit(f"the answer is no {kind.__name__}: {text}") from None
    return model.model_dump(mode="json")


def _number(answer: Any, kind: type) -> int | float:
    if isinstance(answer, bool) or not isinstance(answer, int | float) or not math.isfinite(answer):
        raise Misfit("the answer is not a number")
    if kind is int and int(answer) != answer:
        raise Misfit("the answer is not a whole number")
    return int(answer) if kind is int else float(answer)
