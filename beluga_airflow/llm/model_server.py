"""A simulated language model: a local server that speaks OpenAI's chat completions over HTTP.

It answers by rules (see ``model_rules``), counts its calls, keeps what it was asked, and fails as real
endpoints do when told to. In a test::

    async with ModelServer(rules=[{"when": {"customer_tier": "gold"}, "answer": "expedite"}]) as server:
        server.fail("status", status=429, headers={"retry-after-ms": "10"})
        ...  # a client of server.base_url
        assert server.calls == 2

As a process: ``python -m beluga_airflow.llm.model_server --port 8400 --rules rules.yaml``. Besides the API it
serves ``GET /health``, ``GET /calls`` (the counts), ``POST /failures`` (such as ``[{"kind": "reset"}]``) and
``POST /reset``; these ask for no key.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import math
import os
import signal
import socket
import struct
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web
from pydantic import JsonValue, ValidationError

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.llm.model_requests import (
    FAILURE,
    FAILURES,
    BadAnswer,
    ChatRequest,
    Failure,
    NotJson,
    Plain,
    Refusal,
    RefusedRequest,
    Slow,
    Status,
    validated,
)
from beluga_airflow.llm.model_rules import Rule, content_for, describe, load_rules

FINGERPRINT = "beluga-simulation"
MAX_BODY_BYTES = 2 * 1024 * 1024
REQUESTS_KEPT = 1000


class ModelServer:
    """The simulated model, serving while it is entered as an async context manager.

    Args:
        rules: a rules file (YAML or JSON), or the rules.
        latency: seconds before every answer.
        api_key: the only key that is let in; None lets everybody in.
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one, which `port` then says.

    Raises:
        InvalidSetting: a rule is wrong, or `latency` is no time.
    """

    def __init__(
        self,
        *,
        rules: str | Path | Iterable[Rule | Mapping[str, Any]] = (),
        latency: float = 0.0,
        api_key: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        if not (math.isfinite(latency) and latency >= 0):
            raise InvalidSetting(f"latency of the model server: {latency} is no time; give seconds, at least 0")
        self.host = host
        self.port = port
        self._rules = load_rules(rules)
        self._latency = latency
        self._api_key = api_key
        self._runner: web.AppRunner | None = None
        self.reset()

    async def __aenter__(self) -> Self:
        """Start to listen.

        Raises:
            OSError: the address cannot be listened on.
        """
        # a client that gives up ends its call, and a stopping server waits for no slow answer
        runner = web.AppRunner(self._application(), handler_cancellation=True, access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        try:
            await web.TCPSite(runner, self.host, self.port).start()
        except BaseException:
            await runner.cleanup()
            raise
        self._runner = runner
        self.port = runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop: calls that are being answered are cut."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @property
    def base_url(self) -> str:
        """What an OpenAI client takes as its ``base_url``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"

    @property
    def calls(self) -> int:
        """How many chat completions were asked for, whatever became of them."""
        return self._total

    @property
    def counts(self) -> dict[str, Any]:
        """The calls, as ``GET /calls`` reports them.

        ``answered`` are those that got a whole completion (refusals and bad answers too: a real endpoint
        charges for them), ``failed`` the rest. A connection that broke first counts as ``cut`` in
        ``by_status``. A call that is still being answered is in ``total`` only.
        """
        return {
            "total": self._total,
            "answered": self._answered,
            "failed": self._by_status.total() - self._answered,
            "by_status": dict(self._by_status),
        }

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The bodies of the last calls (at most `REQUESTS_KEPT`), oldest first."""
        return list(self._requests)

    def fail(self, kind: str, *, times: int = 1, **options: JsonValue) -> None:
        """Make the next `times` calls fail, after those that were told to fail before.

        Args:
            kind: ``status`` (options ``status``, ``headers``, ``code``, ``message``), ``reset``,
                ``half_body``, ``not_json`` (``text``, ``content_type``), ``bad_answer`` (``text``),
                ``refusal`` (``text``), ``content_filter``, ``empty``, or ``slow`` (``delay`` in seconds).
            times: how many calls.
            options: of the kind.

        Raises:
            InvalidSetting: there is no such kind, or it has no such option.
        """
        try:
            self._failures.append(FAILURE.validate_python({"kind": kind, "times": times, **options}))
        except ValidationError as error:
            raise InvalidSetting("failure of the model server: " + "; ".join(describe(error))) from error

    def reset(self) -> None:
        """Forget the calls, the requests, and the failures that are still due."""
        self._total = 0
        self._answered = 0
        self._by_status: Counter[str] = Counter()
        self._requests: deque[dict[str, Any]] = deque(maxlen=REQUESTS_KEPT)
        self._failures: deque[Failure] = deque()

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors_as_openai])
        for prefix in ("/v1", ""):
            application.router.add_post(f"{prefix}/chat/completions", self._chat)
            application.router.add_get(f"{prefix}/models", self._models)
        application.router.add_get("/health", self._health)
        application.router.add_get("/calls", self._calls)
        application.router.add_post("/reset", self._reset)
        application.router.add_post("/failures", self._queue_failures)
        return application

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "simulation": True})

    async def _calls(self, _: web.Request) -> web.Response:
        return web.json_response(self.counts)

    async def _reset(self, _: web.Request) -> web.Response:
        self.reset()
        return web.json_response(self.counts)

    async def _queue_failures(self, request: web.Request) -> web.Response:
        failures = validated(FAILURES, await _json_body(request))
        self._failures.extend(failures)
        return web.json_response({"queued": sum(failure.times for failure in failures)})

    async def _models(self, request: web.Request) -> web.Response:
        self._check_key(request)
        model = {"id": "gpt-4o", "object": "model", "created": 0, "owned_by": FINGERPRINT}
        return web.json_response({"object": "list", "data": [model]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self._total += 1
        response: web.StreamResponse | None = None
        try:
            response = await _errors_as_openai(request, self._reply)
            return response
        finally:
            cut = response is None or request.transport is None or request.transport.is_closing()
            self._by_status["cut" if cut or response is None else str(response.status)] += 1

    async def _reply(self, request: web.Request) -> web.StreamResponse:
        self._check_key(request)
        body = await _json_body(request)
        if isinstance(body, dict):
            self._requests.append(body)
        asked = ChatRequest.read(body)
        content = content_for(self._rules, asked.prompt, asked.schema_asked)
        failure = self._next_failure()
        await asyncio.sleep(self._latency + (failure.delay if isinstance(failure, Slow) else 0))
        match failure:
            case Status():
                return _error(failure.message, status=failure.status, code=failure.code, headers=failure.headers)
            case NotJson():
                return web.Response(text=failure.text, content_type=failure.content_type)
            case Plain(kind="reset"):
                return _reset_connection(request)
            case Plain(kind="half_body"):
                return await _half(request, _completion(asked, content))
        self._answered += 1
        match failure:
            case Refusal():
                completion = _completion(asked, None, refusal=failure.text)
            case BadAnswer():
                completion = _completion(asked, failure.text)
            case Plain(kind="content_filter"):
                completion = _completion(asked, None, finish_reason="content_filter")
            case Plain(kind="empty"):
                completion = _completion(asked, "")
            case _:
                completion = _completion(asked, content)
        return web.json_response(completion, headers={"x-request-id": f"req_{uuid.uuid4().hex}"})

    def _next_failure(self) -> Failure | None:
        if not self._failures:
            return None
        failure = self._failures.popleft()
        if failure.times > 1:
            self._failures.appendleft(failure.model_copy(update={"times": failure.times - 1}))
        return failure

    def _check_key(self, request: web.Request) -> None:
        if self._api_key is None:
            return
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise RefusedRequest(
                "You didn't provide an API key. Send it in an Authorization header, as Bearer.", status=401
            )
        if not hmac.compare_digest(key.encode(errors="replace"), self._api_key.encode()):
            # OpenAI shows the ends of the key here; a secret has no place in a message
            raise RefusedRequest("Incorrect API key provided: ***.", status=401, code="invalid_api_key")


async def _json_body(request: web.Request) -> Any:
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise RefusedRequest(
            "We could not parse the JSON body of your request. Send a JSON object, encoded in UTF-8."
        ) from error


@web.middleware
async def _errors_as_openai(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except RefusedRequest as refused:
        return _error(str(refused), status=refused.status, code=refused.code, param=refused.param)
    except web.HTTPException as http:
        return _error(f"{http.reason}: {request.method} {request.path}", status=http.status, code=None)


def _error(
    message: str, *, status: int, code: str | None, param: str | None = None, headers: Mapping[str, str] = {}
) -> web.Response:
    kind = "invalid_request_error"
    if status >= 500:
        kind = "server_error"
    elif status == 429:
        code = code or "rate_limit_exceeded"
        kind = "insufficient_quota" if code == "insufficient_quota" else "requests"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)


def _completion(
    asked: ChatRequest, content: str | None, *, refusal: str | None = None, finish_reason: str = "stop"
) -> dict[str, Any]:
    prompt_tokens = math.ceil(asked.length / 4)
    completion_tokens = math.ceil(len(content or refusal or "") / 4)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked.model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content, "refusal": refusal, "annotations": []},
                "logprobs": None,
                "finish_reason": finish_reason,
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
        "system_fingerprint": FINGERPRINT,
    }


def _reset_connection(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        # closed without lingering, the socket sends a reset instead of an end
        request.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        request.transport.abort()
    return web.Response()


async def _half(request: web.Request, completion: dict[str, Any]) -> web.StreamResponse:
    body = json.dumps(completion).encode()
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.content_length = len(body)
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    if request.transport is not None:
        # close, not abort: the half that was written shall arrive
        request.transport.close()
    return response


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, and say on stdout when it listens. Runs in a process's main thread.

    Returns:
        The exit code: 0 after a signal, 1 if the address cannot be listened on, 2 if the rules are wrong.

    Raises:
        SystemExit: the options are wrong (code 2).
    """
    parser = argparse.ArgumentParser(prog="model-server", description="A simulated model with OpenAI's API.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8400, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--rules", type=Path, help="YAML or JSON file with the rules of the answers")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before every answer")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable with the only key let in")
    options = parser.parse_args(argv)
    api_key = None
    if options.api_key_env and not (api_key := os.environ.get(options.api_key_env)):
        parser.error(f"--api-key-env: the variable {options.api_key_env} is not set; set it to the key")
    try:
        where = {"host": options.host, "port": options.port}
        server = ModelServer(rules=options.rules or (), latency=options.latency, api_key=api_key, **where)
        asyncio.run(_serve(server))
    except (InvalidSetting, OSError, OverflowError) as error:
        print(f"model server: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidSetting) else 1
    return 0


async def _serve(server: ModelServer) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with server:
        print(f"model server (SIMULATION) listening on {server.base_url}", flush=True)
        await stop.wait()


if __name__ == "__main__":
    sys.exit(main())
