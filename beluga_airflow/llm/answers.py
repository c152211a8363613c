"""What a decision may answer: the schema that asks for it, and the check that holds it to that."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from beluga_airflow.graph import Decision
from beluga_airflow.llm.client import ModelReply
from beluga_airflow.llm.offers import offered

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = ["Misfit", "fitted", "offered_schema", "parsed", "schema_of"]

REASON = 500
"""Characters of a reason, or of what is wrong with an answer, that are kept."""
BITS = 63
"""What a whole number must fit into, as in Airflow's own messages."""
KEPT = frozenset(
    {
        *("type", "enum", "const", "$ref", "title", "description", "pattern", "format", "minItems", "maxItems"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    }
)
"""Keywords that strict schemas may have, besides those that are built here."""
FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"})


BLOCK = re.compile(r"[^{}`]*```[A-Za-z]*\s*(\{.*\})\s*```[^{}`]*", re.DOTALL)
"""One block of Markdown with an object in it, and around it words at most."""


class Misfit(Exception):  # never leaves this room, where it is an outcome and not an error
    """Why an answer cannot be taken; quotes nothing of it."""


def schema_of(decision: Decision) -> dict[str, Any]:
    """The JSON schema of a whole answer, in the strict form that the OpenAI API wants."""
    answer = _schema_of_answer(decision)
    definitions = answer.pop("$defs", None)
    properties = {"answer": _strict(answer)}
    if decision.reason:
        properties["reason"] = {"type": "string"}
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    if definitions:
        schema["$defs"] = {name: _strict(definition) for name, definition in definitions.items()}
    return schema


def offered_schema(decision: Decision) -> dict[str, Any]:
    """The schema as it is sent: with the choices as they are offered."""
    schema = schema_of(decision)
    if decision.choices is not None:
        schema["properties"]["answer"]["enum"] = list(offered(decision))
    return schema


def _schema_of_answer(decision: Decision) -> dict[str, Any]:
    if decision.choices is not None:
        return {"type": "string", "enum": list(decision.labels)}
    if decision.output_type in (bool, int, float):
        return {"type": {bool: "boolean", int: "integer", float: "number"}[decision.output_type]}
    schema: dict[str, Any] = decision.output_type.model_json_schema()
    return schema


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A part of pydantic's schema without what the API refuses; the check of the answer still holds it to that."""
    if "$ref" in schema and len(schema) > 1:
        beside = {key: value for key, value in schema.items() if key != "$ref"}
        return _strict({**beside, "anyOf": [{"$ref": schema["$ref"]}]})
    strict = {key: value for key, value in schema.items() if key in KEPT}
    if strict.get("format") not in FORMATS:
        strict.pop("format", None)
    if "(?" in strict.get("pattern", ""):
        del strict["pattern"]
    if "items" in schema:
        strict["items"] = _strict(schema["items"])
    several = schema.get("anyOf") or schema.get("oneOf")
    if several:
        strict["anyOf"] = [_strict(part) for part in several]
    if schema.get("type") == "object":
        properties = {name: _strict(part) for name, part in schema.get("properties", {}).items()}
        strict |= {"properties": properties, "required": list(properties), "additionalProperties": False}
    return strict


def parsed(decision: Decision, reply: ModelReply) -> tuple[Any, str | None]:
    """The answer and the reason in a model's reply.

    Raises:
        Misfit: there is no answer in it that fits.
    """
    if reply.trouble:
        raise Misfit(reply.trouble)
    texts = offered(decision)
    bare = reply.content.strip()
    if texts.get(bare, bare) in decision.labels:
        return texts.get(bare, bare), None
    if decision.output_type is bool and bare in ("true", "false"):
        return bare == "true", None
    content = _object(bare)
    answer = content["answer"]
    reason = content.get("reason") if decision.reason else None
    if isinstance(answer, str):
        answer = texts.get(answer, answer)
    return fitted(decision, answer), _line(reason) if reason else None


def _object(text: str) -> dict[str, Any]:
    """The one object that a text is, or that is in its one block."""
    block = BLOCK.fullmatch(text)
    try:
        content = json.loads(block[1] if block else text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError):
        raise Misfit("the answer is not JSON") from None
    if not isinstance(content, dict) or "answer" not in content:
        raise Misfit('the answer is not an object with "answer"')
    return content


def _each_once(members: list[tuple[str, Any]]) -> dict[str, Any]:
    # of two answers in one object, nobody can say which was meant
    content = dict(members)
    if len(content) != len(members):
        raise Misfit("the answer is not clear: a name comes twice in its JSON")
    return content


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
    return _modelled(answer, kind)


def _number(answer: Any, kind: type) -> int | float:
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        raise Misfit("the answer is not a number")
    try:
        whole = int(answer)
        number = float(answer)
    except (OverflowError, ValueError):
        raise Misfit("the answer is not a finite number") from None
    if kind is float:
        return number
    if whole != answer or whole.bit_length() > BITS:
        raise Misfit(f"the answer is not a whole number of at most {BITS} bits")
    return whole


def _modelled(answer: Any, kind: Any) -> Any:
    from pydantic import ValidationError
    from pydantic_core import to_json

    try:
        # by way of JSON: a strict model takes a date's text from nothing else
        model = answer if isinstance(answer, kind) else kind.model_validate_json(to_json(answer))
        value = model.model_dump(mode="json")
        json.dumps(value, allow_nan=False)
    except ValidationError as error:
        raise Misfit(f"the answer is no {kind.__name__}: {_faults(error)}"[:REASON]) from None
    except ValueError:
        raise Misfit(f"the answer is no {kind.__name__}: it holds what JSON cannot hold") from None
    return value


def _faults(error: ValidationError) -> str:
    """What pydantic found, without what it repeats of the answer."""
    faults = []
    for fault in error.errors(include_url=False, include_input=False, include_context=False)[:10]:
        place, what = fault["loc"], fault["msg"]
        if fault["type"] == "extra_forbidden":
            place = place[:-1]  # the last is a name of the model's own
        elif fault["type"] == "union_tag_invalid":
            what = "its tag is none of those expected"
        faults.append(f"{'.'.join(map(str, place)) or 'as a whole'}: {what}")
    return "; ".join(faults)


def _line(text: Any) -> str:
    """A model's text as one harmless line."""
    kept = text if isinstance(text, str) else json.dumps(text)
    return "".join(char if char.isprintable() else " " for char in kept[:REASON])
