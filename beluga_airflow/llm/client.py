"""Asking a model, and the one place where errors of the openai library become ours."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

from beluga_airflow.config import LLMSettings
from beluga_airflow.errors import InvalidSetting, ModelError, ModelRefused, ModelUnavailable
from beluga_airflow.graph.parts import told
from beluga_airflow.llm.abilities import WAYS, completed
from beluga_airflow.llm.logprobs import Token, tokens_of
from beluga_airflow.llm.presets import preset
from beluga_airflow.resilience.bounded import bounded

if TYPE_CHECKING:
    import openai

__all__ = ["SIMULATION", "Endpoint", "ModelClient", "ModelReply", "ModelRequest", "OpenAIClient", "Usage"]

log = logging.getLogger(__name__)

SIMULATION = "beluga-simulation"
"""The ``system_fingerprint`` by which the model server of this package owns up."""
AGAIN = frozenset({408, 409, 429})
"""Status codes below 500 that another attempt may help."""
NEVER_SENT = "ConnectError"
"""What the HTTP library, whichever it is, calls a connection that was not made."""

WORD = re.compile(r"[A-Za-z_.]{1,60}")
"""A server's codes and parameters; a key or a piece of data does not look like one."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a model is, and how to be let in.

    Args:
        provider: the name of a preset.
        model: unless a decision names another.
        base_url: instead of the preset's.
        api_key: instead of the one in the provider's usual environment variable.
        timeout: seconds for one call.
        conn_id: the connection that says all this, for messages.
        structured_output: how answers are asked for: by JSON schema (``schema``), in words (``text``), or (``auto``) by
            schema until the endpoint refuses that.
        logprobs: whether log-probabilities of choices are asked for: ``on``, ``off``, or (``auto``) until it refuses
            that.

    Raises:
        InvalidSetting: ``base_url`` is no address of an API, or one of the others is none of its words.
    """

    provider: str = LLMSettings.provider
    model: str = LLMSettings.model
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout: float = LLMSettings.timeout
    conn_id: str | None = None
    structured_output: str = "auto"
    logprobs: str = "auto"

    def __post_init__(self) -> None:
        for name, words in WAYS.items():
            if getattr(self, name) not in words:
                raise InvalidSetting(f"{name} is {told(getattr(self, name))}, it must be {', '.join(words)}")
        if self.base_url and not _is_address(self.base_url):
            # not the text itself: people put keys there
            raise InvalidSetting(
                f"the base_url for model provider {self.provider!r} cannot be used: write http(s)://host/path, with no "
                "user, password or query in it; a key goes into the connection's password"
            )

    @property
    def owner(self) -> str:
        """What to mend when something here is wrong."""
        return f"connection {self.conn_id!r}" if self.conn_id else "the connection"

    @property
    def address(self) -> str:
        """The base URL, from the preset where none is given.

        Raises:
            InvalidSetting: the provider is unknown, or needs a base URL.
        """
        found = preset(self.provider)
        address = self.base_url or found.base_url
        if not address:
            raise InvalidSetting(
                f"model provider {self.provider!r} needs a base_url in {self.owner}, such as {found.address_form}"
            )
        return address

    @property
    def key(self) -> str:
        """The API key, from the provider's usual environment variable where none is given.

        Raises:
            InvalidSetting: the provider wants one and there is none, or it cannot be one.
        """
        variable = preset(self.provider).key_variable
        key = (self.api_key or (os.environ.get(variable) if variable else None) or "").strip()
        if not (key.isascii() and key.isprintable()):
            raise InvalidSetting(
                f"the API key for model provider {self.provider!r} holds characters that no key has; copy it again"
            )
        if not key and variable:
            raise InvalidSetting(
                f"no API key for model provider {self.provider!r}: put it into the password of {self.owner}, "
                f"or into the environment variable {variable}"
            )
        return key or "none"


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens that were read and written."""

    input: int = 0
    output: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(input=self.input + other.input, output=self.output + other.output)

    @property
    def total(self) -> int:
        """All of them."""
        return self.input + self.output


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """One question to a model: ``messages`` as the chat API has them, and the JSON schema of the answer.

    ``within``: seconds that whoever asks has left; no limit may take longer. ``timeout``: seconds for the answer, where
    whoever asks has less than the endpoint's. ``logprobs``: whether log-probabilities are of no use, wanted, or needed.
    """

    messages: tuple[Mapping[str, str], ...]
    schema: Mapping[str, Any]
    max_tokens: int
    model: str | None = None
    within: float | None = field(default=None, compare=False)
    timeout: float | None = field(default=None, compare=False)
    logprobs: Literal["no", "wanted", "needed"] = "no"


@dataclass(frozen=True, kw_only=True)
class ModelReply:
    """What came back.

    Args:
        content: the text of the answer; empty when the model refused or was cut off.
        trouble: why there is no whole answer, or None.
        model: the model that answered, as the endpoint names it.
        provider: the preset it was asked through.
        usage: tokens paid for.
        simulated: whether a simulation answered, not a model.
        seconds: how long it took.
        connection: the id of the connection that was asked, if it has one.
        tokens: of the content, where their log-probabilities were reported.
    """

    content: str
    trouble: str | None
    model: str
    provider: str
    usage: Usage
    simulated: bool
    seconds: float
    connection: str | None = None
    tokens: tuple[Token, ...] | None = field(default=None, repr=False)


class ModelClient(Protocol):
    """Whoever can answer a ``ModelRequest``."""

    async def answer(self, request: ModelRequest) -> ModelReply:
        """Ask once; no retries.

        Raises:
            ModelUnavailable: worth another try.
            ModelRefused: not worth another try.
            InvalidSetting: the connection switches off what the request needs.
            NotNow: a guard before it does not let it through now.
        """
        ...

    def asks(self, request: ModelRequest) -> tuple[str, str]:
        """The provider and the model that a request goes to."""
        ...

    async def check(self) -> None:
        """See, for nothing, that the endpoint lets us in; one that cannot tell is taken to.

        Raises:
            ModelRefused: it refuses the key.
        """
        ...

    @property
    def refused(self) -> bool:
        """Whether the endpoint has refused the key, so that the connection should be looked at again."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


class OpenAIClient:
    """A ``ModelClient`` for every endpoint that speaks the OpenAI API.

    It belongs to the event loop in which it is first used.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._address, self._key = endpoint.address, endpoint.key
        self._client: openai.AsyncOpenAI | None = None
        self.refused = False

    def _opened(self) -> openai.AsyncOpenAI:
        import openai

        if self._client is None:
            self._client = openai.AsyncOpenAI(
                api_key=self._key, base_url=self._address, timeout=self._endpoint.timeout, max_retries=0
            )
        return self._client

    def asks(self, request: ModelRequest) -> tuple[str, str]:
        return self._endpoint.provider, request.model or self._endpoint.model

    async def check(self) -> None:
        import openai

        try:
            with bounded(self._endpoint.timeout, self._late):
                await self._opened().models.list()
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._translated(error) from None
        except (openai.OpenAIError, ModelUnavailable, ValueError, AttributeError, TypeError) as error:
            log.debug("%s cannot tell whether it lets us in (%s)", self._who, type(error).__name__)

    async def answer(self, request: ModelRequest) -> ModelReply:
        import openai

        client = self._opened()
        started = time.monotonic()
        timeout = min(self._endpoint.timeout, request.timeout or self._endpoint.timeout)
        try:
            # the library's own timeout begins anew with every byte
            with bounded(timeout, lambda: self._late(timeout)):
                completion = await completed(client, self._endpoint, request)
            reply = _reply(completion, self._endpoint.provider, time.monotonic() - started)
            return replace(reply, connection=self._endpoint.conn_id)
        except openai.OpenAIError as error:
            raise self._translated(error) from None
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
            # the body was no chat completion
            raise ModelUnavailable(
                f"{self._who} answered something that is no chat completion ({type(error).__name__}); "
                "check that its base_url is that of an OpenAI-compatible API",
                may_cost=True,
            ) from None

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    @property
    def _who(self) -> str:
        asked = f"provider {self._endpoint.provider!r}"
        if self._endpoint.conn_id:
            asked += f", {self._endpoint.owner}"
        return f"the model endpoint {self._address} ({asked})"

    def _late(self, timeout: float | None = None) -> ModelUnavailable:
        seconds = self._endpoint.timeout if timeout is None else timeout
        return ModelUnavailable(f"{self._who} did not answer within {round(seconds, 2):g} s", may_cost=True)

    def _translated(self, error: openai.OpenAIError) -> ModelError:
        # never the server's own message: it may repeat the key, the question or the data
        import openai

        if isinstance(error, openai.APITimeoutError):
            return self._late()
        if isinstance(error, openai.APIStatusError):
            return self._of_status(error)
        if isinstance(error, openai.APIConnectionError):
            return ModelUnavailable(
                f"{self._who} cannot be reached or broke off; check base_url and that it is up",
                may_cost=type(error.__cause__).__name__ != NEVER_SENT,
            )
        return ModelUnavailable(f"{self._who} answered something unreadable ({type(error).__name__})", may_cost=True)

    def _of_status(self, error: openai.APIStatusError) -> ModelError:
        status, headers = error.status_code, error.response.headers
        code = _word(error.code)
        said = f"{self._who} answered {status}{f' ({code})' if code else ''}"
        if status in (401, 403):
            self.refused = True
            return ModelRefused(f"{said}: it refuses the API key; mend the password of {self._endpoint.owner}")
        if code == "insufficient_quota":
            return ModelRefused(f"{said}: the account has no quota left; top it up or use another connection")
        wanted = headers.get("x-should-retry")
        again = status >= 500 or status in AGAIN
        if wanted == "true" or (wanted != "false" and again):
            return ModelUnavailable(f"{said}; it may work later", retry_after=_retry_after(headers))
        parameter = _word(error.param)
        return ModelRefused(f"{said}: it refuses the request{f' over {parameter}' if parameter else ''}")


def _reply(completion: Any, provider: str, seconds: float) -> ModelReply:
    choice = completion["choices"][0]
    message, ended = choice["message"], choice.get("finish_reason")
    content = message.get("content")
    trouble = None
    if message.get("refusal"):
        trouble = "the model refused to answer"
    elif ended == "content_filter":
        trouble = "a content filter stopped the answer"
    elif ended == "length":
        trouble = "the answer was cut off at max_tokens"
    elif not content:
        trouble = "the answer is empty"
    usage = completion.get("usage") or {}
    return ModelReply(
        content="" if trouble else str(content),
        trouble=trouble,
        model=str(completion.get("model") or "unknown"),
        provider=provider,
        usage=Usage(input=_count(usage.get("prompt_tokens")), output=_count(usage.get("completion_tokens"))),
        simulated=str(completion.get("system_fingerprint")).startswith(SIMULATION),
        seconds=seconds,
        tokens=None if trouble else tokens_of(choice.get("logprobs")),
    )


def _is_address(base_url: str) -> bool:
    try:
        parts = urlsplit(base_url)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return has_host and parts.scheme in ("http", "https") and not ("@" in parts.netloc or parts.query or parts.fragment)


def _count(tokens: object) -> int:
    # endpoints differ
    return tokens if isinstance(tokens, int) and tokens > 0 else 0


def _word(text: object) -> str:
    """A code of the server's, when it looks like one."""
    return text if isinstance(text, str) and WORD.fullmatch(text) else ""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from any of the three forms in which servers say it."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            wait = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        return wait if math.isfinite(wait) and wait >= 0 else None
    try:
        moment = parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
