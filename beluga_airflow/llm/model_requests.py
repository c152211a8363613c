"""What the model server is asked: chat requests, checked as OpenAI checks them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, Self, TypeVar

from jsonschema import Draft202012Validator, SchemaError  # type: ignore[import-untyped]  # it has no types
from pydantic import BaseModel, Field, JsonValue, TypeAdapter, ValidationError, field_validator

Schema = dict[str, Any]
T = TypeVar("T")


ANY_OBJECT: Schema = {"type": "object"}


class RefusedRequest(Exception):  # never leaves this room, where it becomes a reply
    """A request that gets an error of OpenAI's form instead of an answer.

    Args:
        message: what is wrong with it, and what to do.
        status: the HTTP status.
        code: OpenAI's word for the error.
        param: the part of the request that is wrong.
    """

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


MOST_TOP_LOGPROBS = 20
_MOST_LEVELS = 50  # of a schema; beyond a hundred or so its check would overflow the stack
_OPENING = re.compile(r"<<<DATA ([0-9A-Za-z]+)>>>")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What was asked: the text around the data block, and the data (empty unless it is a JSON object)."""

    question: str
    data: Mapping[str, Any]

    @classmethod
    def read(cls, user_messages: list[str]) -> Self:
        """The prompt in the last user message with a data block: a re-prompt may follow it without one."""
        for text in reversed(user_messages):
            if opening := _OPENING.search(text):
                data, closing, after = text[opening.end() :].partition(f"<<<END {opening[1]}>>>")
                if closing:
                    return cls(question=text[: opening.start()] + after, data=_json_object(data))
        return cls(question=user_messages[-1] if user_messages else "", data={})


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class _Part(BaseModel):
    type: str
    text: str = ""


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[_Part] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class _JsonSchema(BaseModel):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    strict: bool | None = None
    asked: Schema = Field(default={}, alias="schema")


class _Text(BaseModel):
    type: Literal["text"]


class _JsonObject(BaseModel):
    type: Literal["json_object"]


class _JsonSchemaFormat(BaseModel):
    type: Literal["json_schema"]
    json_schema: _JsonSchema


_Format = Annotated[_Text | _JsonObject | _JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(BaseModel):
    """The part of a chat completion request that the simulation reads; the rest is let pass."""

    model: str = Field(min_length=1)
    messages: list[_Message] = Field(min_length=1)
    response_format: _Format | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
    n: int | None = None
    stream: bool | None = None

    @field_validator("n", "stream")
    @classmethod
    def _whole_and_once(cls, value: int | bool | None) -> int | bool | None:
        if value is True or value not in (None, False, 1):
            raise ValueError("the simulation gives one answer, as a whole; leave this out")
        return value

    @classmethod
    def read(cls, body: JsonValue) -> Self:
        """The request in a JSON body.

        Raises:
            RefusedRequest: OpenAI would refuse it, or the simulation cannot do what it asks.
        """
        request = validated(TypeAdapter(cls), body)
        if isinstance(form := request.response_format, _JsonSchemaFormat):
            _check_schema(form.json_schema)
        if request.top_logprobs is not None and not request.logprobs:
            raise RefusedRequest(
                "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.",
                code="invalid_value",
                param="top_logprobs",
            )
        return request

    @property
    def prompt(self) -> Prompt:
        """What the user asks."""
        return Prompt.read([message.text for message in self.messages if message.role == "user"])

    @property
    def system(self) -> str:
        """What the model was told to be."""
        return "\n\n".join(message.text for message in self.messages if message.role in ("system", "developer"))

    @property
    def told(self) -> list[str]:
        """Everything in the messages that may be of others: what is from a data block on, or else the last message."""
        texts = [message.text for message in self.messages if message.role not in ("system", "developer")]
        blocks = [text[opening.start() :] for text in texts if (opening := _OPENING.search(text))]
        return blocks or texts[-1:]

    @property
    def asks_for_json_schema(self) -> bool:
        """Whether the answer shall fit a JSON schema."""
        return isinstance(self.response_format, _JsonSchemaFormat)

    @property
    def length(self) -> int:
        """Characters in all messages."""
        return sum(len(message.text) for message in self.messages)

    @property
    def schema_asked(self) -> Schema | None:
        """The schema that the answer must fit, or None where plain text is asked for."""
        match self.response_format:
            case _JsonSchemaFormat(json_schema=json_schema):
                return json_schema.asked
            case _JsonObject():
                return ANY_OBJECT
        return None


def validated(adapter: TypeAdapter[T], body: object) -> T:
    """The body as its type.

    Raises:
        RefusedRequest: it is not of that type; names the first field that is wrong.
    """
    try:
        return adapter.validate_python(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(map(str, fault["loc"])) or None
        if fault["type"] == "missing":
            message, code = f"Missing required parameter: '{param}'.", "missing_required_parameter"
        else:
            message, code = f"Invalid value for '{param or 'the body'}': {fault['msg']}.", "invalid_value"
        raise RefusedRequest(message, code=code, param=param) from error


def _check_schema(json_schema: _JsonSchema) -> None:
    fault: str | None = f"it is nested more than {_MOST_LEVELS} levels deep"
    if not _deeper(json_schema.asked, _MOST_LEVELS):
        fault = _schema_fault(json.dumps(json_schema.asked), bool(json_schema.strict))
    if fault:
        raise RefusedRequest(
            f"Invalid schema for response_format '{json_schema.name}': {fault}.",
            code="invalid_json_schema",
            param="response_format",
        )


def _deeper(value: JsonValue, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(part, levels - 1) for part in parts)


@lru_cache(maxsize=64)  # a millisecond each, and a batch asks with the same few
def _schema_fault(text: str, strict: bool) -> str | None:
    schema = json.loads(text)
    try:
        Draft202012Validator.check_schema(schema)
        return next(_strict_faults(schema), None) if strict else None
    except SchemaError as error:
        return f"at {error.json_path}: {error.message[:300]}"


def _strict_faults(schema: object) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    properties = schema.get("properties", {})
    if properties or schema.get("type") == "object":
        if schema.get("additionalProperties") is not False:
            yield "'additionalProperties' is required to be supplied and to be false"
        for missing in sorted(properties.keys() - set(schema.get("required", []))):
            yield (
                "'required' is required to be supplied and to be an array including every key in properties. "
                f"Missing '{missing}'"
            )
    parts = [*properties.values(), *schema.get("$defs", {}).values(), schema.get("items")]
    for part in [*parts, *schema.get("anyOf", []), *schema.get("oneOf", []), *schema.get("allOf", [])]:
        yield from _strict_faults(part)
