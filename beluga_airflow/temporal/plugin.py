"""Decisions in a user's own Temporal worker, for hand-written workflows."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

from temporalio import activity
from temporalio.common import RetryPolicy
from temporalio.plugin import SimplePlugin
from temporalio.worker import WorkflowRunner
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner

from beluga_airflow.config import Settings
from beluga_airflow.errors import InvalidFlow, InvalidInput, InvalidSetting
from beluga_airflow.execute import Resources, States, attempt, own_cancellation
from beluga_airflow.graph import Chain, Decision, Identity, Retry
from beluga_airflow.graph.locate import load_decision
from beluga_airflow.llm.client import Endpoint, ModelClient, OpenAIClient
from beluga_airflow.llm.decide import DecisionRecord
from beluga_airflow.state import StateStore, open_store
from beluga_airflow.temporal.activities import Backends, failures, heartbeat
from beluga_airflow.temporal.messages import DECISION_ACTIVITY, DecisionCall

__all__ = ["BelugaPlugin"]

ASKING = 0.8
"""Of an attempt's time, what may be spent on coming to an answer: then the last one still has the time to fall back."""


class BelugaPlugin(SimplePlugin):
    """Puts the activity behind ``decide`` into a worker; for the worker's ``plugins``, or its client's.

        Worker(client, task_queue="orders", workflows=[OrderWorkflow], activities=[...],
               plugins=[BelugaPlugin({"handling": HANDLING}, state="postgresql://...")])

    It changes nothing but that: data converter, interceptors and retries are yours. Keys stay in this process.

    Args:
        decisions: by the names that workflows give; others are found by their import path.
        endpoint: where decisions ask; without it as the settings say, with the key from the provider's usual
            environment variable.
        endpoints: more of them, by the names of connections that decisions give.
        model: asks in place of all endpoints; not closed here.
        state: where records are kept, a store or its URL; a store is not closed here. Without it the settings'
            ``state.url``.
        settings: instead of the defaults; ``load_settings`` reads them from a file.
        backends: gives model and state in place of all these: ``AirflowBackends`` takes Airflow's connections.

    Raises:
        InvalidFlow: a decision cannot mean anything.
        InvalidSetting: there is no state store, or an endpoint cannot be used.
    """

    def __init__(
        self,
        decisions: Mapping[str, Decision] | None = None,
        *,
        endpoint: Endpoint | None = None,
        endpoints: Mapping[str, Endpoint] | None = None,
        model: ModelClient | None = None,
        state: StateStore | str | None = None,
        settings: Settings | None = None,
        backends: Backends | None = None,
    ) -> None:
        own = None
        if backends is None:
            own = backends = _OwnBackends(endpoint, endpoints or {}, model, state, settings or Settings())
        elif (endpoint, endpoints, model, state, settings) != (None,) * 5:
            raise InvalidSetting("BelugaPlugin: backends= gives model and state; leave out what else would say so")
        self._own = own
        self._workers = 0
        super().__init__(
            "beluga.BelugaPlugin",
            activities=[_Decisions(decisions or {}, backends).decision],
            workflow_runner=_with_us_let_in,
            run_context=self._while_it_runs,
        )

    @asynccontextmanager
    async def _while_it_runs(self) -> AsyncIterator[None]:
        # several workers of a process may share it
        self._workers += 1
        try:
            yield
        finally:
            self._workers -= 1
            if self._own is not None and not self._workers:
                await self._own.close()


def _with_us_let_in(runner: WorkflowRunner | None) -> WorkflowRunner:
    """The worker's own runner, which does not import us anew for every workflow where it has a sandbox."""
    runner = runner or SandboxedWorkflowRunner()
    if not isinstance(runner, SandboxedWorkflowRunner):
        return runner
    return replace(runner, restrictions=runner.restrictions.with_passthrough_modules("beluga_airflow"))


class _Decisions:
    """The activity."""

    def __init__(self, decisions: Mapping[str, Decision], backends: Backends) -> None:
        for name, decision in decisions.items():
            if not isinstance(decision, Decision):
                raise InvalidFlow(f"BelugaPlugin: {name!r} is a {type(decision).__name__}, it must be a Decision")
        self._backends = backends
        self._chains = {name: _chain(name, decision) for name, decision in decisions.items()}

    @activity.defn(name=DECISION_ACTIVITY)
    async def decision(self, call: DecisionCall) -> DecisionRecord:
        """Come to a decision, or to what is on record; one attempt."""
        info = activity.info()
        retry = _retry(info.retry_policy)
        with failures(retry, info.attempt):
            chain = self._chain(call.decision)
            place = chain.check().place(chain.name)
            if not isinstance(call.data, dict):
                raise InvalidInput(
                    f"decision {call.decision!r} was given a {type(call.data).__name__}, its data must be an object"
                )
            async with heartbeat():
                try:
                    outcome = await attempt(
                        chain,
                        chain.name,
                        targets=place.targets,
                        states=States(chain, place.sources, call.data, {}),
                        identity=_identity(info, call.key),
                        resources=await self._backends.resources(llm_conn_id=None, state_conn_id=None),
                        timeout=_asking(info),
                        number=info.attempt,
                        last=info.attempt >= retry.maximum_attempts,
                    )
                except asyncio.CancelledError:
                    if activity.is_cancelled():
                        raise
                    raise own_cancellation(chain.name) from None
            assert outcome.decision is not None
            return DecisionRecord(**outcome.decision)

    def _chain(self, name: str) -> Chain:
        if name not in self._chains:
            if ":" not in name:
                raise InvalidSetting(
                    f"decision {name!r} is not in this worker; its BelugaPlugin has: "
                    f"{', '.join(self._chains) or 'none'}. Add it there, or give its import path, 'module:name'"
                )
            self._chains[name] = _chain(name.partition(":")[2], load_decision(name))
        return self._chains[name]


def _chain(name: str, decision: Decision) -> Chain:
    """The decision as the only step of a flow: what makes an attempt of a step makes one of it."""
    chain = Chain(name).add_step(name, decision)
    chain.check()
    return chain


def _identity(info: activity.Info, key: str | None) -> Identity:
    within = ("temporal", info.namespace, *(() if info.workflow_id is None else (info.workflow_id,)))
    # what a decision may spend a run, all of its workflow's may together
    run = Identity.of(*within).scope
    return Identity.of(*within, info.activity_id if key is None else key, run=run)


def _asking(info: activity.Info) -> float | None:
    whole = info.start_to_close_timeout
    return None if whole is None else ASKING * whole.total_seconds()


def _retry(policy: RetryPolicy | None) -> Retry:
    """What Temporal does, as a judgement needs it; without a bound on attempts none is the last."""
    policy = policy or RetryPolicy()
    longest = policy.maximum_interval or 100 * policy.initial_interval
    return Retry(
        maximum_attempts=policy.maximum_attempts or sys.maxsize,
        initial_interval=policy.initial_interval,
        backoff_coefficient=policy.backoff_coefficient,
        maximum_interval=longest,
        non_retryable=tuple(policy.non_retryable_error_types or ()),
    )


class _OwnBackends:
    """The model and the state store of a process that has no Airflow: opened when they are first needed."""

    def __init__(
        self,
        endpoint: Endpoint | None,
        endpoints: Mapping[str, Endpoint],
        model: ModelClient | None,
        state: StateStore | str | None,
        settings: Settings,
    ) -> None:
        self._endpoint = endpoint or Endpoint(**vars(settings.llm))
        self._endpoints = dict(endpoints)
        self._model = model
        self._state = state or settings.state.url
        if not self._state:
            raise InvalidSetting(
                "BelugaPlugin needs a state store, where the records are kept by which nothing is paid twice: give it "
                "state='postgresql://...', or settings with a state.url"
            )
        if model is None:
            default = () if endpoint is None and endpoints else (self._endpoint,)
            for one in (*default, *endpoints.values()):
                OpenAIClient(one)  # a key that is missing shows when the worker starts
        self._store: StateStore | None = None
        self._clients: dict[str | None, ModelClient] = {}

    async def resources(self, *, llm_conn_id: str | None, state_conn_id: str | None) -> Resources:  # noqa: ARG002  # there is one of each
        if self._store is None:
            self._store = open_store(self._state) if isinstance(self._state, str) else self._state
        assert self._store is not None
        return Resources(state=self._store, model=self._client)

    async def _client(self, conn_id: str | None) -> ModelClient:
        if self._model is not None:
            return self._model
        if conn_id not in self._clients:
            if conn_id is not None and conn_id not in self._endpoints:
                raise InvalidSetting(
                    f"a decision names connection {conn_id!r}, which this worker does not have; its BelugaPlugin's "
                    f"endpoints are: {', '.join(self._endpoints) or 'none'}"
                )
            endpoint = self._endpoint if conn_id is None else self._endpoints[conn_id]
            self._clients[conn_id] = OpenAIClient(replace(endpoint, conn_id=endpoint.conn_id or conn_id))
        return self._clients[conn_id]

    async def close(self) -> None:
        """Let go of what was opened here."""
        clients, self._clients = self._clients, {}
        store, self._store = self._store, None
        for client in clients.values():
            await client.close()
        if store is not None and isinstance(self._state, str):
            await store.close()
