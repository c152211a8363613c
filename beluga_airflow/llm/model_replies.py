"""What the model server sends: completions and errors in OpenAI's form, and answers that break on their way."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import struct
import time
import uuid
from dataclasses import dataclass
from typing import Any, Self

from aiohttp import web

from beluga_airflow.llm.model_requests import ChatRequest
from beluga_airflow.llm.model_rules import Content
from beluga_airflow.llm.model_setup import Traits
from beluga_airflow.llm.model_tokens import joined, logprobs, tokens
from beluga_airflow.llm.model_troubles import BadAnswer, HttpError, Length, Odd, Refusal, Trouble

FINGERPRINT = "beluga-simulation"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model says: content, or a refusal, or (where a filter took it) nothing."""

    content: Content | None = None
    refusal: str | None = None
    finish_reason: str = "stop"

    @classmethod
    def of(cls, content: Content, trouble: Trouble | None) -> Self:
        """What is said instead of `content`, where a trouble has a say in it."""
        match trouble:
            case Refusal():
                return cls(refusal=trouble.text)
            case BadAnswer():
                return cls(content=Content.sure(trouble.text))
            case Odd(kind="content_filter"):
                return cls(finish_reason="content_filter")
            case Odd():
                return cls(content=Content.sure(""))
            case Length():
                start = joined(tokens(content.text)[: trouble.tokens])
                return cls(content=Content.sure(start), finish_reason="length")
        return cls(content=content)

    def completion(self, asked: ChatRequest, traits: Traits) -> dict[str, Any]:
        """The chat completion that holds it."""
        text = self.content.text if self.content else None
        prompt_tokens = math.ceil(asked.length / 4)
        completion_tokens = math.ceil(len(text or self.refusal or "") / 4)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": self.refusal, "annotations": []}
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": asked.model,
            "choices": [
                {
                    "index": 0,
                    "message": message,
                    "logprobs": self._logprobs(asked, traits),
                    "finish_reason": self.finish_reason,
                }
            ],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
            "system_fingerprint": FINGERPRINT,
        }

    def _logprobs(self, asked: ChatRequest, traits: Traits) -> dict[str, Any] | None:
        if not asked.logprobs or traits.logprobs == "none":
            return None

        def told(content: Content | None) -> list[dict[str, Any]] | None:
            if content is None:
                return None
            most = min(asked.top_logprobs or 0, traits.top_logprobs)
            return logprobs(content.text, content.probabilities, most=most, with_bytes=traits.token_bytes)

        refusal = None if self.refusal is None else Content.sure(self.refusal)
        return {"content": told(self.content), "refusal": told(refusal)}


def error_response(error: HttpError) -> web.Response:
    """An error in OpenAI's form."""
    kind, code = "invalid_request_error", error.code
    if error.status >= 500:
        kind = "server_error"
    elif error.status == 429:
        code = code or "rate_limit_exceeded"
        kind = "insufficient_quota" if code == "insufficient_quota" else "requests"
    told = {"message": error.message, "type": error.type or kind, "param": error.param, "code": code}
    return web.json_response({"error": told}, status=error.status, headers=error.headers)


def json_bytes(value: object) -> bytes:
    """JSON as it is sent."""
    return json.dumps(value).encode()


async def reset(request: web.Request, *, announced: int | None = None) -> web.StreamResponse:
    """Reset the connection, behind the headers of a body of `announced` bytes if there is one."""
    response: web.StreamResponse = web.Response()
    if announced is not None:
        response = await _headers(request, announced)
        await asyncio.sleep(0.05)  # a reset overtakes what the client has not yet read
    if request.transport is not None:
        # closed without lingering, the socket sends a reset instead of an end
        request.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        request.transport.abort()
    return response


async def half(request: web.Request, body: bytes) -> web.StreamResponse:
    """Send half of a body, then close the connection."""
    response = await _headers(request, len(body))
    await response.write(body[: len(body) // 2])
    if request.transport is not None:
        # close, not abort: the half that was written shall arrive
        request.transport.close()
    return response


async def drip(request: web.Request, body: bytes, delay: float) -> web.StreamResponse:
    """Send a body a byte at a time, each after `delay` seconds."""
    response = await _headers(request, len(body))
    for number in body:
        await asyncio.sleep(delay)
        await response.write(bytes([number]))
    await response.write_eof()
    return response


async def _headers(request: web.Request, length: int) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.content_length = length
    await response.prepare(request)
    return response
