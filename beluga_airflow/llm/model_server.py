"""A simulated language model: a local server that speaks OpenAI's chat completions over HTTP.

It answers by rules (see ``model_rules``), with log-probabilities if asked for them, can do as much or as little as
real endpoints can (see ``model_setup``), counts its calls, keeps what it was asked, and has troubles as real endpoints
have them when told to (see ``model_troubles``). In a test::

    async with ModelServer(rules=[{"when": {"customer_tier": "gold"}, "answer": "expedite"}]) as server:
        server.fail("status", status=429, headers={"retry-after-ms": "10"})
        ...  # a client of server.base_url
        assert server.calls == 2

As a process: ``airflow beluga model-server --port 8400 --rules rules.yaml``. Besides the API it serves
``GET /health``, ``GET /calls`` (the counts; ``?by=model`` and ``?by=connection`` of each), ``POST /failures`` (such as
``[{"kind": "reset"}]``) and ``POST /reset``; these ask for no key.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import math
import os
import signal
import sys
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from aiohttp import web
from pydantic import JsonValue, ValidationError

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.llm.model_obedience import REASON, demand_of
from beluga_airflow.llm.model_options import DESCRIPTION, OPTIONS
from beluga_airflow.llm.model_replies import FINGERPRINT, Reply, drip, error_response, half, json_bytes, reset
from beluga_airflow.llm.model_requests import ChatRequest, RefusedRequest, validated
from beluga_airflow.llm.model_rules import Content, Rule, content_for, describe, unchecked
from beluga_airflow.llm.model_setup import Traits, load_setup
from beluga_airflow.llm.model_troubles import (
    TROUBLE,
    TROUBLES,
    Drip,
    HalfBody,
    HttpError,
    Named,
    NoCompletion,
    NotJson,
    RateLimit,
    Reset,
    Slow,
    Status,
    Troubles,
)

MAX_BODY_BYTES = 2 * 1024 * 1024
REQUESTS_KEPT = 1000
CONNECTION = r"{connection:[A-Za-z0-9_.-]{1,100}}"


class ModelServer:
    """The simulated model, serving while it is entered as an async context manager.

    Args:
        rules: a rules file (YAML or JSON), or the rules, or a mapping as a file may have it (see ``model_setup``).
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
        rules: str | Path | Mapping[str, Any] | Iterable[Rule | Mapping[str, Any]] = (),
        latency: float = 0.0,
        api_key: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        if not (math.isfinite(latency) and latency >= 0):
            raise InvalidSetting(f"latency of the model server: {latency} is no time; give seconds, at least 0")
        self.host = host
        self.port = port
        self._setup = load_setup(rules)
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

    def url_of(self, connection: str) -> str:
        """A ``base_url`` whose calls are told apart from others, as those of `connection`."""
        return f"{self.base_url.removesuffix('/v1')}/{connection}/v1"

    @property
    def calls(self) -> int:
        """How many chat completions were asked for, whatever became of them."""
        return self._total

    @property
    def obeyed(self) -> int:
        """How many answers did what the data demanded."""
        return self._obeyed

    def calls_by(self, what: Literal["model", "connection"]) -> dict[str, int]:
        """The calls of each model, or of each connection (see `url_of`; "" for all others).

        A call that was refused before its model was read, for its key say, has the model "".
        """
        counts: Counter[str] = Counter()
        for (model, connection), count in self._by_kind.items():
            counts[model if what == "model" else connection] += count
        return dict(counts)

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

    def fail(self, kind: str, *, times: int | None = None, **options: JsonValue) -> None:
        """Make calls fail: the next `times`, or those that the options tell; after the troubles told before.

        Args:
            kind: ``status`` (options ``status``, ``headers``, ``code``, ``message``, ``param``, ``type``),
                ``rate_limit`` (``retry_after`` in seconds, ``form``: ``seconds``, ``ms``, ``date``, ``none`` or
                ``nonsense``), ``insufficient_quota``, ``wrong_key``, ``unknown_model``, ``overloaded``, ``reset``
                (``after``: ``nothing`` or ``headers``), ``half_body``, ``not_json`` (``text``, ``content_type``),
                ``no_completion`` (``body``), ``bad_answer`` (``text``), ``refusal`` (``text``), ``content_filter``,
                ``empty``, ``length`` (``tokens``), ``slow`` (``delay`` in seconds), or ``drip`` (``delay`` of
                each byte).
            times: how many calls; if not given one, or with ``calls`` or ``every`` as many as they say.
            options: of the kind; ``calls`` (numbers from 1) or ``every`` (1: always) say which calls fail, ``model``
                and ``connection`` whose.

        Raises:
            InvalidSetting: there is no such kind, or it has no such option.
        """
        try:
            self._troubles.add([TROUBLE.validate_python({"kind": kind, "times": times, **options})])
        except ValidationError as error:
            raise InvalidSetting("failure of the model server: " + "; ".join(describe(error))) from error

    def reset(self) -> None:
        """Forget the calls and the requests; only the troubles of the rules are still to come, from their first."""
        self._total = 0
        self._answered = 0
        self._obeyed = 0
        self._by_status: Counter[str] = Counter()
        self._by_kind: Counter[tuple[str, str]] = Counter()
        self._requests: deque[dict[str, Any]] = deque(maxlen=REQUESTS_KEPT)
        self._troubles = Troubles(self._setup.troubles)

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors_as_openai])
        for prefix in ("/v1", "", f"/{CONNECTION}/v1"):
            application.router.add_post(f"{prefix}/chat/completions", self._chat)
            application.router.add_get(f"{prefix}/models", self._models)
        application.router.add_get("/health", self._health)
        application.router.add_get("/calls", self._calls)
        application.router.add_post("/reset", self._reset)
        application.router.add_post("/failures", self._queue_failures)
        return application

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "simulation": True})

    async def _calls(self, request: web.Request) -> web.Response:
        match request.query.get("by"):
            case None:
                return web.json_response(self.counts)
            case "model" | "connection" as what:
                return web.json_response(self.calls_by(what))
        raise RefusedRequest("Calls are counted by=model or by=connection.", param="by")

    async def _reset(self, _: web.Request) -> web.Response:
        self.reset()
        return web.json_response(self.counts)

    async def _queue_failures(self, request: web.Request) -> web.Response:
        troubles = validated(TROUBLES, await _json_body(request))
        self._troubles.add(troubles)
        return web.json_response({"queued": sum(trouble.times or 1 for trouble in troubles)})

    async def _models(self, request: web.Request) -> web.Response:
        self._check_key(request)
        names = list(self._setup.models) or ["gpt-4o"]
        models = [{"id": name, "object": "model", "created": 0, "owned_by": FINGERPRINT} for name in names]
        return web.json_response({"object": "list", "data": models})

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
        connection = request.match_info.get("connection", "")
        model = ""
        try:
            self._check_key(request)
            body = await _json_body(request)
            if isinstance(body, dict):
                self._requests.append(body)
                model = str(body.get("model", ""))[:200]
        finally:
            self._by_kind[model, connection] += 1
        asked = ChatRequest.read(body)
        traits = self._setup.traits(asked.model)
        traits.check(asked)
        content = self._content(asked, traits)
        trouble = self._troubles.strike(asked.model, connection)
        await asyncio.sleep(self._latency + (trouble.delay if isinstance(trouble, Slow) else 0))
        match trouble:
            case Status() | RateLimit() | Named():
                return error_response(trouble.error)
            case NotJson():
                return web.Response(text=trouble.text, content_type=trouble.content_type)
            case NoCompletion():
                return web.json_response(trouble.body)
        completion = json_bytes(Reply.of(content, trouble).completion(asked, traits))
        match trouble:
            case Reset():
                return await reset(request, announced=len(completion) if trouble.after == "headers" else None)
            case HalfBody():
                return await half(request, completion)
            case Drip():
                response = await drip(request, completion, trouble.delay)
            case _:
                headers = {"x-request-id": f"req_{uuid.uuid4().hex}"}
                response = web.Response(body=completion, content_type="application/json", headers=headers)
        self._answered += 1
        return response

    def _content(self, asked: ChatRequest, traits: Traits) -> Content:
        schema = traits.schema_for(asked)
        demand = demand_of(asked.told, asked.system) if traits.obedient else None
        if demand is None:
            return content_for(self._setup.rules, asked.prompt, schema, traits.without_schema)
        self._obeyed += 1
        if demand.content is not None:
            return Content.sure(demand.content)
        return Content.sure(unchecked(demand.answer, REASON, schema, traits.without_schema))

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
        return error_response(HttpError(refused.status, str(refused), refused.code, refused.param))
    except web.HTTPException as http:
        return error_response(HttpError(http.status, f"{http.reason}: {request.method} {request.path}"))


def main(argv: Sequence[str] | None = None) -> int:
    """``run`` with the options of a command line.

    Raises:
        SystemExit: the options are wrong (code 2).
    """
    parser = argparse.ArgumentParser(prog="model-server", description=DESCRIPTION)
    for flag, about in OPTIONS:
        parser.add_argument(flag, **about)
    return run(parser.parse_args(argv))


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT, and say on stdout when it listens. Runs in a process's main thread.

    Returns:
        The exit code: 0 after a signal, 1 if the address cannot be listened on, 2 if the rules or the key are wrong.
    """
    try:
        server = ModelServer(
            rules=options.rules or (),
            latency=options.latency,
            api_key=_key_in(options.api_key_env),
            host=options.host,
            port=options.port,
        )
        asyncio.run(_serve(server))
    except (InvalidSetting, OSError, OverflowError) as error:
        print(f"model server: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidSetting) else 1
    return 0


def _key_in(variable: str | None) -> str | None:
    key = os.environ.get(variable) if variable else None
    if variable and not key:
        raise InvalidSetting(f"--api-key-env: the variable {variable} is not set; set it to the key")
    return key


async def _serve(server: ModelServer) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with server:
        print(f"model server (SIMULATION) listening on {server.base_url}", flush=True)
        await stop.wait()


if __name__ == "__main__":
    sys.exit(main())
