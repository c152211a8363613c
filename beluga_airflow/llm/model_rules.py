"""What the model server answers: by rules, or where none matches by a default that fits the request's schema.

The first rule that matches answers::

    - question: How should this order be handled?     # optional: a part of the text around the data
      when:                                           # optional: every key must hold
        customer_tier: gold
        order_value: {gte: 200, lt: 1000}
        country: {in: [France, Spain]}
      answer: expedite                                # or: probabilities: {expedite: 0.7, standard: 0.3}
      reason: a large order of a gold customer        # optional

A key that the data lacks never matches. ``gt``, ``gte``, ``lt`` and ``lte`` compare a number with a number or
with text that is one (a decimal travels as text), and text with text; the others compare JSON values exactly.
"""

from __future__ import annotations

import contextlib
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it has no types
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from referencing import Registry
from referencing.exceptions import Unresolvable

from beluga_airflow.llm.model_requests import ANY_OBJECT, Prompt, RefusedRequest, Schema

SUM_WITHIN = 1e-9
DEFAULT_REASON = "a default of the simulation: no rule matched"


def _bound(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("must be a number or text")
    return value


Bound = Annotated[Any, AfterValidator(_bound)]


def _same(value: object, expected: object) -> bool:
    # in JSON, true is not 1
    return isinstance(value, bool) == isinstance(expected, bool) and value == expected


def _as_number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[object, Any], bool]:
    def holds(value: object, bound: object) -> bool:
        if isinstance(bound, str):
            return isinstance(value, str) and compare(value, bound)
        number = _as_number(value)
        return number is not None and compare(number, bound)

    return holds


_COMPARATORS: dict[str, Callable[[object, Any], bool]] = {
    "gt": _ordered(operator.gt),
    "gte": _ordered(operator.ge),
    "lt": _ordered(operator.lt),
    "lte": _ordered(operator.le),
    "eq": _same,
    "ne": lambda value, expected: not _same(value, expected),
    "in_": lambda value, several: any(_same(value, one) for one in several),
    "not_in": lambda value, several: not any(_same(value, one) for one in several),
}


class Comparison(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """What one value of the data must be: every comparator that is given must hold."""

    gt: Bound = None
    gte: Bound = None
    lt: Bound = None
    lte: Bound = None
    eq: JsonValue = None
    ne: JsonValue = None
    in_: list[JsonValue] = Field(default=[], alias="in")
    not_in: list[JsonValue] = []

    @model_validator(mode="after")
    def _one_at_least(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("give at least one of gt, gte, lt, lte, eq, ne, in, not_in")
        return self

    def holds(self, value: object) -> bool:
        """Whether `value` passes every comparator that was given."""
        return all(_COMPARATORS[name](value, getattr(self, name)) for name in self.model_fields_set)


def _scalar_keys(value: object) -> object:
    for key in value if isinstance(value, Mapping) else ():
        if not isinstance(key, str | bool | int | float | None):
            raise ValueError("an answer here must be text, true, false, null or a number")
    return value


Probabilities = Annotated[dict[Any, Annotated[float, Field(ge=0, le=1)]], BeforeValidator(_scalar_keys)]


def _as_comparison(value: object) -> object:
    return value if isinstance(value, Mapping | Comparison) else {"eq": value}


class Rule(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """One rule: which prompts it answers, and how.

    Args:
        when: data key to the value it must have, or to comparators (an object is compared by ``eq``).
        question: text that the prompt contains outside its data.
        answer: the decision's ``answer``; the whole content where the schema has no such property. With
            `probabilities` it is one of them, unless given the first of the most probable.
        reason: the decision's ``reason``.
        probabilities: how probable each answer was. Text that the schema does not allow, but would as JSON
            (``"true"``), is taken as JSON.
        outside: how probable other answers were, which the schema does not allow. The sum of all is 1.
    """

    when: dict[str, Annotated[Comparison, BeforeValidator(_as_comparison)]] = {}
    question: str = ""
    answer: JsonValue
    reason: str | None = None
    probabilities: Probabilities = {}
    outside: Probabilities = {}

    @model_validator(mode="before")
    @classmethod
    def _most_probable(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping) or "answer" in raw:
            return raw
        given = raw.get("probabilities")
        if not isinstance(given, Mapping) or not given:
            return raw
        return {**raw, "answer": max(given, key=lambda answer: _as_number(given[answer]) or 0.0)}

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.probabilities:
            if self.outside:
                raise ValueError("outside needs probabilities; give those of the answers that are allowed too")
            return self
        whole = math.fsum([*self.probabilities.values(), *self.outside.values()])
        if abs(whole - 1) > SUM_WITHIN:
            raise ValueError(f"the probabilities (with outside) sum to {whole:.12g}; make their sum 1")
        if isinstance(self.answer, dict | list) or not self.probabilities.get(self.answer):
            raise ValueError("the answer is none of the probabilities above 0; name one of them, or leave it out")
        return self

    def matches(self, prompt: Prompt) -> bool:
        """Whether this rule answers `prompt`."""
        return self.question in prompt.question and all(
            key in prompt.data and comparison.holds(prompt.data[key]) for key, comparison in self.when.items()
        )


def describe(error: ValidationError) -> list[str]:
    """One ``field.path: what is wrong`` for each fault, without the values."""
    return [
        f"{'.'.join(map(str, fault['loc'])) or 'as a whole'}: {fault['msg']}"
        + ("; correct its name or leave it out" if fault["type"] == "extra_forbidden" else "")
        for fault in error.errors(include_url=False, include_input=False)
    ]


Wording = Literal["answer", "json", "block", "prose"]
"""How a model puts an answer that no schema holds: bare, as JSON, as JSON in a block of Markdown, or in a sentence."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """The content of the model's message, and what it might have been.

    Args:
        text: JSON that fits the schema, plain text where there is none.
        probabilities: of every text that it might have been, itself included.
    """

    text: str
    probabilities: Mapping[str, float]

    @classmethod
    def sure(cls, text: str) -> Self:
        """Content that could have been nothing else."""
        return cls(text=text, probabilities={text: 1.0})


def content_for(rules: Iterable[Rule], prompt: Prompt, schema: Schema | None, wording: Wording = "answer") -> Content:
    """What the first rule that matches answers, or a default.

    Raises:
        RefusedRequest: the matching rule's answer, or the default, does not fit the schema.
    """
    number, rule = next(((n, rule) for n, rule in enumerate(rules, 1) if rule.matches(prompt)), (0, None))
    if rule is None:
        return Content.sure(_default(schema, wording))
    reason = rule.reason or f"rule {number} of the simulation"

    def written(answer: JsonValue, *, allowed: bool = True) -> str:
        if schema is None:
            return worded(answer, reason, wording)
        content, fault = _fitting(answer, reason, schema)
        if fault and allowed:
            raise _cannot_answer(
                f"rule {number} of the simulation gives an answer that the request's schema does not allow; "
                f"mend the rule, or give it a `question` so that it answers no other question ({fault})"
            )
        return json.dumps(content, ensure_ascii=False)

    if not rule.probabilities:
        return Content.sure(written(rule.answer))
    allowed = [(written(answer), probability) for answer, probability in rule.probabilities.items()]
    outside = [(written(answer, allowed=False), probability) for answer, probability in rule.outside.items()]
    probabilities: Counter[str] = Counter()
    for text, probability in [*allowed, *outside]:
        probabilities[text] += probability  # type: ignore[assignment]  # a Counter counts floats as well
    return Content(text=written(rule.answer), probabilities=probabilities)


def _default(schema: Schema | None, wording: Wording) -> str:
    if schema is None:
        return DEFAULT_REASON if wording == "answer" else worded(None, DEFAULT_REASON, wording)
    is_decision = "answer" in schema.get("properties", {})
    content = _minimal(schema, given={"reason": DEFAULT_REASON} if is_decision else {})
    if fault := _fault(content, schema):
        raise _cannot_answer(f"the simulation has no default for this schema; write a rule that answers it ({fault})")
    return json.dumps(content, ensure_ascii=False)


def worded(answer: JsonValue, reason: str, wording: Wording) -> str:
    """An answer that no schema holds."""
    bare = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    whole = json.dumps({"answer": answer, "reason": reason}, ensure_ascii=False)
    match wording:
        case "answer":
            return bare
        case "json":
            return whole
        case "block":
            return f"Here is my decision:\n\n```json\n{whole}\n```\n"
    return f"I would say: {bare}. {reason}"


def unchecked(answer: JsonValue, reason: str, schema: Schema | None, wording: Wording) -> str:
    """An answer in the place that a schema has for it, whether or not it fits there."""
    if schema is None:
        return worded(answer, reason, wording)
    places = schema.get("properties", {"answer": {}, "reason": {}})
    if "answer" not in places:
        return json.dumps(answer, ensure_ascii=False)
    if (
        isinstance(answer, str)
        and isinstance(place := places["answer"], dict)
        and place.get("type") in ("boolean", "integer", "number")
    ):
        with contextlib.suppress(ValueError):
            answer = json.loads(answer)
    given = {"answer": answer, "reason": reason}
    return json.dumps({name: given[name] for name in given if name in places}, ensure_ascii=False)


def _fitting(answer: JsonValue, reason: str, schema: Schema) -> tuple[JsonValue, str | None]:
    """The content with the answer, taken as JSON where only that fits, and why it does not fit the schema."""
    content = _enveloped(_as_offered(answer, schema), reason, schema)
    fault = _fault(content, schema)
    if fault and isinstance(answer, str):
        try:
            meant = _enveloped(json.loads(answer), reason, schema)
        except (ValueError, RecursionError):
            return content, fault
        if not _fault(meant, schema):
            return meant, None
    return content, fault


def _as_offered(answer: JsonValue, schema: Schema) -> JsonValue:
    """The answer, behind the sign that the schema offers it with: ``A: expedite`` for ``expedite``."""
    place = schema.get("properties", {}).get("answer")
    several = place.get("enum") if isinstance(place, dict) else None
    if not isinstance(answer, str) or not isinstance(several, list) or answer in several:
        return answer
    return next((text for text in several if isinstance(text, str) and text.partition(": ")[2] == answer), answer)


def _enveloped(answer: JsonValue, reason: str, schema: Schema) -> JsonValue:
    if "answer" in schema.get("properties", {}):
        enveloped: JsonValue = _minimal(schema, given={"answer": answer, "reason": reason})
        return enveloped
    if schema == ANY_OBJECT and not isinstance(answer, dict):
        return {"answer": answer, "reason": reason}
    return answer


def _cannot_answer(message: str) -> RefusedRequest:
    return RefusedRequest(message, code="simulation_cannot_answer", param="response_format")


def _fault(content: object, schema: Schema) -> str | None:
    try:
        # a registry of its own, since without one a $ref would be fetched from the network
        error = next(Draft202012Validator(schema, registry=Registry()).iter_errors(content), None)
        return f"at {error.json_path}: {error.message[:300]}" if error else None
    except (Unresolvable, RecursionError, re.error) as unusable:
        return f"the schema cannot be used: {unusable}"


_FORMATS = {
    "date": "2000-01-01",
    "date-time": "2000-01-01T00:00:00Z",
    "time": "00:00:00Z",
    "duration": "P0D",
    "email": "nobody@example.com",
    "hostname": "example.com",
    "ipv4": "127.0.0.1",
    "ipv6": "::1",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def _minimal(schema: Schema, *, given: Mapping[str, Any]) -> Any:
    """The least value that the schema describes, with the properties `given`, in the schema's order."""

    def of(part: Any, open_refs: tuple[str, ...] = (), given: Mapping[str, Any] = {}) -> Any:
        if not isinstance(part, dict):
            return None
        if ref := part.get("$ref"):
            if ref in open_refs:
                raise _cannot_answer(f"there is no default for the recursive {ref}; write a rule for it")
            return of(_pointed(schema, ref) | _without(part, "$ref"), (*open_refs, ref), given)
        for several in ("anyOf", "oneOf", "allOf"):
            if several in part and isinstance(part[several][0], dict):
                return of(_without(part, several) | part[several][0], open_refs, given)
        if "const" in part:
            return part["const"]
        if part.get("enum"):
            return part["enum"][0]
        kind = part.get("type", "object" if "properties" in part else "null")
        match kind[0] if isinstance(kind, list) else kind:
            case "object":
                return {
                    name: given[name] if name in given else of(child, open_refs)
                    for name, child in part.get("properties", {}).items()
                    if name in given or name in part.get("required", [])
                }
            case "array":
                return [of(part.get("items"), open_refs) for _ in range(min(part.get("minItems", 0), 100))]
            case "string":
                return _FORMATS.get(part.get("format", ""), "x" * min(part.get("minLength", 0), 10_000))
            case "integer" | "number":
                return _number_within(part)
            case "boolean":
                return False
        return None

    return of(schema, given=given)


def _without(part: Schema, key: str) -> Schema:
    return {name: value for name, value in part.items() if name != key}


def _pointed(schema: Schema, ref: str) -> Schema:
    target: Any = schema if ref.startswith("#") else None
    for name in ref.split("/")[1:]:
        target = target.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
    if not isinstance(target, dict):
        raise _cannot_answer(f"{ref} leads to nothing inside the request's schema")
    return target


def _number_within(part: Schema) -> int | float:
    low: Any = part.get("minimum", part.get("exclusiveMinimum", 0))
    high: Any = part.get("maximum", part.get("exclusiveMaximum", 0))
    candidates = (0, low, high, low + 1, high - 1, (low + high) / 2, part.get("multipleOf", 0))
    return next((number for number in candidates if Draft202012Validator(part).is_valid(number)), 0)
