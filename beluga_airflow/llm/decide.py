"""The decision core: rules, then the model, then the fallback; never outside what the author allows."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from beluga_airflow.errors import BudgetSpent, ModelUnavailable, NotNow, Undecided
from beluga_airflow.graph import Decision
from beluga_airflow.llm.answers import Misfit, fitted, offered_schema, parsed, schema_of
from beluga_airflow.llm.budget import reserved
from beluga_airflow.llm.client import ModelClient, ModelReply, ModelRequest, Usage
from beluga_airflow.llm.confidence import Confidence, check_sure, confidence_of, logprobs_for
from beluga_airflow.llm.estimate import estimated
from beluga_airflow.llm.failover import Until, first_answer
from beluga_airflow.llm.memory import Conversation
from beluga_airflow.llm.prices import cost_usd
from beluga_airflow.llm.prompt import messages_of, misfit_message
from beluga_airflow.llm.purse import Purse
from beluga_airflow.resilience.bounded import bounded
from beluga_airflow.state import StateStore

if TYPE_CHECKING:
    from beluga_airflow.resilience.limits import Booking

__all__ = ["DecisionRecord", "decide"]

log = logging.getLogger(__name__)

OWES_TURN = "owes_turn"
"""Beside a record in the store, until its turn is in its conversation: whoever reads it there adds the turn."""


@dataclass(frozen=True, kw_only=True)
class DecisionRecord:
    """What was decided, by whom, and what it cost.

    Args:
        answer: one of the choices, or a value of the output type, as JSON.
        decided_by: ``rule``, ``model`` or ``fallback``.
        reason: the model's, the rule's number, or why the fallback was taken.
        confidence: in the model's answer, at most 1; None where that is no choice, or its endpoint does not report it.
        probabilities: of the choices that the endpoint reported, by name.
        proposed: the model's answer where it was not sure enough of it.
        model, provider, connection: who answered; None where no model did.
        simulated: whether a simulation answered in place of a model.
        tokens: paid for, over all calls: ``{"input": ..., "output": ...}``.
        cost_usd: of them, by the public price list; None where it does not know a model.
        calls: how often the model was asked.
        attempt: the attempt of the step that came to the answer.
        latency_ms: from the first call to the answer.
        fingerprint: of question, choices and data, so that an auditor can tell what was decided on.
    """

    answer: Any
    decided_by: str
    reason: str | None
    confidence: float | None = None
    probabilities: dict[str, float] | None = None
    proposed: Any = None
    fingerprint: str
    model: str | None = None
    provider: str | None = None
    connection: str | None = None
    simulated: bool = False
    tokens: dict[str, int]
    cost_usd: float | None = 0.0
    calls: int = 0
    attempt: int
    latency_ms: int = 0

    def to_json(self) -> dict[str, Any]:
        """This record as JSON."""
        return asdict(self)


@dataclass(kw_only=True)
class _Bill:
    """What has been paid while coming to one answer."""

    started: float
    usage: Usage = field(default_factory=Usage)
    calls: int = 0
    cost: float | None = 0.0
    reply: ModelReply | None = None
    proposed: Any = None
    sure: Confidence | None = None

    def add(self, reply: ModelReply) -> None:
        cost = cost_usd(reply.usage, provider=reply.provider, model=reply.model)
        self.cost = None if cost is None or self.cost is None else self.cost + cost
        self.usage += reply.usage
        self.calls += 1
        self.reply = reply

    def entries(self) -> dict[str, Any]:
        tokens = {"input": self.usage.input, "output": self.usage.output}
        if self.reply is None:
            return {"tokens": tokens}
        return {
            "tokens": tokens,
            "model": self.reply.model,
            "provider": self.reply.provider,
            "connection": self.reply.connection,
            "simulated": self.reply.simulated,
            "cost_usd": self.cost,
            "calls": self.calls,
            "latency_ms": round((time.monotonic() - self.started) * 1000),
            "confidence": self.sure and self.sure.value,
            "probabilities": self.sure and self.sure.probabilities,
        }


async def decide(
    decision: Decision,
    data: Mapping[str, Any],
    *,
    key: str,
    state: StateStore,
    model: Callable[[str | None], Awaitable[ModelClient]],
    attempt: int = 1,
    last: bool = True,
    timeout: float | None = None,
    conversation: Conversation | None = None,
    guard: Callable[..., AbstractAsyncContextManager[Booking | None]] | None = None,
    purses: Sequence[Purse] = (),
) -> DecisionRecord:
    """Come to an answer, once: what is on record under ``key`` for the same question and data is not paid again.

    Args:
        decision: a checked decision.
        data: exactly the keys that it reads.
        key: names the record: idempotency key and generation.
        state: where the record is kept; it is written before this returns.
        model: the client for a connection id, asked only if the model is needed.
        attempt: the attempt of the step.
        last: whether no other attempt follows, so that a model that cannot be reached means the fallback.
        timeout: seconds for asking the model, reprompts included; no answer by then is a model that cannot be reached.
        conversation: that the decision belongs to; the model sees its earlier turns, and the decision becomes one.
        guard: what asking the model has to go past, with so many ``tokens``; waiting there takes of ``timeout``.
        purses: what is left of the decision's budgets.

    Raises:
        Undecided: no answer that fits, and no fallback.
        ModelUnavailable: the endpoint cannot answer now, and there is another attempt or no fallback.
        NotNow: a guard does not let the model be asked now, and there is another attempt or no fallback.
        BudgetSpent: too little is left, and there is no fallback.
        ModelRefused: the endpoint refuses the key or the request.
        StateUnavailable: the record cannot be read or written.
    """
    fingerprint = _fingerprint(decision, data)
    name = f"beluga/decisions/{key}"
    kept = await state.get(name)
    if kept is not None and kept["fingerprint"] == fingerprint:
        owes = kept.pop(OWES_TURN, False)
        record = DecisionRecord(**kept)
    else:
        owes = conversation is not None
        record = await _come_to(decision, data, fingerprint, attempt, last, timeout, model, conversation, guard, purses)
        await state.set(name, record.to_json() | ({OWES_TURN: True} if owes else {}))
    if owes and conversation is not None:
        await conversation.add(decision.question, data, _turn_of(record))
        # a turn that has been pushed out since must not come back with a retry
        await state.set(name, record.to_json())
    return record


async def _come_to(
    decision: Decision,
    data: Mapping[str, Any],
    fingerprint: str,
    attempt: int,
    last: bool,
    timeout: float | None,
    model: Callable[[str | None], Awaitable[ModelClient]],
    conversation: Conversation | None,
    guard: Callable[..., AbstractAsyncContextManager[Booking | None]] | None,
    purses: Sequence[Purse],
) -> DecisionRecord:
    if (record := _by_rule(decision, data, fingerprint, attempt)) is not None:
        return record
    earlier = await conversation.earlier() if conversation is not None else []
    request = ModelRequest(
        messages=tuple(messages_of(decision, data, earlier)),
        schema=offered_schema(decision),
        max_tokens=decision.max_tokens,
        model=decision.model,
        logprobs=logprobs_for(decision),
    )
    bill = _Bill(started=time.monotonic())
    try:
        async with nullcontext() if guard is None else guard(tokens=estimated(request).total) as booking:
            try:
                with bounded(timeout and timeout - (booking.waited if booking else 0.0), lambda: _too_slow(timeout)):
                    return await _by_model(decision, request, fingerprint, attempt, last, timeout, model, bill, purses)
            except Misfit as misfit:
                answered = misfit  # which is no failure of what the guards are there for
            finally:
                if booking is not None and bill.usage != Usage():
                    booking.settle(bill.usage.total)
        raise answered
    except (ModelUnavailable, NotNow) as error:
        is_uncertain = last or isinstance(error, BudgetSpent)  # which no other attempt would find otherwise
        if not is_uncertain or decision.when_uncertain != "fallback":
            raise
        return _by_fallback(decision, data, fingerprint, attempt, bill, str(error))
    except Misfit as misfit:
        if decision.when_uncertain != "fallback":
            raise Undecided(
                f"the model came to no answer that fits: {misfit}; ask more clearly or give a fallback"
            ) from None
        return _by_fallback(decision, data, fingerprint, attempt, bill, str(misfit))


def _turn_of(record: DecisionRecord) -> dict[str, Any]:
    """What later turns are told of a decision."""
    if record.decided_by != "model":
        return {"answer": record.answer, "decided_by": record.decided_by}
    return {"answer": record.answer} | ({"reason": record.reason} if record.reason else {})


def _too_slow(timeout: float | None) -> ModelUnavailable:
    return ModelUnavailable(
        f"the model came to no answer within the step's timeout of {timeout:g} s; give the step more time, or the "
        "connection less"
    )


def _by_rule(decision: Decision, data: Mapping[str, Any], fingerprint: str, attempt: int) -> DecisionRecord | None:
    for number, (predicate, answer) in enumerate(decision.rules, start=1):
        if predicate(_copied(data)):
            return DecisionRecord(
                answer=_own(decision, answer(_copied(data)) if callable(answer) else answer),
                decided_by="rule",
                reason=f"rule {number}",
                fingerprint=fingerprint,
                attempt=attempt,
                tokens={"input": 0, "output": 0},
            )
    return None


async def _by_model(
    decision: Decision,
    request: ModelRequest,
    fingerprint: str,
    attempt: int,
    last: bool,
    timeout: float | None,
    model: Callable[[str | None], Awaitable[ModelClient]],
    bill: _Bill,
    purses: Sequence[Purse],
) -> DecisionRecord:
    async def ask(client: ModelClient, request: ModelRequest, until: Until) -> DecisionRecord:
        return await _by_client(decision, request, fingerprint, attempt, client, bill, until, purses)

    until = Until(moment=timeout and bill.started + timeout)
    return await first_answer(decision, request, model, ask, until=until, last=last)


async def _by_client(
    decision: Decision,
    request: ModelRequest,
    fingerprint: str,
    attempt: int,
    client: ModelClient,
    bill: _Bill,
    until: Until,
    purses: Sequence[Purse],
) -> DecisionRecord:
    for asked in range(decision.max_reprompts + 1):
        async with reserved(purses, client, until.of(request)) as reservation:
            reply = await client.answer(until.of(request))
            if reservation is not None:
                reservation.settle(reply)
        bill.add(reply)
        try:
            answer, reason = parsed(decision, reply)
        except Misfit as misfit:
            if asked == decision.max_reprompts:
                raise
            log.info("a decision's answer does not fit (%s), asking again", misfit)
            request = replace(request, messages=(*request.messages, *misfit_message(reply.content, str(misfit))))
            continue
        bill.proposed, bill.sure = answer, confidence_of(decision, answer, reply)
        check_sure(decision, bill.sure)
        return DecisionRecord(
            answer=answer,
            decided_by="model",
            reason=reason,
            fingerprint=fingerprint,
            attempt=attempt,
            **bill.entries(),
        )
    raise AssertionError("the last misfit is raised")


def _by_fallback(
    decision: Decision, data: Mapping[str, Any], fingerprint: str, attempt: int, bill: _Bill, why: str
) -> DecisionRecord:
    log.warning("a decision takes its fallback: %s", why)
    answer = decision.fallback(_copied(data)) if callable(decision.fallback) else decision.fallback
    return DecisionRecord(
        answer=_own(decision, answer),
        decided_by="fallback",
        reason=why,
        proposed=bill.proposed,
        fingerprint=fingerprint,
        attempt=attempt,
        **bill.entries(),
    )


def _copied(data: Mapping[str, Any]) -> dict[str, Any]:
    # what the model sees must not be changed by the author's functions
    return copy.deepcopy(dict(data))


def _own(decision: Decision, answer: Any) -> Any:
    """An answer of the author's own rules or fallback, held to the same bounds as the model's.

    Raises:
        Undecided: it is outside them.
    """
    try:
        return fitted(decision, answer)
    except Misfit as misfit:
        raise Undecided(
            f"a rule or the fallback gave an answer that does not fit: {misfit}; mend the decision"
        ) from None


def _fingerprint(decision: Decision, data: Mapping[str, Any]) -> str:
    about = {
        "question": decision.question,
        "instructions": decision.instructions,
        "schema": schema_of(decision),
        "descriptions": [decision.describe(label) for label in decision.labels],
        "data": dict(data),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
