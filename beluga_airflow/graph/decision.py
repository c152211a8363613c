"""A decision: a step that asks a language model, and may answer only inside what its author allows."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from textwrap import shorten
from typing import Any, Final, Literal

from beluga_airflow.graph.budget import Budget
from beluga_airflow.graph.memory import Memory
from beluga_airflow.graph.parts import told
from beluga_airflow.graph.retry import is_number, is_whole

__all__ = ["UNSET", "Decision"]


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"

    def __bool__(self) -> bool:
        return False


UNSET: Final[Any] = _Unset()
"""Stands for "no fallback": None, False and 0 are answers."""


@dataclass(frozen=True)
class Decision:
    """A question to a language model, with everything that bounds its answer.

    Args:
        question: the author's words; no template, no data.
        choices: the answers allowed, with or without a description each: ``{"expedite": "ship today"}`` or
            ``["yes", "no"]``. Give ``choices`` or ``output_type``.
        output_type: ``bool``, ``int``, ``float``, or a pydantic model, where the answer is not one of a list. Every
            part of the model must have a type of its own: no ``dict``, ``tuple`` or ``Any``.
        reads: the keys of the data that the model sees; it sees nothing else.
        output_key: where the answer goes in the data; the step's name when left out.
        instructions: more of the author's words, put into the system message.
        rules: ``(predicate, answer)`` pairs, tried in order on the data read, before the model and for nothing.
        min_confidence: how probable the model's choice must have been to it, above 0 and at most 1, by the
            log-probabilities that its endpoint reports; only with ``choices`` or ``bool``. Below it, it came to no
            answer.
        fallback: the answer when the model comes to none: a value, or a function of the data read.
        on_uncertain: what then happens: ``"fallback"`` (the default where a fallback is given) or ``"fail"``.
        reason: whether to ask for a reason, which comes after the answer.
        max_reprompts: how often an answer that does not fit is asked for again, with what was wrong.
        max_tokens: the most tokens an answer may have.
        model: the model, instead of the connection's.
        llm_conn_id: the connection, instead of the operator's.
        fallback_conn_ids: connections that are asked, in this order, each for its own model, where that one cannot be:
            a guard keeps it back, or, on the last attempt, its endpoint is overloaded, late, broken or away.
        budget: what it may spend, or several such bounds; a decision that may spend no more is uncertain.
        memory: the conversation it belongs to: the model sees its earlier turns, and this one becomes the next.
    """

    question: str
    _: KW_ONLY
    choices: Mapping[str, str] | Sequence[str] | None = None
    output_type: Any = None
    reads: Sequence[str] = ()
    output_key: str | None = None
    instructions: str | None = None
    rules: Sequence[tuple[Callable[[dict[str, Any]], bool], Any]] = ()
    min_confidence: float | None = None
    fallback: Any = UNSET
    on_uncertain: Literal["fallback", "fail"] | None = None
    reason: bool = True
    max_reprompts: int = 1
    max_tokens: int = 500
    model: str | None = None
    llm_conn_id: str | None = None
    fallback_conn_ids: Sequence[str] = ()
    budget: Budget | Sequence[Budget] | None = None
    memory: Memory | None = None

    def __repr__(self) -> str:
        given = [repr(shorten(str(self.question), 100, placeholder=" ..."))]
        for part in dataclasses.fields(self)[1:]:
            value = getattr(self, part.name)
            # of another type it is another: an array, compared, is neither True nor False
            if type(value) is not type(part.default) or value != part.default:
                given.append(f"{part.name}={reprlib.repr(value)}")
        return f"Decision({', '.join(given)})"

    @property
    def labels(self) -> tuple[str, ...]:
        """The choices' names, in the author's order; empty where ``output_type`` is given."""
        return tuple(self.choices or ())

    def describe(self, label: str) -> str:
        """What the author says about a choice, or an empty text."""
        return self.choices.get(label, "") if isinstance(self.choices, Mapping) else ""

    @property
    def when_uncertain(self) -> str:
        """``on_uncertain``, with its default."""
        return self.on_uncertain or ("fail" if self.fallback is UNSET else "fallback")

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """``budget`` as a list."""
        if self.budget is None:
            return ()
        return (self.budget,) if isinstance(self.budget, Budget) else tuple(self.budget)

    def faults(self) -> list[str]:
        """What makes this decision meaningless, as clauses of a sentence; empty when it is sound."""
        found = []
        if not isinstance(self.question, str):
            found.append(f"its question is {told(self.question)}, it must be a text")
        elif not self.question.strip():
            found.append("its question is empty")
        if (self.choices is None) == (self.output_type is None):
            found.append("it needs either choices or an output_type")
        found += self._faults_of_rules() or self._faults_of_answers()
        found += self._faults_of_reads()
        if self.on_uncertain is not None and not _is_one_of(self.on_uncertain, ("fallback", "fail")):
            found.append(f"on_uncertain is {told(self.on_uncertain)}, it must be 'fallback' or 'fail'")
        elif self.on_uncertain == "fallback" and self.fallback is UNSET:
            found.append("on_uncertain is 'fallback' but no fallback is given")
        found += self._faults_of_confidence()
        if not isinstance(self.reason, bool):
            found.append(f"reason is {told(self.reason)}, it must be True or False")
        for name, least in (("max_reprompts", 0), ("max_tokens", 1)):
            number = getattr(self, name)
            if not is_whole(number) or number < least:
                found.append(f"{name} is {told(number)}, it must be a whole number, {least} or more")
        for name in ("output_key", "instructions", "model", "llm_conn_id"):
            text = getattr(self, name)
            if text is not None and not isinstance(text, str):
                found.append(f"{name} is {told(text)}, it must be a text")
        return [*found, *self._faults_of_connections(), *self._faults_of_budgets(), *self._faults_of_memory()]

    def _faults_of_rules(self) -> list[str]:
        if not isinstance(self.rules, Sequence) or isinstance(self.rules, str):
            return [f"rules is {told(self.rules)}, it must be a list of pairs of a predicate and an answer"]
        if all(isinstance(rule, Sequence) and len(rule) == 2 and callable(rule[0]) for rule in self.rules):
            return []
        return ["each of its rules must be a pair of a predicate and an answer"]

    def _faults_of_reads(self) -> list[str]:
        if isinstance(self.reads, str):
            return [f"reads is the text {told(self.reads)}, it must be a list of keys"]
        if not isinstance(self.reads, Collection):
            return [f"reads is {told(self.reads)}, it must be a list of keys"]
        if not len(self.reads):
            return ["reads names no key, so the model would see nothing to decide on"]
        return [
            f"reads names {told(key)}, it must name keys, which are texts" for key in self.reads if not _is_text(key)
        ]

    def _faults_of_confidence(self) -> list[str]:
        least = self.min_confidence
        if least is None:
            return []
        if not is_number(least) or not 0 < least <= 1:
            return [f"min_confidence is {told(least)}, it must be a number above 0 and at most 1"]
        if self.choices is None and self.output_type is not bool:
            return ["min_confidence needs choices or bool: of other answers no probability is known"]
        return []

    def _faults_of_connections(self) -> list[str]:
        conn_ids = self.fallback_conn_ids
        if isinstance(conn_ids, str) or not isinstance(conn_ids, Sequence):
            return [f"fallback_conn_ids is {told(conn_ids)}, it must be a list of connection ids"]
        for conn_id in conn_ids:
            if not _is_text(conn_id):
                return [f"fallback_conn_ids names {told(conn_id)}, it must name connections, which are texts"]
        if len(set(conn_ids)) < len(conn_ids) or _is_one_of(self.llm_conn_id, conn_ids):
            return ["fallback_conn_ids names a connection twice, or the decision's own"]
        return []

    def _faults_of_budgets(self) -> list[str]:
        if isinstance(self.budget, str) or not isinstance(self.budget, Budget | Sequence | None):
            return [f"budget is {told(self.budget)}, it must be a Budget or a list of them"]
        for budget in self.budgets:
            if not isinstance(budget, Budget):
                return [f"budget holds {told(budget)}, it must hold Budgets"]
        return [f"budget: {fault}" for budget in self.budgets for fault in budget.faults()]

    def _faults_of_memory(self) -> list[str]:
        if self.memory is None:
            return []
        if not isinstance(self.memory, Memory):
            return [f"memory is {told(self.memory)}, it must be a Memory"]
        return [f"memory: {fault}" for fault in self.memory.faults()]

    def _faults_of_answers(self) -> list[str]:
        if self.choices is None:
            return _faults_of_output_type(self.output_type) or self._fault_of_own_answers()
        if not isinstance(self.choices, Mapping | Sequence) or isinstance(self.choices, str | bytes | bytearray):
            # the order of a set differs from process to process, and with it the question
            return [f"choices is a {type(self.choices).__name__}, it must be a mapping or a list"]
        if any(not _is_text(label) for label in self.choices):
            return ["a choice must be a text that is not empty"]
        found = []
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            found.append("choices must be two or more different answers")
        if not all(isinstance(self.describe(label), str) for label in self.labels):
            found.append("what choices says about a choice must be a text")
        return [*found, *self._fault_of_own_answers()]

    def _fault_of_own_answers(self) -> list[str]:
        """The author's own answers, where they are known before the data is."""
        own = [answer for answer in (*(answer for _, answer in self.rules), self.fallback) if not callable(answer)]
        for answer in own:
            if answer is UNSET:
                continue
            if self.choices is not None and not _is_one_of(answer, self.labels):
                return [f"{told(answer)}, of its rules or fallback, is none of its choices"]
            for kind, kinds in ((bool, (bool,)), (int, (int,)), (float, (int, float))):
                if self.output_type is kind and type(answer) not in kinds:
                    return [f"{told(answer)}, of its rules or fallback, is no {kind.__name__}"]
        return []

    def named(self, step: str) -> Decision:
        """This decision with its output key settled, as the step called ``step``."""
        is_open = self.output_key is None or (isinstance(self.output_key, str) and not self.output_key)
        return dataclasses.replace(self, output_key=step) if is_open else self


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_one_of(value: Any, texts: Collection[str]) -> bool:
    # an array, compared, is neither True nor False
    return isinstance(value, str) and value in texts


def _faults_of_output_type(kind: Any) -> list[str]:
    if kind is None or any(kind is plain for plain in (bool, int, float)):
        return []
    if not (isinstance(kind, type) and hasattr(kind, "model_json_schema")):
        return [f"its output_type is {told(kind)}, it must be bool, int, float or a pydantic model"]
    try:
        schema = kind.model_json_schema()
    except Exception as error:  # pydantic's errors for this share no base of their own
        return [f"its output_type {kind.__name__} has no JSON schema: {error}"]
    if not isinstance(schema, dict):
        return [f"its output_type {kind.__name__} has no JSON schema: it gives {told(schema)}"]
    parts = {kind.__name__: schema, **schema.get("$defs", {})}
    return [
        f"{place} of its output_type leaves open what it holds, which no model's structured output can promise; "
        "use a model or a list of models in place of dict, tuple or Any"
        for name, part in parts.items()
        for place in _open_places(part, name)
    ]


def _open_places(part: Mapping[str, Any], place: str) -> Iterator[str]:
    """Where a JSON schema does not say what there may be."""
    several = part.get("anyOf") or part.get("oneOf")
    if "$ref" in part:
        return
    if several:
        for one in several:
            yield from _open_places(one, place)
    elif part.get("type") == "object" and "properties" in part and not part.get("additionalProperties"):
        for name, inner in part["properties"].items():
            yield from _open_places(inner, f"{place}.{name}")
    elif part.get("type") == "array" and "items" in part:
        yield from _open_places(part["items"], f"{place}[]")
    elif part.get("type") in (None, "object", "array") and not {"enum", "const"} & part.keys():
        yield place
