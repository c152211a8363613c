"""Troubles that the model server plays, as real endpoints and the networks before them make them.

Each says what (``kind`` and its options), whose calls it concerns (``model``, ``connection``), and when: the next
``times`` of those calls, those with the numbers ``calls`` (from 1), or every ``every``-th (1: always).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, model_validator

MOST_SECONDS = 3600


class _Trouble(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str | None = None
    connection: str | None = None
    times: int | None = Field(default=None, ge=1)
    calls: frozenset[Annotated[int, Field(ge=1)]] = Field(default=frozenset(), max_length=10_000)
    every: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_time(self) -> Self:
        if self.calls and self.every:
            raise ValueError("give calls or every, not both")
        return self

    def concerns(self, model: str, connection: str) -> bool:
        """Whether a call is one of those it counts."""
        return self.model in (None, model) and self.connection in (None, connection)

    def is_due(self, seen: int, played: int) -> bool:
        """Whether it strikes the `seen`-th of its calls, after having struck `played` before."""
        if self.calls or self.every:
            on_time = seen in self.calls if self.calls else seen % (self.every or 1) == 0
            return on_time and (self.times is None or played < self.times)
        return played < (self.times or 1)


class HttpError(NamedTuple):
    """An error response in OpenAI's form; without ``type`` it has the one that its status usually has."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    type: str | None = None
    headers: Mapping[str, str] = MappingProxyType({})


HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$")]
HeaderText = Annotated[str, Field(pattern=r"^[\x20-\x7e]*$")]


class Status(_Trouble):
    """An HTTP error."""

    kind: Literal["status"]
    status: int = Field(default=500, ge=400, le=599)
    headers: dict[HeaderName, HeaderText] = {}
    code: str | None = None
    message: str = "The simulation was told to fail."
    param: str | None = None
    type: str | None = None

    @property
    def error(self) -> HttpError:
        return HttpError(self.status, self.message, self.code, self.param, self.type, self.headers)


class RateLimit(_Trouble):
    """A 429 that says when to come back: in seconds, milliseconds, as a date, not at all, or as nonsense."""

    kind: Literal["rate_limit"]
    retry_after: float = Field(default=1.0, ge=0, le=86_400)
    form: Literal["seconds", "ms", "date", "none", "nonsense"] = "seconds"

    @property
    def error(self) -> HttpError:
        message = "Rate limit reached for requests (the simulation was told to). Please try again later."
        return HttpError(429, message, "rate_limit_exceeded", headers=self._headers())

    def _headers(self) -> dict[str, str]:
        match self.form:
            case "seconds":
                return {"Retry-After": f"{self.retry_after:g}"}
            case "ms":
                return {"retry-after-ms": f"{self.retry_after * 1000:g}"}
            case "date":
                # a date has whole seconds: rounded up, it asks for no less than was told
                moment = datetime.now(UTC) + timedelta(seconds=self.retry_after, microseconds=999_999)
                return {"Retry-After": format_datetime(moment, usegmt=True)}
            case "nonsense":
                return {"Retry-After": "when the moon is full"}
        return {}


_NAMED = {
    "insufficient_quota": HttpError(
        429, "You exceeded your current quota, please check your plan and billing details.", "insufficient_quota"
    ),
    # OpenAI shows the ends of the key here; a secret has no place in a message
    "wrong_key": HttpError(401, "Incorrect API key provided: ***.", "invalid_api_key"),
    "unknown_model": HttpError(
        404, "The model does not exist or you do not have access to it.", "model_not_found", "model"
    ),
    "overloaded": HttpError(529, "Overloaded", type="overloaded_error"),
}


class Named(_Trouble):
    """An HTTP error that has a name."""

    kind: Literal["insufficient_quota", "wrong_key", "unknown_model", "overloaded"]

    @property
    def error(self) -> HttpError:
        return _NAMED[self.kind]


class Reset(_Trouble):
    """The connection is reset before anything was answered, or after the headers."""

    kind: Literal["reset"]
    after: Literal["nothing", "headers"] = "nothing"


class HalfBody(_Trouble):
    """Half of the answer, then the connection is closed."""

    kind: Literal["half_body"]


class NotJson(_Trouble):
    """A 200 that is no JSON, as a proxy may give it."""

    kind: Literal["not_json"]
    text: str = "<html><body>Bad gateway</body></html>"
    content_type: Literal["text/html", "text/plain", "application/json"] = "text/html"


class NoCompletion(_Trouble):
    """A 200 whose JSON is no chat completion."""

    kind: Literal["no_completion"]
    body: JsonValue = {"status": "ok"}


class Odd(_Trouble):
    """An answer that the content filter took, or an empty one."""

    kind: Literal["content_filter", "empty"]


class BadAnswer(_Trouble):
    """Content that does not fit the schema."""

    kind: Literal["bad_answer"]
    text: str = '{"answer": {"not": "asked for"}}'


class Refusal(_Trouble):
    """The model declines."""

    kind: Literal["refusal"]
    text: str = "I'm sorry, I can't assist with that request."


class Length(_Trouble):
    """The answer, cut off after so many tokens."""

    kind: Literal["length"]
    tokens: int = Field(default=3, ge=0)


class Slow(_Trouble):
    """An answer after `delay` seconds more."""

    kind: Literal["slow"]
    delay: float = Field(default=1.0, ge=0, le=MOST_SECONDS)


class Drip(_Trouble):
    """An answer that comes a byte at a time, each after `delay` seconds."""

    kind: Literal["drip"]
    delay: float = Field(default=0.01, ge=0, le=MOST_SECONDS)


Trouble = Annotated[
    Status
    | RateLimit
    | Named
    | Reset
    | HalfBody
    | NotJson
    | NoCompletion
    | Odd
    | BadAnswer
    | Refusal
    | Length
    | Slow
    | Drip,
    Field(discriminator="kind"),
]
TROUBLE: TypeAdapter[Trouble] = TypeAdapter(Trouble)
TROUBLES: TypeAdapter[list[Trouble]] = TypeAdapter(list[Trouble])


class _Standing:
    def __init__(self, trouble: Trouble) -> None:
        self.trouble = trouble
        self.seen = 0
        self.played = 0


class Troubles:
    """The troubles that are still to come; of those that are due, the first strikes."""

    def __init__(self, troubles: Iterable[Trouble] = ()) -> None:
        self._standing = [_Standing(trouble) for trouble in troubles]

    def add(self, troubles: Iterable[Trouble]) -> None:
        """More of them, after those that there are; they count calls from now on."""
        self._standing += [_Standing(trouble) for trouble in troubles]

    def strike(self, model: str, connection: str) -> Trouble | None:
        """The trouble of this call, if there is one. Every trouble that the call concerns counts it."""
        struck: _Standing | None = None
        for standing in self._standing:
            if not standing.trouble.concerns(model, connection):
                continue
            standing.seen += 1
            if struck is None and standing.trouble.is_due(standing.seen, standing.played):
                struck = standing
        if struck is None:
            return None
        struck.played += 1
        return struck.trouble
